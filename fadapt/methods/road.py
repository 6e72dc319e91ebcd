"""RoAd: y' = R y, bias included, with R made of scaled 2 x 2 rotations.

Each group of G outputs pairs j with j + G/2. With rot(y)_j = -y_{j+G/2}, rot(y)_{j+G/2} = y_j,
    R y = (1 + a₁) cos θ₁ ∘ y + (1 + a₂) sin θ₂ ∘ rot(y).
Trainable: theta and a = alpha - 1, zero.
    variant 1: one θ and a per pair, out/2 each.               Count: out.
    variant 2: one θ and a per output, out each.               Count: 2 out.
    variant 4: apart for cosine and sine, 2 out each, stored (groups, 2, G). Count: 4 out.
Evaluated as the increment [a cos θ - 2 sin²(θ/2)] ∘ y + [(1 + a) sin θ] ∘ rot(y).
Identity at the start: both brackets are exactly 0 at θ = a = 0.
The bias is rotated with the output, and weight and bias change by a full-rank factor. The paper
pairs neighbours; the pairs here are those of PEFT's files (a permutation of the outputs).

Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
Composability", arXiv 2409.00119, eq. 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import require
from ..method import Leaves, Method

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class RoAd(Method):
    """Rotation and scaling of pairs of outputs.

    Args:
        variant: 1, 2 or 4.
        group_size: G, even; divides the number of outputs.

    Example:
        >>> params = fadapt.init(model, fadapt.RoAd(variant=2, group_size=4))
        >>> sorted(params["0.weight"].train)
        ['a', 'theta']
    """

    variant: Literal[1, 2, 4] = 1
    group_size: int = 64

    reads_input: ClassVar[bool] = False

    @property
    def acts_on_bias(self) -> bool:
        return True

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        require(
            self.group_size >= 2 and self.group_size % 2 == 0,
            f"group_size must be positive and even, got {self.group_size}",
        )

    def check(self, site: Site) -> None:
        n = site.out_features
        require(n % 2 == 0, f"RoAd pairs the outputs, and {n} outputs is an odd number")
        fits = max(g for g in range(2, min(self.group_size, n) + 1, 2) if n % g == 0)
        require(
            n % self.group_size == 0,
            f"group_size={self.group_size} does not divide the {n} outputs; "
            f"write group_size={fits}",
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        count = site.out_features * self.variant // 2
        return {"theta": site.zeros(count), "a": site.zeros(count)}, {}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        gain, turn = self._gain_and_turn(p)
        upper, lower = y.unflatten(-1, (-1, 2, self.group_size // 2)).unbind(-2)
        gain_upper, gain_lower = gain.to(y.dtype).unbind(-2)
        turn_upper, turn_lower = turn.to(y.dtype).unbind(-2)
        both = [
            gain_upper * upper - turn_upper * lower,
            gain_lower * lower + turn_lower * upper,
        ]
        return torch.stack(both, -2).flatten(-3)

    def _gain_and_turn(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The factors of y and of rot(y): (..., groups, 2, group_size / 2) each."""
        half = self.group_size // 2
        wide = torch.promote_types(p["theta"].dtype, torch.float32)
        theta, a = p["theta"].to(wide), p["a"].to(wide)
        if self.variant == 4:
            (cos_theta, sin_theta), (cos_a, sin_a) = (
                t.unflatten(-1, (-1, 2, 2, half)).unbind(-3) for t in (theta, a)
            )
        else:
            rows = 1 if self.variant == 1 else 2
            cos_theta, cos_a = (
                t.unflatten(-1, (-1, rows, half)).expand(*t.shape[:-1], -1, 2, -1)
                for t in (theta, a)
            )
            sin_theta, sin_a = cos_theta, cos_a
        gain = cos_a * cos_theta.cos() - 2 * (cos_theta / 2).sin().square()
        return gain, (1 + sin_a) * sin_theta.sin()
