"""RandLoRA: y' = y + s x ΔWᵀ, a full-rank ΔW of random factors with trained scales; s = alpha / r.

With m = min(in, out), n the larger, and ⌈m / r⌉ = N terms:
    U = A ∘ λ ∘ (γ0 + g) (r N, m), entry (k N + j, i) is A[k, i] λ[k, j] (γ0 + g[j, i]);
    V = B (n, N r), entry (i, j r + k) is B[i, j, k];
    ΔW = V U where in <= out, else Uᵀ Vᵀ.
Trainable: λ ("lambda", (r, N)) and g (N, m), zero; γ0 = 1 / max(N, m). Count: r N + N m.
Fixed and shared by all sites, which use their first rows and columns: A (r, largest m) and
B (largest n, largest N, r), drawn from ``projection_prng_key`` alone as PEFT draws them (uniform in
bfloat16, or with values -1, 0 and 1), each divided by its standard deviation.
Identity at the start: λ = 0. The bias is untouched.
The pairing of the r N inner places is PEFT's: U's run over j first and V's over k first, so term j
of the paper's sum is spread over others. A and B are random, so the family of maps is alike.
Numerics: of few tokens x goes through U and V; of more than 2 m, ΔW itself is made, which is
cheaper. Neither U nor ΔW is kept for the backward pass. A full rank has its price: both ways take
at least three products of the size of W's own where LoRA has none, so a step is two to three times
LoRA's.
Pitfall: the start depends on which other sites there are, by the sizes of A and B.

Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
arXiv 2502.00987, eq. 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..method import Leaves, Method
from ..recomputed import product
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class RandLoRA(Method):
    """A full-rank increment from trained scales of random factors that all sites share.

    Args:
        r: rank of each term, at least 1.
        alpha: numerator of the scale alpha / r.
        projection_prng_key: the seed of the shared factors, at least 0.
        sparse: factors of -1, 0 and 1 with two zeros in three.
        very_sparse: the same with few entries that are not zero, about one in √m.

    Example:
        >>> params = fadapt.init(model, fadapt.RandLoRA(r=4))
        >>> {name: tuple(leaf.shape) for name, leaf in params["0.weight"].train.items()}
        {'g': (2, 8), 'lambda': (4, 2)}
    """

    r: int = 32
    alpha: float = 640.0
    projection_prng_key: int = 0
    sparse: bool = False
    very_sparse: bool = False

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)
        key = self.projection_prng_key
        require(key >= 0, f"projection_prng_key must be at least 0, got {key}")

    def terms(self, site: Site) -> int:
        """N."""
        return -(-min(site.matrix_shape) // self.r)

    def gamma(self, site: Site) -> float:
        """γ0."""
        return 1 / max(self.terms(site), min(site.matrix_shape))

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        n = self.terms(site.site)
        g = site.zeros(n, min(site.site.matrix_shape))
        return {"g": g, "lambda": site.zeros(self.r, n)}, {}

    def shared(self, sites: Sequence[SiteView], rng: torch.Generator) -> tuple[Leaves, Leaves]:
        first = sites[0]
        rows = max(site.out_features for site in sites)
        columns = max(site.in_features for site in sites)
        if first.device.type == "meta":
            return {}, {k: first.zeros(*s) for k, s in self._shapes(rows, columns).items()}
        bank = self.bank(rows, columns)
        return {}, {k: t.to(first.device, first.dtype) for k, t in bank.items()}

    def bank(self, rows: int, columns: int) -> Leaves:
        """A and B for sites of at most this many outputs and inputs, from the key."""
        key, m = torch.Generator().manual_seed(self.projection_prng_key), min(rows, columns)
        (r, _), (n, count, _) = shapes = [*self._shapes(rows, columns).values()]
        if self.sparse or self.very_sparse:
            share = 1 / (2 * (m**0.5 if self.very_sparse else 3))
            uniform = [torch.rand(shape, generator=key, device="cpu") for shape in shapes]
            a, b = ((u > 1 - share).float() - (u < share).float() for u in uniform)
        else:
            # Drawn with an axis for the terms, which is why the width of A is its fan-in.
            a = _uniform((r, 1, m), m, key).squeeze(1)
            b = torch.cat([_uniform((n, 1, r), r, key) for _ in range(count)], 1)
        spreads = a.std(), b.std()
        require(
            all(bool(s > 0) for s in spreads),
            f"{self} draws factors without an entry that is not zero; write very_sparse=False",
        )
        return {"A": (a / spreads[0]).float(), "B": (b / spreads[1]).float()}

    def _shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        m = min(rows, columns)
        return {"A": (self.r, m), "B": (max(rows, columns), -(-m // self.r), self.r)}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        (r, terms), m = p["lambda"].shape[-2:], p["g"].shape[-1]
        d_in, d_out = x.shape[-1], y.shape[-1]
        a = p["A"][..., :m].unsqueeze(-2)
        v = p["B"][..., : max(d_in, d_out), :terms, :].flatten(-2)
        start, s = 1 / max(terms, m), self.alpha / r

        def scaled(outer: Tensor, inner: Tensor) -> Tensor:
            u = a * (s * outer).unsqueeze(-1) * (start + inner).unsqueeze(-3)
            return u.flatten(-3, -2)

        def whole(outer: Tensor, inner: Tensor) -> Tensor:
            change = v @ scaled(outer, inner)
            return change if m == d_in else change.mT

        trained = p["lambda"], p["g"]
        tokens = math.prod(x.shape[:-1]) // math.prod(p["g"].shape[:-2])
        if tokens > 2 * m:
            return product(x, whole, *trained)
        if m == d_in:
            return product(x, scaled, *trained) @ v.mT
        return product(x @ v, lambda outer, inner: scaled(outer, inner).mT, *trained)


def _uniform(shape: tuple[int, ...], fan_in: int, rng: torch.Generator) -> Tensor:
    """As ``nn.init.kaiming_uniform_(a=√5)`` in bfloat16."""
    bound = fan_in**-0.5
    empty = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    return empty.uniform_(-bound, bound, generator=rng)
