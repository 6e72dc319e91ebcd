"""GraLoRA: y' = y + s x ΔWᵀ, ΔW of k x k blocks with a low-rank pair each,  s = alpha / (r + h).

The block of outputs j and inputs n is (A_n[:, Q_j] B_j[Q_n, :])ᵀ with Q_j the j-th of k equal parts
of 1 ... r: every pair of blocks has r / k ranks of its own.
Trainable: A (k, in / k, r) uniform on ±1/sqrt(in / k), B (k, r, out / k) zero; with h = hybrid_r a
LoRA beside it, A_general (h, in) and B_general (out, h) zero, under the same scale.
Count: (r + h) (in + out).
Evaluated as x_n A_n for every n, the parts of the results exchanged between the blocks, and a
product with B_j for every j: as many operations as a LoRA of rank r, and no matrix of in x out.
Identity at the start: B = 0. The bias is untouched. The increment has rank at most k r + h.

Jung et al. 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
arXiv 2505.20355, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..linalg import block_diagonal
from ..method import Factors, Leaves, Method
from ._ranks import LARGEST_RANK, check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class GraLoRA(Method):
    """Low-rank updates of the blocks of the weight.

    Args:
        r: rank of all blocks of a row or column together, a multiple of ``gralora_k``.
        alpha: numerator of the scale alpha / (r + hybrid_r).
        gralora_k: k, the number of blocks of either side; divides inputs and outputs.
        hybrid_r: h, the rank of a plain LoRA beside it.

    Example:
        >>> params = fadapt.init(model, fadapt.GraLoRA(r=4))
        >>> {name: tuple(leaf.shape) for name, leaf in params["0.weight"].train.items()}
        {'A': (2, 4, 4), 'B': (2, 4, 8)}
    """

    r: int = 32
    alpha: float = 64.0
    gralora_k: int = 2
    hybrid_r: int = 0

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)
        k = self.gralora_k
        require(k >= 1, f"gralora_k must be at least 1, got {k}; write gralora_k=2")
        require(
            self.r % k == 0,
            f"r must be a multiple of gralora_k={k}, so that each block has r / gralora_k ranks; "
            f"got r={self.r}, write r={-(-self.r // k) * k}",
        )
        require(
            0 <= self.hybrid_r <= LARGEST_RANK,
            f"hybrid_r must be at least 0 and at most {LARGEST_RANK}, got {self.hybrid_r}; "
            "write hybrid_r=0",
        )

    def check(self, site: Site) -> None:
        k, (d_out, d_in) = self.gralora_k, site.matrix_shape
        fits = [n for n in range(1, min(self.r, d_in, d_out) + 1)
                if not (d_in % n or d_out % n or self.r % n)]  # fmt: skip
        require(
            d_in % k == 0 and d_out % k == 0,
            f"gralora_k={k} does not divide both the {d_in} inputs and the {d_out} outputs; "
            f"choose from {fits}",
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        k, r, h = self.gralora_k, self.r, self.hybrid_r
        d_in, d_out = site.in_features, site.out_features
        train = {
            "A": site.uniform(rng, (k, d_in // k, r), (d_in // k) ** -0.5),
            "B": site.zeros(k, r, d_out // k),
        }
        if h:
            train["A_general"] = site.uniform(rng, (h, d_in), d_in**-0.5)
            train["B_general"] = site.zeros(d_out, h)
        return train, {}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        k, tokens = self.gralora_k, x.shape[-2]
        # (..., block, tokens, width): one product for each block of inputs, one of outputs.
        h = x.unflatten(-1, (k, -1)).transpose(-3, -2) @ p["A"]
        h = h.unflatten(-1, (k, -1)).movedim(-2, -4)  # (..., j, n, tokens, r / k)
        h = h.movedim(-2, -3).reshape(*h.shape[:-3], tokens, self.r)
        out = (h @ p["B"]).transpose(-3, -2).flatten(-2)
        if "A_general" in p:
            out = out + (x @ p["A_general"].mT) @ p["B_general"].mT
        return out * self.scaling

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        k = self.gralora_k
        a = block_diagonal(p["A"].mT)  # (k r, in): the rows n, j, rank within Q_j
        b = p["B"].unflatten(-2, (k, -1))  # (j, n, rank within Q_n, out / k)
        # B_j meets Q_j of every A_n: its columns n, j hold the rank that A's rows n, j have.
        b = torch.stack([block_diagonal(b[:, n].mT) for n in range(k)], 1).flatten(1)
        if self.hybrid_r:
            a, b = torch.cat([a, p["A_general"]]), torch.cat([b, p["B_general"]], 1)
        if a.shape[0] >= min(a.shape[1], b.shape[0]):
            return None
        return a, b * self.scaling

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r + self.hybrid_r)
