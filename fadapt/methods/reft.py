"""LoReFT at every position of a layer's output: y' = y + Rᵀ (M y + e), of rank r with a bias.

    R = L⁻¹ K,   L Lᵀ = K Kᵀ (Cholesky),   K = R0 + dR

The paper's h + Rᵀ (W h + b - R h) with M = W - R and e = b, at all positions: those that a prompt
chooses are not the same function of every row, which no weight can hold.
Trainable: dR (r, out), M (r, out) and e (r,), all zero. Fixed: R0 (r, out), random orthonormal.
Count: 2·r·out + r. Identity at the start: M = 0 and e = 0.
R has orthonormal rows whatever dR is: those of K but for a map inside the r directions, which M and
e take up.
LoRA form: ΔW = Rᵀ (M W), exactly of rank r; and the bias moves by Rᵀ (M b + e), which a LoRA has
not. Usual targets: the writers to the residual stream, ``Config(roles=("writer",))``.
Numerics: r x r products and the Cholesky factor in float32 or better.

Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", arXiv 2404.03592.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..linalg import orthonormal_rows
from ..method import Factors, Leaves, Method

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class ReFT(Method):
    """A low-rank edit of a layer's output, LoReFT's.

    Args:
        r: the number of directions that are edited.

    Example:
        >>> params = fadapt.init(model, fadapt.ReFT(r=2))
        >>> sorted(params["0.weight"].train)
        ['M', 'dR', 'e']
    """

    r: int = 8

    reads_input: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require(self.r >= 1, f"r must be at least 1, got {self.r}")

    @property
    def acts_on_bias(self) -> bool:
        return True

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def check(self, site: Site) -> None:
        require(
            self.r <= site.out_features,
            f"r={self.r} directions of an output of {site.out_features}; use a smaller r",
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        shape = self.r, site.out_features
        random = site.normal(rng, shape)
        start = random if random.is_meta else torch.linalg.qr(random.mT).Q.mT
        train = {"M": site.zeros(*shape), "dR": site.zeros(*shape), "e": site.zeros(self.r)}
        return train, {"R0": start.contiguous()}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return (y @ p["M"].mT + p["e"]) @ self._directions(p)

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        weight = base.weight().to(p["M"].dtype)
        return p["M"] @ weight, self._directions(p).mT

    def _directions(self, p: Mapping[str, Tensor]) -> Tensor:
        return orthonormal_rows(p["R0"] + p["dR"])
