"""LoRA-GA: y' = y + s [(x dAᵀ) (B0 + dB)ᵀ + (x A0ᵀ) dBᵀ],  s = alpha / r.

Fixed: A0 (r, in) and B0 (out, r), singular vectors of the gradient of the loss by the weight,
G = U diag(S) Vᵀ (out, in), both times c = out^(1/4) / √stable_gamma. Of the first 2 r triplets,
``direction`` gives A0 and B0 different ones, so that the first step of both together follows the
gradient in 2 r directions, the best that any factors of rank r can:
    ArB2r: A0 = c V[:, :r]ᵀ, B0 = c U[:, r:2r];
    A2rBr: A0 = c V[:, r:2r]ᵀ, B0 = c U[:, :r];
    ArBr: A0 from the second, fourth, ... triplet, B0 from the first, third, ...
With A = A0 + dA and B = B0 + dB this is W_res + s B A, where W_res = W - s B0 A0; as in PiSSA the
frozen W needs no residual copy and may be quantised.
Trainable: dA (r, in), dB (out, r), zero. Count: r (in + out).
Identity at the start: both products have a factor 0. The bias is untouched. The increment has rank
at most 2 r.
Data: G is the mean over the batches of the loss's gradient, the model's own loss, or ``loss_fn`` of
``fadapt.init`` or ``fadapt.observe``. Labels of padded tokens are left out.
Pitfalls: a gradient of fewer than 2 r directions (few tokens) is refused. The sign of a singular
vector is arbitrary; here the largest entry of each column of U is positive. PEFT multiplies B0 by
the singular values as well, so that its start depends on the size of the loss; this follows the
paper, in which it does not.

Wang, Yu and Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000,
theorem 3.1 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import CalibrationError, require
from ..linalg import random_svd, top_svd
from ..method import Leaves
from ..statistics.reduction import Statistic
from ..statistics.sums import Sum
from ._moved_factors import MovedFactors

if TYPE_CHECKING:
    from ..site import Site, SiteView


@dataclass(frozen=True)
class LoRAGA(MovedFactors):
    """LoRA that starts at singular vectors of the gradient of the loss.

    Args:
        r: rank, at least 1 and at most min(in_features, out_features) / 2.
        alpha: numerator of the scale alpha / r, positive.
        direction: which of the 2 r leading triplets give A and which B.
        stable_gamma: the larger, the smaller the start; positive.
        niter: power iterations of a randomised SVD; None for the exact one.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRAGA(r=1), [x, x], loss_fn=loss_fn)
        >>> sorted(params["0.weight"].train)
        ['dA', 'dB']
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr"] = "ArB2r"
    stable_gamma: float = 16.0
    niter: int | None = None

    @property
    def statistic(self) -> Statistic:
        return Statistic(Sum(), side="grad")

    def __post_init__(self) -> None:
        super().__post_init__()
        gamma = self.stable_gamma
        require(gamma > 0, f"stable_gamma must be positive, got {gamma}; write 16.0")
        require(
            self.niter is None or self.niter >= 1,
            f"niter must be at least 1, or None for an exact SVD, got {self.niter}",
        )

    def check(self, site: Site) -> None:
        most = min(site.matrix_shape) // 2
        require(
            self.r <= most,
            f"r={self.r} takes {2 * self.r} singular directions, more than a {site.out_features} x "
            f"{site.in_features} gradient has; write r={most} or less",
        )

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        if not isinstance(stat, Tensor):
            raise CalibrationError(
                f"{site.name}: LoRAGA starts from gradients; write fadapt.init(model, cfg, batches)"
            )
        r, wide = self.r, torch.promote_types(site.dtype, torch.float32)
        gradient = stat.reshape(site.site.matrix_shape)
        # The loss may be small: singular vectors do not depend on its size.
        largest = gradient.abs().max()
        gradient = (gradient / largest.clamp(min=torch.finfo(stat.dtype).tiny)).to(wide)
        if self.niter is None:
            u, s, v = top_svd(gradient, 2 * r)
        else:
            u, s, v = random_svd(gradient, 2 * r, rng, self.niter, oversample=max(8, 2 * r))
        # Below it the float32 products that were summed up are noise.
        floor = 16 * torch.finfo(torch.float32).eps * s[0]
        if not largest > 0 or not s[-1] > floor:
            rank = int((s > floor).sum()) if bool(largest > 0) else 0
            raise CalibrationError(
                f"{site.name}: the gradient of the loss has {rank} directions, fewer than the "
                f"2 r = {2 * r} that the start takes; calibrate on more tokens, or lower r"
            )
        both = {
            "ArB2r": (slice(0, r), slice(r, 2 * r)),
            "A2rBr": (slice(r, 2 * r), slice(0, r)),
            "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        }
        of_a, of_b = both[self.direction]
        c = site.out_features**0.25 / self.stable_gamma**0.5
        return self.leaves(site, c * v[:, of_a].mT, c * u[:, of_b])
