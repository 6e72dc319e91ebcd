"""PSOFT: y' = y + x Aᵀ (R - I)ᵀ Bᵀ,  R = diag(1 + b) (I + Q) (I - Q)⁻¹ diag(1 + a).

The r largest singular directions of W = U S Vᵀ, turned among themselves and rescaled.
Fixed: A = V_rᵀ (r, in), orthonormal, and B = U_r S_r (out, r); with ab_svd_init="pissa_init" they
are S_r^½ V_rᵀ and U_r S_r^½. Q is skew-symmetric with the strict upper triangle q, row by row.
Trainable: q (r (r - 1) / 2,), a and b (r,), zero; with orth=False dR (r, r), R = I + dR up to the
scales. Count: r (r - 1) / 2 + 2 r.
Identity at the start, by construction: with K = (I + Q) (I - Q)⁻¹ - I = 2 (I - Q)⁻¹ Q,
    R - I = diag(1 + b) K diag(1 + a) + diag(a + b + a b),
exactly 0 at Q = 0, a = b = 0. The bias is untouched. The increment has rank at most r, and rows and
columns in the spans of A and B.
Numerics: R is made in float32 or better. A and B are stored, never recomputed: q belongs to their
signs and, where singular values nearly coincide, to their choice of directions. A scale alpha / r
would cancel between B and the increment, so there is none. The series (exact=False) is not quite
orthogonal and diverges from the Cayley map as |Q| nears 1.
Pitfall: what lies outside of the top r directions stays as it is, so r bounds the capacity.

Wu et al. 2025, "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation",
arXiv 2505.11235.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import require
from ..linalg import cayley_minus_identity, skew, top_svd
from ..method import Factors, Leaves, Method
from ._ranks import check_rank, check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class PSOFT(Method):
    """An orthogonal map, with scales, of the weight's principal subspace.

    Args:
        r: the number of singular directions, at least 1 and at most min(in, out).
        orth: R orthogonal up to its scales; False for any r x r matrix.
        mag_a: train the scales of R's inputs.
        mag_b: train the scales of R's outputs.
        exact: the Cayley map by an inverse; False for its five-term series.
        ab_svd_init: whether the singular values stay with B or are shared by A and B.

    Example:
        >>> params = fadapt.init(model, fadapt.PSOFT(r=4))
        >>> sorted(params["0.weight"].train)
        ['a', 'b', 'q']
    """

    r: int = 32
    orth: bool = True
    mag_a: bool = True
    mag_b: bool = True
    exact: bool = True
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)
        require(
            self.r > 1 or self.mag_a or self.mag_b or not self.orth,
            "one direction has nowhere to turn, and without scales nothing would train; write "
            "PSOFT(r=2) or more, or mag_a=True",
        )

    def check(self, site: Site) -> None:
        check_rank(site, "r", self.r)

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        u, s, v = top_svd(site.weight(), self.r)
        left, right = self.singular_shares(s)
        r = self.r
        turn = {"q": site.zeros(r * (r - 1) // 2)} if self.orth else {"dR": site.zeros(r, r)}
        if self.orth and r == 1:
            turn = {}  # no entry above the diagonal
        scales = {k: site.zeros(r) for k, on in (("a", self.mag_a), ("b", self.mag_b)) if on}
        return {**turn, **scales}, {"A": (v * right).mT, "B": u * left}

    def singular_shares(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """What B and what A have of the singular values."""
        if self.ab_svd_init == "psoft_init":
            return s, torch.ones_like(s)
        return s.sqrt(), s.sqrt()

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return x @ p["A"].mT @ self._core(p).to(x.dtype).mT @ p["B"].mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        core = self._core(p)
        return p["A"], p["B"].to(core.dtype) @ core

    def _core(self, p: Mapping[str, Tensor]) -> Tensor:
        """R - I (..., r, r), in float32 or better."""
        wide = torch.promote_types(p["A"].dtype, torch.float32)
        row = p["A"].new_zeros(1, self.r, dtype=wide)
        # Vectors as rows (..., 1, k), as which they come in a stack.
        found = {k: torch.atleast_2d(p[k].to(wide)) for k in ("a", "b", "q") if k in p}
        a, b = found.get("a", row), found.get("b", row)
        if "dR" in p:
            turn = p["dR"].to(wide)
        else:
            turn = self._turn(skew(found.get("q", row[:, :0]), self.r).squeeze(-3))
        eye = torch.eye(self.r, dtype=wide, device=row.device)
        return (1 + b.mT) * turn * (1 + a) + eye * (a + b + a * b)

    def _turn(self, q: Tensor) -> Tensor:
        """(I + Q) (I - Q)⁻¹ - I."""
        if self.exact:
            return cayley_minus_identity(q)
        q2 = q @ q
        return 2 * q + 2 * q2 + (2 * q + q2) @ q2
