"""FourierFT: y' = y + s x ΔWᵀ,  ΔW = Re F⁻¹(C), the inverse 2-D Fourier transform of a sparse C.

C (out, in) holds the n trained values at n fixed random places (u_k, v_k), one of each place:
    ΔW[p, q] = 1 / (out in) Σ_k spectrum[k] cos 2π(u_k p / out + v_k q / in).
Trainable: spectrum (n,), zero. Fixed: indices (2, n) int64, drawn from ``random_loc_seed`` alone,
so that layers of the same shape share them. Count: n.
For a few tokens neither C nor ΔW is made. A transform is a product of one for each axis:
    y' = y + s Re F⁻¹_out S(spectrum ∘ (F⁻¹_in x)[v]),  S adds the k-th entry to place u_k.
For 4 min(in, out) of them and more ΔW itself is cheaper, by one transform of C.
Identity at the start: spectrum = 0. The bias is untouched. The increment has rank at most 2 n.
PEFT starts at a standard normal spectrum, which changes the model: ``init_weights=False``.
Numerics: Fourier transforms are in float32 or better, of some tokens at a time, and made again in
the backward pass: the n complex values a token are more than x. On CUDA the sums of S are in no
fixed order.
Pitfall: one step of a value moves all of W by 150 / (out in); PEFT's comparison trains it badly at
its defaults, so search the learning rate.

Gao et al. 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
arXiv 2405.03003, eq. 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dense_increment import DenseIncrement
from ..errors import require
from ..linalg import full_precision
from ..method import Factors, Leaves
from ..recomputed import again

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView

TOKENS = 128
"""That are transformed at a time."""


@dataclass(frozen=True)
class FourierFT(DenseIncrement):
    """A few coefficients of the Fourier transform of the increment.

    Args:
        n_frequency: n, at most in_features times out_features.
        scaling: s.
        random_loc_seed: of the places.
        init_weights: True starts at zero; False at PEFT's random values, which change the model.

    Example:
        >>> params = fadapt.init(model, fadapt.FourierFT(n_frequency=10))
        >>> tuple(params["0.weight"].train["spectrum"].shape)
        (10,)
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    init_weights: bool = True

    @property
    def starts_at_identity(self) -> bool:
        return self.init_weights

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.n_frequency
        require(n >= 1, f"n_frequency must be at least 1, got {n}; write n_frequency=1000")
        require(
            0 <= self.random_loc_seed < 2**63,
            f"random_loc_seed must be at least 0 and less than 2**63, got {self.random_loc_seed}",
        )

    def check(self, site: Site) -> None:
        d_out, d_in = site.matrix_shape
        require(
            self.n_frequency <= d_out * d_in,
            f"n_frequency={self.n_frequency} is more than the {d_out * d_in} entries of a "
            f"{d_out} x {d_in} weight; write n_frequency={d_out * d_in} or less",
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        d_out, d_in = site.site.matrix_shape
        own = torch.Generator().manual_seed(self.random_loc_seed)
        place = torch.randperm(d_out * d_in, generator=own, device="cpu")[: self.n_frequency]
        indices = torch.stack([place // d_in, place % d_in]).to(site.device)
        shape = (self.n_frequency,)
        start = site.zeros(*shape) if self.init_weights else site.normal(rng, shape)
        return {"spectrum": start}, {"indices": indices}

    def prefers_matrix(self, p: Mapping[str, Tensor], tokens: int, d_out: int, d_in: int) -> bool:
        return tokens >= 4 * min(d_out, d_in)

    def increment(
        self, p: Mapping[str, Tensor], weight: Callable[[], Tensor], d_out: int, d_in: int
    ) -> Tensor:
        spectrum, n = p["spectrum"], self.n_frequency
        wide = torch.promote_types(spectrum.dtype, torch.float32)
        lead = spectrum.shape[:-2] if spectrum.dim() > 1 else ()
        u, v = (p["indices"][..., k, :] for k in (0, 1))
        values = spectrum.reshape(*lead, n).to(wide)
        place = (u * d_in + v).expand(*lead, n)
        c = values.new_zeros(*lead, d_out * d_in).scatter(-1, place, values)
        with full_precision(spectrum):
            # The real part is even: that of the transform, which of real values is half as large.
            half = torch.fft.rfft2(c.unflatten(-1, (d_out, d_in))).real
        negative = -torch.arange(d_out, device=c.device) % d_out
        rest = half[..., 1 : (d_in + 1) // 2].index_select(-2, negative).flip(-1)
        return (torch.cat([half, rest], -1) * (self.scaling / (d_out * d_in))).to(spectrum.dtype)

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        d_in, d_out = x.shape[-1], y.shape[-1]
        tokens = math.prod(x.shape[:-1]) // math.prod(p["spectrum"].shape[:-1])
        if self.prefers_matrix(p, tokens, d_out, d_in):
            return super().delta(p, x, y, base)
        wide = torch.promote_types(x.dtype, torch.float32)
        u, v = p["indices"].unbind(-2)  # (..., n)
        # Of real values a transform is its first half; the second is conjugate, in reverse.
        far_u, far_v = 2 * u > d_out, 2 * v > d_in
        u, v = torch.where(far_u, d_out - u, u), torch.where(far_v, d_in - v, v)
        scale = p["spectrum"].new_full((), self.scaling / d_in, dtype=wide)
        real = torch.where((u == 0) | (2 * u == d_out), scale, scale / 2).unsqueeze(-1)
        gains = real, torch.where(far_u == far_v, -1, 1).unsqueeze(-1) * real

        def increment(x: Tensor, spectrum: Tensor) -> Tensor:
            with full_precision(x):
                waves, half = torch.fft.rfft(x.to(wide)).mT, []
                spectrum = spectrum.to(wide)
                spectrum = spectrum.mT if spectrum.dim() > 1 else spectrum.unsqueeze(-1)
                for part, gain in zip((waves.real, waves.imag), gains, strict=True):
                    values = _taken(part.contiguous(), v) * (spectrum * gain)
                    half.append(_added(values, u, d_out // 2 + 1))
                return torch.fft.irfft(torch.complex(*half).mT, n=d_out).to(x.dtype)

        if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.dim() < 2:
            return again(increment, x, p["spectrum"])
        # What one token needs on the way is several times x.
        parts = [again(increment, part, p["spectrum"]) for part in x.split(TOKENS, -2)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        d_out, d_in = base.weight().shape[-2:]
        if 2 * self.n_frequency >= min(d_out, d_in):
            return None
        c = p["spectrum"]

        def angles(index: Tensor, size: int) -> Tensor:
            # Reduced as integers, so that they are exact in any dtype.
            turns = index.unsqueeze(-1) * torch.arange(size, device=index.device) % size
            return turns.to(c.dtype) * (2 * math.pi / size)

        rows, columns = angles(p["indices"][0], d_out), angles(p["indices"][1], d_in)
        scale = (c * (self.scaling / (d_out * d_in))).unsqueeze(-1)
        # cos(α + β) = cos α cos β - sin α sin β.
        b = torch.cat([scale * rows.cos(), -scale * rows.sin()])
        return torch.cat([columns.cos(), columns.sin()]), b.mT


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """The rows (..., n, tokens) at ``index`` (n,), or at each member's own (members, n)."""
    if index.dim() == 1:
        return rows.index_select(-2, index)
    return rows.gather(-2, index.unsqueeze(-1).expand(*rows.shape[:-2], -1, rows.shape[-1]))


def _added(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """The sums (..., count, tokens) of the rows of each index."""
    sums = rows.new_zeros(*rows.shape[:-2], count, rows.shape[-1])
    if index.dim() == 1:
        return sums.index_add(-2, index, rows)
    return sums.scatter_add(-2, index.unsqueeze(-1).expand(rows.shape), rows)
