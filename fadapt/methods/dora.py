"""DoRA: W' = diag(m / |V|) V,  V = W + s B A,  |V| the L2 norm of each row.

Trainable: A (r, in) uniform, B (out, r) zero, mu (out,) zero, with m = |W| (1 + mu).
Fixed: w2 (out,), the squared row norms of W. Count: r (in + out) + out.
The norm is factored, so that W' is never formed:
    |V|² = w2 + 2 s rowsum(W Aᵀ ∘ B) + s² rowsum(B A Aᵀ ∘ B),
and with c = m / |V| the increment is (c - 1) ∘ (y - b) + c ∘ s (x Aᵀ) Bᵀ. The bias is untouched.
Identity at the start: B = 0 makes |V|² == w2 bitwise, hence c - 1 == 0.
The norm is a constant in backpropagation (section 4.3), so it is also one for jvp.
Training keeps the layer's output for the gradient of m, in the base's dtype; without it, that
gradient would cost a product of the size of W's own.
Dropout acts on the low-rank path alone: x Aᵀ sees the x without the dropped entries, and the gain
c - 1 meets the output y of all of them (PEFT's gain meets that of the dropped x).
A zero row of W has m = 0 and stays zero; its outputs and gradients are finite.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, eq. 5 and 11.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..base.linear_map import without_bias
from ..linalg import full_precision
from ..method import Leaves
from .lora import LoRA

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed LoRA.

    Args:
        r: rank, at least 1.
        alpha: numerator of the scale alpha / r.
        detach_norm: treat the norm as a constant in differentiation, as the paper does.

    Example:
        >>> params = fadapt.init(model, fadapt.DoRA(r=2))
        >>> sorted(params["0.weight"].train)
        ['A', 'B', 'mu']
    """

    detach_norm: bool = True

    @property
    def keep_fp32(self) -> frozenset[str]:
        return frozenset({"w2"})

    reads_output: ClassVar[bool] = True
    casts_output: ClassVar[bool] = False
    needs_plain_base: ClassVar[bool] = True

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        train, _ = super().init(site, rng)
        return (
            {**train, "mu": site.zeros(site.out_features)},
            {"w2": site.weight().square().sum(-1)},
        )

    def true_gradient(self) -> DoRA:
        return replace(self, detach_norm=False)

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        c_minus_1 = self._gain_minus_1(p, base).to(x.dtype)
        # The gain of the low-rank path is that of B's rows, so that y alone is as large as y.
        low_rank = self.scaled(p, x @ p["A"].mT) @ ((1 + c_minus_1).mT * p["B"]).mT
        return torch.addcmul(low_rank, c_minus_1, without_bias(base, y))

    def _gain_minus_1(self, p: Mapping[str, Tensor], base: LinearMap) -> Tensor:
        """c - 1 as a row (..., 1, out)."""
        w2, s, a, b = p["w2"], self.s(p), p["A"], p["B"]
        if self.detach_norm:
            a, b = a.detach(), b.detach()
        with full_precision(a):
            # The leaves' precision will do for |V|² - w2 = s rowsum(B ∘ (2 W Aᵀ + s B A Aᵀ)).
            inner = self._inner(a, b, base.linear(a), s, w2.dtype)
        change = (b.mT.to(w2.dtype) * inner).sum(-2, keepdim=True)
        moved = torch.add(w2, change, alpha=s) if isinstance(s, float) else w2 + s * change
        # Where V nearly vanishes the difference may round below zero.
        info = torch.finfo(w2.dtype)
        n = torch.maximum(moved, info.eps * w2).clamp(min=info.tiny).sqrt()
        n0 = w2.clamp(min=info.tiny).sqrt()  # so that a zero row has finite gradients
        return torch.addcmul(n0 - n, n0, p["mu"].to(w2.dtype)) / n

    def _inner(
        self, a: Tensor, b: Tensor, cross: Tensor, s: Tensor | float, dtype: torch.dtype
    ) -> Tensor:
        """2 W Aᵀ + s B A Aᵀ, transposed, from cross = (W Aᵀ)ᵀ."""
        if isinstance(s, float) and a.dim() == 2 and a.dtype is cross.dtype is dtype:
            return torch.addmm(cross, a @ a.mT, b.mT, beta=2, alpha=s)
        return 2 * cross.to(dtype) + s * ((a @ a.mT) @ b.mT).to(dtype)
