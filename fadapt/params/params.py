"""Params: the explicit pytree of adapters, and its differentiable part."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, Set, ValuesView
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..adapted_map import SharedLeaves
from ..arguments import check_function
from ..config import Config
from ..errors import ConfigError
from ..method import STRENGTH, Leaves
from .adapter import Adapter, _sorted
from .pytree import Note, register_node

if TYPE_CHECKING:
    from ..targeting import Coverage


class Tree(Protocol):
    """What has a differentiable part: params, and stacks of them."""

    def split(self) -> tuple[Any, Any]: ...

    def join(self, train: Mapping[str, Any]) -> Any: ...

    def trainable(self) -> list[Tensor]: ...

    def check_whole(self) -> None: ...


P = TypeVar("P", bound=Tree)
Train = dict[str, Leaves]
"""What :func:`split` returns first: {site name: {leaf name: tensor}}."""
Awaited = Mapping[str, Mapping[str, torch.Size]]
"""The shapes of the leaves that the rest of a split waits for."""


class Params(Mapping[str, Adapter]):
    """An immutable mapping {site name: Adapter}, sorted by name; a pytree.

    Registered in torch's pytree and in optree's global namespace, so torch.func and
    ``optree.tree_map`` take it as it is; derivatives are those of what :func:`split` returns, as
    fixed leaves may be integers. ``config`` and ``coverage`` (what share of the base is
    adapted, and what is left out) are kept for the record and are not compared.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRA(r=2))
        >>> params
        Params(LoRA(r=2, ...) x 2; 88 trainable)
        >>> params["0.weight"].train["B"].shape
        torch.Size([16, 2])
    """

    __slots__ = ("__weakref__", "_adapters", "_awaited", "config", "coverage")

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        config: Config | None = None,
        coverage: Coverage | None = None,
        *,
        awaited: Awaited | None = None,
    ):
        whole = isinstance(adapters, Mapping)
        if not whole or not all(isinstance(a, Adapter) for a in adapters.values()):
            raise ConfigError(
                f"Params takes {{site: Adapter}}, got {adapters!r:.80}; write fadapt.init(model, "
                "cfg), or params.with_adapters({**params, name: adapter})"
            )
        if not (config is None or isinstance(config, Config)):
            raise ConfigError(f"config must be a fadapt.Config or None, got {config!r:.80}")
        self._adapters: dict[str, Adapter] = _with_banks(_sorted(adapters))
        self.config, self.coverage = config, coverage
        self._awaited = awaited

    def with_adapters(self, adapters: Mapping[str, Adapter]) -> Params:
        """Other adapters of the same sites, with this one's record."""
        return Params(adapters, self.config, self.coverage)

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def values(self) -> ValuesView[Adapter]:
        return self._adapters.values()

    def items(self) -> ItemsView[str, Adapter]:
        return self._adapters.items()

    def map(self, fn: Callable[[Adapter], Adapter]) -> Params:
        """A Params with ``fn`` applied to every adapter."""
        check_function("map: fn", fn, "params.map(lambda adapter: ...)", needed=True)
        adapters = {name: fn(a) for name, a in self.items()}
        if odd := [name for name, a in adapters.items() if not isinstance(a, Adapter)]:
            raise ConfigError(
                f"map: the function must return an Adapter, and for {odd[0]} it returned "
                f"{adapters[odd[0]]!r:.80}; write lambda adapter: adapter.replace(train, fixed)"
            )
        return Params(adapters, self.config, self.coverage, awaited=self._awaited)

    def only(self, *patterns: str) -> Params:
        """The adapters whose site names match one of the patterns, searched as in a rule.

        Raises:
            ConfigError: a pattern that matches no site.

        Example:
            >>> import torch, fadapt
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
            >>> params = fadapt.init(model, fadapt.LoRA(r=2))
            >>> list(params.only("0"))
            ['0.weight']
        """
        chosen = self._matching(patterns)
        return self._keep(chosen)

    def without(self, *patterns: str) -> Params:
        """The adapters whose site names match none of the patterns: those are dropped.

        Raises:
            ConfigError: a pattern that matches no site, or nothing that is left.

        Example:
            >>> import torch, fadapt
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
            >>> params = fadapt.init(model, fadapt.LoRA(r=2))
            >>> list(params.without("0"))
            ['1.weight']
        """
        dropped = self._matching(patterns)
        if len(dropped) == len(self):
            raise ConfigError(
                f"without{patterns} leaves no adapter: call the model itself, or scale(params, 0)"
            )
        return self._keep(self.keys() - dropped)

    def _keep(self, names: Set[str]) -> Params:
        """The adapters of some sites, with what these share."""
        methods = {self[name].method for name in names}
        return Params(
            {
                name: a
                for name, a in self.items()
                if (a.method.of in methods if isinstance(a.method, SharedLeaves) else name in names)
            },
            self.config,
        )

    def at_sites(self) -> dict[str, Adapter]:
        """The adapters of the model's parameters, without the places of shared leaves."""
        return {name: a for name, a in self.items() if not a.site.is_shared}

    def _matching(self, patterns: tuple[str, ...]) -> set[str]:
        self.check_whole()
        found: set[str] = set()
        for pattern in patterns:
            try:
                hits = {name for name in self if re.search(pattern, name)}
            except (re.error, TypeError, OverflowError, RecursionError) as error:
                raise ConfigError(
                    f"{pattern!r:.80} is not a regular expression: {error}"
                ) from error
            if not hits:
                raise ConfigError(f"{pattern!r} matches none of the sites {list(self)[:8]}")
            found |= hits
        if not patterns:
            raise ConfigError("name the sites: params.only(pattern) or params.without(pattern)")
        return found

    def check_whole(self) -> None:
        """Refuses the rest of a split, whose trainable leaves are elsewhere.

        Raises:
            ConfigError: says how to put them back.
        """
        if self._awaited is not None and any(self._awaited.values()):
            raise ConfigError(
                "these params are the rest of a split, without their trainable leaves; put them "
                "back: fadapt.join(train, rest)"
            )

    def check_one(self) -> None:
        """Refuses what is not one whole adapter: the rest of a split, or a group of a stack.

        Raises:
            ConfigError: says what to pass instead.
        """
        self.check_whole()
        if any(a.is_group for a in self.values()):
            raise ConfigError(
                "these params are a group of a stack, several adapters in one tree; pass the stack "
                "itself, as in fadapt.run(model, stack, batch) and fadapt.scale(stack, [c0, c1]), "
                "or one of its members: fadapt.unstack(stack)[0]"
            )

    def split(self) -> tuple[Train, Params]:
        """See :func:`split`."""
        self.check_whole()
        train = {name: dict(a.train) for name, a in self.items()}
        awaited = {name: {k: t.shape for k, t in leaves.items()} for name, leaves in train.items()}
        rest = {name: a.replace(train={}) for name, a in self.items()}
        return train, Params(rest, self.config, awaited=awaited)

    def join(self, train: Mapping[str, Mapping[str, Tensor]]) -> Params:
        """See :func:`join`."""
        if not isinstance(train, Mapping):
            raise ConfigError(f"join: train is {train!r:.80}; {_HALVES}")
        if train.keys() != self.keys():
            missing, extra = self.keys() - train.keys(), train.keys() - self.keys()
            raise ConfigError(
                f"join: train lacks the sites {_some(missing)} and has the unknown sites "
                f"{_some(extra)}; {_HALVES}"
            )
        for name, adapter in self.items():
            own = {k: t.shape for k, t in adapter.train.items()} or None
            awaited = own if self._awaited is None else self._awaited[name]
            _check_joined(name, adapter, train[name], awaited)
        return self.with_adapters({k: a.replace(dict(train[k])) for k, a in self.items()})

    def trainable(self) -> list[Tensor]:
        """See :func:`trainable`."""
        return [leaf for _, adapter in self.items() for leaf in adapter.train.values()]

    def to(
        self,
        *where: torch.device | str | int | torch.dtype | Tensor,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Params:
        """A copy on another device or in another adapter dtype, as new trainable leaves.

        As for a tensor: ``params.to(torch.bfloat16)``, ``params.to("cuda")``,
        ``params.to("cuda", torch.bfloat16)``, ``params.to(other_tensor)``. Leaves that a method
        declares ``keep_fp32``, integers and booleans keep their dtype.

        Raises:
            ConfigError: something else than a device and a floating dtype.
        """
        device, dtype = destination(where, device, dtype)

        def move(adapter: Adapter) -> Adapter:
            exact = adapter.method.keep_fp32 | {STRENGTH}
            return adapter.replace(
                train={k: cut(t).to(device, dtype) for k, t in adapter.train.items()},
                fixed={
                    k: t.to(device, None if k in exact or not t.is_floating_point() else dtype)
                    for k, t in adapter.fixed.items()
                },
            )

        return own_leaves(self.map(move))

    def __repr__(self) -> str:
        methods = Counter(repr(a.method) for _, a in self.items())
        what = ", ".join(f"{method} x {n}" for method, n in methods.items()) or "empty"
        return f"Params({what}; {sum(t.numel() for t in self.trainable()):,} trainable)"


def _with_banks(adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    """Every adapter with the leaves that its method's sites share, from the one that holds them."""
    banks = {a.method.of: a for a in adapters.values() if isinstance(a.method, SharedLeaves)}
    if not banks:
        return adapters
    return {
        name: a.with_bank(banks[a.method]) if a.method in banks else a
        for name, a in adapters.items()
    }


def split(params: P) -> tuple[Any, P]:
    """Separates what is differentiated from what is not.

    Args:
        params: Params, or a Stack.

    Returns:
        ``train``, a plain nested dict {site: {leaf: tensor}} of floating tensors to differentiate,
        stack or optimise (for a Stack, one such dict per group); and ``rest``, the params without
        them, for :func:`join`.

    Raises:
        ConfigError: something else than params.

    Example:
        >>> train, rest = fadapt.split(fadapt.init(model, fadapt.LoRA(r=2)))
        >>> {site: sorted(leaves) for site, leaves in train.items()}
        {'0.weight': ['A', 'B'], '2.weight': ['A', 'B']}
    """
    _check_tree(params, "split(params)")
    return params.split()  # type: ignore[return-value]


def join(train: Mapping[str, Any], rest: P) -> P:
    """Puts back what :func:`split` took apart.

    Args:
        train: {site: {leaf: tensor}} with the names and shapes that ``split`` returned, whatever
            the values: an optimiser's, a hypernetwork's, or those of a torch.func transform.
        rest: the second half.

    Raises:
        ConfigError: other sites, leaves, shapes or kinds of tensors than those of ``rest``.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Linear(4, 3)
        >>> train, rest = fadapt.split(fadapt.init(model, fadapt.LoRA(r=2)))
        >>> train["weight"]["B"] = torch.ones(3, 2)
        >>> fadapt.merge(model, fadapt.join(train, rest))["weight"].shape
        torch.Size([3, 4])
    """
    _check_tree(rest, "join(train, rest)")
    return rest.join(train)


def trainable(params: Tree) -> list[Tensor]:
    """The trainable leaves in a fixed order, for an optimiser.

    Args:
        params: Params, or a Stack.

    Raises:
        ConfigError: something else than params, or the rest of a split.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRA(r=2))
        >>> optimizer = torch.optim.AdamW(fadapt.trainable(params), lr=1e-3)
        >>> sum(leaf.numel() for leaf in fadapt.trainable(params))
        88
    """
    _check_tree(params, "trainable(params)")
    params.check_whole()
    return params.trainable()


def trainable_leaves(params: Params) -> Params:
    """The same values with fresh trainable leaves: detached, requires_grad=True.

    They are ordinary tensors, also inside ``torch.inference_mode``.
    """
    return _ordinary(params, torch.Tensor.detach)


def own_leaves(params: Params) -> Params:
    """As :func:`trainable_leaves`, except that leaves which a graph made stay part of it."""
    return _ordinary(params, cut)


def _ordinary(params: Params, start: Callable[[Tensor], Tensor]) -> Params:
    def train(t: Tensor) -> Tensor:
        own = _writable(start(t))
        return own if is_made(own) else own.requires_grad_()

    # Tensors of inference mode could not be trained after it.
    with torch.inference_mode(False):
        return params.map(
            lambda a: a.replace(
                {k: train(t) for k, t in a.train.items()},
                {k: _writable(t) for k, t in a.fixed.items()},
            )
        )


def _writable(t: Tensor) -> Tensor:
    return t.clone() if t.is_inference() else t


def is_made(leaf: Tensor) -> bool:
    """Whether a leaf was computed from others that are differentiated: by a hypernetwork, say.

    Under torch.func, whose inputs look like leaves, every wrapped tensor counts as made.
    """
    if leaf.grad_fn is not None:
        return True
    return not torch.compiler.is_compiling() and torch.func.debug_unwrap(leaf) is not leaf


def cut(leaf: Tensor) -> Tensor:
    """The values of a leaf, without its history unless it was made (:func:`is_made`)."""
    return leaf if is_made(leaf) else leaf.detach()


def scale(params: P, c: float | Tensor | Sequence[float]) -> P:
    """Sets the runtime strength: 0 is the base, 1 the trained adapter, negative steers back.

    Args:
        params: Params, a Stack, or one that :func:`fadapt.select` made; an earlier strength is
            replaced.
        c: a finite number, or a 0-d floating tensor (which may require grad). For a Stack of N a
            list of N of them, or a floating tensor (N,): one for each adapter, or for each row.

    Raises:
        ConfigError: something else than finite numbers, or not one for each adapter.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Linear(4, 3)
        >>> params = fadapt.init(model, fadapt.LoRA(r=2))
        >>> float(fadapt.scale(params, 0.5)["weight"].fixed["strength"])
        0.5
        >>> stack = fadapt.scale(fadapt.stack([params, params]), [1.0, -1.0])
        >>> [float(p["weight"].fixed["strength"]) for p in fadapt.unstack(stack)]
        [1.0, -1.0]
    """
    _check_tree(params, "scale(params, c)")
    if isinstance(params, Params):
        params.check_one()
        value = strength_value(c)
        return params.map(lambda adapter: set_strength(adapter, value))  # type: ignore[return-value]
    return params.scaled(c)  # type: ignore[return-value]


def set_strength(adapter: Any, value: float | Tensor) -> Any:
    """The adapter with a strength of at least float32, on its own device."""
    like = next(iter(adapter.leaves.values()), torch.empty(()))
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(value, Tensor):
        value = value.to(like.device, torch.promote_types(dtype, value.dtype))
    else:
        value = torch.tensor(value, dtype=dtype, device=like.device)
    return adapter.replace(fixed={**adapter.fixed, STRENGTH: value})


def strength_value(c: Any) -> float | Tensor:
    """A strength, after its check."""
    if isinstance(c, Tensor):
        if c.dim() or c.dtype not in _STRENGTHS:
            raise ConfigError(
                f"a strength is a number or a 0-d floating tensor, got {c.dtype} of shape "
                f"{list(c.shape)}; {_PER_ADAPTER}"
            )
        if c.is_meta:
            raise ConfigError("a strength on the meta device has no value; write a number")
        # The values of other tensors cannot be looked at, or only by waiting for a GPU.
        if not is_made(c) and c.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_finite(float(c.detach()), c)
        return c
    if not isinstance(c, Real) or isinstance(c, bool):
        raise ConfigError(
            f"a strength is a number or a 0-d floating tensor, got {c!r:.80}; {_PER_ADAPTER}"
        )
    try:
        value = float(c)
    except OverflowError:
        value = math.inf
    _check_finite(value, c)
    return value


def _check_finite(value: float, given: Any) -> None:
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise ConfigError(f"a strength must be a finite number in float32, got {given!r:.80}")


_STRENGTHS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PER_ADAPTER = "strengths of several adapters: scale(stack, [c0, c1, ...])"
_HALVES = "pass the two halves that one split() returned: join(train, rest)"


def _check_tree(params: Any, call: str) -> None:
    if not all(hasattr(type(params), name) for name in ("split", "join", "trainable")) or not (
        hasattr(type(params), "map")
    ):
        raise ConfigError(
            f"expected Params or a Stack, got {type(params).__name__}; write fadapt.{call}"
        )


def _check_joined(name: str, adapter: Adapter, leaves: Any, awaited: Any) -> None:
    """Refuses leaves that are not those of the site that they are joined to."""
    if not isinstance(leaves, Mapping):
        raise ConfigError(f"join: {name} holds {leaves!r:.80}, not its leaves; {_HALVES}")
    if odd := [k for k, t in leaves.items() if not isinstance(t, Tensor)]:
        raise ConfigError(f"join: {name}: {odd[0]} is {leaves[odd[0]]!r:.80}; {_HALVES}")
    if awaited is not None:
        missing, extra = awaited.keys() - leaves.keys(), leaves.keys() - awaited.keys()
        if missing or extra:
            raise ConfigError(
                f"join: {name} lacks the leaves {_some(missing)} and has the unknown leaves "
                f"{_some(extra)}; {_HALVES}"
            )
        for k, t in leaves.items():
            if t.shape != awaited[k]:
                raise ConfigError(
                    f"join: {name}: {k} has the shape {list(t.shape)}, {list(awaited[k])} is "
                    f"expected; {_HALVES}, or stack several: fadapt.stack([join(t, rest), ...])"
                )
    if odd := [k for k, t in leaves.items() if t.dtype not in _STRENGTHS]:
        raise ConfigError(f"join: {name}: {odd[0]} is {leaves[odd[0]].dtype}; leaves are floating")
    whole = {**leaves, **{k: t for k, t in adapter.fixed.items() if k != STRENGTH}}
    exact = adapter.method.keep_fp32
    dtypes = {t.dtype for k, t in whole.items() if k not in exact and t.is_floating_point()}
    devices = {t.device for t in whole.values()}
    if len(dtypes) > 1 or len(devices) > 1:
        raise ConfigError(
            f"join: the leaves of {name} are {sorted(map(str, dtypes))} on "
            f"{sorted(map(str, devices))}; move them all: params.to(device, dtype), before split()"
        )


def _some(names: set[str] | Any) -> list[str]:
    return sorted(map(str, names))[:3]


def destination(
    where: tuple[Any, ...], device: Any, dtype: Any
) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and dtype that the arguments of ``to`` name.

    Raises:
        ConfigError: something else than a device and a floating dtype.
    """
    for given in where:
        if isinstance(given, torch.dtype) and dtype is None:
            dtype = given
        elif isinstance(given, Tensor) and len(where) == 1 and device is None and dtype is None:
            device, dtype = given.device, given.dtype
        elif isinstance(given, (str, int, torch.device)) and device is None:
            device = given
        else:
            raise ConfigError(f"to{where!r}: write params.to(device, dtype)")
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in _STRENGTHS):
        raise ConfigError(f"adapters are float16, bfloat16, float32 or float64, got {dtype!r}")
    try:
        if device is not None:
            device = torch.empty(0, device=device).device
        return device, dtype
    # Without CUDA, torch says so by an AssertionError.
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{device!r:.80} is no device: {error}") from error


def project(params: Params) -> Params:
    """Moves the trainable leaves into their methods' constraints; call it after an optimiser step.

    The leaves are overwritten in place, as an optimiser does, and ``params`` is returned. For a
    stack write ``stack.map(fadapt.project)``.

    Args:
        params: from :func:`fadapt.init`.

    Raises:
        ConfigError: something else than Params, or leaves that a graph made, which are not an
            optimiser's to write to.

    Example:
        >>> params = fadapt.init(model, fadapt.DeLoRA(r=2))
        >>> optimizer = torch.optim.AdamW(fadapt.trainable(params), lr=1e-3)
        >>> fadapt.run(model, params, x, loss_fn).backward()
        >>> optimizer.step()
        >>> _ = fadapt.project(params)
    """
    _check_tree(params, "project(params)")
    if not isinstance(params, Params):
        raise ConfigError(
            "the members of a stack are projected group by group: write stack.map(fadapt.project)"
        )
    params.check_whole()
    if any(is_made(leaf) for leaf in params.trainable()):
        raise ConfigError(
            "project writes to the leaves of an optimiser; these were computed from other tensors"
        )
    with torch.no_grad():
        for adapter in params.values():
            for name, leaf in adapter.projected().items():
                if leaf is not adapter.train[name]:
                    adapter.train[name].copy_(leaf)
    return params


def _flatten_params(p: Params) -> tuple[list[Adapter], tuple[tuple[str, ...], Note]]:
    record = p.config, p.coverage, p._awaited
    return list(p._adapters.values()), (tuple(p._adapters), Note(record))


def _unflatten_params(aux: Any, children: Any) -> Params:
    names, note = aux
    config, covered, awaited = note.value
    return Params(dict(zip(names, children, strict=True)), config, covered, awaited=awaited)


register_node(Params, _flatten_params, _unflatten_params)
