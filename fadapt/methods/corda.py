"""CorDA: y' = y + s [(x dAᵀ) (B0 + dB)ᵀ + (x A0ᵀ) dBᵀ],  s = alpha / r.

C = E[x xᵀ] of the layer's input, scaled to mean(diag C) = 1 and damped, C + damping I; then
SVD(W C) = U Σ Vᵀ, so W = U Σ (Vᵀ C⁻¹). Of these triplets, "ipm" (instruction previewed; C from the
new task) adapts the r largest, "kpm" (knowledge preserved; C from data to be kept) the r smallest.
Fixed: B0 = U (Σ/s)^½ (out, r) and A0 = (Σ s)^-½ UᵀW (r, in). As UᵀW = Σ VᵀC⁻¹, this is the paper's
(Σ/s)^½ VᵀC⁻¹ without forming C⁻¹, and s B0 A0 is the selected part of W. Where Σ vanishes A0 is 0.
Trainable: dA (r, in), dB (out, r), zero. Count: r (in + out). As in PiSSA, W needs no residual.
Identity at the start: both products have a factor 0. The bias is untouched.
Numerics: float64 throughout, because kpm picks the worst determined directions; a Gram of W C would
square its condition number. The reference doubles a damping of 0.01 until ‖C C⁻¹ - I‖ < 0.05; in
float64, where the damped condition number is at most in / damping, the first value always does.
Pitfalls: the scale of C moves weight between A0 and B0, not their product; here it is fixed, so the
result does not depend on how the data were split into batches. "kpm" needs far more tokens than
inputs (about 128 times as many): directions that the data leave out count as knowledge-free.

Yang et al. 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
Task-Aware Parameter-Efficient Fine-tuning", arXiv 2406.05223, eq. 1 to 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..errors import require
from ..method import Leaves
from ..statistics.moments import Gram
from ..statistics.reduction import Statistic
from ._moved_factors import MovedFactors
from ._svd_core import calibrated

if TYPE_CHECKING:
    from ..site import SiteView


@dataclass(frozen=True)
class CorDA(MovedFactors):
    """LoRA started from singular triplets of W C, C the second moment of the layer's input.

    Args:
        r: rank, at least 1 and at most min(in_features, out_features).
        alpha: numerator of the scale alpha / r, positive.
        mode: "ipm" adapts the directions that matter most on the calibration data, "kpm" those that
            matter least.
        damping: added to the diagonal of C, relative to its mean; positive.

    Example:
        >>> params = fadapt.init(model, fadapt.CorDA(r=2), [x, x])
        >>> sorted(params["0.weight"].train)
        ['dA', 'dB']
    """

    mode: Literal["ipm", "kpm"] = "ipm"
    damping: float = 0.01

    @property
    def statistic(self) -> Statistic:
        return Statistic(Gram())

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.damping > 0, f"damping must be positive, got {self.damping}")

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        c = calibrated(site, self, stat, (site.in_features, site.in_features))
        w = site.weight(c.dtype)
        c = c / c.diagonal().mean()
        c.diagonal().add_(self.damping)
        u, s, _ = torch.linalg.svd(w @ c, full_matrices=False)
        pick = slice(None, self.r) if self.mode == "ipm" else slice(len(s) - self.r, None)
        u, sigma = u[:, pick], s[pick] / self.scaling
        tiny = torch.finfo(s.dtype).eps * len(s) * s[0]
        inverse = torch.where(s[pick] > tiny, sigma, torch.inf).rsqrt()
        a0 = inverse.unsqueeze(1) * (u.mT @ w) / self.scaling
        return self.leaves(site, a0, u * sigma.sqrt())
