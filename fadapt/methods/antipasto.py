"""AntiPaSTO gain: S_eff = S (1 + ELU(c g)) on r frozen singular directions of W.

    Δ = ((u U) ∘ ELU(c g)) Uᵀ,   u = y - b = x Wᵀ,   ΔW = U diag(S ∘ ELU(c g)) Vᵀ

Trainable: g (r,) zero. Fixed: U (out, r); also P = UᵀW = diag(S) Vᵀ (r, in) where out > in, and
then u U is computed as x Pᵀ. Count: r. W itself is never changed: no residual weight.
Gain: 1 + ELU(z) is e^z for z <= 0 and 1 + z above: positive, smooth, slope 1 at 0.
Directions: the top r singular ones, or select="wanda": the r largest of
score_k = S_k rms(x v_k) = rms of the output coordinate (u U)_k, indices in ascending order. Its
statistic is the uncentred second moment E[x xᵀ] (in, in) of the layer's input.
Identity at the start: ELU(0) = 0, so the increment is exactly 0. The bias is untouched.
Pitfalls: gains belong to the stored U; an SVD of the same weight on another device may order or
turn clustered directions otherwise. c -> -c is not the inverse gain. A query or key projection
before a per-head norm (Qwen3) has directions that the norm cancels.

Clark 2026, "AntiPaSTO: Self-Supervised Honesty Steering via Anti-Parallel Representations", arXiv
2601.07473; scores after Sun et al. 2023, "A Simple and Effective Pruning Approach for LLMs", arXiv
2306.11695.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..linalg import top_svd
from ..method import Leaves
from ..statistics.moments import Gram
from ..statistics.reduction import Statistic
from ._svd_core import SpectralGain, calibrated, direction_leaves

if TYPE_CHECKING:
    from ..site import SiteView


@dataclass(frozen=True)
class AntiPaSTO(SpectralGain):
    """A bounded gain on singular directions.

    Args:
        r: number of directions, at most min(out, in).
        select: None for the largest singular values, "wanda" for the largest rms output on the
            calibration data.
        suppress_only: keep g at or below 0, so that a strength c >= 0 only damps.

    Example:
        >>> params = fadapt.init(model, fadapt.AntiPaSTO(r=4))
        >>> sorted(params["0.weight"].train)
        ['g']
    """

    select: Literal["wanda"] | None = None

    @property
    def statistic(self) -> Statistic | None:
        return Statistic(Gram()) if self.select else None

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        return self.start(site, rng), direction_leaves(site, self.directions(site, stat))

    def directions(self, site: SiteView, stat: Any = None) -> Tensor:
        if self.select is None:
            return super().directions(site)
        moment = calibrated(site, self, stat, (site.in_features, site.in_features))
        u = top_svd(site.weight(), min(site.out_features, site.in_features))[0]
        projected = u.to(moment.dtype).mT @ site.weight(moment.dtype)
        score = ((projected @ moment) * projected).sum(-1)
        return u[:, score.argsort(descending=True, stable=True)[: self.r].sort().values]
