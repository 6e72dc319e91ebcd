"""The leading eigenpairs of a second moment: what principal components are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Leading eigenpairs of a covariance or second moment (d, d).

    Attributes:
        values: (k,) descending, float64; the variances along the components.
        vectors: (d, k), orthonormal columns; the entry of largest magnitude of each is positive.
        total: 0-d, the trace: the variance along all d directions.
        rows: how many rows it was taken of.
    """

    values: Tensor
    vectors: Tensor
    total: Tensor
    rows: int

    @classmethod
    def of(cls, moment: Tensor, k: int, rows: int) -> Spectrum:
        """The k largest (at most d) eigenpairs of a symmetric (d, d) matrix, in float64."""
        moment = moment.double()
        k = min(k, len(moment))
        values, vectors = _leading(moment, k) or _all(moment)
        return cls(values[:k].clamp(min=0), positive(vectors[:, :k]), moment.trace(), rows)

    def top(self, k: int) -> Spectrum:
        """The first k eigenpairs."""
        return Spectrum(self.values[:k], self.vectors[:, :k], self.total, self.rows)

    def holds(self, k: int) -> bool:
        """Whether the first k eigenpairs, or all d, are here."""
        return len(self.values) >= min(k, len(self.vectors))

    @property
    def ratios(self) -> Tensor:
        """(k,), the share of the total variance that each component explains."""
        return self.values / self.total.clamp(min=torch.finfo(torch.float64).tiny)

    @property
    def rank(self) -> int:
        """How many of the components vary at all, beyond rounding."""
        floor = 1e-12 * self.values[0] if len(self.values) else 0
        return int((self.values > floor).sum())


def _all(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0), vectors.flip(1)


def _leading(moment: Tensor, k: int, width: int = 16) -> tuple[Tensor, Tensor] | None:
    """The k leading eigenpairs by block Lanczos; None where that would not save time.

    The basis grows by ``width`` columns a step, orthogonalised against all before, until the
    residuals ‖C z - λ z‖ of the k leading Ritz pairs are at most 1e-10 of the largest eigenvalue.
    """
    d = len(moment)
    if 6 * k > d or d < 512:
        return None
    rng = torch.Generator().manual_seed(0)
    block = torch.randn(d, width, generator=rng, dtype=torch.float64).to(moment.device)
    basis, images = block[:, :0], block[:, :0]
    check = 2 * k
    while basis.shape[1] + width <= d // 4:
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        image = moment @ block
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image], 1)
        block = image
        if basis.shape[1] < check:
            continue
        check = basis.shape[1] + k
        core = basis.mT @ images
        values, mix = torch.linalg.eigh((core + core.mT) / 2)
        values, mix = values.flip(0)[:k], mix.flip(1)[:, :k]
        vectors = basis @ mix
        residual = (images @ mix - vectors * values).norm(dim=0).max()
        drift = (vectors.mT @ vectors - torch.eye(k).to(vectors)).abs().max()
        if residual <= 1e-10 * values[0] and drift <= 1e-10:
            return values, vectors
    return None


def positive(vectors: Tensor) -> Tensor:
    """The columns with signs such that the entry of largest magnitude is positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1, 1).to(vectors.dtype)
