"""SSVD: the top k singular values shift, their right singular vectors turn; the left stay.

    W' - W = U_k (diag(S_k + d) G - diag(S_k)) V_kᵀ
    Δ = (x V) coreᵀ Uᵀ,   core = diag(S + d)(G - I) + diag(d),   rank at most k

G from the skew matrix K of k (k - 1) / 2 parameters, by ``kind``:
    "first_order" (the paper's default)   G = I - 2 K            nearly orthogonal, for small K
    "strict"                              G = (I - K)(I + K)⁻¹   orthogonal
    "free"                                G = I + F              k² parameters
Trainable: d (k,) zero, T (k (k - 1) / 2,) zero, the upper triangle of K, or F (k, k) zero. Fixed:
U (out, k), S (k,), V (in, k). Count: k (k + 1) / 2, or k² + k for "free".
The strength c scales d, K and F, so a strict G stays orthogonal at any c.
Identity at the start: d = 0 and G - I = -2 (I + K)⁻¹ K is exactly 0. The bias is untouched.
Pitfalls: tied to the stored signs and order of U and V. "first_order" lengthens vectors: its
singular values are sqrt(1 + 4 κ²) for those κ of K. The solve is done in float32 or better.

Wang et al. 2025, "SSVD: Structured SVD for Parameter-Efficient Fine-Tuning and Benchmarking under
Domain Shift in ASR", arXiv 2509.02830.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import require
from ..linalg import cayley_minus_identity, skew
from ..method import Factors, Leaves, Method
from ._ranks import check_rank, check_rank_range
from ._svd_core import coefficient, core_factors, singular_leaves

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class SSVD(Method):
    """Structured update of the leading singular triplets.

    Args:
        k: number of triplets, at most min(out, in).
        kind: of the transformation of the right singular vectors.

    Example:
        >>> params = fadapt.init(model, fadapt.SSVD(k=3))
        >>> sorted(params["0.weight"].train)
        ['T', 'd']
    """

    k: int = 32
    kind: Literal["strict", "first_order", "free"] = "first_order"

    reads_output: ClassVar[bool] = False
    owns_strength: ClassVar[bool] = True
    needs_plain_base: ClassVar[bool] = True

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        least = 1 if self.kind == "free" else 2  # one vector cannot turn
        require(self.k >= least, f"k must be at least {least}, got {self.k}")
        check_rank_range("k", self.k)

    def check(self, site: Site) -> None:
        check_rank(site, "k", self.k)

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        train = {"d": site.zeros(self.k)}
        if self.kind == "free":
            train["F"] = site.zeros(self.k, self.k)
        else:
            train["T"] = site.zeros(self.k * (self.k - 1) // 2)
        return train, singular_leaves(site, self.k)

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        z, shift = x @ p["V"], coefficient(self, p, p["d"]) * p["d"]
        core = (p["S"] + shift) * (z @ self._turn(p).mT) + shift * z
        return core @ p["U"].mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        return core_factors(self, p, base)

    def _turn(self, p: Mapping[str, Tensor]) -> Tensor:
        """G - I (k, k)."""
        c = coefficient(self, p, p["d"])
        if self.kind == "free":
            return c * p["F"]
        # A vector of a stack comes as a row, (n, 1, k (k - 1) / 2).
        triangle = p["T"].squeeze(-2) if p["T"].dim() > 1 else p["T"]
        minus_k = -c * skew(triangle, self.k)
        return 2 * minus_k if self.kind == "first_order" else cayley_minus_identity(minus_k)
