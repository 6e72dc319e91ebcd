"""AntiPaSTO-rotation: singular values shift and singular vectors turn, within an angle.

    W' - W = U (R_uᵀ D R_v - diag(S)) Vᵀ,   D = diag(S + c d),   R = (I - X)⁻¹ (I + X)

with X block-diagonal and skew; R_u = I for basis "V", R_v = I for basis "U". With E = R - I
    K = c diag(d) + E_uᵀ D + D E_v + E_uᵀ D E_v,   Δ = (x V) Kᵀ Uᵀ,   rank at most r.
Trainable: d (r,) zero, T_v and/or T_u (r / bs, bs (bs - 1) / 2) zero, the upper triangles of the
blocks. Fixed: U (out, r), S (r,), V (in, r). Count: r + r (bs - 1) / 2, the T twice for "both".
Angle: X = c a tanh(skew(T) / 2 / a) / 2 by element, with a = 2 tan(max_angle / 2) tan(π / (2 bs)).
A skew matrix with entries up to a has norm up to a cot(π / (2 bs)), so the second tangent is what
keeps every angle of R within max_angle for |c| <= 1 (the bound of the reference, without it, holds
for bs = 2 alone; at bs = 4 and 0.5 it admits 1.105 rad). R(-c) = R(c)⁻¹.
Identity at the start: d = 0 and X = 0, so E = 2 (I - X)⁻¹ X is exactly 0. The bias is untouched.
A contrastive loss in which c and -c agree at 0 has no gradient there; ``noise`` > 0 starts d off
zero for it, and gives up the identity.
Pitfalls: tied to the stored signs and order of U and V. The solve is done in float32 or better.

Clark 2026, arXiv 2601.07473, in the block form of the author's lora-lite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import require
from ..linalg import block_diagonal, cayley_minus_identity, full_precision, skew
from ..method import Factors, Leaves
from ._svd_core import SpectralMethod, coefficient, core_factors, singular_leaves

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class AntiPaSTORotation(SpectralMethod):
    """Shifts of singular values and bounded rotations of singular vectors.

    Args:
        r: number of directions, a multiple of block_size, at most min(out, in).
        block_size: of the rotations, at least 2.
        max_angle: radians in (0, π); no vector turns further at strengths of magnitude up to 1.
        basis: which singular vectors turn: "V" (input), "U" (output) or "both".
        noise: standard deviation of d at the start; 0 for the exact identity.

    Example:
        >>> params = fadapt.init(model, fadapt.AntiPaSTORotation(r=4, block_size=2))
        >>> sorted(params["0.weight"].train)
        ['T_v', 'd']
    """

    block_size: int = 4
    max_angle: float = 0.5
    basis: Literal["V", "U", "both"] = "V"
    noise: float = 0.0

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.block_size
        require(size >= 2, f"block_size must be at least 2, got {size}")
        require(
            self.r % size == 0,
            f"r={self.r} is not a multiple of block_size={size}; "
            f"write r={max(self.r // size, 1) * size}",
        )
        require(0 < self.max_angle < math.pi, f"max_angle must lie in (0, π), got {self.max_angle}")
        require(self.noise >= 0, f"noise must be at least 0, got {self.noise}")

    @property
    def starts_at_identity(self) -> bool:
        return self.noise == 0

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        size = self.block_size
        train = {"d": site.zeros(self.r)}
        if self.noise:
            train["d"] = site.normal(rng, (self.r,), self.noise)
        for name in ("T_v", "T_u") if self.basis == "both" else (f"T_{self.basis.lower()}",):
            train[name] = site.zeros(self.r // size, size * (size - 1) // 2)
        return train, singular_leaves(site, self.r)

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return x @ p["V"] @ self.core(p).to(x.dtype).mT @ p["U"].mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        return core_factors(self, p, base)

    def core(self, p: Mapping[str, Tensor]) -> Tensor:
        """K (r, r) in float32 or better.

        Formed whole: one product with it costs less than its terms on every token.
        """
        wide = torch.promote_types(p["d"].dtype, torch.float32)
        p = {k: t.to(wide) for k, t in p.items() if k not in ("U", "V")}
        size = self.block_size
        shift = _entries(coefficient(self, p, p["d"]) * p["d"]).unflatten(-1, (-1, size))
        scale = _entries(p["S"]).unflatten(-1, (-1, size)) + shift
        core, turned = torch.diag_embed(shift), torch.diag_embed(scale)
        names = [name for name in ("T_v", "T_u") if name in p]
        turns = dict(zip(names, self.turns(torch.stack([p[k] for k in names]), p), strict=True))
        with full_precision(shift):
            if "T_v" in turns:
                change = scale.unsqueeze(-1) * turns["T_v"]
                core, turned = core + change, turned + change
            if "T_u" in turns:
                core = core + turns["T_u"].mT @ turned
        return block_diagonal(core)

    def turns(self, t: Tensor, p: Mapping[str, Tensor]) -> Tensor:
        """R - I: (..., bs, bs) of the triangles t."""
        size = self.block_size
        limit = 2 * math.tan(self.max_angle / 2) * math.tan(math.pi / (2 * size))
        x = skew(limit / 2 * torch.tanh(t / (2 * limit)), size)
        c = coefficient(self, p, x)
        if isinstance(c, Tensor) and c.dim():  # (n, 1, 1), for blocks (n, blocks, bs, bs)
            c = c.unsqueeze(-1)
        return cayley_minus_identity(c * x)


def _entries(vector: Tensor) -> Tensor:
    """A vector (r,), or those of a stack (n, r), which come as rows (n, 1, r)."""
    return vector.squeeze(-2) if vector.dim() > 1 else vector
