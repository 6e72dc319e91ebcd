"""Params: the explicit pytree of adapters, and its differentiable part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..method import STRENGTH, Leaves
from .adapter import Adapter, _sorted
from .pytree import Note, register_node

if TYPE_CHECKING:
    from ..config import Config


class Tree(Protocol):
    """What has a differentiable part: params, and stacks of them."""

    def split(self) -> tuple[Any, Any]: ...

    def join(self, train: Mapping[str, Any]) -> Any: ...

    def trainable(self) -> list[Tensor]: ...


P = TypeVar("P", bound=Tree)
Train = dict[str, Leaves]
"""What :func:`split` returns first: {site name: {leaf name: tensor}}."""


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


def trainable(params: Tree) -> list[Tensor]:
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


def _flatten_params(p: Params) -> tuple[list[Adapter], tuple[tuple[str, ...], Note]]:
    return list(p._adapters.values()), (tuple(p._adapters), Note(p.config))


def _unflatten_params(aux: Any, children: Any) -> Params:
    names, note = aux
    return Params(dict(zip(names, children, strict=True)), note.value)


register_node(Params, _flatten_params, _unflatten_params)
