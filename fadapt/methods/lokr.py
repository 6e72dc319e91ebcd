"""LoKr: y' = y + s x (w1 ⊗ w2)ᵀ,  s = alpha / r.

With out = a b and in = c d (the divisor nearest to the square root first, or to
``decompose_factor``), w1 is (a, c) and w2 is (b, d). Entry (α b + β, γ d + δ) of w1 ⊗ w2 is
w1[α, γ] w2[β, δ], so x seen as X (c, d) gives w1 X w2ᵀ (a, b): two small products, and the
Kronecker product itself is never made. w2 is w2_a (b, r) w2_b (r, d), or whole where
r >= max(b, d) / 2; w1 is whole, or with ``decompose_both`` w1_a (a, r) w1_b (r, c) where
r < max(a, c) / 2. Of a convolution (out, channels, kernel) the channels are factored and w2 holds
the kernel: (b, d kernel).
Trainable: w1 or w1_a zero; the others uniform on ±1/sqrt(longer side). Count: a c + r (b + d), with
b d for a whole w2 and r (a + c) for w1 in factors.
Identity at the start: w1 = 0. The bias is untouched. The increment has rank
rank(w1) rank(w2) <= min(a, c) min(b, d, r).
Pitfalls: a prime number of outputs or inputs factors as 1 n only, and then w2 is large; where w2 is
whole, r is in the scale alone.

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation", arXiv 2309.14859, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..errors import require
from ..method import Factors, Leaves, Method
from ..recomputed import again
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class LoKr(Method):
    """A Kronecker product of two small matrices.

    Args:
        r: rank of the factors, at least 1.
        alpha: numerator of the scale alpha / r.
        decompose_both: w1 in factors too, where it is large.
        decompose_factor: the size of w1 that is aimed at; -1 for the square root.

    Example:
        >>> params = fadapt.init(model, fadapt.LoKr(r=1))
        >>> {name: tuple(leaf.shape) for name, leaf in params["0.weight"].train.items()}
        {'w1': (4, 2), 'w2_a': (4, 1), 'w2_b': (1, 4)}
    """

    r: int = 8
    alpha: float = 8.0
    decompose_both: bool = False
    decompose_factor: int = -1

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)
        require(
            self.decompose_factor == -1 or self.decompose_factor >= 1,
            f"decompose_factor must be -1 (the square root) or at least 1, got "
            f"{self.decompose_factor}; write decompose_factor=-1",
        )

    def shapes(self, site: Site) -> dict[str, tuple[int, int]]:
        """The leaves' shapes at a site."""
        channels = site.kernel[0] if site.kernel else site.in_features
        a, b = factorization(site.out_features, self.decompose_factor)
        c, d = factorization(channels, self.decompose_factor)
        whole = {"w1": (a, c), "w2": (b, site.in_features // c)}
        in_factors = {
            "w1": self.decompose_both and self.r < max(a, c) / 2,
            "w2": self.r < max(b, d) / 2,
        }
        found = {}
        for name, (rows, columns) in whole.items():
            if in_factors[name]:
                found[f"{name}_a"] = rows, self.r
                found[f"{name}_b"] = self.r, columns
            else:
                found[name] = rows, columns
        return found

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        train = {}
        for name, shape in self.shapes(site.site).items():
            start_at_zero = name in ("w1", "w1_a")
            # Small enough that bfloat16 keeps their steps, also where r is 1.
            bound = max(shape) ** -0.5
            train[name] = site.zeros(*shape) if start_at_zero else site.uniform(rng, shape, bound)
        return train, {}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        names = [name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b") if name in p]
        scale = self.alpha / self.r
        # What lies between the products is larger than x.
        return again(
            lambda x, *leaves: _applied(dict(zip(names, leaves, strict=True)), x) * scale,
            x,
            *(p[name] for name in names),
        )

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        (b1, a1), (b2, a2) = (_thin(*_factors(p, name)) for name in ("w1", "w2"))
        a, b = torch.kron(a1, a2), torch.kron(b1, b2)
        if a.shape[0] >= min(a.shape[1], b.shape[0]):
            return None
        return a, b * (self.alpha / self.r)


def _applied(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x (w1 ⊗ w2)ᵀ."""
    (b1, a1), (b2, a2) = _factors(p, "w1"), _factors(p, "w2")
    c = (b1 if a1 is None else a1).shape[-1]
    # (..., tokens c, d), then (..., tokens b, c): one plain product for each factor.
    h = x.unflatten(-1, (c, -1))
    tokens = h.shape[-3]
    h = h.flatten(-3, -2)
    h = (h if a2 is None else h @ a2.mT) @ b2.mT
    h = h.unflatten(-2, (tokens, c)).mT
    b = h.shape[-2]
    h = h.flatten(-3, -2)
    h = (h if a1 is None else h @ a1.mT) @ b1.mT
    return h.unflatten(-2, (tokens, b)).mT.flatten(-2)


def factorization(n: int, factor: int) -> tuple[int, int]:
    """n as a product: ``factor`` first if it divides n, else the largest divisor below it.

    Not above the square root of n in the second case; -1 stands for the square root.
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    largest = math.isqrt(n) if factor == -1 else min(factor, math.isqrt(n))
    first = next(m for m in range(largest, 0, -1) if n % m == 0)
    return first, n // first


def _factors(p: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    """(B, A) of a matrix B A, or (B, None) of a whole one."""
    return (p[name], None) if name in p else (p[f"{name}_a"], p[f"{name}_b"])


def _thin(b: Tensor, a: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factors with as few columns as the shapes allow."""
    rows, columns = b.shape[-2], (b if a is None else a).shape[-1]
    whole = b if a is None else b @ a
    if a is not None and b.shape[-1] < min(rows, columns):
        return b, a
    if columns <= rows:
        return whole, torch.eye(columns, dtype=b.dtype, device=b.device)
    return torch.eye(rows, dtype=b.dtype, device=b.device), whole
