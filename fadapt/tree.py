"""Params: the explicit pytree of adapters, and its differentiable part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import optree
import torch

# torch.func flattens its arguments with this registry; torch has no public name for it.
import torch.utils._pytree as torch_pytree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE
from torch import Tensor

from .errors import ConfigError
from .linear_map import DenseMap, LinearMap
from .method import STRENGTH, Leaves, Method
from .sites import Site

if TYPE_CHECKING:
    from .config import Config
    from .stack import Stack

P = TypeVar("P", "Params", "Stack")
Train = dict[str, Leaves]
"""What :func:`split` returns first: {site name: {leaf name: tensor}}."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One site's adapter: static site and method, trainable and fixed leaves.

    Attributes:
        site: where it belongs; static.
        method: its hyper-parameters; static.
        train: trainable leaves, which start at the increment zero or at random.
        fixed: constants the method needs (row norms, SVD factors) and the runtime strength.
    """

    site: Site
    method: Method
    train: Leaves
    fixed: Leaves

    @property
    def leaves(self) -> Leaves:
        """Trainable and fixed leaves together, as a method's functions receive them."""
        return {**self.train, **self.fixed}

    @property
    def acts_on_bias(self) -> bool:
        return self.method.acts_on_bias

    @property
    def device(self) -> torch.device | None:
        """Where the leaves are; None without leaves."""
        return next((t.device for t in self.leaves.values()), None)

    def __str__(self) -> str:
        return type(self.method).__name__

    def __call__(self, x: Tensor, base: LinearMap) -> Tensor:
        """The adapted map on (..., in_features).

        The base sees x in its own shape, so its kernel and rounding are those of the plain layer.
        """
        p = self.leaves
        if self.method.broadcasts:
            return self.method(p, x, base)
        rows = x.reshape(-1, x.shape[-1])
        shifted, saved = self.method.enter(p, rows)
        y = base(x if shifted is rows else shifted.reshape(x.shape))
        return self.method.leave(p, saved, y, base)

    def dense(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The adapted weight, in its stored layout, and bias; in the dtype of ``weight``.

        Pass float32 or float64 tensors; the leaves are cast to them.
        """
        p = {k: t.to(weight.dtype) for k, t in self.leaves.items()}
        transposed = self.site.transposed
        new_weight, new_bias = self.method.dense(p, DenseMap(weight, bias, transposed))
        return (new_weight.mT if transposed else new_weight), new_bias

    def replace(self, train: Leaves | None = None, fixed: Leaves | None = None) -> Self:
        """A copy with other leaves."""
        return replace(
            self,
            train=self.train if train is None else _sorted(train),
            fixed=self.fixed if fixed is None else _sorted(fixed),
        )


class Params(Mapping[str, Adapter]):
    """An immutable mapping {site name: Adapter}, sorted by name; a pytree.

    Registered in torch's pytree and in optree's global namespace, so torch.func and
    ``optree.tree_map`` take it as it is. ``config`` is kept for the record and is not compared.
    """

    __slots__ = ("_adapters", "config")

    def __init__(self, adapters: Mapping[str, Adapter], config: Config | None = None):
        self._adapters: dict[str, Adapter] = _sorted(adapters)
        self.config = config

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
        return Params({name: fn(a) for name, a in self.items()}, self.config)

    def split(self) -> tuple[Train, Params]:
        """See :func:`split`."""
        train = {name: dict(a.train) for name, a in self.items()}
        return train, self.map(lambda a: a.replace(train={}))

    def join(self, train: Mapping[str, Mapping[str, Tensor]]) -> Params:
        """See :func:`join`."""
        if train.keys() != self.keys():
            missing, extra = sorted(self.keys() - train.keys()), sorted(train.keys() - self.keys())
            raise ConfigError(
                f"join: train lacks the sites {missing[:3]} and has the unknown sites {extra[:3]}; "
                "pass the two halves that one split() returned"
            )
        return Params({k: a.replace(dict(train[k])) for k, a in self.items()}, self.config)

    def trainable(self) -> list[Tensor]:
        """See :func:`trainable`."""
        return [leaf for _, adapter in self.items() for leaf in adapter.train.values()]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Params:
        """A copy on another device or in another adapter dtype, as new trainable leaves.

        Leaves that a method declares ``keep_wide`` keep their dtype.
        """

        def move(adapter: Adapter) -> Adapter:
            exact = adapter.method.keep_wide | {STRENGTH}
            return adapter.replace(
                train={k: t.detach().to(device, dtype) for k, t in adapter.train.items()},
                fixed={
                    k: t.to(device, None if k in exact else dtype) for k, t in adapter.fixed.items()
                },
            )

        return trainable_leaves(self.map(move))

    def __repr__(self) -> str:
        methods = Counter(repr(a.method) for _, a in self.items())
        what = ", ".join(f"{method} x {n}" for method, n in methods.items()) or "empty"
        return f"Params({what}; {sum(t.numel() for t in trainable(self)):,} trainable)"


def split(params: P) -> tuple[Any, P]:
    """Separates what is differentiated from what is not.

    Args:
        params: Params, or a Stack.

    Returns:
        ``train``, a plain nested dict {site: {leaf: tensor}} of floating tensors to differentiate,
        stack or optimise (for a Stack, one such dict per group); and ``rest``, the params without
        them, for :func:`join`.
    """
    return params.split()  # type: ignore[return-value]


def join(train: Mapping[str, Any], rest: P) -> P:
    """Puts back what :func:`split` took apart.

    Raises:
        ConfigError: the sites of ``train`` are not those of ``rest``.
    """
    return rest.join(train)


def trainable(params: Params | Stack) -> list[Tensor]:
    """The trainable leaves in a fixed order, for an optimiser."""
    return params.trainable()


def trainable_leaves(params: Params) -> Params:
    """The same values with fresh trainable leaves: detached, requires_grad=True."""
    return params.map(
        lambda a: a.replace({k: t.detach().requires_grad_() for k, t in a.train.items()})
    )


def scale(params: Params, c: float | Tensor) -> Params:
    """Sets the runtime strength: 0 is the base, 1 the trained adapter, negative steers back.

    Args:
        params: any params; an earlier strength is replaced.
        c: a number or a 0-d tensor (which may require grad).
    """

    def set_strength(adapter: Adapter) -> Adapter:
        like = next(iter(adapter.leaves.values()))
        value = torch.as_tensor(c, device=like.device)
        if not value.is_floating_point():
            value = value.to(torch.float32)
        return adapter.replace(fixed={**adapter.fixed, STRENGTH: value})

    return params.map(set_strength)


def project(params: Params) -> Params:
    """Moves the trainable leaves into their methods' constraints; call it after an optimiser step.

    The leaves are overwritten in place, as an optimiser does, and ``params`` is returned.
    """
    with torch.no_grad():
        for adapter in params.values():
            for name, leaf in adapter.method.project(adapter.train).items():
                if leaf is not adapter.train[name]:
                    adapter.train[name].copy_(leaf)
    return params


def _sorted(items: Mapping[str, Any]) -> dict[str, Any]:
    # torch's pytree keeps a dict's insertion order, optree sorts it: sorted keys agree in both.
    return {k: items[k] for k in sorted(items)}


class Note:
    """Carries a value through a treespec without taking part in its comparison."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note)

    def __hash__(self) -> int:
        return 0


def _flatten_adapter(a: Adapter) -> tuple[tuple[Leaves, Leaves], tuple[Site, Method]]:
    return (a.train, a.fixed), (a.site, a.method)


def _unflatten_adapter(aux: Any, children: Any) -> Adapter:
    return Adapter(*aux, *children)


def _flatten_params(p: Params) -> tuple[list[Adapter], tuple[tuple[str, ...], Note]]:
    return list(p._adapters.values()), (tuple(p._adapters), Note(p.config))


def _unflatten_params(aux: Any, children: Any) -> Params:
    names, note = aux
    return Params(dict(zip(names, children, strict=True)), note.value)


def register_node(
    cls: type, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]
) -> None:
    """Registers a class in optree and in torch's pytree; ``unflatten(aux, children)``."""
    optree.register_pytree_node(cls, flatten, unflatten, namespace=GLOBAL_NAMESPACE)
    torch_pytree.register_pytree_node(cls, flatten, lambda children, aux: unflatten(aux, children))


register_node(Adapter, _flatten_adapter, _unflatten_adapter)
register_node(Params, _flatten_params, _unflatten_params)
