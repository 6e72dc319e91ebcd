"""LoRA: y' = y + s (x Aᵀ) Bᵀ,  s = alpha / r;  rsLoRA: s = alpha / sqrt(r).

Trainable: A (r, in) uniform on ±1/sqrt(in), B (out, r) zero. Count: r (in + out).
Identity at the start: B = 0, so the increment is exactly 0. The bias is untouched.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3;
Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
arXiv 2312.03732.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..method import Factors, LastProduct, Leaves, RankPadded
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class LoRA(RankPadded):
    """Low-rank additive update.

    Args:
        r: rank, at least 1.
        alpha: numerator of the scale alpha / r.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRA(r=4, alpha=8))
        >>> sorted(params["0.weight"].train)
        ['A', 'B']
    """

    r: int = 8
    alpha: float = 16.0

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    rank_axes: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        a = site.uniform(rng, (self.r, site.in_features), site.in_features**-0.5)
        return {"A": a, "B": site.zeros(site.out_features, self.r)}, {}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return self.scaled(p, x @ p["A"].mT) @ p["B"].mT

    def last_product(self, p: Mapping[str, Tensor], x: Tensor, base: LinearMap) -> LastProduct:
        s, h = self.s(p), x @ p["A"].mT
        return (h, p["B"], s) if isinstance(s, float) else (s * h, p["B"], 1.0)

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        return p["A"], self.scaled(p, p["B"])

    def scaled(self, p: Mapping[str, Tensor], h: Tensor) -> Tensor:
        """s h."""
        s = self.s(p)
        # A product with 1 is a kernel like any other, which torch.compile does not leave out.
        return h if isinstance(s, float) and s == 1 else s * h

    def s(self, p: Mapping[str, Tensor]) -> Tensor | float:
        """s, which a stack of mixed ranks holds as a leaf."""
        return p.get("s", self.scaling)

    def widened(self, r: int) -> LoRA:
        return replace(self, r=r, alpha=float(r))

    def hyper_leaves(self) -> dict[str, float]:
        return {"s": self.scaling}


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA with the rank-stabilised scale alpha / sqrt(r).

    Example:
        >>> params = fadapt.init(model, fadapt.RsLoRA(r=4))
        >>> sorted(params["0.weight"].train)
        ['A', 'B']
    """

    @property
    def scaling(self) -> float:
        return self.alpha / self.r**0.5

    def widened(self, r: int) -> LoRA:
        return LoRA(r=r, alpha=float(r), dropout=self.dropout)
