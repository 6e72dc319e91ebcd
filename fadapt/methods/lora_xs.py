"""LoRA-XS: y' = y + s x (U R diag(S) Vᵀ)ᵀ,  s = alpha / r, with U, S, V of the weight's top r.

Trainable: R (r, r), zero. Fixed: A = diag(S) Vᵀ (r, in) and U (out, r), from the SVD of W.
Count: r².
Identity at the start: R = 0. (The paper starts at R ~ N(0, 1e-5); at zero the gradient is
Uᵀ G V diag(S), which does not vanish, because no trained factor multiplies it.) The bias is
untouched. The increment has rank r.
Pitfalls: where singular values are equal, which directions are taken is arbitrary; so few values
take larger learning rates than LoRA's.

Bałazy et al. 2024, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters",
arXiv 2405.17604, eq. 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..linalg import random_svd, top_svd
from ..method import Factors, Leaves, Method
from ._ranks import check_rank, check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class LoRAXS(Method):
    """A trained core between frozen singular directions.

    Args:
        r: directions, at most min(in_features, out_features).
        alpha: numerator of the scale alpha / r.
        niter: None for an exact SVD; a number for a randomised one with that many power
            iterations, seeded like all initial values.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRAXS(r=2))
        >>> tuple(params["0.weight"].train["R"].shape)
        (2, 2)
    """

    r: int = 8
    alpha: float = 8.0
    niter: int | None = None

    reads_output: ClassVar[bool] = False
    needs_plain_base: ClassVar[bool] = True

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)
        require(
            self.niter is None or 0 <= self.niter <= 1000,
            f"niter must be None (exact SVD) or from 0 to 1000, got {self.niter}; write niter=4",
        )

    def check(self, site: Site) -> None:
        check_rank(site, "r", self.r)

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        w = site.weight()
        exact = self.niter is None
        u, s, v = top_svd(w, self.r) if exact else random_svd(w, self.r, rng, self.niter or 0)
        a = (v * s).mT.contiguous()
        return {"R": site.zeros(self.r, self.r)}, {"A": a, "U": u.contiguous()}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return (x @ p["A"].mT) @ ((self.alpha / self.r) * p["R"].mT) @ p["U"].mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        return p["A"], p["U"] @ p["R"] * (self.alpha / self.r)
