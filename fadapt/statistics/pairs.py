"""Reductions of rows that come in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..linalg import top_svd
from .reduction import Reduction, Rows, State, check_width


@dataclass(frozen=True, eq=False)
class Pairs:
    """What is known of pairs of rows (z⁺, z⁻) of width d, in a basis U (d, k).

    Attributes:
        difference: (d,), the mean of z⁺ - z⁻.
        majority: (k,), +1 where u_kᵀz⁺ > u_kᵀz⁻ in more than half of the pairs, -1 where in fewer;
            at a tie, the sign of the mean difference along u_k.
        basis: (d, k), U itself: singular vectors are not unique, so it is kept.
        count: how many pairs.
    """

    difference: Tensor
    majority: Tensor
    basis: Tensor
    count: int


@dataclass(frozen=True)
class PairedSums(Reduction):
    """Σ z⁺, Σ z⁻ and, per direction of a basis U, how often z⁺ is the larger; see :class:`Pairs`.

    Rows are z⁺ and z⁻ side by side, 2 d wide. U holds the k leading left singular vectors of the
    site's weight (all, where it has fewer) and is part of the state.

    Args:
        k: directions; None for all min(out, in).
    """

    k: int | None = None

    constants: ClassVar[frozenset[str]] = frozenset({"basis"})
    paired: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width(self.k)

    def leaves(self, d: int) -> Mapping[str, tuple[int, ...]]:
        k = d if self.k is None else min(self.k, d)
        return {"plus": (d,), "minus": (d,), "wins": (k,), "basis": (d, k)}

    def zero(
        self, d: int, device: torch.device | str | None = None, weight: Tensor | None = None
    ) -> State:
        if weight is None:
            raise CalibrationError("PairedSums needs the site's weight: zero(d, weight=W)")
        state = super().zero(d, device)
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        basis = top_svd(wide, min(self.k or d, *weight.shape))[0].to(state["n"].device)
        wins = torch.zeros(basis.shape[1], dtype=torch.float64, device=basis.device)
        return {**state, "wins": wins, "basis": basis}

    def lift(self, rows: Rows, state: State) -> State:
        plus, minus = rows.values.double().chunk(2, -1)
        ahead = (plus - minus) @ state["basis"].double() > 0
        return {
            "plus": plus.sum(0),
            "minus": minus.sum(0),
            "wins": ahead.sum(0, dtype=torch.float64),
            "basis": state["basis"],
        }

    def finalize(self, state: State) -> Pairs:
        difference = (state["plus"] - state["minus"]) / state["n"]
        lead = 2 * state["wins"] - state["n"]
        # A fixed sign at a tie would make the result depend on the arbitrary signs of U.
        lead = torch.where(lead == 0, difference @ state["basis"].double(), lead)
        majority = torch.where(lead < 0, -1, 1).to(difference.dtype)
        return Pairs(difference, majority, state["basis"], int(state["n"]))
