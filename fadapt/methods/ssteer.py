"""S-steer: contrastive steering of singular directions, without training.

    Δ = c ((u U) ∘ d) Uᵀ,   u = y - b = x Wᵀ,   ΔW = c U diag(S ∘ d) Vᵀ

a linear gain 1 + c d on the singular directions, with
    d = normalize(√S ∘ Uᵀ mean(z⁺ - z⁻))
over pairs of layer outputs z⁺, z⁻ (the last token of a prompt that shows the trait, and of one that
does not), after turning every u_k towards the majority: where u_k · (z⁺ - z⁻) > 0 in less than half
of the pairs, u_k and with it d_k change sign. The products u_k u_kᵀ do not.
Trainable: none. Fixed: U (out, r), d (r,), and P = UᵀW (r, in) where out > in. Count: 0.
Statistic: the mean of z⁺ - z⁻ and the majority's signs. Usual targets: o_proj, down_proj.
Start: nothing is trained, so fresh params steer at full strength: the one method that does not
start as the identity. ``fadapt.scale(params, 0)`` is exactly the base, and negative strengths steer
the other way. The bias is untouched.
Pitfalls: choose c by the coherence of the output; it is not calibrated.

Clark 2026, the method of the author's ssteer-eval-aware and steering-lite; a linear form of the
gain in AntiPaSTO, arXiv 2601.07473.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..errors import CalibrationError, require
from ..method import Factors, Leaves, Method
from ..statistics.pairs import PairedSums, Pairs
from ..statistics.reduction import Statistic
from ._ranks import check_rank
from ._svd_core import (
    calibrated,
    coefficient,
    coordinates,
    core_factors,
    direction_leaves,
)

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class SSteer(Method):
    """Training-free contrastive steering.

    Args:
        r: number of singular directions; None for all min(out, in).

    Example:
        >>> pairs = [({"input": x + 1}, {"input": x - 1})]
        >>> params = fadapt.init(model, {"0.weight": fadapt.SSteer(r=2)}, pairs)
        >>> less = fadapt.scale(params, 0.5)
    """

    r: int | None = None

    reads_input: ClassVar[bool] = False
    owns_strength: ClassVar[bool] = True
    needs_plain_base: ClassVar[bool] = True

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        require(self.r is None or self.r >= 1, f"r must be None or at least 1, got {self.r}")

    def check(self, site: Site) -> None:
        if self.r is not None:
            check_rank(site, "r", self.r)

    @property
    def starts_at_identity(self) -> bool:
        return False

    @property
    def statistic(self) -> Statistic:
        return Statistic(PairedSums(self.r), "out")

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        pairs = stat.difference if isinstance(stat, Pairs) else stat
        difference = calibrated(site, self, pairs, (site.out_features,))
        wide = difference.dtype
        u = stat.basis.to(site.device, wide)
        s = (u.mT @ site.weight(wide)).norm(dim=-1)
        d = stat.majority.to(u) * s.sqrt() * (difference @ u)
        norm = d.norm()
        if norm == 0:
            raise CalibrationError(
                f"{site.name}: SSteer found no mean difference over {stat.count} pairs along the "
                f"{u.shape[1]} singular directions; use pairs that differ in the trait, or a "
                "larger r"
            )
        fixed = {"d": d / norm, **direction_leaves(site, u.to(site.dtype))}
        return {}, {k: t.to(site.dtype) for k, t in fixed.items()}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        rows, into = coordinates(p, x, y, base)
        return ((rows @ into) * (coefficient(self, p, p["d"]) * p["d"])) @ p["U"].mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        return core_factors(self, p, base)
