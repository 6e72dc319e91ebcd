"""AntiPaSTO-ASVD: the gain of AntiPaSTO in activation-aware singular directions.

    Δ = ((u U) ∘ ELU(c g)) Uᵀ,   u = y - b = x Wᵀ,   W diag(√q) = U S Vtᵀ

with q_j = E[x_j²] + ε mean(E[x²]). Then S P = UᵀW for the reference's P = Vtᵀ diag(1/√q), so only U
is needed and nothing is divided by a small √q.
Trainable: g (r,) zero. Fixed: U (out, r), and UᵀW (r, in) where out > in. Count: r.
Statistic: the mean squares E[x_j²] (in,) of the layer's input. The damping is relative, so that
rescaled activations give the same U. The SVD is taken in float64.
Identity at the start: ELU(0) = 0. The bias is untouched.
Pitfalls: U belongs to the calibration data and is stored; calibrate before training, not after.

Clark 2026, arXiv 2601.07473; scaling after Yuan et al. 2023, "ASVD: Activation-aware Singular Value
Decomposition for Compressing Large Language Models", arXiv 2312.05821, with the root mean square
in place of its mean magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import require
from ..linalg import top_svd
from ..method import Leaves
from ..statistics.reduction import Statistic
from ..statistics.sums import SumSq
from ._svd_core import SpectralGain, calibrated, direction_leaves

if TYPE_CHECKING:
    from ..site import SiteView


@dataclass(frozen=True)
class AntiPaSTOASVD(SpectralGain):
    """A bounded gain on the singular directions of the activation-scaled weight.

    Args:
        r: number of directions, at most min(out, in).
        eps: damping relative to the mean square over all inputs, at least 0.
        suppress_only: keep g at or below 0, so that a strength c >= 0 only damps.

    Example:
        >>> params = fadapt.init(model, fadapt.AntiPaSTOASVD(r=4), [x, x])
        >>> sorted(params["0.weight"].train)
        ['g']
    """

    eps: float = 1e-3

    @property
    def statistic(self) -> Statistic:
        return Statistic(SumSq())

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.eps >= 0, f"eps must be at least 0, got {self.eps}")

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        return self.start(site, rng), direction_leaves(site, self.directions(site, stat))

    def directions(self, site: SiteView, stat: Any = None) -> Tensor:
        squares = calibrated(site, self, stat, (site.in_features,))
        scale = (squares + self.eps * squares.mean()).sqrt()
        return top_svd(site.weight(squares.dtype) * scale, self.r)[0].to(site.dtype)
