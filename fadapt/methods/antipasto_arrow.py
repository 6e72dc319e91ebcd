"""AntiPaSTO-arrow: a dense block on the top b singular directions, gains on the rest.

    Δ = (u U) K'ᵀ Uᵀ,   K' = blockdiag(c M, diag(ELU(c g))),   u = y - b = x Wᵀ

that is ΔW = U K' diag(S) Vᵀ, rank at most r.
Trainable: M (b, b) zero, g (r - b,) zero. Fixed: U (out, r), and P = UᵀW (r, in) where out > in
(then u U = x Pᵀ). Count: b² + r - b.
Identity at the start: M = 0 and ELU(0) = 0, so the increment is exactly 0. The bias is untouched.
Pitfalls: M acts on coordinates that S scales, so its steps are amplified by the largest singular
values; give it a smaller learning rate than a LoRA. M mixes directions, so it is tied to the stored
signs and order of U.

Clark 2026, arXiv 2601.07473, in the block form of the author's lora-lite.
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
from ._svd_core import SpectralMethod, coefficient, coordinates, core_factors

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class AntiPaSTOArrow(SpectralMethod):
    """A dense core on the leading singular directions, gains on the others.

    Args:
        r: number of directions, at most min(out, in).
        b: size of the dense block, less than r.

    Example:
        >>> params = fadapt.init(model, fadapt.AntiPaSTOArrow(r=4, b=2))
        >>> sorted(params["0.weight"].train)
        ['M', 'g']
    """

    b: int = 8

    reads_input: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.b < self.r, f"b must be from 1 to r-1={self.r - 1}, got {self.b}")

    def start(self, site: SiteView, rng: torch.Generator) -> Leaves:
        return {"M": site.zeros(self.b, self.b), "g": site.zeros(self.r - self.b)}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        rows, into = coordinates(p, x, y, base)
        top, rest = (rows @ into).split((self.b, self.r - self.b), -1)
        c = coefficient(self, p, p["g"])
        core = torch.cat((top @ (c * p["M"]).mT, rest * F.elu(c * p["g"])), -1)
        return core @ p["U"].mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        return core_factors(self, p, base)
