"""TinyLoRA: y' = y + x [B (Σ_k v_k P_k) A]ᵀ, a combination of fixed random cores.

Trainable: v (u,), zero; with ``weight_tying`` one v for all sites. Fixed: A = diag(√S) Vᵀ (r, in)
and B = U diag(√S) (out, r) from the top of W's SVD; P (u, r, r) normal with variance 1 / r.
Count: u a site, or u in all.
Identity at the start: v = 0. The bias is untouched. The increment has rank r.
Pitfalls: more than r² values a site are redundant; so few values take larger learning rates than
LoRA's.

Morris et al. 2026, "Learning to Reason in 13 Parameters", arXiv 2602.04118; over LoRA-XS,
arXiv 2405.17604.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..linalg import top_svd
from ..method import Factors, Leaves, Method
from ._ranks import LARGEST_RANK, check_rank, check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class TinyLoRA(Method):
    """A few numbers that mix random cores between frozen singular directions.

    Args:
        r: directions, at most min(in_features, out_features).
        u: numbers that are trained.
        weight_tying: one set of numbers for all sites.

    Example:
        >>> params = fadapt.init(model, fadapt.TinyLoRA(u=13))
        >>> tuple(params["0.weight"].train["v"].shape)
        (13,)
    """

    r: int = 2
    u: int = 64
    weight_tying: bool = False

    reads_output: ClassVar[bool] = False
    needs_plain_base: ClassVar[bool] = True

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)
        require(
            1 <= self.u <= LARGEST_RANK,
            f"u must be at least 1 and at most {LARGEST_RANK}, got {self.u}; write u=64",
        )

    def check(self, site: Site) -> None:
        check_rank(site, "r", self.r)

    def shared(self, sites: Sequence[SiteView], rng: torch.Generator) -> tuple[Leaves, Leaves]:
        return ({"v": sites[0].zeros(self.u)} if self.weight_tying else {}), {}

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        left, s, right = top_svd(site.weight(), self.r)
        root = s.sqrt()
        fixed = {
            "A": (right * root).mT.contiguous(),
            "B": left * root,
            "P": site.normal(rng, (self.u, self.r, self.r), self.r**-0.5),
        }
        return ({} if self.weight_tying else {"v": site.zeros(self.u)}), fixed

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return (x @ p["A"].mT) @ self._core(p).mT @ p["B"].mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        return p["A"], p["B"] @ self._core(p)

    def _core(self, p: Mapping[str, Tensor]) -> Tensor:
        """Σ_k v_k P_k (..., r, r)."""
        v = p["v"] if p["v"].dim() > 1 else p["v"].unsqueeze(0)
        return (v @ p["P"].flatten(-2)).squeeze(-2).unflatten(-1, (self.r, self.r))
