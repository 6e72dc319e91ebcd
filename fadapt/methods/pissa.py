"""PiSSA: y' = y + s [(x dAᵀ) (B0 + dB)ᵀ + (x A0ᵀ) dBᵀ],  s = alpha / r.

With A = A0 + dA and B = B0 + dB this is the paper's W_res + s B A, where W_res = W - s B0 A0:
    s (B A - B0 A0) = s [(B0 + dB) dA + dB A0],
so the frozen W needs no residual copy and may be quantised.
Fixed: A0 = (S/s)^½ Vᵀ (r, in) and B0 = U (S/s)^½ (out, r) from the r largest singular triplets
W ≈ U S Vᵀ, so s B0 A0 is the top of W for any alpha. They are stored, never recomputed: singular
vectors are not unique. Trainable: dA (r, in), dB (out, r), zero. Count: r (in + out).
Identity at the start: both products have a factor 0. The bias is untouched.
Weight decay pulls towards the base model, not towards a W without its top. The increment has
rank at most 2 r.

Meng, Wang and Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of
Large Language Models", arXiv 2404.02948.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import require
from ..linalg import random_svd, top_svd
from ..method import Leaves
from ._moved_factors import MovedFactors

if TYPE_CHECKING:
    from ..site import SiteView


@dataclass(frozen=True)
class PiSSA(MovedFactors):
    """LoRA that starts from the principal singular triplets of the weight.

    Args:
        r: rank, at least 1 and at most min(in_features, out_features).
        alpha: numerator of the scale alpha / r, positive.
        niter: None for an exact SVD; a number for a randomised one with that many power
            iterations, seeded like all initial values.

    Example:
        >>> params = fadapt.init(model, fadapt.PiSSA(r=2))
        >>> sorted(params["0.weight"].train)
        ['dA', 'dB']
    """

    niter: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.niter is None or 0 <= self.niter <= 1000,
            f"niter must be None (exact SVD) or from 0 to 1000, got {self.niter}; write niter=4",
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        w = site.weight()
        if self.niter is None:
            u, s, v = top_svd(w, self.r)
        else:
            u, s, v = random_svd(w, self.r, rng, self.niter)
        root = (s / self.scaling).sqrt()
        return self.leaves(site, (v * root).mT, u * root)
