"""SHiRA: y' = y + x Sᵀ,  S (out, in) sparse: v[k] at row indices[0, k], column indices[1, k].

Trainable: v (n,), zero, with n = r (in + out), as many as LoRA has of rank r. Fixed: indices (2, n)
int32, n different places row by row, drawn at random: from the site's own generator, or from
``random_seed`` alone, as PEFT draws them. Count: r (in + out).
Identity at the start: v = 0. The bias is untouched. The increment has full rank in general: no LoRA
equals it.
Numerics: of few tokens (generation), n products a token: the entries of x at the columns, times v,
added up by rows. Of more, S is made for products, which are cheaper than n scattered sums a token,
and made again in the backward pass, so that training keeps v and x alone; the gradient of all of S,
of which v's is a part, is one product of the size of W's own. On CUDA the sums of the first way are
in no fixed order.
Pitfall: the largest n that means anything is in out; r is bounded by that.

Bhardwaj et al. 2024, "Sparse High Rank Adapters", arXiv 2406.13175, section 3 (SHiRA-Rand).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..base.torch_private import is_transformed
from ..dense_increment import DenseIncrement
from ..errors import require
from ..method import Leaves
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class SHiRA(DenseIncrement):
    """Some entries of the weight, chosen at random and trained.

    Args:
        r: r (in + out) entries of a layer are trained, at most all.
        random_seed: of the places, which then follow from it and the shape alone; None for other
            places at every site.

    Example:
        >>> params = fadapt.init(model, fadapt.SHiRA(r=1))
        >>> adapter = params["0.weight"]
        >>> tuple(adapter.train["v"].shape), adapter.fixed["indices"].dtype
        ((24,), torch.int32)
    """

    r: int = 32
    random_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)
        seed = self.random_seed
        require(
            seed is None or 0 <= seed < 2**63,
            f"random_seed must be None, or at least 0 and less than 2**63, got {seed}",
        )

    def check(self, site: Site) -> None:
        d_out, d_in = site.matrix_shape
        most = d_out * d_in // (d_out + d_in)
        require(
            most >= 1,
            f"a {d_out} x {d_in} weight has fewer entries than in + out; write fadapt.Full()",
        )
        require(
            self.r <= most,
            f"r={self.r} trains {self.r * (d_in + d_out)} entries, more than the {d_out * d_in} of "
            f"a {d_out} x {d_in} weight; write r={most} or less",
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        d_out, d_in = site.site.matrix_shape
        n = self.r * (d_in + d_out)
        if self.random_seed is not None:
            rng = torch.Generator().manual_seed(self.random_seed)
        places = torch.randperm(d_out * d_in, generator=rng, device="cpu")[:n].sort().values
        indices = torch.stack([places // d_in, places % d_in]).to(site.device, torch.int32)
        return {"v": site.zeros(n)}, {"indices": indices}

    def prefers_matrix(self, p: Mapping[str, Tensor], tokens: int, d_out: int, d_in: int) -> bool:
        return tokens * p["v"].shape[-1] >= d_in * d_out

    def increment(
        self, p: Mapping[str, Tensor], weight: Callable[[], Tensor], d_out: int, d_in: int
    ) -> Tensor:
        v = p["v"]
        # Of a stack v is (members, 1, n), alone (n,); the places of all members may be the same.
        row, column = _places(p)
        place = row * d_in + column
        place = place.expand_as(v) if v.dim() > 1 else place.squeeze(-2)
        flat = v.new_zeros(*v.shape[:-1], d_out * d_in)
        # In place, where torch.func does not map it, there is one matrix less.
        flat = flat.scatter(-1, place, v) if is_transformed() else flat.scatter_(-1, place, v)
        return flat.reshape(*v.shape[:-2], d_out, d_in)

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        v, (d_in, d_out) = p["v"], (x.shape[-1], y.shape[-1])
        tokens = math.prod(x.shape[:-1]) // math.prod(v.shape[:-1])
        # The rows of an embedding are no tensor: one product with S takes its columns.
        if not isinstance(x, Tensor) or self.prefers_matrix(p, tokens, d_out, d_in):
            return super().delta(p, x, y, base)
        row, column = _places(p)
        places = (*x.shape[:-1], v.shape[-1])
        values = x.gather(-1, column.expand(places)) * v
        sums = values.new_zeros(*x.shape[:-1], d_out)
        return sums.scatter_add(-1, row.expand(places), values)


def _places(p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows and columns (..., 1, n)."""
    row, column = (p["indices"][..., k : k + 1, :].long() for k in (0, 1))
    return row, column
