"""Sums and maxima of rows as reductions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .reduction import Reduction, Rows, State


@dataclass(frozen=True)
class Sum(Reduction):
    """Σ x; the statistic is the mean (d,)."""

    def leaves(self, d: int) -> Mapping[str, tuple[int, ...]]:
        return {"sum": (d,)}

    def lift(self, rows: Rows, state: State) -> State:
        return {"sum": rows.values.sum(0, dtype=torch.float64)}

    def finalize(self, state: State) -> Tensor:
        return state["sum"] / state["n"]


@dataclass(frozen=True)
class SumSq(Reduction):
    """Σ x²; the statistic is the mean square (d,)."""

    def leaves(self, d: int) -> Mapping[str, tuple[int, ...]]:
        return {"sum_sq": (d,)}

    def lift(self, rows: Rows, state: State) -> State:
        return {"sum_sq": rows.values.square().sum(0, dtype=torch.float64)}

    def finalize(self, state: State) -> Tensor:
        return state["sum_sq"] / state["n"]


@dataclass(frozen=True)
class SumAbs(Reduction):
    """Σ |x|; the statistic is the mean magnitude (d,)."""

    def leaves(self, d: int) -> Mapping[str, tuple[int, ...]]:
        return {"sum_abs": (d,)}

    def lift(self, rows: Rows, state: State) -> State:
        return {"sum_abs": rows.values.abs().sum(0, dtype=torch.float64)}

    def finalize(self, state: State) -> Tensor:
        return state["sum_abs"] / state["n"]


@dataclass(frozen=True)
class MaxAbs(Reduction):
    """max |x|, (d,)."""

    maxima: ClassVar[frozenset[str]] = frozenset({"max_abs"})

    def leaves(self, d: int) -> Mapping[str, tuple[int, ...]]:
        return {"max_abs": (d,)}

    def lift(self, rows: Rows, state: State) -> State:
        empty = rows.values.new_zeros(1, rows.values.shape[1])
        return {"max_abs": torch.cat([empty, rows.values.abs()]).amax(0).double()}

    def finalize(self, state: State) -> Tensor:
        return state["max_abs"]
