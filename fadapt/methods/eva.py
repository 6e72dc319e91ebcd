"""EVA: LoRA, y' = y + s (x Aᵀ) Bᵀ, whose A starts as the principal directions of the input x.

Trainable: A (r, in), rows the r leading eigenvectors of the covariance of x (orthonormal; the entry
of largest magnitude in each is positive), B (out, r) zero. Count: r (in + out), where r is what
the site got. With ``whiten`` row k is divided by √σ_k, σ_k = √(n λ_k) the singular value of the
(n, in) centred inputs, so it depends on the number of tokens n.
Rank redistribution: every site offers the explained variance ratios λ_k / Σλ of its first
round(r rho) directions, and the Σ r largest of all win. The budget is kept exactly; at ties the
lower k wins, then the earlier site (sites fed by one tensor tie at every k). alpha is scaled with
r, so that s = alpha / r stays. Sites without a win are not adapted.
Identity at the start: B = 0, so the increment is exactly 0. The bias is untouched.
Pitfalls: directions belong to the calibration data. Where the mean dominates and center=False, the
first direction is the mean. A site that varies in fewer directions than it needs is an error. In a
Chain ranks stay as they are.

Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv
2410.07170 (first versions: "One Initialization to Rule them All"), algorithm 1 and eq. 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CalibrationError, require
from ..method import Leaves, Planned
from ..statistics.moments import PCA
from ..statistics.reduction import Statistic
from ..statistics.spectrum import Spectrum
from .lora import LoRA

if TYPE_CHECKING:
    from ..method import Method
    from ..site import Site, SiteView


@dataclass(frozen=True)
class EVA(LoRA, Planned):
    """LoRA started from the principal directions of the layer's input, ranks where variance is.

    Args:
        r: mean rank over the sites, at least 1.
        alpha: numerator of the scale alpha / r; scaled with a site's rank.
        rho: a site gets at most round(r rho) ranks; 1 gives every site r.
        center: principal components of the centred input; False keeps the mean in.
        whiten: divide each direction by the square root of its singular value.

    Example:
        >>> params = fadapt.init(model, fadapt.EVA(r=2), [x, x])
        >>> sorted(params["0.weight"].train)
        ['A', 'B']
    """

    rho: float = 2.0
    center: bool = True
    whiten: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rho >= 1, f"rho must be at least 1 (no redistribution), got {self.rho}")

    @property
    def most(self) -> int:
        """The highest rank that a site can get."""
        return round(self.r * self.rho)

    @property
    def statistic(self) -> Statistic:
        # A centred covariance of n rows has rank n - 1 at most.
        return Statistic(PCA(self.most, self.center), at_least=self.r + self.center)

    def check(self, site: Site) -> None:
        require(
            self.r <= site.in_features,
            f"the input has {site.in_features} directions, fewer than r={self.r}; "
            f"write EVA(r={site.in_features}) or smaller",
        )

    @classmethod
    def plan_ranks(cls, sites: Mapping[str, tuple[EVA, Any]]) -> Mapping[str, Method | None]:
        """Redistributes the ranks over the sites; see the module docstring."""
        methods = {name: m for name, (m, _) in sites.items()}  # type: ignore[misc]
        if all(m.most == m.r for m in methods.values()):
            return methods
        offers = []
        for i, (name, (_, spectrum)) in enumerate(sites.items()):
            useful = min(methods[name].most, spectrum.rank)
            ratios = spectrum.ratios[:useful].tolist()
            offers += [(-ratio, k, i, name) for k, ratio in enumerate(ratios)]
        budget = sum(m.r for m in methods.values())
        if len(offers) < budget:
            raise CalibrationError(
                f"EVA: the inputs of {len(sites)} sites vary in only {len(offers)} directions, "
                f"fewer than the {budget} ranks to give out; calibrate on more varied data or "
                "lower r"
            )
        ranks = Counter(name for *_, name in sorted(offers)[:budget])
        return {
            name: replace(m, r=ranks[name], alpha=m.alpha * ranks[name] / m.r, rho=1.0)
            if ranks[name]
            else None
            for name, m in methods.items()
        }

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        if not isinstance(stat, Spectrum):
            raise CalibrationError(
                f"{site.name}: EVA starts from data; write fadapt.init(model, cfg, batches)"
            )
        if stat.rank < self.r:
            raise CalibrationError(
                f"{site.name}: the input varies in only {stat.rank} directions, fewer than the "
                f"rank {self.r}; calibrate on more varied data, lower r, or let ranks move: rho > 1"
            )
        # A copy: sites that are fed by one tensor share the spectrum, but each trains its own A.
        a = stat.vectors[:, : self.r].mT.clone()
        if self.whiten:
            a = a / (stat.rows * stat.values[: self.r]).pow(0.25).unsqueeze(1)
        return (
            {"A": a.to(site.device, site.dtype), "B": site.zeros(site.out_features, self.r)},
            {},
        )

    def widened(self, r: int) -> LoRA:
        # Once started, EVA is LoRA.
        return LoRA(r=r, alpha=float(r), dropout=self.dropout)
