"""AntiPaSTO-ablate: a learned projector that removes k directions from a layer's output.

    Δ = -c ((u G) ∘ α) Gᵀ,   G = U Ĉ,   Ĉ = orthonormal(C),   u = y - b = x Wᵀ

that is ΔW = -c G diag(α) GᵀW, rank k. Over the r frozen singular directions the core is
I - c Ĉ diag(α) Ĉᵀ, with eigenvalues 1 - c α_j: a contraction while c and α lie in [0, 1].
Trainable: dC (r, k) and alpha (k,), zero; C = C0 + dC. Fixed: C0 (r, k) normal with variance 1/r,
U (out, r), and where out > in P = UᵀW (r, in), for u G = x Pᵀ Ĉ. Count: r k + k.
Usual targets: residual writers (o_proj, down_proj).
Ĉ is C / |C| for k = 1 and the Q of a QR above, in float32 or better.
Identity at the start: α = 0, so the increment is exactly 0. The bias is untouched.
``project`` clips α to [0, 1] after an optimiser step. At α = 0 the true gradient of C vanishes, as
it does for the angle at the origin of polar coordinates, and a direction clipped there would
never turn. The gradient of C alone is therefore taken as if |α| were at least ``floor``; with
floor = 0 it is the true one.
Pitfalls: c outside [0, 1] gives up the contraction, c < 0 amplifies. QR is undefined where the
columns of C become dependent.

Clark 2026, arXiv 2601.07473; the fixed projector is Arditi et al. 2024, "Refusal in Language Models
Is Mediated by a Single Direction", arXiv 2406.11717.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..method import Factors, Leaves
from ._svd_core import SpectralMethod, coefficient, coordinates, input_directions

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class AntiPaSTOAblate(SpectralMethod):
    """Learned removal of k directions.

    Args:
        r: number of singular directions to choose within, at most min(out, in).
        k: number of directions removed, at most r.
        floor: the least |α| at which the gradient of C is taken; 0 for the true gradient.

    Example:
        >>> params = fadapt.init(model, fadapt.AntiPaSTOAblate(r=4, k=1))
        >>> sorted(params["0.weight"].train)
        ['alpha', 'dC']
    """

    k: int = 1
    floor: float = 1e-3

    reads_input: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.k <= self.r, f"k must be from 1 to r={self.r}, got {self.k}")
        require(0 <= self.floor <= 1, f"floor must be from 0 to 1, got {self.floor}")

    def true_gradient(self) -> AntiPaSTOAblate:
        return replace(self, floor=0.0)

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        train, fixed = super().init(site, rng)
        return train, {**fixed, "C0": site.normal(rng, (self.r, self.k), self.r**-0.5)}

    def start(self, site: SiteView, rng: torch.Generator) -> Leaves:
        return {"dC": site.zeros(self.r, self.k), "alpha": site.zeros(self.k)}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        alpha, directions = p["alpha"], orthonormal(p["C0"], p["dC"])
        rows, into = coordinates(p, x, y, base)
        into, out = into @ directions, p["U"] @ directions
        removed = ((rows @ into) * alpha) @ out.mT
        if self.floor:
            lift = torch.where(alpha.abs() < self.floor, self.floor - alpha, 0).detach()
            lifted = ((rows.detach() @ into) * lift) @ out.mT
            # Exactly 0; only its derivative by C remains.
            removed = removed + (lifted - lifted.detach())
        return -coefficient(self, p, removed) * removed

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        directions = orthonormal(p["C0"], p["dC"])
        up = -coefficient(self, p, p["U"]) * (p["U"] @ directions) * p["alpha"]
        return directions.mT @ input_directions(p, base), up

    def project(self, train: Leaves) -> Leaves:
        return {**train, "alpha": train["alpha"].clamp(0, 1)}


def orthonormal(start: Tensor, moved: Tensor) -> Tensor:
    """Orthonormal columns (r, k) that span those of ``start + moved``, one after the other."""
    wide = torch.promote_types(moved.dtype, torch.float32)
    c = start.to(wide) + moved.to(wide)
    q = torch.linalg.qr(c).Q if c.shape[-1] > 1 else c / c.square().sum(-2, keepdim=True).sqrt()
    return q.to(moved.dtype)
