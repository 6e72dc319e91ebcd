"""OFT: y' = layer(x R),  R = diag(R_1, R_2, ...) of orthogonal b x b blocks.

Q is skew-symmetric with the strict upper triangle q, row by row.
    exact:   R = (I - Q) (I + Q)⁻¹, the Cayley map.
    series:  R = I + 2 Q + 2 Q² + 2 Q³ + Q⁴, five terms of (I + Q) (I - Q)⁻¹, for small Q.
The two have opposite signs, as in PEFT's files with use_cayley_neumann=False and True: the series
at Q is close to the exact map at -Q.
Trainable: q (in / b, b (b - 1) / 2), zero. Count: in (b - 1) / 2.
Evaluated as the increment x (R - I), block by block: R - I = -2 (I + Q)⁻¹ Q, or the series without
its I. Identity at the start: both are exactly 0 at Q = 0. The bias is untouched. The increment has
full rank. The series is not quite orthogonal and diverges from the Cayley map as |Q| nears 1.
Constrained (COFT): ``fadapt.project`` after each optimiser step pulls every block back to
|Q|_F <= coft / sqrt(number of blocks).

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280;
Qiu et al. 2025, "Orthogonal Finetuning Made Scalable", arXiv 2506.19847.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import require
from ..linalg import cayley_minus_identity, in_blocks, skew
from ..method import Leaves, Method

if TYPE_CHECKING:
    from ..site import Site, SiteView


@dataclass(frozen=True)
class OFT(Method):
    """Block-diagonal orthogonal map of the input.

    Args:
        block_size: b, at least 2; divides the number of inputs.
        exact: the Cayley map by a solve; False for the five-term series.
        coft: the radius that ``fadapt.project`` keeps the blocks in; None for no constraint.

    Example:
        >>> params = fadapt.init(model, fadapt.OFT(block_size=4))
        >>> sorted(params["0.weight"].train)
        ['q']
    """

    block_size: int = 32
    exact: bool = True
    coft: float | None = None

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        require(
            self.block_size >= 2,
            f"block_size must be at least 2, got {self.block_size}; a block of 1 cannot rotate",
        )
        require(
            self.coft is None or self.coft > 0,
            f"coft must be None or a positive radius, got {self.coft}",
        )

    def check(self, site: Site) -> None:
        n, b = site.in_features, self.block_size
        sizes = [d for d in range(2, n + 1) if n % d == 0]
        near = sorted(sorted(sizes, key=lambda d: abs(d - b))[:8])
        require(
            n % b == 0,
            f"block_size={b} does not divide the {n} inputs; "
            + (f"choose from {near}" if near else "OFT needs at least 2"),
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        b = self.block_size
        return {"q": site.zeros(site.in_features // b, b * (b - 1) // 2)}, {}

    def shift(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        q = p["q"].to(torch.promote_types(p["q"].dtype, torch.float32))
        turn = self._rotation_minus_identity(skew(q, self.block_size)).to(x.dtype)
        return in_blocks(x, turn)

    def project(self, train: Leaves) -> Leaves:
        if self.coft is None:
            return train
        q = train["q"]
        norm = 2**0.5 * torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        radius = self.coft / q.shape[-2] ** 0.5
        return {**train, "q": torch.where(norm > radius, q * (radius / norm), q)}

    def _rotation_minus_identity(self, q: Tensor) -> Tensor:
        if self.exact:
            return cayley_minus_identity(-q)
        q2 = q @ q
        twice = torch.add(q2, q, alpha=2)
        rest = twice + q2  # 2 Q + 2 Q² + (2 Q + Q²) Q²
        return torch.baddbmm(rest, twice, q2) if q.dim() == 3 else rest + twice @ q2
