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
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..adapted_map import Compound, adapt_input, adapt_output
from ..errors import require
from ..method import STRENGTH, Leaves, Method

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap

WEIGHT = "weight"


@dataclass(frozen=True)
class Sum(Compound):
    """Methods applied side by side, their increments added.

    Args:
        methods: at least one method.

    Example:
        >>> params = fadapt.init(model, fadapt.Sum((fadapt.LoRA(r=2), fadapt.IA3())))
        >>> torch.equal(fadapt.apply(model, params, x), model(x))
        True
    """

    methods: tuple[Method, ...] = ()

    numbers: ClassVar[tuple[str, ...]] = (WEIGHT, STRENGTH)
    needs_plain_base: ClassVar[bool] = True  # of whichever it holds

    def __post_init__(self) -> None:
        require(bool(self.methods), "Sum needs at least one method: Sum((LoRA(), IA3()))")

    def delta(
        self,
        p: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        base: LinearMap,
        training: bool = False,
        draw: Tensor | None = None,
    ) -> Tensor:
        total = torch.zeros_like(y)
        for i, method in enumerate(self.methods):
            own = self.part(p, i)
            weight = own.pop(WEIGHT)
            total = total + weight.to(y.dtype) * _increment(method, own, x, y, base, training, draw)
        return total

    def true_gradient(self) -> Sum:
        return Sum(tuple(m.true_gradient() for m in self.methods))


def _increment(
    method: Method,
    p: Leaves,
    x: Tensor,
    y: Tensor,
    base: LinearMap,
    training: bool,
    draw: Tensor | None,
) -> Tensor:
    """f_i(x) - f_0(x), from y = f_0(x)."""
    entered, saved = adapt_input(method, p, x)
    moved = y if entered is x else y + base.linear(entered - x)
    return adapt_output(method, p, saved, moved, base, "", training, draw) - y
