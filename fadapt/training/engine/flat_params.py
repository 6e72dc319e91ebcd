"""FlatParams: the trainable values of a stack in few buffers per group, one row per trial.

The stack's leaves are views of it. An optimiser sees each trial's row as a parameter of its own,
so nothing that it computes, norms included, is shared between trials.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...fold.fold import take
from ...linalg import inverse_permutation
from ...method import Leaves, Method
from ...params.adapter import Adapter
from ...params.params import Params, Train
from ...params.stack import Group, Stack, StackedAdapter, at_rank, rank_of

LAYOUT = 2
"""The order of a trial's values in memory, which checkpoints depend on, as a number."""


@dataclass(frozen=True)
class Buffer:
    """One buffer of a block: (rows, lines, columns).

    Leaves that are padded to a common rank lie in lines, one per rank, so that a trial's own
    values come first and in one piece: the padding is no concern of the optimiser. All other
    leaves share one line.

    Attributes:
        own: the lines of each row that are no padding.
        lines: of a row.
    """

    dtype: torch.dtype
    device: torch.device
    own: tuple[int, ...]
    lines: int

    def runs(self, start: int, stop: int) -> Iterator[tuple[slice, int]]:
        """Neighbours among the rows ``start`` to ``stop`` with equally many lines of their own."""
        for own, neighbours in itertools.groupby(range(start, stop), self.own.__getitem__):
            rows = list(neighbours)
            yield slice(rows[0], rows[-1] + 1), own


@dataclass(frozen=True)
class LeafView:
    """Where one stacked leaf lies: columns ``start`` to ``stop`` of buffer ``part``.

    Attributes:
        shape: of a row's leaf, padding included.
        axis: of the rank, from the end, if there is a line per rank.
    """

    site: str
    leaf: str
    part: int
    start: int
    stop: int
    shape: torch.Size
    axis: int | None

    def view(self, buffers: Sequence[Tensor]) -> Tensor:
        """The leaf (n, *shape) as a view of the block's buffers."""
        columns = buffers[self.part][:, :, self.start : self.stop]
        if self.axis is None:
            return columns.view(-1, *self.shape)
        others = list(self.shape)
        del others[self.axis]
        return columns.view(*columns.shape[:2], *others).movedim(1, self.axis)


class FlatGroup:
    """The values and gradients of one group of a stack.

    Args:
        group: the group.
        rows: its members, in the order in which they are to lie.

    Attributes:
        values: one buffer per part.
        grads: the same for the gradients.
        own_values: what of ``values`` is no padding, as (rows, view (rows, values)), a few.
        own_grads: the same of ``grads``.
    """

    def __init__(self, group: Group, rows: Sequence[int]):
        leaves = [
            (site, name, leaf.detach())
            for site, adapter in group.params.items()
            for name, leaf in adapter.train.items()
        ]
        group = _members(group, rows, lambda t: take(t, rows))
        # Leaves of one shape lie side by side: their gradients are taken over together.
        alike: dict[Any, list[int]] = {}
        for i, (site, name, leaf) in enumerate(leaves):
            axis = group.params[site].method.rank_axes.get(name)
            own = tuple(rank_of(original[site].method) for original in group.originals)
            if axis is None or min(own) == leaf.shape[axis]:  # nobody's is padded
                axis, own = None, (1,) * len(rows)
            part = Buffer(leaf.dtype, leaf.device, own, 1 if axis is None else leaf.shape[axis])
            alike.setdefault((part, leaf.shape[1:], axis), []).append(i)
        parts = list(dict.fromkeys(part for part, *_ in alike))
        widths = [0] * len(parts)
        places: dict[int, LeafView] = {}
        for (part, shape, axis), members in alike.items():
            k = parts.index(part)
            for i in members:
                start, stop = widths[k], widths[k] + shape.numel() // part.lines
                places[i] = LeafView(*leaves[i][:2], k, start, stop, shape, axis)
                widths[k] = stop
        self.places = [places[i] for i in range(len(leaves))]
        self._alike = list(alike.values())
        values = [
            torch.zeros(len(rows), part.lines, width, dtype=part.dtype, device=part.device)
            for part, width in zip(parts, widths, strict=True)
        ]
        for place, (_, _, leaf) in zip(self.places, leaves, strict=True):
            place.view(values).copy_(take(leaf, rows))
        self._hold(group, parts, values, [torch.zeros_like(v) for v in values])

    def _hold(
        self, group: Group, parts: list[Buffer], values: list[Tensor], grads: list[Tensor]
    ) -> None:
        self._group, self.size = group, len(group.index)
        self.buffers, self.values, self.grads = parts, values, grads
        self.own_values, self.own_grads = (
            [
                (rows, buffer[rows, :own].flatten(1))
                for part, buffer in zip(parts, buffers, strict=True)
                for rows, own in part.runs(0, self.size)
            ]
            for buffers in (values, grads)
        )

    @property
    def device(self) -> torch.device:
        """Where this group's flags and norms are kept."""
        return self.values[0].device if self.values else torch.device("cpu")

    def part(self, start: int, stop: int, at: int) -> Group:
        """Rows ``start`` to ``stop`` as a group of views, at positions from ``at``."""
        some = [v[start:stop] for v in self.values]
        train: dict[str, dict[str, Tensor]] = {name: {} for name in self._group.params}
        for place in self.places:
            train[place.site][place.leaf] = place.view(some).detach().requires_grad_()
        rows = range(start, stop)
        group = _members(self._group, rows, lambda t: take(t, rows), train)
        return replace(group, index=tuple(range(at, at + len(rows))))

    def keep(self, rows: Sequence[int]) -> FlatGroup:
        """A block of some rows, laid out as this one."""

        def copied(tensor: Tensor) -> Tensor:
            # Not a view, which would keep the memory of the others.
            return tensor[list(rows)]

        smaller = copy.copy(self)
        smaller._hold(
            _members(self._group, rows, copied),
            [replace(p, own=tuple(p.own[row] for row in rows)) for p in self.buffers],
            [copied(v) for v in self.values],
            [copied(g) for g in self.grads],
        )
        return smaller

    def row(self, row: int, buffers: Sequence[Tensor]) -> list[Tensor]:
        """One member's own values, a flat view per part."""
        pairs = zip(self.buffers, buffers, strict=True)
        return [buffer[row, : part.own[row]].view(-1) for part, buffer in pairs]

    def member(self, row: int, buffers: Sequence[Tensor]) -> list[Tensor]:
        """One member's part of each leaf, at its own rank: views."""
        original = self._group.originals[row]
        return [
            at_rank(original[place.site].method, place.leaf, place.view(buffers)[row])
            for place in self.places
        ]

    def train(self, row: int) -> Train:
        """A copy on the host of one member's trainable leaves, for :func:`fadapt.join`."""
        result: Train = {name: {} for name in self._group.params}
        for place, view in zip(self.places, self.member(row, self.values), strict=True):
            result[place.site][place.leaf] = view.to("cpu", copy=True)
        return result

    def gradients(
        self, start: int, stop: int, found: Sequence[Tensor | None]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Where the gradients of rows ``start`` to ``stop`` lie, and those found, zero for None.

        A pair for all leaves of a shape, and for each run of ranks: (rows, lines, leaves, ...).
        """
        for members in self._alike:
            first, last = self.places[members[0]], self.places[members[-1]]
            grads = self.grads[first.part][:, :, first.start : last.stop]
            zero = grads.new_zeros(()).expand(stop - start, *first.shape)
            some = [found[i] for i in members]
            new = _stacked([zero if g is None else g.reshape(zero.shape) for g in some])
            new = new.unsqueeze(1) if first.axis is None else new.movedim(first.axis, 1)
            for rows, own in self.buffers[first.part].runs(start, stop):
                total = grads[rows, :own]
                total = total.view(*total.shape[:2], *new.shape[2:])
                yield total, new[rows.start - start : rows.stop - start, :own]

    def project(self) -> None:
        """Moves every member into its methods' constraints."""
        for name, adapter in self._group.params.items():
            leaves = {p.leaf: p.view(self.values) for p in self.places if p.site == name}
            if type(adapter.method).project is Method.project or not leaves:
                continue
            for leaf, new in torch.func.vmap(adapter.method.project)(leaves).items():
                leaves[leaf].copy_(new)


class FlatParams:
    """All blocks of a stack. Trials are counted by ``order``, group after group, rank after rank.

    Attributes:
        order: the trial (any number) of each row.
    """

    def __init__(self, stack: Stack, trials: Sequence[int]):
        self.blocks: list[FlatGroup] = []
        self.order: list[int] = []
        for group in stack.groups:
            # Members of one rank beside each other make long runs.
            ranks = [[rank_of(a.method) for a in member.values()] for member in group.originals]
            rows = sorted(range(len(ranks)), key=ranks.__getitem__)
            self.blocks.append(FlatGroup(group, rows))
            self.order += [trials[group.index[row]] for row in rows]

    def __len__(self) -> int:
        return len(self.order)

    def spans(self) -> Iterator[tuple[FlatGroup, slice]]:
        """Each block with its rows' places in ``order``."""
        start = 0
        for block in self.blocks:
            yield block, slice(start, start + block.size)
            start += block.size

    def rows(self) -> Iterator[tuple[int, FlatGroup, int]]:
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

    def _within(self, start: int, stop: int) -> Iterator[tuple[FlatGroup, int, int]]:
        """The blocks with their own rows between ``start`` and ``stop``."""
        for block, span in self.spans():
            low, high = max(start, span.start) - span.start, min(stop, span.stop) - span.start
            if low < high:
                yield block, low, high

    def keep(self, positions: Sequence[int]) -> FlatParams:
        """Smaller flat params of some rows, gradients included."""
        smaller = copy.copy(self)
        smaller.blocks, smaller.order = [], []
        for block, span in self.spans():
            rows = [p - span.start for p in positions if span.start <= p < span.stop]
            if rows:
                smaller.blocks.append(block.keep(rows))
                smaller.order += [self.order[span][row] for row in rows]
        return smaller


def _members(
    group: Group,
    rows: Sequence[int],
    pick: Callable[[Tensor], Tensor],
    train: Mapping[str, Leaves] | None = None,
) -> Group:
    """Some members of a group, with leaves to train from elsewhere, or none.

    Args:
        group: the group.
        rows: the members.
        pick: takes these rows of a fixed leaf.
        train: {site: leaves}.
    """

    def some(name: str, adapter: Adapter) -> Adapter:
        assert isinstance(adapter, StackedAdapter)
        fixed = {k: t if k in adapter.shared else pick(t) for k, t in adapter.fixed.items()}
        return adapter.replace(train[name] if train else {}, fixed)

    adapters = {name: some(name, adapter) for name, adapter in group.params.items()}
    return Group(
        tuple(rows),
        Params(adapters, group.params.config),
        tuple(group.originals[row] for row in rows),
    )


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The (n, ...) tensors side by side, (n, tensors, ...), in the order of memory of the first.

    The gradient of a batched product is often a transposed tensor, and to copy hundreds of these
    one by one takes longer than all of them at once.
    """
    inner = sorted(range(1, tensors[0].dim()), key=tensors[0].stride, reverse=True)
    joined = torch.stack([t.permute(0, *inner) for t in tensors], 1)
    back = inverse_permutation([0, *inner])
    return joined.permute(0, *(1 + i for i in back))
