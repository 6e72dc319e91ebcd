"""FlatParams: the trainable values of a stack in few buffers per group, one row per trial.

The stack's leaves are views of it. An optimiser sees each trial's row as a parameter of its own,
so nothing that it computes, norms included, is shared between trials.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...fold.fold import take
from ...linalg import inverse_permutation
from ...method import Leaves, Method
from ...params.adapter import Adapter
from ...params.params import Params, Train
from ...params.stack import Group, Stack, StackedAdapter, groups_of, rank_axes, rank_of, stack


@dataclass(frozen=True)
class Buffer:
    """One buffer of a group: (rows, lines, columns).

    Leaves that are padded to a common rank lie in lines, one per rank, so that a trial's own
    values come first and in one piece: the padding is no concern of the optimiser. All other
    leaves share one line.

    Attributes:
        own: the lines of each row that are no padding.
        lines: of a row.
        leaf: the name of the only leaves here, or None for those of one learning rate.
    """

    dtype: torch.dtype
    device: torch.device
    own: tuple[int, ...]
    lines: int
    leaf: str | None = None

    def runs(self, start: int, stop: int) -> Iterator[tuple[slice, int]]:
        """Neighbours among the rows ``start`` to ``stop`` with equally many lines of their own."""
        for own, neighbours in itertools.groupby(range(start, stop), self.own.__getitem__):
            rows = list(neighbours)
            yield slice(rows[0], rows[-1] + 1), own


@dataclass(frozen=True)
class LeafView:
    """Where one stacked leaf lies: columns ``start`` to ``stop`` of a buffer.

    Attributes:
        shape: of a row's leaf, padding included.
        axis: of the rank, from the end, if there is a line per rank.
    """

    site: str
    leaf: str
    buffer: int
    start: int
    stop: int
    shape: torch.Size
    axis: int | None

    def view(self, buffers: Sequence[Tensor]) -> Tensor:
        """The leaf (n, *shape) as a view of the block's buffers."""
        columns = buffers[self.buffer][:, :, self.start : self.stop]
        if self.axis is None:
            return columns.view(-1, *self.shape)
        others = list(self.shape)
        del others[self.axis]
        return columns.view(*columns.shape[:2], *others).movedim(1, self.axis)

    def of_row(self, flat: Tensor, own: int) -> Tensor:
        """A member's leaf at its own rank as a view of its row of the buffer, (own * columns,)."""
        columns = flat.view(own, -1)[:, self.start : self.stop]
        if self.axis is None:
            return columns.view(self.shape)
        others = list(self.shape)
        del others[self.axis]
        return columns.view(own, *others).movedim(0, self.axis)


class FlatGroup:
    """The values and gradients of one group of a stack.

    Args:
        group: the group.
        rows: its members, in the order in which they are to lie.
        apart: names of leaves that some trial trains at a rate of their own, in buffers of their
            own.

    Attributes:
        buffers: what each buffer is.
        values: the buffers.
        grads: the same for the gradients.
        own_values: what of ``values`` is no padding, as (rows, view (rows, values)), a few.
        own_grads: the same of ``grads``.
    """

    def __init__(self, group: Group, rows: Sequence[int], apart: Collection[str] = ()):
        leaves = [
            (site, name, leaf.detach())
            for site, adapter in group.params.items()
            for name, leaf in adapter.train.items()
        ]
        group = _members(group, rows, lambda t: take(t, rows))
        # Leaves of one shape lie side by side: their gradients are taken over together.
        alike: dict[Any, list[int]] = {}
        for i, (site, name, leaf) in enumerate(leaves):
            axis = rank_axes(group.params[site].method).get(name)
            own = tuple(rank_of(original[site].method) for original in group.originals)
            if axis is None or min(own) == leaf.shape[axis]:  # nobody's is padded
                axis, own = None, (1,) * len(rows)
            buffer = Buffer(
                leaf.dtype, leaf.device, own, 1 if axis is None else leaf.shape[axis],
                name if name in apart else None,
            )  # fmt: skip
            alike.setdefault((buffer, leaf.shape[1:], axis), []).append(i)
        buffers = list(dict.fromkeys(buffer for buffer, *_ in alike))
        widths = [0] * len(buffers)
        places: dict[int, LeafView] = {}
        for (buffer, shape, axis), members in alike.items():
            k = buffers.index(buffer)
            for i in members:
                start, stop = widths[k], widths[k] + shape.numel() // buffer.lines
                places[i] = LeafView(*leaves[i][:2], k, start, stop, shape, axis)
                widths[k] = stop
        self.places = [places[i] for i in range(len(leaves))]
        self._alike = list(alike.values())
        values = [
            torch.zeros(len(rows), b.lines, width, dtype=b.dtype, device=b.device)
            for b, width in zip(buffers, widths, strict=True)
        ]
        for place, (_, _, leaf) in zip(self.places, leaves, strict=True):
            place.view(values).copy_(take(leaf, rows))
        self._hold(group, buffers, values, [torch.zeros_like(v) for v in values])

    def _hold(
        self, group: Group, buffers: list[Buffer], values: list[Tensor], grads: list[Tensor]
    ) -> None:
        self._group, self.size = group, len(group.index)
        self.buffers, self.values, self.grads = buffers, values, grads
        self.own_values, self.own_grads = (
            [
                (rows, held[rows, :own].flatten(1))
                for buffer, held in zip(buffers, tensors, strict=True)
                for rows, own in buffer.runs(0, self.size)
            ]
            for tensors in (values, grads)
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
            [replace(b, own=tuple(b.own[row] for row in rows)) for b in self.buffers],
            [copied(v) for v in self.values],
            [copied(g) for g in self.grads],
        )
        return smaller

    def row(self, row: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One member's own part of ``values`` or ``grads``, a flat view per buffer."""
        pairs = zip(self.buffers, tensors, strict=True)
        return [held[row, : buffer.own[row]].view(-1) for buffer, held in pairs]

    def leaves_of(self, row: int, flats: Sequence[Tensor]) -> list[Tensor]:
        """The leaves of a member, at its own rank: views of what :meth:`row` returns."""
        return [p.of_row(flats[p.buffer], self.buffers[p.buffer].own[row]) for p in self.places]

    def member(self, row: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One member's part of each leaf, at its own rank: views."""
        return self.leaves_of(row, self.row(row, tensors))

    def sets(self, ratios: Mapping[str, float]) -> list[tuple[list[int], list[int]]]:
        """A trial's (leaves, buffers) of one dtype and learning rate: one vector of a checkpoint.

        The sets and their order depend on the trial alone, not on how its leaves lie in memory,
        which depends on the other trials.
        """
        found: dict[Any, list[int]] = {}
        for i, place in enumerate(self.places):
            key = self.buffers[place.buffer].dtype, ratios.get(place.leaf, 1.0)
            found.setdefault(key, []).append(i)
        return [
            (leaves, sorted({self.places[i].buffer for i in leaves})) for leaves in found.values()
        ]

    def pack(self, row: int, flats: Sequence[Tensor], leaves: Sequence[int]) -> Tensor:
        """Some leaves of a member's row as one vector, on the host."""
        views = self.leaves_of(row, flats)
        pieces = [views[i].reshape(-1) for i in leaves]
        if len({p.device for p in pieces}) > 1:
            pieces = [p.cpu() for p in pieces]
        return torch.cat(pieces).cpu()

    def unpack(
        self, row: int, flats: Sequence[Tensor], leaves: Sequence[int], vector: Tensor
    ) -> None:
        """The inverse of :meth:`pack`: writes into ``flats``."""
        views = self.leaves_of(row, flats)
        pieces = vector.split([views[i].numel() for i in leaves])
        for i, piece in zip(leaves, pieces, strict=True):
            views[i].copy_(piece.view(views[i].shape))

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

        A pair for all leaves of one shape, and for each run of ranks: (rows, lines, leaves, ...).
        """
        for members in self._alike:
            first, last = self.places[members[0]], self.places[members[-1]]
            grads = self.grads[first.buffer][:, :, first.start : last.stop]
            zero = grads.new_zeros(()).expand(stop - start, *first.shape)
            some = [found[i] for i in members]
            new = _stacked([zero if g is None else g for g in some], zero.shape)
            new = new.unsqueeze(1) if first.axis is None else new.movedim(first.axis, 1)
            for rows, own in self.buffers[first.buffer].runs(start, stop):
                total = grads[rows, :own]
                total = total.view(*total.shape[:2], *new.shape[2:])
                yield total, new[rows.start - start : rows.stop - start, :own]

    @property
    def projects(self) -> bool:
        """Whether some method has constraints."""
        adapters = self._group.params.values()
        return any(type(a.method).project is not Method.project for a in adapters)

    def project(self) -> None:
        """Moves every member into its methods' constraints."""
        for name, adapter in self._group.params.items():
            if type(adapter.method).project is Method.project:
                continue
            leaves = {p.leaf: p.view(self.values) for p in self.places if p.site == name}
            if not leaves:
                continue
            for leaf, new in torch.func.vmap(adapter.method.project)(leaves).items():
                leaves[leaf].copy_(new)


class FlatParams:
    """All groups of a stack. Trials are counted by ``order``, group after group, rank after rank.

    Args:
        stack: the adapters, which are copied.
        trials: their numbers.
        apart: see :class:`FlatGroup`.

    Attributes:
        order: the trial (any number) of each row.
    """

    def __init__(self, stack: Stack, trials: Sequence[int], apart: Collection[str] = ()):
        self.blocks: list[FlatGroup] = []
        self.order: list[int] = []
        for group in stack.groups:
            rows = _by_rank(group.originals)
            self.blocks.append(FlatGroup(group, rows, apart))
            self.order += [trials[group.index[row]] for row in rows]

    @staticmethod
    def order_of(members: Sequence[Params], by_rank: bool) -> list[int]:
        """The positions of the members in ``order``, of the flat of their stack."""
        return [
            index[row]
            for index in groups_of(members, by_rank)
            for row in _by_rank([members[i] for i in index])
        ]

    @classmethod
    def separate(
        cls, members: Sequence[Params], trials: Sequence[int], apart: Collection[str] = ()
    ) -> FlatParams:
        """Each in a group of its own, without padding: as if it were alone in the world."""
        whole = cls(Stack([]), [])
        for member, trial in zip(members, trials, strict=True):
            one = cls(stack([member]), [trial], apart)
            whole.blocks += one.blocks
            whole.order += one.order
        return whole

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


def _by_rank(members: Sequence[Params]) -> list[int]:
    """Their order in a group: those of one rank beside each other make long runs."""
    ranks = [[rank_of(a.method) for a in member.values()] for member in members]
    return sorted(range(len(ranks)), key=ranks.__getitem__)


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
        group.params.with_adapters(adapters),
        tuple(group.originals[row] for row in rows),
    )


def _stacked(tensors: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Tensors of one shape (n, ...) side by side, (n, tensors, ...), in the first's memory order.

    The gradient of a batched product is often a transposed tensor, and to copy hundreds of these
    one by one takes longer than all of them at once. Those of one adapter may lack its axis.
    """
    if all(t.dim() < len(shape) and t.is_contiguous() for t in tensors):
        return torch.stack(list(tensors))[None]
    tensors = [t if t.shape == shape else t.reshape(shape) for t in tensors]
    inner = sorted(range(1, len(shape)), key=tensors[0].stride, reverse=True)
    joined = torch.stack([t.permute(0, *inner) for t in tensors], 1)
    back = inverse_permutation([0, *inner])
    return joined.permute(0, *(1 + i for i in back))
