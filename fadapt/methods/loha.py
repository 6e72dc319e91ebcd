"""LoHa: y' = y + s x [(w1_a w1_b) ∘ (w2_a w2_b)]ᵀ,  s = alpha / r, with the Hadamard product ∘.

Trainable: w2_a (out, r) zero; w1_a (out, r), w1_b and w2_b (r, in) uniform on ±1/sqrt(columns).
Count: 2 r (in + out).
Identity at the start: w2_a = 0, as in LyCORIS (PEFT starts at w2_b = 0). The bias is untouched.
The increment has rank at most r²: it is B A with the products of all pairs of columns in
B (out, r²) and of rows in A (r², in). Where 2 r² (in + out) < in out it is applied so, and no
matrix of in x out is made; for larger r the product itself is cheaper, and is made, and made again
in the backward pass.
Pitfall: the gradient of each factor carries the other's size, so moderate ranks want a larger
learning rate than LoRA's.

Hyeon-Woo, Ye-Bin and Oh 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient
Federated Learning", arXiv 2108.06098, proposition 1; for adapters, Yeh et al. 2023, "Navigating
Text-To-Image Customization", arXiv 2309.14859.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..dense_increment import DenseIncrement
from ..method import Factors, Leaves, RankPadded
from ..recomputed import product
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class LoHa(DenseIncrement, RankPadded):
    """The Hadamard product of two low-rank matrices.

    Args:
        r: rank of each of the two, at least 1.
        alpha: numerator of the scale alpha / r.

    Example:
        >>> params = fadapt.init(model, fadapt.LoHa(r=2))
        >>> sorted(params["0.weight"].train)
        ['w1_a', 'w1_b', 'w2_a', 'w2_b']
    """

    r: int = 8
    alpha: float = 8.0

    row_axes: ClassVar[Mapping[str, int]] = {"w1_a": -2, "w2_a": -2}
    rank_axes: ClassVar[Mapping[str, int]] = {"w1_a": -1, "w1_b": -2, "w2_a": -1, "w2_b": -2}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        tall, wide = (site.out_features, self.r), (self.r, site.in_features)
        return {
            "w1_a": site.uniform(rng, tall, self.r**-0.5),
            "w1_b": site.uniform(rng, wide, site.in_features**-0.5),
            "w2_a": site.zeros(*tall),
            "w2_b": site.uniform(rng, wide, site.in_features**-0.5),
        }, {}

    def prefers_matrix(self, p: Mapping[str, Tensor], tokens: int, d_out: int, d_in: int) -> bool:
        # Two products and their gradients, in place of one and that of the matrix.
        r = p["w1_a"].shape[-1]
        return 2 * r * r * (d_in + d_out) >= d_in * d_out

    def increment(
        self, p: Mapping[str, Tensor], weight: Callable[[], Tensor], d_out: int, d_in: int
    ) -> Tensor:
        names = "w1_a", "w1_b", "w2_a", "w2_b"
        return _hadamard(*(p[name] for name in names)) * p.get("s", self.alpha / self.r)

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        if self.prefers_matrix(p, 0, y.shape[-1], x.shape[-1]):
            return super().delta(p, x, y, base)
        h = product(x, _row_pairs, p["w1_b"], p["w2_b"])
        return product(p.get("s", self.alpha / self.r) * h, _column_pairs, p["w1_a"], p["w2_a"])

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        a, b = _pairs(p)
        if a.shape[0] >= min(a.shape[1], b.shape[0]):
            return None
        return a, p.get("s", self.alpha / self.r) * b

    def widened(self, r: int) -> LoHa:
        return replace(self, r=r, alpha=float(r))

    def hyper_leaves(self) -> dict[str, float]:
        return {"s": self.alpha / self.r}


def _hadamard(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    return (w1_a @ w1_b) * (w2_a @ w2_b)


def _row_pairs(first: Tensor, second: Tensor) -> Tensor:
    """(..., r², in): the products of all pairs of rows."""
    return (first.unsqueeze(-2) * second.unsqueeze(-3)).flatten(-3, -2)


def _column_pairs(first: Tensor, second: Tensor) -> Tensor:
    """(..., out, r²): the products of all pairs of columns."""
    return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)


def _pairs(p: Mapping[str, Tensor]) -> Factors:
    """A (..., r², in) and B (..., out, r²) with B A the Hadamard product."""
    return _row_pairs(p["w1_b"], p["w2_b"]), _column_pairs(p["w1_a"], p["w2_a"])
