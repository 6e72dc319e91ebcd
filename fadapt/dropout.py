"""Dropout whose mask is a function of numbers: of an adapter's key and of a draw.

A generator's stream would depend on who else draws from it. This mask is the same for an adapter
alone and in a stack, eager and compiled, in a pass and in its recomputation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .seeds import number

LANES, LEVELS = 4, 2**16
"""Each hash of 64 bits decides for four entries, in steps of 2⁻¹⁶ of the probability."""

PART = 48
"""The bits of a draw from here on say which part of the rows is at hand; see :func:`of_part`."""


def of_part(draw: int, part: int) -> int:
    """The draw for one of several equal parts of the rows, whose masks are those of the whole."""
    return draw + (part << PART)


def dropout_key(*parts: object) -> Tensor:
    """A key that depends on the texts of ``parts`` alone: int64, without axes."""
    return torch.tensor(number(*parts), dtype=torch.int64, device="cpu")


def fresh_draw(device: torch.device) -> Tensor:
    """A number from torch's generator of a device, for the masks of one pass."""
    return torch.randint(2**31, (), dtype=torch.int64, device=device)


def drop(x: Tensor, share: float, key: Tensor | None, draw: Tensor) -> Tensor:
    """The rows with a share of their entries zeroed, the others scaled to the same mean.

    Args:
        x: (..., width), all rows of one adapter; (n, rows, width), where the draws are (n, 1, 1).
        share: more than 0 and less than 1, taken in steps of 2⁻¹⁶.
        key: of the adapter, one number; or of each, (n, 1, 1).
        draw: of the pass, one number; or of each adapter, (n, 1, 1).
    """
    if draw.dim() < 3:
        shape = x.shape
        return _drop(x.reshape(-1, shape[-1]), share, key, draw).reshape(shape)
    return _drop(x, share, key, draw)


def _drop(x: Tensor, share: float, key: Tensor | None, draw: Tensor) -> Tensor:
    rows, width = x.shape[-2:]
    count = min(max(1, round(share * LEVELS)), LEVELS - 1)
    step = -(-width // LANES)
    draw = draw.to(x.device)
    first = (draw >> PART) * (rows * step)
    draw = draw & ((1 << PART) - 1)
    seed = _mixed(draw if key is None else draw + _mixed(key.to(x.device)))
    place = torch.arange(rows * step, device=x.device).view(rows, step)
    bits = _mixed(seed + (first + place))
    # Not as a view of int16, which torch.compile (2.13) takes for as many numbers.
    shifts = torch.arange(0, 64, 64 // LANES, device=x.device)
    lanes = ((bits.unsqueeze(-1) >> shifts) & (LEVELS - 1)).flatten(-2)
    keep = lanes[..., :width] >= count
    return torch.where(keep, x * (LEVELS / (LEVELS - count)), 0)


def _mixed(z: Tensor) -> Tensor:
    """A bijection of 64 bits that leaves no trace of order, the finaliser of SplitMix64.

    Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, as an unsigned number."""
    return (z >> by) & ((1 << (64 - by)) - 1)
