"""AntiPaSTO-dplr: a diagonal-plus-low-rank core on r singular directions.

    Δ = (x V) Kᵀ Uᵀ,   K = diag(S ∘ ELU(c g)) + c B A,   ΔW = U K Vᵀ, rank at most r

Trainable: g (r,) zero, A (k, r) uniform on ±1/sqrt(r), B (r, k) zero. Fixed: U (out, r), S (r,),
V (in, r). Count: r + 2 r k. The low-rank part is additive and not scaled by S, so, unlike the
arrow's block, its steps have the same size on all directions.
Identity at the start: ELU(0) = 0 and B = 0, so the increment is exactly 0. The bias is untouched.
Pitfalls: needs V whatever the shape, as u U would have to be divided by small S. B A mixes
directions, so it is tied to the stored signs and order of U and V.

Clark 2026, arXiv 2601.07473, in the form of the author's lora-lite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import require
from ..method import Factors, Leaves
from ._svd_core import SpectralMethod, coefficient, core_factors, singular_leaves

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class AntiPaSTODPLR(SpectralMethod):
    """Gains plus a low-rank mixing of singular directions.

    Args:
        r: number of directions, at most min(out, in).
        k: rank of the mixing, at most r.

    Example:
        >>> params = fadapt.init(model, fadapt.AntiPaSTODPLR(r=4, k=1))
        >>> sorted(params["0.weight"].train)
        ['A', 'B', 'g']
    """

    k: int = 8

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.k <= self.r, f"k must be from 1 to r={self.r}, got {self.k}")

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        train = {
            "g": site.zeros(self.r),
            "A": site.uniform(rng, (self.k, self.r), self.r**-0.5),
            "B": site.zeros(self.r, self.k),
        }
        return train, singular_leaves(site, self.r)

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        z, c = x @ p["V"], coefficient(self, p, p["g"])
        core = z * (p["S"] * F.elu(c * p["g"])) + (z @ p["A"].mT) @ (c * p["B"]).mT
        return core @ p["U"].mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        return core_factors(self, p, base)
