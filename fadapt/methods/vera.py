"""VeRA: y' = y + b ∘ (((d0 + d) ∘ (x A[:, :in]ᵀ)) B[:out]ᵀ).

Random factors that all sites share and nothing trains, with trained scales of their inner and outer
side. Fixed and shared: A (r, largest in), B (largest out, r), uniform on ±√(6 / largest in) and
±√(6 / r), drawn from ``projection_prng_key`` alone, A first, as PEFT draws them.
Trainable: d (r,) and b (out,), zero. Count: r + out. d0 is ``d_initial``.
Identity at the start: b = 0, so the increment is exactly 0. The bias is untouched. The increment
has rank at most r.
Numerics: the gradient of d is 0 until b has moved; rates are ten times LoRA's.
Pitfall: a site uses the first rows and columns of the banks, whose bounds belong to the largest
site, so the start depends on which other sites there are: it is a method of all sites at once.

Kopiczko, Blankevoort and Asano 2023, "VeRA: Vector-based Random Matrix Adaptation",
arXiv 2310.11454, eq. 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..method import Factors, Leaves, Method
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class VeRA(Method):
    """Trained scales of random factors that all sites share.

    Args:
        r: rank, at least 1.
        projection_prng_key: the seed of the shared factors, at least 0.
        d_initial: the inner scale at the start, not 0.

    Example:
        >>> params = fadapt.init(model, fadapt.VeRA(r=4))
        >>> list(params), sorted(params["0.weight"].train)
        (['0.weight', '2.weight', 'shared:VeRA'], ['b', 'd'])
    """

    r: int = 256
    projection_prng_key: int = 0
    d_initial: float = 0.1

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)
        key = self.projection_prng_key
        require(key >= 0, f"projection_prng_key must be at least 0, got {key}")
        require(self.d_initial != 0, "d_initial=0 would leave nothing that trains; write 0.1")

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        return {"b": site.zeros(site.out_features), "d": site.zeros(self.r)}, {}

    def shared(self, sites: Sequence[SiteView], rng: torch.Generator) -> tuple[Leaves, Leaves]:
        first = sites[0]
        rows = max(site.out_features for site in sites)
        columns = max(site.in_features for site in sites)
        bank = self.bank(rows, columns)
        return {}, {k: t.to(first.device, first.dtype) for k, t in bank.items()}

    def bank(self, rows: int, columns: int) -> Leaves:
        """A (r, columns) and B (rows, r), from the key."""
        key = torch.Generator().manual_seed(self.projection_prng_key)
        return {"A": _uniform((self.r, columns), key), "B": _uniform((rows, self.r), key)}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        a, b = self._banks(p, x.shape[-1], y.shape[-1])
        return p["b"] * (((self.d_initial + p["d"]) * (x @ a.mT)) @ b.mT)

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        rows, columns = base.weight().shape
        a, b = self._banks(p, columns, rows)
        return a, p["b"].unsqueeze(-1) * b * (self.d_initial + p["d"])

    def _banks(self, p: Mapping[str, Tensor], columns: int, rows: int) -> tuple[Tensor, Tensor]:
        return p["A"][..., :columns], p["B"][..., :rows, :]


def _uniform(shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    bound = (6 / shape[1]) ** 0.5
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=rng)
