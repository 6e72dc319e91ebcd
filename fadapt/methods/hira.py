"""HiRA: y' = y + x [W ∘ (B A)]ᵀ, a low-rank matrix that multiplies the weight entry by entry.

Trainable: A (r, in) uniform on ±1/sqrt(in), B (out, r) zero. Count: r (in + out).
Identity at the start: B = 0. The bias is untouched. The increment has full rank in general, though
that of B A is r: no LoRA equals it. An entry of W that is 0 stays 0.
Numerics: W ∘ (B A) is a matrix of in x out that is made in every pass, for every adapter of a stack
(a quantized W is dequantized for it), and not kept; other orders of the products need r passes over
W. Its gradient is one product of the size of W's own beside the base's two. Alone and in float32
the base meets W + W ∘ (B A) and there is no other; else there are two more.
Pitfall: the increment is relative to W, whose entries are small, so HiRA takes learning rates that
are some ten times LoRA's.

Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language
Models", ICLR 2025 (openreview TwJrTz9cRS), eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..dense_increment import DenseIncrement
from ..method import Leaves, RankPadded
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..site import SiteView


@dataclass(frozen=True)
class HiRA(DenseIncrement, RankPadded):
    """The weight times a low-rank matrix, entry by entry, as the increment.

    Args:
        r: rank of the matrix, at least 1.

    Example:
        >>> params = fadapt.init(model, fadapt.HiRA(r=2))
        >>> sorted(params["0.weight"].train)
        ['A', 'B']
    """

    r: int = 32

    rank_axes: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1}
    row_axes: ClassVar[Mapping[str, int]] = {"B": -2}

    @property
    def reads_weight(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        a = site.uniform(rng, (self.r, site.in_features), site.in_features**-0.5)
        return {"A": a, "B": site.zeros(site.out_features, self.r)}, {}

    def increment(
        self, p: Mapping[str, Tensor], weight: Callable[[], Tensor], d_out: int, d_in: int
    ) -> Tensor:
        low_rank = p["B"] @ p["A"]
        return weight().to(low_rank.dtype) * low_rank
