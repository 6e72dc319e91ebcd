"""Sum: several methods side by side on one site; their increments add up, without cross terms.

f(x) = f_0(x) + Σ_i c_i (f_i(x) - f_0(x)), where f_0 is the frozen layer and f_i that layer adapted
by the i-th method alone. Leaves are those of the methods, prefixed "0.", "1.", ..., and fixed
numbers of each: "0.weight", its c_i, and "0.strength", its own runtime strength.
Identity at the start: every f_i is f_0.

``fadapt.combine`` makes it where increments of different kinds meet. Unlike in a Chain, no method
sees another's map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..adapted_map import adapt_input, adapt_output, check_site, start
from ..errors import require
from ..method import STRENGTH, Leaves, Method
from ..seeds import generator

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView

WEIGHT = "weight"


@dataclass(frozen=True)
class Sum(Method):
    """Methods applied side by side, their increments added.

    Args:
        methods: at least one method.

    Example:
        >>> params = fadapt.init(model, fadapt.Sum((fadapt.LoRA(r=2), fadapt.IA3())))
        >>> torch.equal(fadapt.apply(model, params, x), model(x))
        True
    """

    methods: tuple[Method, ...] = ()

    needs_plain_base: ClassVar[bool] = True  # of whichever it holds

    def __post_init__(self) -> None:
        require(bool(self.methods), "Sum needs at least one method: Sum((LoRA(), IA3()))")

    @property
    def keep_fp32(self) -> frozenset[str]:
        own = {f"{i}.{k}" for i in range(len(self.methods)) for k in (WEIGHT, STRENGTH)}
        return frozenset(
            own | {f"{i}.{k}" for i, m in enumerate(self.methods) for k in m.keep_fp32}
        )

    @property
    def acts_on_bias(self) -> bool:
        return any(m.acts_on_bias for m in self.methods)

    @property
    def statistic(self) -> tuple | None:
        parts = tuple(m.statistic for m in self.methods)
        return parts if any(part is not None for part in parts) else None

    def check(self, site: Site) -> None:
        for method in self.methods:
            check_site(method, site)

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        train: Leaves = {}
        fixed: Leaves = {}
        for i, method in enumerate(self.methods):
            own = generator(rng.initial_seed(), i)
            parts = start(method, site, own, None if stat is None else stat[i])
            one = site.zeros() + 1
            numbers = {WEIGHT: one, STRENGTH: one.clone()}
            for whole, part in zip(
                (train, fixed), (parts[0], {**parts[1], **numbers}), strict=True
            ):
                whole.update({f"{i}.{k}": t for k, t in part.items()})
        return train, fixed

    def delta(
        self,
        p: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        base: LinearMap,
        training: bool = False,
    ) -> Tensor:
        total = torch.zeros_like(y)
        for i, method in enumerate(self.methods):
            own = self.part(p, i)
            weight = own.pop(WEIGHT)
            total = total + weight.to(y.dtype) * _increment(method, own, x, y, base, training)
        return total

    def project(self, train: Leaves) -> Leaves:
        return {
            f"{i}.{k}": t
            for i, method in enumerate(self.methods)
            for k, t in method.project(self.part(train, i)).items()
        }

    def true_gradient(self) -> Sum:
        return Sum(tuple(m.true_gradient() for m in self.methods))

    def part(self, p: Mapping[str, Tensor], i: int) -> Leaves:
        """The leaves of the i-th method."""
        prefix = f"{i}."
        return {k[len(prefix) :]: t for k, t in p.items() if k.startswith(prefix)}


def _increment(
    method: Method, p: Leaves, x: Tensor, y: Tensor, base: LinearMap, training: bool
) -> Tensor:
    """f_i(x) - f_0(x), from y = f_0(x)."""
    entered, saved = adapt_input(method, p, x)
    moved = y if entered is x else y + base.linear(entered - x)
    return adapt_output(method, p, saved, moved, base, training=training) - y
