"""Stack: N adapters in one tree. stack, unstack, select.

A stack holds groups; a group holds the adapters that one vmapped function can run: the same
methods at the same sites. Ranks may differ within a group (padded with zeros, which stay zero).
Fixed leaves that are equal in all members, such as PiSSA's factors of one base, are held once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.linear_map import LinearMap
from ..errors import ConfigError
from ..linalg import inverse_permutation
from ..method import STRENGTH, Leaves, Method
from .adapter import Adapter
from .params import Params, Train, trainable_leaves
from .pytree import Note, register_node


@dataclass(frozen=True, eq=False)
class StackedAdapter(Adapter):
    """The adapters of a group at one site: leaves (n, ...), or without that axis if ``shared``."""

    shared: frozenset[str] = frozenset()

    def over(self, function: Callable[..., Any], *batched: Any) -> Any:
        """``function(p, *batched)`` over the group, by broadcasting or by torch.func.vmap."""
        p = self.leaves
        if self.method.broadcasts:
            own = {k: t for k, t in p.items() if k not in self.shared}
            rows = {k: t.reshape(*t.shape[:1], 1, -1) for k, t in own.items() if t.dim() < 3}
            return function({**p, **rows}, *batched)
        axes = {name: None if name in self.shared else 0 for name in p}
        return torch.func.vmap(function, in_dims=(axes, *(0 for _ in batched)))(p, *batched)

    def __call__(self, x: Tensor, base: LinearMap) -> Tensor:
        raise ConfigError("a group of a stack is run through the stack: fadapt.run(model, stack)")


@dataclass(frozen=True, eq=False)
class Group:
    """Adapters that run as one.

    Attributes:
        index: their positions in the stack.
        params: {site: StackedAdapter}.
        originals: each member as it came, without its leaves; static.
    """

    index: tuple[int, ...]
    params: Params
    originals: tuple[Params, ...]


class Stack:
    """N adapters as one tree; made by :func:`stack` or :func:`select`.

    Attributes:
        groups: see :class:`Group`.
        size: N.
        per_row: whether adapter i belongs to row i of the batch (:func:`select`).
    """

    __slots__ = ("groups", "per_row", "size")

    def __init__(self, groups: Sequence[Group], per_row: bool = False):
        self.groups = tuple(groups)
        self.size = sum(len(g.index) for g in self.groups)
        self.per_row = per_row

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Params]:
        return iter(unstack(self))

    @property
    def sites(self) -> list[str]:
        """The names of all adapted sites, sorted."""
        return sorted({name for g in self.groups for name in g.params})

    @property
    def order(self) -> list[int]:
        """The positions of the adapters, group after group."""
        return [i for group in self.groups for i in group.index]

    def in_groups(self) -> Stack:
        """The same adapters at positions that go on from group to group."""
        place = inverse_permutation(self.order)
        groups = [
            Group(tuple(place[i] for i in g.index), g.params, g.originals) for g in self.groups
        ]
        return Stack(groups, self.per_row)

    def map(self, function: Callable[[Params], Params]) -> Stack:
        """A stack with ``function`` applied to the params of every group."""
        groups = [Group(g.index, function(g.params), g.originals) for g in self.groups]
        return Stack(groups, self.per_row)

    def split(self) -> tuple[dict[str, Train], Stack]:
        """As :func:`fadapt.split`, with one more level: {group number: {site: {leaf: tensor}}}."""
        halves = [g.params.split() for g in self.groups]
        rests = iter(rest for _, rest in halves)
        return {str(i): t for i, (t, _) in enumerate(halves)}, self.map(lambda _: next(rests))

    def join(self, train: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> Stack:
        """As :func:`fadapt.join`."""
        groups = [
            Group(g.index, g.params.join(train[str(i)]), g.originals)
            for i, g in enumerate(self.groups)
        ]
        return Stack(groups, self.per_row)

    def trainable(self) -> list[Tensor]:
        """The stacked trainable leaves, each (n, ...) over the members of its group."""
        return [leaf for g in self.groups for leaf in g.params.trainable()]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Stack:
        """A copy on another device or in another adapter dtype."""
        return self.map(lambda params: params.to(device, dtype))

    def __repr__(self) -> str:
        what = ", ".join(
            f"{len(g.index)} x {next(iter(g.params.values()), '')}" for g in self.groups
        )
        return f"Stack({self.size} adapters in {len(self.groups)} groups: {what})"


def stack(params: Sequence[Params]) -> Stack:
    """N adapters of one base as one tree, for one pass over the base.

    Any mix of methods, ranks, sites, strengths and dtypes. The trainable leaves are new tensors;
    :func:`unstack` gives the members back.

    Args:
        params: at least one Params, in the order of the losses that ``run`` returns.

    Raises:
        ConfigError: an empty list, something else than Params, or members of different bases.
    """
    members = list(params)
    if not members or not all(isinstance(p, Params) for p in members):
        raise ConfigError(f"stack takes a non-empty list of Params, got {members!r}")
    _check_one_base(members)
    keys: dict[Hashable, list[int]] = {}
    for i, member in enumerate(members):
        keys.setdefault(_group_key(member), []).append(i)
    return Stack([_group(index, [members[i] for i in index]) for index in keys.values()])


def unstack(stack: Stack) -> list[Params]:
    """The members of a stack, in their order, each at its own rank and with its own tensors."""
    found: dict[int, Params] = {}
    for group in stack.groups:
        for row, (i, original) in enumerate(zip(group.index, group.originals, strict=True)):
            adapters = {
                name: _member(adapter, row, original[name])
                for name, adapter in group.params.items()
            }
            found[i] = trainable_leaves(Params(adapters, original.config))
    return [found[i] for i in sorted(found)]


def select(stack: Stack, ids: Sequence[int] | Tensor) -> Stack:
    """One adapter per batch row, for mixed-batch inference and training.

    ``apply(model, select(stack, ids), input_ids)`` runs row i of an ordinary batch with adapter
    ``ids[i]``. With a single group, ``ids`` may be a tensor on the device, and nothing waits for
    its values.

    Args:
        stack: the resident adapters.
        ids: an index into the stack per row.

    Raises:
        ConfigError: an index out of range, where the ids are on the host.
    """
    if isinstance(ids, Tensor) and len(stack.groups) == 1:
        group, index = stack.groups[0], ids.to(torch.long)
        rows = tuple(range(len(ids)))
        return Stack([Group(rows, _take(group.params, index), ())], per_row=True)
    wanted = [int(i) for i in ids]
    if bad := [i for i in wanted if not 0 <= i < stack.size]:
        raise ConfigError(f"select: ids {bad} are not in a stack of {stack.size} adapters")
    groups = []
    for group in stack.groups:
        place = {i: row for row, i in enumerate(group.index)}
        rows = tuple(b for b, i in enumerate(wanted) if i in place)
        if rows:
            device = next((t.device for t in group.params.trainable()), None)
            index = torch.tensor([place[wanted[b]] for b in rows], device=device)
            originals = tuple(group.originals[place[wanted[b]]] for b in rows if group.originals)
            groups.append(Group(rows, _take(group.params, index), originals))
    return Stack(groups, per_row=True)


def alone(stack: Stack) -> Params:
    """The only member of a stack, its leaves slices of the stack's: it runs without the fold."""
    ((group,), adapters) = stack.groups, {}
    for name, a in group.params.items():
        assert isinstance(a, StackedAdapter)
        train = {k: t[0] for k, t in a.train.items()}
        fixed = {k: t if k in a.shared else t[0] for k, t in a.fixed.items()}
        adapters[name] = Adapter(a.site, a.method, {}, {}).replace(train, fixed)
    return Params(adapters)


def rank_of(method: Method) -> int:
    """The rank of a method, 1 where it has none."""
    return getattr(method, "r", 1)


def at_rank(method: Method, name: str, leaf: Tensor) -> Tensor:
    """A leaf of a member without the padding of its stack: a view."""
    axis = method.rank_axes.get(name)
    return leaf if axis is None else leaf.narrow(axis, 0, rank_of(method))


def _take(params: Params, index: Tensor) -> Params:
    def take(adapter: Adapter) -> Adapter:
        assert isinstance(adapter, StackedAdapter)
        return adapter.replace(
            {k: t.index_select(0, index) for k, t in adapter.train.items()},
            {
                k: t if k in adapter.shared else t.index_select(0, index)
                for k, t in adapter.fixed.items()
            },
        )

    return params.map(take)


def _check_one_base(members: list[Params]) -> None:
    seen: dict[str, tuple[int, Adapter]] = {}
    for i, member in enumerate(members):
        for name, adapter in member.items():
            if isinstance(adapter, StackedAdapter):
                raise ConfigError("stack takes the members, not a part of another stack")
            first, other = seen.setdefault(name, (i, adapter))
            if other.site.fingerprint != adapter.site.fingerprint:
                raise ConfigError(
                    f"stack: members {first} and {i} adapt {name} of different base models"
                )


def _group_key(member: Params) -> Hashable:
    def leaf_key(adapter: Adapter, name: str, leaf: Tensor) -> Hashable:
        axis = adapter.method.rank_axes.get(name, 0)
        shape = tuple(n for i, n in enumerate(leaf.shape) if i - leaf.dim() != axis)
        return name, shape, leaf.dtype, leaf.device

    return tuple(
        (
            name,
            adapter.method.widened(1),
            tuple(leaf_key(adapter, *item) for item in adapter.train.items()),
            tuple(leaf_key(adapter, *i) for i in adapter.fixed.items() if i[0] != STRENGTH),
        )
        for name, adapter in member.items()
    )


def _group(index: list[int], members: list[Params]) -> Group:
    sites = {name: _stack_site([m[name] for m in members]) for name in members[0]}
    # A strength that only other members set is 1 here, and not kept on unstacking.
    originals = tuple(
        m.map(lambda a: a.replace({}, {k: t for k, t in a.fixed.items() if k == STRENGTH}))
        for m in members
    )
    return Group(tuple(index), trainable_leaves(Params(sites)), originals)


def _stack_site(adapters: list[Adapter]) -> StackedAdapter:
    method = adapters[0].method
    fixed = [a.fixed for a in adapters]
    if any(STRENGTH in f for f in fixed):
        fixed = [{STRENGTH: torch.ones(()), **f} for f in fixed]
    if any(a.method != method for a in adapters):
        rank = max(rank_of(a.method) for a in adapters)
        like, site = next(iter(adapters[0].leaves.values())), adapters[0].site
        each = (site.experts,) if site.experts else ()
        fixed = [
            {**f, **{k: like.new_full(each, v) for k, v in a.method.hyper_leaves().items()}}
            for f, a in zip(fixed, adapters, strict=True)
        ]
        method = method.widened(rank)
        fixed = [_pad(f, method.rank_axes, rank) for f in fixed]
        train = [_pad(a.train, method.rank_axes, rank) for a in adapters]
    else:
        train = [a.train for a in adapters]
    shared = frozenset(
        k
        for k, first in fixed[0].items()
        if len(fixed) > 1 and all(f[k] is first or torch.equal(f[k], first) for f in fixed[1:])
    )
    return StackedAdapter(
        adapters[0].site, method, {}, {}, frozenset(shared)
    ).replace(
        train={k: torch.stack([t[k].detach() for t in train]) for k in train[0]},
        fixed={
            k: first.detach() if k in shared else torch.stack([f[k].to(first) for f in fixed])
            for k, first in fixed[0].items()
        },
    )  # fmt: skip


def _pad(leaves: Leaves, axes: Mapping[str, int], rank: int) -> Leaves:
    def pad(name: str, leaf: Tensor) -> Tensor:
        if name not in axes:
            return leaf
        axis = axes[name]
        widths = [0, 0] * (-axis - 1) + [0, rank - leaf.shape[axis]]
        return F.pad(leaf.detach(), widths)

    return {k: pad(k, t) for k, t in leaves.items()}


def _member(adapter: Adapter, row: int, original: Adapter) -> Adapter:
    assert isinstance(adapter, StackedAdapter)
    method = original.method

    def cut(name: str, leaf: Tensor) -> Tensor:
        leaf = leaf.detach()
        return at_rank(method, name, leaf if name in adapter.shared else leaf[row]).clone()

    added = set(method.hyper_leaves()) | ({STRENGTH} - original.fixed.keys())
    return original.replace(
        {k: cut(k, t) for k, t in adapter.train.items()},
        {k: cut(k, t) for k, t in adapter.fixed.items() if k not in added},
    )


def _flatten_stacked(a: StackedAdapter) -> tuple[Any, Any]:
    return (a.train, a.fixed), (a.site, a.method, a.shared)


def _unflatten_stacked(aux: Any, children: Any) -> StackedAdapter:
    site, method, shared = aux
    train, fixed = children
    return StackedAdapter(site, method, train, fixed, shared)


def _flatten_stack(s: Stack) -> tuple[Any, Any]:
    aux = tuple(g.index for g in s.groups), Note([g.originals for g in s.groups]), s.per_row
    return [g.params for g in s.groups], aux


def _unflatten_stack(aux: Any, children: Any) -> Stack:
    index, originals, per_row = aux
    groups = [Group(*g) for g in zip(index, children, originals.value, strict=True)]
    return Stack(groups, per_row)


register_node(StackedAdapter, _flatten_stacked, _unflatten_stacked)
register_node(Stack, _flatten_stack, _unflatten_stack)
