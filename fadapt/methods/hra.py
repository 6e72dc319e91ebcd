"""HRA: y' = layer(H_0 H_1 ... H_{r-1} x),  H_k = I - 2 û_k û_kᵀ,  û = u / |u|.

Trainable: dU (r, in) zero. Fixed: U0 (r/2, in) uniform on ±sqrt(2/r). Row k of U is row k // 2 of
U0 plus row k of dU, so the rows start in equal pairs. Count: r in.
Identity at the start: equal neighbours cancel, and they do so bitwise in this form. For a pair u, v
with d = v - u and w = v̂ - û = (d - v̂ (|v| - |u|)) / |u|,  |v| - |u| = d·(u + v) / (|u| + |v|),
    H_u H_v - I = Z_kᵀ M_k Z_k,  Z_k = [w; û] (2, in),  M_k = -2 [[1, 1], [|w|² - 1, |w|²]].
With all pairs in Z (r, in) and M, and G the part of Z Zᵀ above its 2 x 2 diagonal blocks, the
product of the pairs is I + Zᵀ (I - M G)⁻¹ M Z, hence
    x' = x + x Zᵀ [(I - M G)⁻¹ M]ᵀ Z:
two products of rank r instead of r passes over x, and one small triangular solve. Where d = 0,
w = 0 and every term of the increment has an exact factor 0.
The bias is untouched. Only directions matter, so |u| sets the effective learning rate; a row
shorter than 1e-12 means no reflection. The two gradients of an equal pair are exactly opposite,
so pairs part at the first step. As an increment dU keeps steps that bfloat16 would round away
from U. The increment of the weight has rank at most r.

Yuan, Liu and Xu 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder
Reflection Adaptation", arXiv 2405.17484, eq. 3 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import require
from ..linalg import block_diagonal, full_precision, lengths_after_step
from ..method import Factors, Leaves, Method
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class HRA(Method):
    """A chain of Householder reflections of the input.

    Args:
        r: number of reflections, positive and even.

    Example:
        >>> params = fadapt.init(model, fadapt.HRA(r=2))
        >>> sorted(params["0.weight"].train)
        ['dU']
    """

    r: int = 8

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        require(
            self.r >= 2 and self.r % 2 == 0,
            f"r must be positive and even, because the reflections start as pairs that cancel; "
            f"got r={self.r}, write HRA(r={max(2, self.r + self.r % 2)})",
        )
        check_rank_range("r", self.r)

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        half = site.uniform(rng, (self.r // 2, site.in_features), (2 / self.r) ** 0.5)
        return {"dU": site.zeros(self.r, site.in_features)}, {"U0": half}

    def shift(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        z, core = self._reflections(p)
        z = z.to(x.dtype)
        return x @ z.mT @ core.to(x.dtype).mT @ z

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        z, core = self._reflections(p)
        return z, base.linear(z).mT @ core

    def _reflections(self, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Z (..., r, in) and (I - M G)⁻¹ M (..., r, r)."""
        z, w2 = self._pairs(p["U0"], p["dU"])
        one = torch.ones_like(w2)
        m = block_diagonal(-2 * torch.stack([one, one, w2 - 1, w2], -1).unflatten(-1, (2, 2)))
        pair = torch.arange(self.r, device=z.device) // 2
        with full_precision(z):
            g = torch.where(pair[:, None] < pair, z @ z.mT, 0)
            return z, torch.linalg.solve_triangular(-m @ g, m, upper=True, unitriangular=True)

    def _pairs(self, start: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Z (..., r, in) and |w|² (..., r / 2)."""
        wide = torch.promote_types(moved.dtype, torch.float32)
        du, dv = moved.to(wide).unflatten(-2, (-1, 2)).unbind(-2)
        u, v, step = start + du, start + dv, dv - du
        squares = (u * u).sum(-1), (v * v).sum(-1)
        to_u, to_v, growth = lengths_after_step(
            *squares, (step * (u + v)).sum(-1), floor=1e-12, short=1.0
        )
        to_u, grown = to_u.unsqueeze(-1), (growth * to_v).unsqueeze(-1)
        w = torch.addcmul(step, grown, v, value=-1) * to_u
        return torch.stack([w, u * to_u], -2).flatten(-3, -2), (w * w).sum(-1)
