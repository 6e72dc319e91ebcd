"""MiCA: y' = y + s (x Aᵀ) Bᵀ,  s = alpha / r, B frozen on the minor directions of the output.

Fixed: B (out, r), the left singular vectors of the r smallest singular values of W: where W writes
least. Trainable: A (r, in), zero. Count: r in.
Identity at the start: A = 0, so the increment is exactly 0. The bias is untouched. The increment
has rank at most r, and its columns stay in the span of B.
Numerics: B has orthonormal columns and is stored, never recomputed; its signs are fixed (the entry
of largest magnitude of each column is positive).
Pitfalls: of a weight with more outputs than inputs only the min(out, in) directions that W reaches
count, not those that it never writes to. Where small singular values nearly coincide, the choice
among their directions is the decomposition's.

"MiCA: Minor Component Adaptation", arXiv 2604.01694.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from ..linalg import bottom_svd
from ..method import Leaves
from ._ranks import check_rank
from .lora import LoRA

if TYPE_CHECKING:
    from ..site import Site, SiteView


@dataclass(frozen=True)
class MiCA(LoRA):
    """LoRA whose B is frozen on the weight's minor left singular vectors.

    Args:
        r: rank, at least 1 and at most min(in_features, out_features).
        alpha: numerator of the scale alpha / r.

    Example:
        >>> params = fadapt.init(model, fadapt.MiCA(r=2))
        >>> sorted(params["0.weight"].train), sorted(params["0.weight"].fixed)
        (['A'], ['B'])
    """

    rank_axes: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1}

    def check(self, site: Site) -> None:
        check_rank(site, "r", self.r)

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        u, _, _ = bottom_svd(site.weight(), self.r)
        return {"A": site.zeros(self.r, site.in_features)}, {"B": u.contiguous()}

    def widened(self, r: int) -> MiCA:
        return replace(self, r=r, alpha=float(r))
