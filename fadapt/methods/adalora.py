"""AdaLoRA: y' = y + s ((x Aᵀ) ∘ E) Bᵀ,  s = alpha / (r + 1e-5).

The increment s B diag(E) A in the form of an SVD, of which unimportant triplets are cut.
Trainable: A (r, in) and B (out, r), normal with deviation 0.02, E (r,) zero. Count:
r (in + out + 1).
Identity at the start: E = 0, so the increment is exactly 0. The bias is untouched. The increment
has rank at most r; a triplet whose E is 0 adds nothing.
Budget: between steps :class:`fadapt.RankBudget` sets the E of the less important triplets of all
sites to 0; without it AdaLoRA runs at its fixed rank r. A cut triplet keeps its A and B and may
come back while the budget falls.
Numerics: the gradient of A and B is 0 until E has moved, and small as E is; rates are higher than
LoRA's.
Pitfall: the paper's regulariser |A Aᵀ - I|² + |BᵀB - I|² belongs into the loss, where triplets are
to be orthogonal.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv 2303.10512.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..method import Factors, Leaves
from .lora import LoRA

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView

OFFSET = 1e-5
"""Added to the rank in the scale, as in the files of others."""


@dataclass(frozen=True)
class AdaLoRA(LoRA):
    """LoRA as a trained SVD, whose triplets :class:`fadapt.RankBudget` can cut.

    Args:
        r: rank at the start, at least 1.
        alpha: numerator of the scale alpha / (r + 1e-5).
        dropout: the share of the input's entries that A does not see in training mode.

    Example:
        >>> params = fadapt.init(model, fadapt.AdaLoRA(r=4))
        >>> sorted(params["0.weight"].train)
        ['A', 'B', 'E']
    """

    r: int = 12

    rank_axes: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1, "E": -1}

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r + OFFSET)

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        a = site.normal(rng, (self.r, site.in_features), 0.02)
        b = site.normal(rng, (site.out_features, self.r), 0.02)
        return {"A": a, "B": b, "E": site.zeros(self.r)}, {}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return self.scaled(p, (x @ p["A"].mT) * p["E"]) @ p["B"].mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        return p["A"], self.scaled(p, p["B"] * p["E"])

    def widened(self, r: int) -> AdaLoRA:
        return replace(self, r=r, alpha=r + OFFSET)
