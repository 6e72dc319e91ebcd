"""y' = y + s [(x dAᵀ) (B0 + dB)ᵀ + (x A0ᵀ) dBᵀ]: what PiSSA and CorDA share.

LoRA whose factors A = A0 + dA and B = B0 + dB start from a part of the frozen weight. As both are
stored as their moves from there, s (B A - B0 A0) is added to W itself and no residual is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..method import Factors, LastProduct, Leaves
from ._ranks import check_rank
from .lora import LoRA

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class MovedFactors(LoRA):
    """LoRA with trainable moves dA (r, in), dB (out, r) of fixed factors A0 and B0."""

    rank_axes: ClassVar[Mapping[str, int]] = {"dA": -2, "dB": -1, "A0": -2, "B0": -1}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.alpha >= 1e-6,
            f"alpha must be positive, at least 1e-6, because the singular values are divided by "
            f"alpha / r; got {self.alpha}",
        )

    def check(self, site: Site) -> None:
        check_rank(site, "r", self.r)

    def leaves(self, site: SiteView, a0: Tensor, b0: Tensor) -> tuple[Leaves, Leaves]:
        """What ``init`` returns for the factors A0 (r, in) and B0 (out, r)."""
        moves = {
            "dA": site.zeros(self.r, site.in_features),
            "dB": site.zeros(site.out_features, self.r),
        }
        return moves, {"A0": a0.to(site.dtype), "B0": b0.to(site.dtype)}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        down, up = self._factors(p)
        return self.scaled(p, x @ down.mT) @ up.mT

    def last_product(self, p: Mapping[str, Tensor], x: Tensor, base: LinearMap) -> LastProduct:
        down, up = self._factors(p)
        s, h = self.s(p), x @ down.mT
        return (h, up, s) if isinstance(s, float) else (s * h, up, 1.0)

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        down, up = self._factors(p)
        return down, self.scaled(p, up)

    def _factors(self, p: Mapping[str, Tensor]) -> Factors:
        """[dA; A0] and [B0 + dB, dB]."""
        down = torch.cat([p["dA"], p["A0"].expand_as(p["dA"])], -2)
        return down, torch.cat([p["B0"] + p["dB"], p["dB"]], -1)

    def widened(self, r: int) -> MovedFactors:
        # What else a subclass has only chose A0 and B0.
        return MovedFactors(r=r, alpha=float(r), dropout=self.dropout)
