"""AntiPaSTO-CorDA: the gain of AntiPaSTO in the principal axes of the layer's own output.

    Δ = ((u U) ∘ ELU(c g)) Uᵀ,   u = y - b = x Wᵀ,   U = top eigenvectors of W C_ε Wᵀ

with C_ε = E[x xᵀ] + ε t I. This is the SVD of W C_ε^½ = U S Vtᵀ with P = Vtᵀ C_ε^-½, for which
S P = UᵀW, so neither the root nor its inverse is formed: W C_ε Wᵀ = E[u uᵀ] + ε t W Wᵀ.
Trainable: g (r,) zero. Fixed: U (out, r), and UᵀW (r, in) where out > in. Count: r.
Statistic: E[u uᵀ] (out, out), uncentred, of the bias-free output. The eigenvectors are taken in
float64. The damping is relative, t = tr E[u uᵀ] / tr W Wᵀ (the mean input variance, where inputs
are white), so that rescaled activations give the same U; ε alone decides where data say nothing.
Identity at the start: ELU(0) = 0. The bias is untouched.
Pitfalls: U belongs to the calibration data and is stored; calibrate before training, not after.

Clark 2026, arXiv 2601.07473; orientation after Yang et al. 2024, "CorDA: Context-Oriented
Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient Fine-tuning",
arXiv 2406.05223, with C^½ in place of its C: the best rank-r approximation of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import require
from ..method import Leaves
from ..statistics.moments import Gram
from ..statistics.reduction import Statistic
from ._svd_core import SpectralGain, calibrated, direction_leaves

if TYPE_CHECKING:
    from ..site import SiteView


@dataclass(frozen=True)
class AntiPaSTOCorDA(SpectralGain):
    """A bounded gain on the principal axes of the layer's output.

    Args:
        r: number of directions, at most min(out, in).
        eps: damping relative to the mean input variance, at least 0.
        suppress_only: keep g at or below 0, so that a strength c >= 0 only damps.

    Example:
        >>> params = fadapt.init(model, fadapt.AntiPaSTOCorDA(r=4), [x, x])
        >>> sorted(params["0.weight"].train)
        ['g']
    """

    eps: float = 1e-3

    @property
    def statistic(self) -> Statistic:
        return Statistic(Gram(), "out")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.eps >= 0, f"eps must be at least 0, got {self.eps}")

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        return self.start(site, rng), direction_leaves(site, self.directions(site, stat))

    def directions(self, site: SiteView, stat: Any = None) -> Tensor:
        moment = calibrated(site, self, stat, (site.out_features, site.out_features))
        weight = site.weight(moment.dtype)
        plain = weight @ weight.mT
        norm = plain.trace()
        # A zero weight has no output to damp.
        ridge = self.eps * moment.trace() / torch.where(norm > 0, norm, 1)
        axes = torch.linalg.eigh(moment + ridge * plain).eigenvectors.flip(-1)[:, : self.r]
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        return (axes * torch.where(largest < 0, -1, 1)).to(site.dtype)
