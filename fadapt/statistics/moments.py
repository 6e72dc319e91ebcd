"""Second moments and principal components as reductions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .reduction import Reduction, Rows, State, check_width
from .spectrum import Spectrum
from .sums import Sum, SumSq


@dataclass(frozen=True)
class Gram(Reduction):
    """Σ x xᵀ and Σ x; the statistic is the second moment E[x xᵀ] (d, d), not centered."""

    def leaves(self, d: int) -> Mapping[str, tuple[int, ...]]:
        return {"sum": (d,), "gram": (d, d)}

    def lift(self, rows: Rows, state: State) -> State:
        return {
            "sum": rows.values.sum(0, dtype=torch.float64),
            "gram": rows.values.mT @ rows.values,
        }

    def finalize(self, state: State) -> Tensor:
        return state["gram"] / state["n"]

    def covers(self, target: Reduction) -> bool:
        return target.stored in (self, Sum(), SumSq())

    def convert(self, state: State, target: Reduction) -> State:
        counts = {"n": state["n"], "bad": state["bad"]}
        if isinstance(target, Sum):
            return {**counts, "sum": state["sum"]}
        if isinstance(target, SumSq):
            return {**counts, "sum_sq": state["gram"].diagonal()}
        return state


@dataclass(frozen=True)
class CenteredGram(Reduction):
    """Mean and centred scatter; the statistic is the covariance Σ (x-μ)(x-μ)ᵀ / n, (d, d).

    Centred block by block and combined by the update of Chan, Golub and LeVeque (1979), so that a
    mean far larger than the deviations costs no digits:
        n = nₐ + n_b, δ = μ_b - μₐ, μ = μₐ + δ n_b/n, M = Mₐ + M_b + δ δᵀ nₐ n_b/n.
    """

    leafwise: ClassVar[bool] = False

    def leaves(self, d: int) -> Mapping[str, tuple[int, ...]]:
        return {"mean": (d,), "scatter": (d, d)}

    def lift(self, rows: Rows, state: State) -> State:
        mean = rows.values.sum(0, dtype=torch.float64) / rows.n.clamp(min=1)
        centered = (rows.values - mean.to(rows.values.dtype)) * rows.keep.unsqueeze(-1)
        return {"mean": mean, "scatter": centered.mT @ centered}

    def combine(self, a: State, b: State) -> State:
        n = a["n"] + b["n"]
        delta = b["mean"] - a["mean"]
        # At n = 0 both weights are 0, as they should be.
        weight_b = b["n"] / n.clamp(min=1)
        weight_a = a["n"] / n.clamp(min=1)
        between = (weight_b * a["n"]).sqrt() * delta
        return {
            "n": n,
            "bad": a["bad"] + b["bad"],
            # Symmetric in a and b, so that the order makes no difference beyond rounding.
            "mean": weight_a * a["mean"] + weight_b * b["mean"],
            "scatter": (a["scatter"] + b["scatter"]).addr_(between, between),
        }

    def finalize(self, state: State) -> Tensor:
        return state["scatter"] / state["n"]

    def covers(self, target: Reduction) -> bool:
        return target.stored in (self, Gram(), Sum(), SumSq())

    def convert(self, state: State, target: Reduction) -> State:
        n, mean = state["n"], state["mean"]
        counts = {"n": n, "bad": state["bad"]}
        if isinstance(target, Sum):
            return {**counts, "sum": n * mean}
        if isinstance(target, SumSq):
            return {**counts, "sum_sq": state["scatter"].diagonal() + n * mean.square()}
        if isinstance(target.stored, Gram):
            gram = state["scatter"].addr(n * mean, mean)
            return {**counts, "sum": n * mean, "gram": gram}
        return state


@dataclass(frozen=True)
class PCA(Reduction):
    """The k leading principal components, as a :class:`Spectrum`.

    It reads the state of :class:`CenteredGram`, or of :class:`Gram` when not centred, so it keeps
    none of its own.

    Args:
        k: components wanted; fewer are returned where d is smaller.
        center: subtract the mean.
    """

    k: int
    center: bool = True

    leafwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width(self.k)

    @property
    def stored(self) -> Reduction:
        return CenteredGram() if self.center else Gram()

    def leaves(self, d: int) -> Mapping[str, tuple[int, ...]]:
        return self.stored.leaves(d)

    def lift(self, rows: Rows, state: State) -> State:
        return self.stored.lift(rows, state)

    def combine(self, a: State, b: State) -> State:
        return self.stored.combine(a, b)

    def finalize(self, state: State) -> Spectrum:
        moment = state["scatter" if self.center else "gram"]
        return Spectrum.of(moment / state["n"], self.k, int(state["n"]))
