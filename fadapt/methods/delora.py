"""DeLoRA: y' = y + E(A, B, λ) x - E(A0, B0, λ0) x,  E x = (λ/r) B̂ Â (w ∘ x).

Â has the rows of A and B̂ the columns of B divided by their lengths (clamped at 1e-4), and w (in,)
holds the column norms of W, so λ alone sets the strength: |E| is bounded by λ |W|.

Trainable: dA (r, in), dB (out, r), dlambda (), zero, with A = A0 + dA, B = B0 + dB, λ = λ0 + dλ.
Fixed: A0, B0 (uniform on ±1/sqrt(in) and ±1/sqrt(r)), w. Count: r (in + out) + 1.
Identity at the start, by construction. With the changes of direction δÂ = Â - Â0, δB̂ = B̂ - B̂0,
    λ B̂ Â - λ0 B̂0 Â0 = λ B̂ δÂ + (λ δB̂ + dλ B̂0) Â0,
and δÂ = (dA - Â0 (|A| - |A0|)) / |A|,  |A| - |A0| = dA·(A + A0) / (|A| + |A0|) by rows, likewise
δB̂: every term has a factor dA, dB or dλ, so none is a difference of two computed products.
Evaluated as [dB, B0] K [dA; A0] (w ∘ x) with K (2 r, 2 r) of four diagonal blocks: two products of
rank 2 r. K maps A0 to 0 B0 at the start.
The bias is untouched. The increment has rank at most 2 r.

form="peft" is E(A, B, λ) with B = 0 at the start (trainable A, B, dlambda; fixed w), as in PEFT's
files. There the first step jumps: it gives the columns of B, which are 0, their full unit
length, and the gradient at B = 0 is 1e4 times too large. Use it with a small lambda0.

Bini, Girrbach and Akata 2025, "Decoupling Angles and Strength in Low-rank Adaptation",
arXiv 2503.18225, eq. 9. The paper writes the scalar |W|; its code uses the vector w.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import require
from ..linalg import lengths_after_step
from ..method import Factors, Leaves, Method
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView

FLOOR = 1e-4


@dataclass(frozen=True)
class DeLoRA(Method):
    """Low-rank update with decoupled directions and strength.

    Args:
        r: rank, at least 1.
        lambda0: the initial strength λ, positive.
        form: "paper" subtracts the frozen initial update; "peft" starts with B = 0 instead.

    Example:
        >>> params = fadapt.init(model, fadapt.DeLoRA(r=2))
        >>> sorted(params["0.weight"].train)
        ['dA', 'dB', 'dlambda']
    """

    r: int = 8
    lambda0: float = 15.0
    form: Literal["paper", "peft"] = "paper"

    @property
    def keep_fp32(self) -> frozenset[str]:
        return frozenset({"w"})

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        check_rank_range("r", self.r)
        require(self.lambda0 > 0, f"lambda0 must be positive, got {self.lambda0}")

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        a = site.uniform(rng, (self.r, site.in_features), site.in_features**-0.5)
        w = torch.linalg.vector_norm(site.weight(), dim=0)
        zero_b, dlambda = site.zeros(site.out_features, self.r), site.zeros()
        if self.form == "peft":
            return {"A": a, "B": zero_b, "dlambda": dlambda}, {"w": w}
        b = site.uniform(rng, (site.out_features, self.r), self.r**-0.5)
        return (
            {"dA": torch.zeros_like(a), "dB": zero_b, "dlambda": dlambda},
            {"A0": a, "B0": b, "w": w},
        )

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        w = p["w"]
        q = {k: t.to(w.dtype) for k, t in p.items()}
        strength = self.lambda0 + q["dlambda"]
        if self.form == "peft":
            a, b = q["A"], q["B"]
            core = strength / self.r * _inverse_length(a, -1) * _inverse_length(b, -2)
            return (x @ (a * w).to(x.dtype).mT) * core.to(x.dtype) @ p["B"].to(x.dtype).mT
        down = (_beside(q["dA"], q["A0"], -2) * w).to(x.dtype)
        up = _beside(p["dB"], p["B0"], -1).to(x.dtype)
        return x @ down.mT @ self._core(q, strength).to(x.dtype) @ up.mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        q = {k: t.to(p["w"].dtype) for k, t in p.items()}
        strength = self.lambda0 + q["dlambda"]
        if self.form == "peft":
            a, b = q["A"], q["B"]
            core = strength / self.r * _inverse_length(a, -1) * _inverse_length(b, -2)
            return a * q["w"], core * b
        up = _beside(q["dB"], q["B0"], -1) @ self._core(q, strength).mT
        return _beside(q["dA"], q["A0"], -2) * q["w"], up

    def _core(self, q: Mapping[str, Tensor], strength: Tensor) -> Tensor:
        """K (..., 2 r, 2 r), transposed: from (dA, A0) to (dB, B0)."""
        vectors = [(_like(q["A0"], q["dA"]), q["dA"], -1), (_like(q["B0"], q["dB"]), q["dB"], -2)]
        start = torch.stack([(old * old).sum(dim) for old, _, dim in vectors])
        end = torch.stack([(old + d).square().sum(dim) for old, d, dim in vectors])
        difference = torch.stack([(d * (2 * old + d)).sum(dim) for old, d, dim in vectors])
        unit, along_step, growth = lengths_after_step(start, end, difference, FLOOR, FLOOR)
        # The turns are along_step d + along_start old, the unit vectors at the start unit old.
        along_start = -growth * along_step * unit
        (a1, b1), (a0, b0), (a_unit, b_unit) = along_step, along_start, unit
        b_new = b0 + b_unit
        # (n, 1, 1) in a stack, whose lengths are (n, r).
        strength, dlambda = (t.squeeze(-1) if t.dim() else t for t in (strength, q["dlambda"]))
        entries = torch.stack(
            [
                strength * a1 * b1,
                strength * a1 * b_new,
                strength * (a0 + a_unit) * b1,
                strength * (a0 * b_new + a_unit * b0) + dlambda * a_unit * b_unit,
            ]
        )
        blocks = torch.diag_embed(entries / self.r).unflatten(0, (2, 2))
        return blocks.movedim((0, 1), (-4, -2)).flatten(-4, -3).flatten(-2)


def _inverse_length(vectors: Tensor, dim: int) -> Tensor:
    """(..., 1, r)."""
    return (vectors * vectors).sum(dim).clamp(min=FLOOR**2).rsqrt().unsqueeze(-2)


def _like(old: Tensor, new: Tensor) -> Tensor:
    """A start that the members of a stack share, as one for each."""
    return old.expand(new.shape)


def _beside(new: Tensor, old: Tensor, dim: int) -> Tensor:
    return torch.cat([new, _like(old, new)], dim)
