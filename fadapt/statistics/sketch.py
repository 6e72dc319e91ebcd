"""Principal components with bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError
from .moments import PCA
from .reduction import Reduction, Rows, State, check_width
from .spectrum import Spectrum, positive


@dataclass(frozen=True)
class Sketch(Reduction):
    """Y = Σ x (xᵀ Ω) with a fixed random Ω (d, k): principal components in d k memory.

    Y is linear in the second moment, so states with the same k and seed combine exactly, like sums.
    The approximation is made once, at the end: Nyström's, C ≈ Y (ΩᵀY)⁻¹ Yᵀ, whose eigenvalues never
    exceed the true ones; what it leaves out is at most the trace of C minus theirs. It is exact
    where C has rank k - 1 or less, and good for r components where k is 2 r to 4 r and the
    variances fall fast. With ``center`` the mean is subtracted at the end, which costs the digits
    of mean² / variance.

    Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1706.05736, algorithm 3.

    Args:
        k: width of Ω, at least 1.
        center: subtract the mean.
        seed: of Ω; equal seeds give equal Ω on every device.
    """

    k: int
    center: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width(self.k)

    def leaves(self, d: int) -> Mapping[str, tuple[int, ...]]:
        return {"sum": (d,), "trace": (), "sketch": (d, min(self.k, d))}

    def test_matrix(self, d: int, like: Tensor) -> Tensor:
        """Ω (d, min(k, d)), drawn on the CPU in float64."""
        rng = torch.Generator().manual_seed(self.seed)
        omega = torch.randn(d, min(self.k, d), generator=rng, dtype=torch.float64)
        return omega.to(like.device, like.dtype)

    def lift(self, rows: Rows, state: State) -> State:
        x = rows.values
        return {
            "sum": x.sum(0, dtype=torch.float64),
            "trace": x.square().sum(dtype=torch.float64),
            "sketch": x.mT @ (x @ self.test_matrix(x.shape[1], x)),
        }

    def finalize(self, state: State) -> Spectrum:
        n, y = state["n"], state["sketch"] / state["n"]
        omega = self.test_matrix(len(y), y)
        total = state["trace"] / n
        if self.center:
            mean = state["sum"] / n
            y = y - torch.outer(mean, mean @ omega)
            total = total - mean @ mean
        return _nystrom(y, omega, total, int(n))

    def covers(self, target: Reduction) -> bool:
        like = isinstance(target, PCA) and target.center == self.center and target.k <= self.k
        return like or target.stored == self


def _nystrom(y: Tensor, omega: Tensor, total: Tensor, rows: int) -> Spectrum:
    # A shift of the order of rounding makes ΩᵀY positive definite; it is taken off again below.
    shift = len(y) ** 0.5 * torch.finfo(y.dtype).eps * torch.linalg.matrix_norm(y)
    shift = shift.clamp(min=torch.finfo(y.dtype).tiny)
    y = y + shift * omega
    core = omega.mT @ y
    for _ in range(8):
        factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2)
        if int(info) == 0:
            break
        extra = 10 * shift
        y, core, shift = y + extra * omega, core + extra * omega.mT @ omega, shift + extra
    else:
        raise CalibrationError(
            "the sketch is not positive definite: with center=True the mean is too large for it; "
            "observe without max_memory, or with center=False"
        )
    half = torch.linalg.solve_triangular(factor, y.mT, upper=False).mT
    u, s, _ = torch.linalg.svd(half, full_matrices=False)
    return Spectrum((s.square() - shift).clamp(min=0), positive(u), total, rows)
