"""C3A: y' = y + x ΔWᵀ, ΔW of circulant blocks of b x b.

The block of outputs m and inputs n holds w[m, n, (q - p) mod b] / in at row p and column q, so each
block is a circular correlation of x_n with w[m, n]. With the real Fourier transform F of length b,
    y'_m = y_m + F⁻¹ Σ_n conj(F w[m, n]) ∘ F x_n / in.
Trainable: w (out / b, in / b, b), zero. Count: in out / b. The work is that of the transforms and
of in out / b products a token, and no matrix of in x out is made; but over a base in bfloat16, for
more tokens than inputs, where the transforms' traffic in float32 takes longer than a product.
Identity at the start: w = 0. The bias is untouched. The increment has full rank in general.
Starts of PEFT's that are not the identity are ``init_weights`` "xavier_uniform" (its default),
"kaiming_uniform" and "gaussian"; the adapted model then differs from the base from the start.
Numerics: Fourier transforms are in float32 or better, whatever the adapter's dtype.
Pitfall: as ΔW is divided by in, w moves far: learning rates are some hundred times LoRA's.

Chen et al. 2024, "Parameter-Efficient Fine-Tuning via Circular Convolution", arXiv 2407.19342,
section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..dense_increment import DenseIncrement
from ..errors import require
from ..linalg import full_precision
from ..method import Leaves

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class C3A(DenseIncrement):
    """Blocks that are circular convolutions.

    Args:
        block_size: b, divides inputs and outputs.
        init_weights: True starts at zero; a name at PEFT's start of that name, which changes the
            model.

    Example:
        >>> params = fadapt.init(model, fadapt.C3A(block_size=4))
        >>> tuple(params["0.weight"].train["w"].shape)
        (4, 2, 4)
    """

    block_size: int = 256
    init_weights: bool | Literal["xavier_uniform", "kaiming_uniform", "gaussian"] = True

    @property
    def starts_at_identity(self) -> bool:
        return self.init_weights is True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.block_size >= 1, f"block_size must be at least 1, got {self.block_size}; write 32"
        )

    def check(self, site: Site) -> None:
        b, (d_out, d_in) = self.block_size, site.matrix_shape
        common = math.gcd(d_in, d_out)
        fits = [n for n in range(1, common + 1) if common % n == 0]
        require(
            common % b == 0,
            f"block_size={b} does not divide both the {d_in} inputs and the {d_out} outputs; "
            f"choose from {sorted(sorted(fits, key=lambda n: abs(n - b))[:8])}",
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        b, (d_out, d_in) = self.block_size, site.site.matrix_shape
        shape = d_out // b, d_in // b, b
        if self.init_weights is True:
            w = site.zeros(*shape)
        elif self.init_weights == "gaussian":
            w = site.normal(rng, shape)
        elif self.init_weights == "kaiming_uniform":
            w = site.uniform(rng, shape, d_in**-0.5)
        else:
            w = site.uniform(rng, shape, (6 / (d_in + d_out)) ** 0.5)
        return {"w": w}, {}

    def prefers_matrix(self, p: Mapping[str, Tensor], tokens: int, d_out: int, d_in: int) -> bool:
        return False  # in float32

    def increment(
        self, p: Mapping[str, Tensor], weight: Callable[[], Tensor], d_out: int, d_in: int
    ) -> Tensor:
        w, b = p["w"], self.block_size
        one = torch.arange(b, device=w.device)
        turn = (one - one.unsqueeze(-1)) % b  # of row p and column q
        blocks = w.index_select(-1, turn.flatten()).unflatten(-1, (b, b)) / d_in
        return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        if y.dtype is torch.bfloat16 and math.prod(x.shape[:-1]) >= x.shape[-1]:
            return super().delta(p, x, y, base)
        b, wide = self.block_size, torch.promote_types(x.dtype, torch.float32)
        with full_precision(x):
            # (..., frequency, n, m) and (..., frequency, tokens, n): one product a frequency.
            kernel = torch.fft.rfft(p["w"].to(wide) / x.shape[-1]).conj().movedim(-1, -3).mT
            spectrum = torch.fft.rfft(x.to(wide).unflatten(-1, (-1, b))).movedim(-1, -3)
            out = torch.fft.irfft((spectrum @ kernel).movedim(-3, -1), n=b)
        return out.flatten(-2).to(x.dtype)
