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
cheaper. Neither U nor ΔW is kept for the backward pass. A full rank has its price: of a square W
the first way takes five products of the size of W's own beside the base's two, and making ΔW twice
and its gradient takes three of m tokens each, so a step of few tokens is about twice LoRA's.
Pitfall: the start depends on which other sites there are, by the sizes of A and B.

Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
arXiv 2502.00987, eq. 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dense_increment import DenseIncrement
from ..errors import require
from ..method import Leaves
from ..recomputed import product
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class RandLoRA(DenseIncrement):
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

    def prefers_matrix(self, p: Mapping[str, Tensor], tokens: int, d_out: int, d_in: int) -> bool:
        return tokens > 2 * min(d_in, d_out)

    def increment(
        self, p: Mapping[str, Tensor], weight: Callable[[], Tensor], d_out: int, d_in: int
    ) -> Tensor:
        change = self._v(p, d_out, d_in) @ self._u(p, p["lambda"], p["g"])
        return change if d_in <= d_out else change.mT

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        d_in, d_out, trained = x.shape[-1], y.shape[-1], (p["lambda"], p["g"])
        tokens = math.prod(x.shape[:-1]) // math.prod(p["g"].shape[:-2])
        if self.prefers_matrix(p, tokens, d_out, d_in):
            return super().delta(p, x, y, base)
        v = self._v(p, d_out, d_in)
        if d_in <= d_out:
            return product(x, lambda *t: self._u(p, *t), *trained) @ v.mT
        return product(x @ v, lambda *t: self._u(p, *t).mT, *trained)

    def _u(self, p: Mapping[str, Tensor], outer: Tensor, inner: Tensor) -> Tensor:
        """s U (..., r N, m)."""
        (r, terms), m = outer.shape[-2:], inner.shape[-1]
        a = p["A"][..., :m].unsqueeze(-2)
        gain = 1 / max(terms, m) + inner
        return (a * (self.alpha / r * outer).unsqueeze(-1) * gain.unsqueeze(-3)).flatten(-3, -2)

    def _v(self, p: Mapping[str, Tensor], d_out: int, d_in: int) -> Tensor:
        """V (..., n, N r)."""
        return p["B"][..., : max(d_in, d_out), : p["g"].shape[-2], :].flatten(-2)


def _uniform(shape: tuple[int, ...], fan_in: int, rng: torch.Generator) -> Tensor:
    """As ``nn.init.kaiming_uniform_(a=√5)`` in bfloat16."""
    bound = fan_in**-0.5
    empty = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    return empty.uniform_(-bound, bound, generator=rng)
