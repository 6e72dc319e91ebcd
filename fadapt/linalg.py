"""Small linear algebra: SVDs, skew matrices, Cayley maps, unit vectors, permutations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .base.torch_private import is_transformed


def inverse_permutation(order: Sequence[int]) -> list[int]:
    """Where each of 0 ... n - 1 stands in ``order``."""
    return sorted(range(len(order)), key=order.__getitem__)


def top_svd(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular triplets, with signs fixed.

    Args:
        matrix: (m, n), float32 or float64.
        k: at most min(m, n).

    Returns:
        U (m, k), S (k,) descending, V (n, k) with matrix ≈ U diag(S) Vᵀ. The entry of largest
        magnitude in each column of U is positive.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _fix_signs(u[:, :k], s[:k], vh[:k].mT)


def bottom_svd(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k smallest singular triplets, as :func:`top_svd` returns the largest."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    first = s.shape[0] - k
    return _fix_signs(u[:, first:], s[first:], vh[first:].mT)


def random_svd(
    matrix: Tensor, k: int, rng: torch.Generator, niter: int = 4, oversample: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`top_svd` approximated by subspace iteration, reproducible from ``rng``.

    Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4.

    Args:
        matrix: (m, n), float32 or float64.
        k: number of triplets.
        rng: a CPU generator.
        niter: power iterations; each sharpens a slowly falling spectrum.
        oversample: extra random directions.
    """
    width = min(k + oversample, *matrix.shape)
    test = torch.randn(matrix.shape[1], width, generator=rng, dtype=matrix.dtype)
    q = torch.linalg.qr(matrix @ test.to(matrix.device)).Q
    for _ in range(niter):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.mT @ matrix, full_matrices=False)
    return _fix_signs(q @ u[:, :k], s[:k], vh[:k].mT)


def full_precision(like: Tensor) -> AbstractContextManager:
    """Switches autocast off, for the small products that norms and solves depend on."""
    kind = like.device.type
    if kind == "meta":  # has no autocast
        return nullcontext()
    # To switch off what is off takes as long as several small products.
    if not torch.compiler.is_compiling() and not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def skew(upper: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices from their strict upper triangles.

    Args:
        upper: (..., size (size - 1) / 2), row by row as ``torch.triu_indices(size, size, 1)``.
        size: of the matrices.

    Returns:
        (..., size, size), Q with Qᵀ = -Q.
    """
    if size < 2:
        return upper.sum(-1)[..., None, None]
    place, sign = _skew_places(size, upper)
    # Read by an index, because vmap refuses an indexed write into a constant.
    return upper.index_select(-1, place).unflatten(-1, (size, size)) * sign


_places: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}


def _skew_places(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where each entry of a skew matrix stands among the upper ones (size²,), and its sign.

    Kept, because to make them costs more than the small products that follow; but for what is made
    while a call is traced, transformed or recorded, and may hold no values afterwards.
    """
    key = size, like.device, like.dtype
    keeps = not (
        torch.compiler.is_compiling()
        or is_transformed()
        or type(like) not in (Tensor, nn.Parameter)
        or (like.is_cuda and torch.cuda.is_current_stream_capturing())
    )
    if keeps and key in _places:
        return _places[key]
    with torch.inference_mode(False) if keeps else nullcontext():
        i = torch.arange(size, device=like.device)
        low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
        # The diagonal reads some entry, times the sign 0.
        place = (low * (2 * size - low - 3) // 2 + high - 1).clamp(min=0).flatten()
        made = place, torch.sign(i - i[:, None]).to(like.dtype)
    if keeps:
        _places[key] = made
    return made


def block_diagonal(blocks: Tensor) -> Tensor:
    """The matrices (..., n b, n b) of n blocks (..., n, b, b) on their diagonals."""
    # diag_embed gives (..., b, b, n, n): entry (i, j) of block k at [..., i, j, k, k].
    spread = torch.diag_embed(blocks.movedim(-3, -1))
    return spread.movedim(-2, -4).transpose(-2, -1).flatten(-4, -3).flatten(-2)


def in_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x times a block-diagonal matrix.

    Args:
        x: (..., n b), of adapters that have the leading axes of ``blocks``, with any of tokens.
        blocks: (..., n, b, b).
    """
    # One axis of tokens beside those of the adapters, so that each block is one product.
    rows = x.reshape(*blocks.shape[:-3], -1, *blocks.shape[-3:-1]).transpose(-3, -2)
    return (rows @ blocks).transpose(-3, -2).reshape(x.shape)


def cayley_minus_identity(q: Tensor) -> Tensor:
    """(I + Q)(I - Q)⁻¹ - I = 2 (I - Q)⁻¹ Q for skew Q (..., b, b); exactly 0 at Q = 0.

    Solved in float32 or better, returned in the dtype of ``q``.
    """
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    eye = torch.eye(q.shape[-1], dtype=wide.dtype, device=q.device)
    # I - Q has no singular value below 1, so its inverse is safe; its derivative is two products,
    # where that of a solve is another solve. inv_ex does not make the host wait for the device.
    with full_precision(q):
        return (torch.linalg.inv_ex(eye - wide).inverse @ (2 * wide)).to(q.dtype)


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Orthonormal rows that span those of a matrix (..., r, n), r <= n, of full rank.

    L⁻¹ K with L Lᵀ = K Kᵀ, in float32 or better; returned in the dtype of ``matrix``.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    with full_precision(matrix):
        # cholesky_ex does not make the host wait for the device.
        lower = torch.linalg.cholesky_ex(wide @ wide.mT).L
        return torch.linalg.solve_triangular(lower, wide, upper=False).to(matrix.dtype)


def lengths_after_step(
    start_square: Tensor, end_square: Tensor, difference: Tensor, floor: float, short: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths for the turn of unit vectors when start moves by step to end.

    The turn is end/|end| - start/|start| = (step - growth start/|start|) / |end| with
    growth = |end| - |start| = step·(start + end) / (|start| + |end|). In this form it is exactly 0
    where step is 0, whatever kernel or fused code evaluates it, and accurate for small steps,
    because it holds no difference of nearly equal numbers.

    Args:
        start_square, end_square: |start|² and |end|², any shape, float32 or float64.
        difference: step·(start + end), evaluated in this form.
        floor: a vector shorter than this counts as ``short`` long, so that a zero vector has the
            unit vector 0 and finite gradients.
        short: positive.

    Returns:
        1/|start|, 1/|end| and the growth.
    """
    square = torch.stack([start_square, end_square])
    is_short = square < floor**2
    square = torch.where(is_short, short**2, square)
    difference = torch.where(is_short.any(0), square[1] - square[0], difference)
    length = square.sqrt()
    to_start, to_end = (1 / length).unbind()
    return to_start, to_end, difference / length.sum(0)


def _fix_signs(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1, 1).to(u.dtype)
    return u * sign, s, v * sign
