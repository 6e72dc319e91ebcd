"""Stack: N adapters in one tree. stack, unstack, select.

A stack holds groups; a group holds the adapters that one vmapped function can run: the same
methods at the same sites. Ranks may differ within a group (padded with zeros, which stay zero).
Fixed leaves that are equal in all members, such as PiSSA's factors of one base, are held once.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import check_function, listed
from ..base.linear_map import LinearMap
from ..errors import ConfigError
from ..linalg import inverse_permutation
from ..method import STRENGTH, Leaves, Method, RankPadded
from .adapter import Adapter
from .params import Params, Train, cut, is_made, own_leaves, set_strength, strength_value
from .pytree import Note, register_node


@dataclass(frozen=True, eq=False)
class StackedAdapter(Adapter):
    """The adapters of a group at one site: leaves (n, ...), or without that axis if ``shared``."""

    shared: frozenset[str] = frozenset()

    is_group: ClassVar[bool] = True

    def with_bank(self, source: Adapter) -> Self:
        assert isinstance(source, StackedAdapter)
        new = super().with_bank(source)
        shared = (self.shared - new.bank.keys()) | (source.shared & new.bank.keys())
        return replace(new, shared=shared)

    def over(self, function: Callable[..., Any], *batched: Any) -> Any:
        """``function(p, *batched)`` over the group, by broadcasting or by torch.func.vmap."""
        p = self.leaves
        if self.method.supports_batch_dims:
            own = {k: t for k, t in p.items() if k not in self.shared}
            rows = {k: t.reshape(*t.shape[:1], 1, -1) for k, t in own.items() if t.dim() < 3}
            return function({**p, **rows}, *batched)
        axes = {name: None if name in self.shared else 0 for name in p}
        vmapped = torch.func.vmap(
            function, in_dims=(axes, *(0 for _ in batched)), randomness="different"
        )
        return vmapped(p, *batched)

    def projected(self) -> Leaves:
        if not self.train:
            return {}
        return torch.func.vmap(self.method.project)(self.train)

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
        size: N, with the rows of :func:`select` that have no adapter, which are in no group.
        per_row: whether adapter i belongs to row i of the batch (:func:`select`).

    Example:
        >>> params = [fadapt.init(model, method) for method in (fadapt.LoRA(r=2), fadapt.DoRA(r=2))]
        >>> stack = fadapt.stack(params)
        >>> stack.size, len(stack.groups)
        (2, 2)
    """

    __slots__ = ("groups", "per_row", "size")

    def __init__(self, groups: Sequence[Group], per_row: bool = False, size: int | None = None):
        self.groups = tuple(groups)
        self.size = sum(len(g.index) for g in self.groups) if size is None else size
        self.per_row = per_row

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Params]:
        return iter(unstack(self))

    @property
    def sites(self) -> list[str]:
        """The names of all adapted sites, sorted."""
        return sorted(
            {name for g in self.groups for name, a in g.params.items() if not a.site.is_shared}
        )

    @property
    def order(self) -> list[int]:
        """The positions of the adapters, group after group, and of the rows without one."""
        adapted = [i for group in self.groups for i in group.index]
        have = set(adapted)
        return adapted + [i for i in range(self.size) if i not in have]

    def in_groups(self) -> Stack:
        """The same adapters at positions that go on from group to group."""
        place = inverse_permutation(self.order)
        groups = [
            Group(tuple(place[i] for i in g.index), g.params, g.originals) for g in self.groups
        ]
        return Stack(groups, self.per_row, self.size)

    def map(self, function: Callable[[Params], Params]) -> Stack:
        """A stack with ``function`` applied to the params of every group."""
        check_function("map: function", function, "stack.map(fadapt.project)", needed=True)
        groups = [Group(g.index, function(g.params), g.originals) for g in self.groups]
        if odd := [g.params for g in groups if not isinstance(g.params, Params)]:
            raise ConfigError(
                f"map: the function takes and returns Params, and it returned {odd[0]!r:.80}"
            )
        return Stack(groups, self.per_row, self.size)

    def check_whole(self) -> None:
        """As :meth:`Params.check_whole`."""
        for group in self.groups:
            group.params.check_whole()

    def split(self) -> tuple[dict[str, Train], Stack]:
        """As :func:`fadapt.split`, with one more level: {group number: {site: {leaf: tensor}}}."""
        halves = [g.params.split() for g in self.groups]
        rests = iter(rest for _, rest in halves)
        return {str(i): t for i, (t, _) in enumerate(halves)}, self.map(lambda _: next(rests))

    def join(self, train: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> Stack:
        """As :func:`fadapt.join`."""
        numbers = [str(i) for i in range(len(self.groups))]
        if not isinstance(train, Mapping) or set(train) != set(numbers):
            keys = sorted(map(str, train))[:4] if isinstance(train, Mapping) else train
            raise ConfigError(
                f"join: train holds {keys!r:.200}, this stack has the groups {numbers}; pass the "
                "two halves that one split() returned: join(train, rest)"
            )
        groups = [
            Group(g.index, g.params.join(train[str(i)]), g.originals)
            for i, g in enumerate(self.groups)
        ]
        return Stack(groups, self.per_row, self.size)

    def scaled(self, c: Any) -> Stack:
        """As :func:`fadapt.scale`."""
        self.check_whole()
        if isinstance(c, Tensor) and c.dim() == 1 and c.is_floating_point():
            values: list[float | Tensor] = [strength_value(part) for part in c]
        elif isinstance(c, (list, tuple)):
            values = [strength_value(part) for part in c]
        else:
            raise ConfigError(
                f"scale: a stack takes a strength for each of its {self.size} adapters, got "
                f"{c!r:.80}; for one that all share write scale(stack, [c] * {self.size})"
            )
        if len(values) != self.size:
            raise ConfigError(f"scale: {len(values)} strengths for a stack of {self.size} adapters")
        groups = []
        for group in self.groups:
            own = [values[i] for i in group.index]
            groups.append(
                Group(
                    group.index,
                    group.params.map(lambda a, own=own: _with_strengths(a, own)),
                    tuple(p.map(_marked) for p in group.originals),
                )
            )
        return Stack(groups, self.per_row, self.size)

    def trainable(self) -> list[Tensor]:
        """The stacked trainable leaves, each (n, ...) over the members of its group."""
        return [leaf for g in self.groups for leaf in g.params.trainable()]

    def to(self, *where: Any, device: Any = None, dtype: torch.dtype | None = None) -> Stack:
        """A copy on another device or in another adapter dtype, as :meth:`Params.to`."""
        return self.map(lambda params: params.to(*where, device=device, dtype=dtype))

    def __repr__(self) -> str:
        what = ", ".join(
            f"{len(g.index)} x {next(iter(g.params.values()), '')}" for g in self.groups
        )
        return f"Stack({self.size} adapters in {len(self.groups)} groups: {what})"


def stack(params: Sequence[Params]) -> Stack:
    """N adapters of one base as one tree, for one pass over the base.

    Any mix of methods, ranks, sites, strengths and dtypes. The trainable leaves are new tensors,
    to be optimised by themselves; :func:`unstack` gives the members back. Where a member's leaves
    were computed from others (a hypernetwork's, or those of a torch.func transform), the stack
    stays part of their graph, and gradients reach what they were computed from.

    Args:
        params: at least one Params, in the order of the losses that ``run`` returns.

    Raises:
        ConfigError: an empty list, something else than Params, or members of different bases.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Linear(4, 3)
        >>> members = [fadapt.init(model, fadapt.LoRA(r=r)) for r in (1, 2)]
        >>> fadapt.apply(model, fadapt.stack(members), torch.ones(5, 4)).shape
        torch.Size([2, 5, 3])
    """
    write = "write fadapt.stack([params, ...])"
    if isinstance(params, Params):
        raise ConfigError(f"stack takes a list of Params, got {type(params).__name__}; {write}")
    members = listed("stack: params", params, write.removeprefix("write "))
    if odd := [p for p in members if not isinstance(p, Params)]:
        raise ConfigError(
            f"stack takes a non-empty list of Params, got one with {odd[0]!r:.80}; {write}"
        )
    if not members:
        raise ConfigError(f"stack takes a non-empty list of Params, got {members!r}; {write}")
    return stack_of(members)


def stack_of(members: list[Params], by_rank: bool = False) -> Stack:
    """A stack of Params; with ``by_rank`` each rank is a group of its own, without padding."""
    for member in members:
        member.check_one()
    _check_one_base(members)
    groups = groups_of(members, by_rank)
    return Stack([_group(index, [members[i] for i in index]) for index in groups])


def groups_of(members: Sequence[Params], by_rank: bool = False) -> list[list[int]]:
    """The positions of the members of each group of their stack."""
    keys: dict[Hashable, list[int]] = {}
    for i, member in enumerate(members):
        ranks = tuple(rank_of(a.method) for a in member.values()) if by_rank else ()
        keys.setdefault((_group_key(member), ranks), []).append(i)
    return list(keys.values())


def unstack(stack: Stack) -> list[Params]:
    """The members of a stack, in their order, each at its own rank and with its own tensors.

    The leaves are new ones, except those that a graph made, which stay part of it.

    Args:
        stack: from :func:`fadapt.stack`, trained or not.

    Raises:
        ConfigError: something else than a stack, or one that :func:`select` made.

    Example:
        >>> stack = fadapt.stack([fadapt.init(model, fadapt.LoRA(r=r)) for r in (1, 2)])
        >>> [params["0.weight"].method.r for params in fadapt.unstack(stack)]
        [1, 2]
    """
    if not isinstance(stack, Stack):
        raise ConfigError(f"unstack takes what fadapt.stack returned, got {type(stack).__name__}")
    if stack.per_row:
        raise ConfigError(
            "these are the adapters of a batch's rows, from select(stack, ids); unstack the stack "
            "itself: fadapt.unstack(stack)[i]"
        )
    stack.check_whole()
    found: dict[int, Params] = {}
    for group in stack.groups:
        for row, (i, original) in enumerate(zip(group.index, group.originals, strict=True)):
            adapters = {
                name: _member(adapter, row, original[name])
                for name, adapter in group.params.items()
            }
            found[i] = own_leaves(original.with_adapters(adapters))
    return [found[i] for i in sorted(found)]


def select(stack: Stack, ids: Sequence[int | None] | Tensor) -> Stack:
    """One adapter per batch row, for mixed-batch inference and training.

    ``apply(model, select(stack, ids), input_ids)`` runs row i of an ordinary batch with adapter
    ``ids[i]``; gradients reach the leaves of ``stack``. ``apply(..., method="generate")`` also
    takes beams and several sequences per row. With a single group, ``ids`` may be a tensor on the
    device, and nothing waits for its values.

    Args:
        stack: the resident adapters.
        ids: per row, an index into the stack, or None for a row of the base.

    Raises:
        ConfigError: something else than indices, or one out of range, where it is on the host.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Linear(4, 3)
        >>> stack = fadapt.stack([fadapt.init(model, fadapt.LoRA(r=2))] * 2)
        >>> fadapt.apply(model, fadapt.select(stack, [1, None, 0]), torch.ones(3, 4)).shape
        torch.Size([3, 3])
    """
    if not isinstance(stack, Stack) or stack.per_row:
        made = "rows that select() chose" if isinstance(stack, Stack) else type(stack).__name__
        raise ConfigError(
            f"select chooses from a stack, got {made}: select(fadapt.stack([...]), ids)"
        )
    if isinstance(ids, Tensor):
        _check_ids(ids, stack.size)
    if isinstance(ids, Tensor) and len(stack.groups) == 1:
        group, index = stack.groups[0], ids.to(torch.long)
        rows = tuple(range(len(ids)))
        return Stack([Group(rows, _take(group.params, index), ())], per_row=True)
    wanted = ids.tolist() if isinstance(ids, Tensor) else _ids(ids)
    if bad := [i for i in wanted if i is not None and not 0 <= i < stack.size]:
        raise ConfigError(f"select: ids {bad} are not in a stack of {stack.size} adapters")
    groups = []
    for group in stack.groups:
        place = {i: row for row, i in enumerate(group.index)}
        taken = {b: place[i] for b, i in enumerate(wanted) if i is not None and i in place}
        if taken:
            rows, index = tuple(taken), torch.tensor(list(taken.values()))
            groups.append(Group(rows, _take(group.params, index), ()))
    return Stack(groups, per_row=True, size=len(wanted))


def _ids(ids: Any) -> list[int | None]:
    write = "write select(stack, [0, 2, None]): an index per row of the batch, None for the base"
    found: list[int | None] = []
    for i in listed("select: ids", ids, write.removeprefix("write ")):
        truth = isinstance(i, bool) or "bool" in str(getattr(i, "dtype", ""))
        try:
            found.append(None if i is None else operator.index(i))
        except TypeError:
            truth = True
        if truth:
            raise ConfigError(f"select: {i!r:.80} is no index; {write}")
    if not found:
        raise ConfigError(f"select: there are no rows; {write}")
    return found


_INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_ids(ids: Tensor, size: int) -> None:
    if ids.dim() != 1 or ids.dtype not in _INDICES or not len(ids):
        raise ConfigError(
            f"select: ids must be indices, a tensor (rows,) of integers, got {ids.dtype} of shape "
            f"{list(ids.shape)}; a mask becomes indices by mask.nonzero()"
        )
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and not is_made(ids):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= size:
            raise ConfigError(
                f"select: ids from {low} to {high} are not in a stack of {size} adapters"
            )


def _with_strengths(adapter: Adapter, values: list[float | Tensor]) -> Adapter:
    """A group's adapter with a strength for each member."""
    assert isinstance(adapter, StackedAdapter)
    each = [set_strength(adapter, value).fixed[STRENGTH] for value in values]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in each))
    strengths = torch.stack([t.to(dtype) for t in each])
    unshared = replace(adapter, shared=adapter.shared - {STRENGTH})
    return unshared.replace(fixed={**adapter.fixed, STRENGTH: strengths})


def _marked(original: Adapter) -> Adapter:
    """A member's record that it has a strength, whose value is in the stack."""
    return original.replace(fixed={STRENGTH: torch.ones(())})


def alone(stack: Stack) -> Params:
    """The only member of a stack, its leaves slices of the stack's: it runs without the fold."""
    ((group,), adapters) = stack.groups, {}
    for name, a in group.params.items():
        assert isinstance(a, StackedAdapter)
        train = {k: t[0] for k, t in a.train.items()}
        fixed = {k: t if k in a.shared else t[0] for k, t in a.fixed.items()}
        adapters[name] = Adapter(a.site, a.method, {}, {}).replace(train, fixed)
    return Params(adapters)


def subset(stack: Stack, ids: Sequence[int]) -> Stack:
    """Some members of a stack, in the form that they have in it: padded, with its shared leaves."""
    groups = []
    for group in stack.groups:
        place = {i: row for row, i in enumerate(group.index)}
        taken = {at: place[i] for at, i in enumerate(ids) if i in place}
        if taken:
            originals = tuple(group.originals[row] for row in taken.values() if group.originals)
            params = _take(group.params, torch.tensor(list(taken.values())))
            groups.append(Group(tuple(taken), params, originals))
    return Stack(groups, size=len(ids))  # with the rows of the base


def views(stack: Stack) -> list[Params]:
    """The members of a stack, in their order, as views of its leaves: gradients reach the stack.

    Each at its own rank, where the stack knows it (not after :func:`select` by a tensor).
    """
    found: dict[int, Params] = {}
    for group in stack.groups:
        members: list[dict[str, Adapter]] = [{} for _ in group.index]
        for name, a in group.params.items():
            assert isinstance(a, StackedAdapter)
            train = {k: t.unbind(0) for k, t in a.train.items()}
            fixed = {
                k: (t,) * len(members) if k in a.shared else t.unbind(0) for k, t in a.fixed.items()
            }
            for row, adapters in enumerate(members):
                like = group.originals[row][name] if group.originals else None
                method = like.method if like else a.method
                added = _added(method, like) if like else set()
                adapters[name] = Adapter(a.site, method, {}, {}).replace(
                    {k: at_rank(method, k, t[row]) for k, t in train.items()},
                    {k: at_rank(method, k, t[row]) for k, t in fixed.items() if k not in added},
                )
        for i, adapters in zip(group.index, members, strict=True):
            found[i] = Params(adapters, group.params.config)
    return [found.get(i, Params({})) for i in range(stack.size)]  # rows of the base have none


def rank_of(method: Method) -> int:
    """The rank of a method, 1 where ranks do not mix."""
    return method.r if isinstance(method, RankPadded) else 1


def rank_axes(method: Method) -> Mapping[str, int]:
    """The axes of its leaves that a larger rank extends."""
    return method.rank_axes if isinstance(method, RankPadded) else {}


def at_rank(method: Method, name: str, leaf: Tensor) -> Tensor:
    """A leaf of a member without the padding of its stack: a view."""
    axis = rank_axes(method).get(name)
    return leaf if axis is None else leaf.narrow(axis, 0, rank_of(method))


def _widened(method: Method, r: int) -> Method:
    return method.widened(r) if isinstance(method, RankPadded) else method


def _hyper_leaves(method: Method) -> dict[str, float]:
    return method.hyper_leaves() if isinstance(method, RankPadded) else {}


def _take(params: Params, index: Tensor) -> Params:
    params.check_whole()
    on: dict[Any, Tensor] = {}

    def pick(t: Tensor) -> Tensor:
        if t.device not in on:
            on[t.device] = index.to(t.device)
        return t.index_select(0, on[t.device])

    def take(adapter: Adapter) -> Adapter:
        assert isinstance(adapter, StackedAdapter)
        return adapter.replace(
            {k: pick(t) for k, t in adapter.train.items()},
            {k: t if k in adapter.shared else pick(t) for k, t in adapter.fixed.items()},
        )

    return params.map(take)


def _check_one_base(members: list[Params]) -> None:
    seen: dict[str, tuple[int, Adapter]] = {}
    for i, member in enumerate(members):
        for name, adapter in member.items():
            first, other = seen.setdefault(name, (i, adapter))
            if other.site.fingerprint != adapter.site.fingerprint:
                raise ConfigError(
                    f"stack: members {first} and {i} adapt {name} of different base models"
                )


def _group_key(member: Params) -> Hashable:
    def leaf_key(adapter: Adapter, name: str, leaf: Tensor) -> Hashable:
        axis = rank_axes(adapter.method).get(name, 0)
        shape = tuple(n for i, n in enumerate(leaf.shape) if i - leaf.dim() != axis)
        return name, shape, leaf.dtype, leaf.device

    return tuple(
        (
            name,
            _widened(adapter.method, 1),
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
    return Group(tuple(index), own_leaves(Params(sites)), originals)


def _stack_site(adapters: list[Adapter]) -> StackedAdapter:
    method = adapters[0].method
    fixed = [a.fixed for a in adapters]
    if any(STRENGTH in f for f in fixed):
        fixed = [{STRENGTH: torch.ones(()), **f} for f in fixed]
    if any(a.method != method for a in adapters):
        rank = max(rank_of(a.method) for a in adapters)
        like = next(t for t in adapters[0].leaves.values() if t.is_floating_point())
        site = adapters[0].site
        each = (site.experts,) if site.experts else ()
        fixed = [
            {**f, **{k: like.new_full(each, v) for k, v in _hyper_leaves(a.method).items()}}
            for f, a in zip(fixed, adapters, strict=True)
        ]
        method = _widened(method, rank)
        fixed = [_pad(f, rank_axes(method), rank) for f in fixed]
        train = [_pad(a.train, rank_axes(method), rank) for a in adapters]
    else:
        train = [a.train for a in adapters]
    shared = frozenset(k for k in fixed[0] if len(fixed) > 1 and _is_shared([f[k] for f in fixed]))
    return StackedAdapter(adapters[0].site, method, {}, {}, shared).replace(
        train={k: torch.stack([cut(t[k]) for t in train]) for k in train[0]},
        fixed={
            k: first if k in shared else _stacked([f[k] for f in fixed])
            for k, first in fixed[0].items()
        },
    )


def _is_shared(leaves: list[Tensor]) -> bool:
    """Whether fixed leaves can be held once: equal, and none with a gradient of its own."""
    first = leaves[0]
    if all(t is first for t in leaves[1:]):
        return True
    if any(t.requires_grad or is_made(t) for t in leaves):
        return False
    return all(t is first or torch.equal(t, first) for t in leaves[1:])


def _stacked(leaves: list[Tensor]) -> Tensor:
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in leaves))
    return torch.stack([t.to(leaves[0].device, dtype) for t in leaves])


def _pad(leaves: Leaves, axes: Mapping[str, int], rank: int) -> Leaves:
    def pad(name: str, leaf: Tensor) -> Tensor:
        if name not in axes:
            return leaf
        axis = axes[name]
        widths = [0, 0] * (-axis - 1) + [0, rank - leaf.shape[axis]]
        return F.pad(cut(leaf), widths)

    return {k: pad(k, t) for k, t in leaves.items()}


def _member(adapter: Adapter, row: int, original: Adapter) -> Adapter:
    assert isinstance(adapter, StackedAdapter)
    method = original.method

    def own(name: str, leaf: Tensor) -> Tensor:
        leaf = cut(leaf)
        return at_rank(method, name, leaf if name in adapter.shared else leaf[row]).clone()

    added = _added(method, original)
    return original.replace(
        {k: own(k, t) for k, t in adapter.train.items()},
        {k: own(k, t) for k, t in adapter.fixed.items() if k not in added},
    )


def _added(method: Method, original: Adapter) -> set[str]:
    """The fixed leaves that a member has only within the stack."""
    # Dynamo subtracts no keys of a dict from a set before torch 2.13.
    unset = set() if STRENGTH in original.fixed else {STRENGTH}
    return set(_hyper_leaves(method)) | unset


def _flatten_stacked(a: StackedAdapter) -> tuple[Any, Any]:
    return (a.train, a.fixed), (a.site, a.method, a.shared)


def _unflatten_stacked(aux: Any, children: Any) -> StackedAdapter:
    site, method, shared = aux
    train, fixed = children
    return StackedAdapter(site, method, train, fixed, shared)


def _flatten_stack(s: Stack) -> tuple[Any, Any]:
    index = tuple(g.index for g in s.groups)
    aux = index, Note([g.originals for g in s.groups]), s.per_row, s.size
    return [g.params for g in s.groups], aux


def _unflatten_stack(aux: Any, children: Any) -> Stack:
    index, originals, per_row, size = aux
    groups = [Group(*g) for g in zip(index, children, originals.value, strict=True)]
    return Stack(groups, per_row, size)


register_node(StackedAdapter, _flatten_stacked, _unflatten_stacked)
register_node(Stack, _flatten_stack, _unflatten_stack)
