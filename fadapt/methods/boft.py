"""BOFT: y' = b + (1 + d) ∘ (W x'),  x' = x G_m ... G_1,  G_i = P_iᵀ diag(R_1, R_2, ...) P_i.

A butterfly of m block-diagonal rotations: G_1 turns blocks of b neighbouring inputs, and G_i blocks
of two halves that lie 2^(i-2) blocks apart, so that m factors mix 2^(m-1) b inputs. The permutation
P_i is a transposition of axes; m = 1 is OFT with output scales.
R = (I - Q) (I + Q)⁻¹ for a skew-symmetric Q with the strict upper triangle q, row by row.
Trainable: q (m, in / b, b (b - 1) / 2), d (out,), zero. Count: m in (b - 1) / 2 + out.
Evaluated as increments: R - I = -2 (I + Q)⁻¹ Q, and with t the move so far t ← t + (x + t) (G - I);
the output moves by d ∘ (y - bias). Identity at the start: all are exactly 0 at Q = 0 and d = 0. The
bias is untouched. The increment has full rank. No matrix of in x in is made: factors that mix at
most 32 inputs are multiplied with each other first, so that a token meets one product; others cost
in b products a token each, and training holds the input of each. For d's gradient it also holds
the layer's output, in the base's dtype.
Numerics: rotations are made in float32 or better by an inverse that is always well conditioned.
Pitfalls: PEFT trains all b² entries of R's generator, of which only the skew part acts, and falls
back to m = 1 where its CUDA extension does not compile.

Liu et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization",
arXiv 2311.06243.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..base.linear_map import without_bias
from ..errors import require
from ..linalg import cayley_minus_identity, in_blocks, skew
from ..method import Leaves, Method

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView

WIDTH = 32
"""Inputs of a block whose product costs little beside moving the inputs to it and back."""


@dataclass(frozen=True)
class BOFT(Method):
    """Butterfly-factorised orthogonal map of the input, and scales of the output.

    Args:
        block_size: b, at least 2; divides the number of inputs. Even for more than one factor.
        n_butterfly_factor: m, at least 1; block_size 2^(m-1) divides the number of inputs.

    Example:
        >>> params = fadapt.init(model, fadapt.BOFT(block_size=4, n_butterfly_factor=2))
        >>> sorted(params["0.weight"].train)
        ['d', 'q']
    """

    block_size: int = 4
    n_butterfly_factor: int = 1

    reads_input: ClassVar[bool] = False
    casts_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def __post_init__(self) -> None:
        b, m = self.block_size, self.n_butterfly_factor
        require(b >= 2, f"block_size must be at least 2, got {b}; a block of 1 cannot rotate")
        require(
            1 <= m <= 24, f"n_butterfly_factor must be at least 1 and at most 24, got {m}; write 1"
        )
        require(
            m == 1 or b % 2 == 0,
            f"block_size={b} is odd, and more than one butterfly factor exchanges halves of "
            f"blocks; write block_size={b + 1}, or n_butterfly_factor=1",
        )

    def check(self, site: Site) -> None:
        n, b, m = site.in_features, self.block_size, self.n_butterfly_factor
        fits = [d for d in range(2, n + 1) if n % d == 0 and (n // d) % 2 ** (m - 1) == 0]
        fits = [d for d in fits if m == 1 or d % 2 == 0]
        near = sorted(sorted(fits, key=lambda d: abs(d - b))[:8])
        product = f"block_size={b}" + (f" times 2^{m - 1}" if m > 1 else "")
        require(
            n % (b * 2 ** (m - 1)) == 0,
            f"{product} does not divide the {n} inputs; "
            + (f"choose block_size from {near}" if near else "write n_butterfly_factor=1"),
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        b, m = self.block_size, self.n_butterfly_factor
        q = site.zeros(m, site.in_features // b, b * (b - 1) // 2)
        return {"q": q, "d": site.zeros(site.out_features)}, {}

    def shift(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        q = p["q"].to(torch.promote_types(p["q"].dtype, torch.float32))
        turns = cayley_minus_identity(-skew(q, self.block_size)).to(x.dtype)
        lead, (blocks, b) = turns.shape[:-4], turns.shape[-3:-1]
        width = self._width(blocks * b)
        if not width or math.prod(x.shape[:-1]) <= width * math.prod(lead):
            return self._moved(turns, x)
        # Once for the rows of the identity, in every part of this width alike.
        eye = torch.eye(width, dtype=x.dtype, device=x.device)
        rows = eye.repeat(*(1 for _ in lead), 1, blocks * b // width)
        parts = self._moved(turns, rows.expand(*lead, -1, -1)).unflatten(-1, (-1, width))
        return in_blocks(x, parts.transpose(-3, -2))

    def _width(self, d_in: int) -> int:
        """Inputs of one product of all factors, at least those that they mix; 0: one by one."""
        mixed = self.block_size * 2 ** (self.n_butterfly_factor - 1)
        most = max(self.block_size, WIDTH)
        # Not max(..., default=0), which Dynamo does not follow.
        widths = [n for n in range(mixed, most + 1, mixed) if d_in % n == 0]
        return widths[-1] if widths else 0

    def _moved(self, turns: Tensor, x: Tensor) -> Tensor:
        """x (G_m ... G_1 - I) for the blocks R - I (..., m, in / b, b, b)."""
        moved = None
        for i in reversed(range(self.n_butterfly_factor)):
            step = self._factor(x if moved is None else x + moved, turns[..., i, :, :, :], i)
            moved = step if moved is None else moved + step
        assert moved is not None
        return moved

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return p["d"] * without_bias(base, y)

    def _factor(self, x: Tensor, turn: Tensor, i: int) -> Tensor:
        """x (G - I) for the blocks R - I (..., in / b, b, b) of a factor."""
        if not i:
            return in_blocks(x, turn)
        lead, (blocks, b) = turn.shape[:-3], turn.shape[-3:-1]
        halves = (blocks >> i, 2, 2**i, b // 2)
        rows = x.reshape(*lead, -1, *halves).movedim((-4, -2), (-5, -4))
        moved = rows.flatten(-2).flatten(-4, -3) @ turn
        moved = moved.unflatten(-1, halves[1::2]).unflatten(-4, halves[::2])
        return moved.movedim((-5, -4), (-4, -2)).reshape(x.shape)
