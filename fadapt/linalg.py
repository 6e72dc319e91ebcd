"""Small dense linear algebra shared by methods: signed SVDs, skew matrices, Cayley maps."""

from __future__ import annotations

import torch
from torch import Tensor


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


def skew(upper: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices from their strict upper triangles.

    Args:
        upper: (..., size (size - 1) / 2), row by row as ``torch.triu_indices(size, size, 1)``.
        size: of the matrices.

    Returns:
        (..., size, size), Q with Qᵀ = -Q.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    # A product with constant one-hot maps, not an indexed write, which vmap would refuse.
    place = torch.zeros(upper.shape[-1], size, size, dtype=upper.dtype, device=upper.device)
    index = torch.arange(upper.shape[-1], device=upper.device)
    place = place.index_put((index, rows, columns), upper.new_ones(()))
    q = (upper @ place.flatten(1)).unflatten(-1, (size, size))
    return q - q.mT


def cayley_minus_identity(q: Tensor) -> Tensor:
    """(I + Q)(I - Q)⁻¹ - I = 2 (I - Q)⁻¹ Q for skew Q (..., b, b); exactly 0 at Q = 0.

    Solved in float32 or better, returned in the dtype of ``q``.
    """
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    eye = torch.eye(q.shape[-1], dtype=wide.dtype, device=q.device)
    return (2 * torch.linalg.solve(eye - wide, wide)).to(q.dtype)


def _fix_signs(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1, 1).to(u.dtype)
    return u * sign, s, v * sign
