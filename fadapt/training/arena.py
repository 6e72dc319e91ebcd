"""Arena: the trainable values of a stack in one flat buffer per group, one row per trial.

The stack's leaves are views of it. An optimiser sees each trial's row as a parameter of its own,
so nothing that it computes, norms included, is shared between trials.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linalg import inverse_permutation
from ..method import Method
from ..stack import Group, Stack, StackedAdapter, select
from ..tree import Adapter, Params, Train


@dataclass(frozen=True)
class Place:
    """Where one stacked leaf lies: columns ``start`` to ``stop`` of flat buffer ``part``."""

    site: str
    leaf: str
    part: int
    start: int
    stop: int
    shape: torch.Size

    def view(self, flats: Sequence[Tensor]) -> Tensor:
        """The leaf (n, ...) as a view of (n, columns) buffers."""
        return flats[self.part][:, self.start : self.stop].unflatten(1, self.shape)


class Block:
    """The values and gradients of one group of a stack.

    Attributes:
        flats: (n, columns) values, one buffer per dtype and device.
        grads: the same for the gradients.
    """

    def __init__(self, group: Group):
        self.size = len(group.index)
        leaves = [
            (site, name, leaf.detach())
            for site, adapter in group.params.items()
            for name, leaf in adapter.train.items()
        ]
        # Leaves of one shape lie side by side: their gradients are taken over together.
        alike: dict[Any, list[int]] = {}
        for i, (_, _, leaf) in enumerate(leaves):
            alike.setdefault((leaf.dtype, leaf.device, leaf.shape[1:]), []).append(i)
        keys: list[Any] = []
        widths: list[int] = []
        places: dict[int, Place] = {}
        for (*key, shape), members in alike.items():
            if key not in keys:
                keys.append(key)
                widths.append(0)
            part = keys.index(key)
            for i in members:
                start, stop = widths[part], widths[part] + shape.numel()
                places[i] = Place(*leaves[i][:2], part, start, stop, shape)
                widths[part] = stop
        self.places = [places[i] for i in range(len(leaves))]
        self._alike = list(alike.values())
        self.flats = [
            torch.zeros(self.size, width, dtype=dtype, device=device)
            for width, (dtype, device) in zip(widths, keys, strict=True)
        ]
        self.grads = [torch.zeros_like(flat) for flat in self.flats]
        for place, (_, _, leaf) in zip(self.places, leaves, strict=True):
            place.view(self.flats).copy_(leaf)
        # Without its leaves, which the buffers now hold.
        params = group.params.map(lambda adapter: adapter.replace(train={}))
        self._group = Group(group.index, params, group.originals)
        self.padding = self._find_padding()

    @property
    def device(self) -> torch.device:
        """Where this group's flags and norms are kept."""
        return self.flats[0].device if self.flats else torch.device("cpu")

    def part(self, start: int, stop: int, at: int) -> Group:
        """Rows ``start`` to ``stop`` as a group of views, at positions from ``at``."""
        rows = [f[start:stop] for f in self.flats]
        train: dict[str, dict[str, Tensor]] = {name: {} for name in self._group.params}
        for place in self.places:
            train[place.site][place.leaf] = place.view(rows).detach().requires_grad_()
        params = self._group.params
        return Group(
            tuple(range(at, at + stop - start)),
            Params({k: _rows(a, train[k], start, stop) for k, a in params.items()}, params.config),
            self._group.originals[start:stop],
        )

    def gradients(
        self, start: int, stop: int, found: Sequence[Tensor | None]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Where the gradients of rows ``start`` to ``stop`` lie, and those found, zero for None.

        One pair for all leaves of a shape: (rows, leaves, *shape).
        """
        for members in self._alike:
            first, last = self.places[members[0]], self.places[members[-1]]
            total = self.grads[first.part][start:stop, first.start : last.stop]
            zero = total.new_zeros(()).expand(stop - start, *first.shape)
            grads = [found[i] for i in members]
            new = _stacked([zero if g is None else g.reshape(zero.shape) for g in grads])
            yield total.unflatten(1, new.shape[1:]), new

    def member(self, row: int, flats: Sequence[Tensor]) -> list[Tensor]:
        """One member's part of each leaf, at its own rank: views of (n, columns) buffers."""
        views = []
        for place in self.places:
            view, method = place.view(flats)[row], self._group.originals[row][place.site].method
            if place.leaf in method.rank_axes:
                view = view.narrow(method.rank_axes[place.leaf], 0, getattr(method, "r", 1))
            views.append(view)
        return views

    def train(self, row: int) -> Train:
        """A copy on the host of one member's trainable leaves, for :func:`fadapt.join`."""
        result: Train = {name: {} for name in self._group.params}
        for place, view in zip(self.places, self.member(row, self.flats), strict=True):
            result[place.site][place.leaf] = view.to("cpu", copy=True)
        return result

    def project(self) -> None:
        """Moves every member into its methods' constraints."""
        for name, adapter in self._group.params.items():
            leaves = {p.leaf: p.view(self.flats) for p in self.places if p.site == name}
            if type(adapter.method).project is Method.project or not leaves:
                continue
            for leaf, new in torch.func.vmap(adapter.method.project)(leaves).items():
                leaves[leaf].copy_(new)

    def clear_padding(self, flats: Sequence[Tensor]) -> None:
        """Sets the padded entries of (n, columns) buffers to zero."""
        for flat, mask in zip(flats, self.padding, strict=True):
            if mask is not None:
                flat.masked_fill_(mask, 0)

    def _find_padding(self) -> list[Tensor | None]:
        masks: list[Tensor | None] = [None] * len(self.flats)
        for place in self.places:
            for row in range(self.size):
                method = self._group.originals[row][place.site].method
                axis = method.rank_axes.get(place.leaf)
                rank = getattr(method, "r", 1)
                if axis is None or rank == place.shape[axis]:
                    continue
                mask = masks[place.part]
                if mask is None:
                    mask = torch.zeros_like(self.flats[place.part], dtype=torch.bool)
                    masks[place.part] = mask
                padded = place.view([mask] * len(masks))[row]
                padded.narrow(axis, rank, place.shape[axis] - rank).fill_(True)
        return masks


class Arena:
    """All blocks of a stack. Trials are counted by ``order``, group after group.

    Attributes:
        order: the trial (any number) of each row.
    """

    def __init__(self, stack: Stack, trials: Sequence[int]):
        self.blocks = [Block(group) for group in stack.groups]
        self.order = [trials[i] for group in stack.groups for i in group.index]

    def __len__(self) -> int:
        return len(self.order)

    def spans(self) -> Iterator[tuple[Block, slice]]:
        """Each block with its rows' places in ``order``."""
        start = 0
        for block in self.blocks:
            yield block, slice(start, start + block.size)
            start += block.size

    def rows(self) -> Iterator[tuple[int, Block, int]]:
        """(trial, block, row in the block) in ``order``."""
        for block, span in self.spans():
            for row, trial in enumerate(self.order[span]):
                yield trial, block, row

    def part(self, start: int, stop: int) -> Stack:
        """Rows ``start`` to ``stop`` as a stack."""
        groups: list[Group] = []
        at = 0
        for block, low, high in self._within(start, stop):
            groups.append(block.part(low, high, at))
            at += high - low
        return Stack(groups)

    def take_gradients(
        self, start: int, stop: int, found: Sequence[Tensor | None], add: bool
    ) -> None:
        """Takes a pass's gradients of the leaves of :meth:`part`, or of its only member.

        Args:
            add: whether to those that are there, or in their place. Then, out of memory, either
                all or none are added.
        """
        if not add:
            for total, new in self._gradients(start, stop, found):
                total.copy_(new)
            return
        for total, new in list(self._gradients(start, stop, found)):
            total.add_(new)

    def _gradients(
        self, start: int, stop: int, found: Sequence[Tensor | None]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        at = 0
        for block, low, high in self._within(start, stop):
            yield from block.gradients(low, high, found[at : at + len(block.places)])
            at += len(block.places)

    def _within(self, start: int, stop: int) -> Iterator[tuple[Block, int, int]]:
        """The blocks with their own rows between ``start`` and ``stop``."""
        for block, span in self.spans():
            low, high = max(start, span.start) - span.start, min(stop, span.stop) - span.start
            if low < high:
                yield block, low, high

    def keep(self, positions: Sequence[int]) -> Arena:
        """A smaller arena of some rows, padding and gradients included."""
        groups: list[Group] = []
        at = 0
        for block in self.blocks:
            groups.append(block.part(0, block.size, at))
            at += block.size
        # select repeats rows by index; without per_row it is a stack of those members.
        chosen = Stack(select(Stack(groups), list(positions)).groups)
        smaller = Arena(chosen, [self.order[i] for i in positions])
        grads = {trial: [g[row] for g in block.grads] for trial, block, row in self.rows()}
        for trial, block, row in smaller.rows():
            for new, old in zip(block.grads, grads[trial], strict=True):
                new[row].copy_(old)
        return smaller


def _rows(adapter: Adapter, train: dict[str, Tensor], start: int, stop: int) -> Adapter:
    assert isinstance(adapter, StackedAdapter)
    fixed = {k: t if k in adapter.shared else t[start:stop] for k, t in adapter.fixed.items()}
    return adapter.replace(train, fixed)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The (n, ...) tensors side by side, (n, tensors, ...), in the order of memory of the first.

    The gradient of a batched product is often a transposed tensor, and to copy hundreds of these
    one by one takes longer than all of them at once.
    """
    inner = sorted(range(1, tensors[0].dim()), key=tensors[0].stride, reverse=True)
    joined = torch.stack([t.permute(0, *inner) for t in tensors], 1)
    back = inverse_permutation([0, *inner])
    return joined.permute(0, *(1 + i for i in back))
