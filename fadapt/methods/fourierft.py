"""FourierFT: y' = y + s x ΔWᵀ,  ΔW = Re F⁻¹(C), the inverse 2-D Fourier transform of a sparse C.

C (out, in) holds the n trained values at n fixed random places (u_k, v_k), one of each place:
    ΔW[p, q] = 1 / (out in) Σ_k spectrum[k] cos 2π(u_k p / out + v_k q / in).
Trainable: spectrum (n,), zero. Fixed: indices (2, n) int64, drawn from ``random_loc_seed`` alone,
so that layers of the same shape share them. Count: n.
Neither C nor ΔW is made. A transform is a product of one for each axis:
    y' = y + s Re F⁻¹_out S(spectrum ∘ (F⁻¹_in x)[v]),  S adds the k-th entry to place u_k.
Identity at the start: spectrum = 0. The bias is untouched. The increment has rank at most 2 n.
PEFT starts at a standard normal spectrum, which changes the model: ``init_weights=False``.
Numerics: Fourier transforms are in float32 or better, and made again in the backward pass: the n
complex values a token are more than x. On CUDA the sums of S are in no fixed order.
Pitfall: one step of a value moves all of W by 150 / (out in); PEFT's comparison trains it badly at
its defaults, so search the learning rate.

Gao et al. 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
arXiv 2405.03003, eq. 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..linalg import full_precision
from ..method import Factors, Leaves, Method
from ..recomputed import again

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class FourierFT(Method):
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

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

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

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        wide, d_out = torch.promote_types(x.dtype, torch.float32), y.shape[-1]
        u, v = (p["indices"][..., k : k + 1, :] for k in (0, 1))  # (..., 1, n)

        def increment(x: Tensor, spectrum: Tensor) -> Tensor:
            with full_precision(x):
                waves = torch.fft.ifft(x.to(wide))
                rows = (*x.shape[:-1], self.n_frequency)
                values = waves.gather(-1, v.expand(rows)) * (spectrum.to(wide) * self.scaling)
                places = values.new_zeros(*x.shape[:-1], d_out)
                out = torch.fft.ifft(places.scatter_add(-1, u.expand(rows), values))
            return out.real.to(x.dtype)

        return again(increment, x, p["spectrum"])

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
