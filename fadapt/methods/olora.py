"""OLoRA: y' = y + s [(x dAᵀ) (B0 + dB)ᵀ + (x A0ᵀ) dBᵀ],  s = alpha / r.

Fixed: B0 (out, r), orthonormal columns, and A0 (r, in), upper triangular, the first r columns and
rows of the factors of W = Q R. With A = A0 + dA and B = B0 + dB this is W_res + s B A, where
W_res = W - s B0 A0; as in PiSSA the frozen W needs no residual copy and may be quantised.
Trainable: dA (r, in), dB (out, r), zero. Count: r (in + out).
Identity at the start: both products have a factor 0. The bias is untouched. The increment has rank
at most 2 r.
Numerics: the factors are stored, never recomputed; the signs of a row of R and of its column of Q
are arbitrary together, and here the diagonal of R is not negative. The order of W's inputs decides
which of its columns Q spans: Q R is not a decomposition by importance, other than an SVD.
Pitfall: s scales the start, too, so a large alpha moves more of W into the factors.

Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
arXiv 2406.01775, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..method import Leaves
from ._moved_factors import MovedFactors

if TYPE_CHECKING:
    from ..site import SiteView


@dataclass(frozen=True)
class OLoRA(MovedFactors):
    """LoRA that starts from the QR decomposition of the weight.

    Args:
        r: rank, at least 1 and at most min(in_features, out_features).
        alpha: numerator of the scale alpha / r, positive.

    Example:
        >>> params = fadapt.init(model, fadapt.OLoRA(r=2))
        >>> sorted(params["0.weight"].train)
        ['dA', 'dB']
    """

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        q, upper = torch.linalg.qr(site.weight())
        sign = torch.where(upper.diagonal()[: self.r] < 0, -1, 1).to(q.dtype)
        return self.leaves(site, sign.unsqueeze(1) * upper[: self.r], q[:, : self.r] * sign)
