"""Chain: several methods on one site; each adapts the map that the one before it made.

f_0 is the frozen layer and f_k the map f_{k-1} adapted by the k-th method, whose ``base`` is
f_{k-1}. Leaves are those of the methods, prefixed "0.", "1.", ...
Identity at the start: every f_k is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..method import STRENGTH, Factors, Leaves, Method, increment_factors
from ..seeds import generator

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class Chain(Method):
    """Methods applied one over the other, innermost first.

    Args:
        methods: at least one method. Those whose constants come from the frozen weight's norms
            (DoRA) can only stand first.
    """

    methods: tuple[Method, ...] = ()

    owns_strength: ClassVar[bool] = True  # which it hands to its methods

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        require(bool(self.methods), "Chain needs at least one method: Chain((LoRA(), IA3()))")
        for method in self.methods:
            require(isinstance(method, Method), f"Chain holds methods, got {method!r}")
        for method in self.methods[1:]:
            require(
                not method.needs_plain_base,
                f"{type(method).__name__} is defined by the frozen weight; put it first",
            )

    @property
    def keep_wide(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(f"{i}.{k}" for i, m in enumerate(self.methods) for k in m.keep_wide)

    @property
    def acts_on_bias(self) -> bool:  # type: ignore[override]
        return any(m.acts_on_bias for m in self.methods)

    @property
    def has_shift(self) -> bool:
        return any(m.has_shift for m in self.methods)

    @property
    def broadcasts(self) -> bool:  # type: ignore[override]
        return all(m.broadcasts for m in self.methods)

    @property
    def statistic(self) -> tuple | None:  # type: ignore[override]
        parts = tuple(m.statistic for m in self.methods)
        return parts if any(part is not None for part in parts) else None

    def check(self, site: Site) -> None:
        for method in self.methods:
            method.check(site)

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        train: Leaves = {}
        fixed: Leaves = {}
        for i, method in enumerate(self.methods):
            own = generator(rng.initial_seed(), i)
            parts = method.init(site, own, None if stat is None else stat[i])
            for whole, part in zip((train, fixed), parts, strict=True):
                whole.update({f"{i}.{k}": t for k, t in part.items()})
        return train, fixed

    def true_gradient(self) -> Chain:
        return Chain(tuple(m.true_gradient() for m in self.methods))

    def project(self, train: Leaves) -> Leaves:
        return {
            f"{i}.{k}": t
            for i, method in enumerate(self.methods)
            for k, t in method.project(self._part(train, i)).items()
        }

    def enter(self, p: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Any]:
        saved = []
        for i in reversed(range(len(self.methods))):
            x, keep = self.methods[i].enter(self._part(p, i), x)
            saved.append(keep)
        return x, tuple(reversed(saved))

    def leave(self, p: Mapping[str, Tensor], saved: Any, y: Tensor, base: LinearMap) -> Tensor:
        for i, method in enumerate(self.methods):
            part = self._part(p, i)
            y = method.leave(part, saved[i], y, base)
            base = AdaptedMap(method, part, base)
        return y

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        pairs = []
        for i, method in enumerate(self.methods):
            part = self._part(p, i)
            pairs.append(increment_factors(method, part, base))
            base = AdaptedMap(method, part, base)
        if any(pair is None for pair in pairs):
            return None
        downs, ups = zip(*(pair for pair in pairs if pair), strict=True)
        return torch.cat(downs, -2), torch.cat(ups, -1)

    def _part(self, p: Mapping[str, Tensor], i: int) -> Leaves:
        prefix = f"{i}."
        part = {k[len(prefix) :]: t for k, t in p.items() if k.startswith(prefix)}
        if STRENGTH in p:
            part[STRENGTH] = p[STRENGTH]
        return part


class AdaptedMap:
    """An adapted map as the base of the next method: what makes composition closed."""

    def __init__(self, method: Method, p: Mapping[str, Tensor], base: LinearMap):
        self._method, self._p, self._base = method, p, base

    @property
    def bias(self) -> Tensor | None:
        if self._base.bias is None or not self._method.acts_on_bias:
            return self._base.bias
        return self(self._zero())[0]

    def __call__(self, x: Tensor) -> Tensor:
        return self._method(self._p, x, self._base)

    def linear(self, z: Tensor) -> Tensor:
        y = self(z)
        return y if self.bias is None else y - self(self._zero()).to(y.dtype)

    def weight(self) -> Tensor:
        return self._method.dense(self._p, self._base)[0]

    def _zero(self) -> Tensor:
        weight = self._base.weight()
        return weight.new_zeros(1, weight.shape[1])
