"""KaSA: y' = y + s [x Aᵀ diag(d) Bᵀ - x A0ᵀ diag(d0) B0ᵀ],  s = alpha / r.

The paper cuts the r smallest singular triplets off W, as noise, and adds s B diag(d) A, whose
diagonal d is trained as a knowledge-aware spectrum. Here W stays as it is: with
W = ... + B0 diag(S) A0 for those r triplets and d0 = S / s, the cut is a part of the increment, so
W' = W - s B0 diag(d0) A0 + s B diag(d) A for any A, B, d, over a W that may be quantised.
Fixed: A0 (r, in), B0 (out, r) orthonormal, d0 (r,). Trainable: dA (r, in), dB (out, r), dd (r,),
zero, with A = A0 + dA, B = B0 + dB, d = d0 + dd. Count: r (in + out + 1).
Identity at the start, by construction:
    B diag(d) A - B0 diag(d0) A0 = B diag(d) dA + (dB diag(d) + B0 diag(dd)) A0,
in which every term has a factor dA, dB or dd. The bias is untouched. The increment has rank at most
2 r, so it is one LoRA of rank 2 r, which PEFT's form, over a base that it overwrites, is not.
Numerics: the triplets are stored, never recomputed.
Pitfalls: the paper starts at B = 0 and random d, which is W without its r smallest triplets and not
the base model; here what is trained starts as what is cut, and is orthonormal as the paper's
regulariser wants it: add beta |d|² + gamma (|BᵀB - I| + |A Aᵀ - I|) to the loss for its training.
Where W has rank below min(in, out), d0 is 0 there and A and B move from the second step on.

Wang et al. 2024, "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models",
arXiv 2412.06071, eq. 4 to 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..linalg import bottom_svd
from ..method import Factors, Leaves
from ._moved_factors import MovedFactors

if TYPE_CHECKING:
    from ..site import SiteView


@dataclass(frozen=True)
class KaSA(MovedFactors):
    """Trained singular triplets in the place of the weight's smallest ones.

    Args:
        r: rank, at least 1 and at most min(in_features, out_features).
        alpha: numerator of the scale alpha / r, positive.

    Example:
        >>> params = fadapt.init(model, fadapt.KaSA(r=2))
        >>> sorted(params["0.weight"].train)
        ['dA', 'dB', 'dd']
    """

    rank_axes: ClassVar[Mapping[str, int]] = {**MovedFactors.rank_axes, "dd": -1, "d0": -1}

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        u, s, v = bottom_svd(site.weight(), self.r)
        train, fixed = self.leaves(site, v.mT, u)
        d0 = (s / self.scaling).to(site.dtype)
        return {**train, "dd": site.zeros(self.r)}, {**fixed, "d0": d0}

    def _factors(self, p: Mapping[str, Tensor]) -> Factors:
        """[dA; A0] and [B diag(d), dB diag(d) + B0 diag(dd)]."""
        step, new = p["dd"], p["d0"] + p["dd"]
        down = torch.cat([p["dA"], p["A0"].expand_as(p["dA"])], -2)
        up = [(p["B0"] + p["dB"]) * new, p["dB"] * new + p["B0"] * step]
        return down, torch.cat(up, -1)

    def widened(self, r: int) -> KaSA:
        return replace(self, r=r, alpha=float(r))
