"""Stacks of matrices, as mixture-of-experts layers hold them: one adapter with an expert axis.

The leaves of a site with ``experts`` matrices have a leading axis over them, and the method is
mapped over it. Routed tokens meet their own expert's matrix and leaves, whichever way the layer
multiplies: one expert after the other, as a batch of gathered matrices, or in groups of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapted_map import adapt_input, adapt_output, has_shift
from ..base.linear_map import DenseMap
from ..method import STRENGTH
from ..params.adapter import Adapter


def at(adapter: Any, index: Any, count: int = 0) -> Adapter:
    """See :meth:`Adapter.expert`; a fold of many has none, and is refused where it is made."""
    return adapter.expert(index, count)


def batched(adapter: Adapter, x: Tensor, weight: Tensor, product: Any) -> Tensor:
    """Every matrix of a stack applied to its own rows.

    Args:
        adapter: leaves (s, ...).
        x: (s, rows, in_features).
        weight: the frozen matrices (s, ...) in their stored layout.
        product: the base's own kernel: x' -> (s, rows, out_features).
    """
    method, transposed = adapter.method, adapter.site.transposed
    p = adapter.leaves
    whole = {STRENGTH, *adapter.bank}
    axes = {name: None if name in whole else 0 for name in p}
    where, training, draw = adapter.site.name, adapter.training, adapter.draw

    def enter(p: Any, x: Tensor) -> tuple[Tensor, Any]:
        return adapt_input(method, p, x, where)

    entered, saved = torch.func.vmap(enter, in_dims=(axes, 0))(p, x)
    y = product(entered if has_shift(method) else x)

    def leave(p: Any, saved: Any, y: Tensor, weight: Tensor) -> Tensor:
        base = DenseMap(weight, None, transposed)
        return adapt_output(method, p, saved, y, base, where, training, draw)

    mapped = torch.func.vmap(leave, in_dims=(axes, 0, 0, 0), randomness="different")
    return mapped(p, saved, y, weight)


def grouped(adapter: Adapter, x: Tensor, weight: Tensor, ends: list[int], product: Any) -> Tensor:
    """Every matrix of a stack applied to its group of rows.

    Args:
        adapter: leaves (experts, ...).
        x: (rows, in_features), sorted by expert.
        weight: the frozen matrices (experts, ...) in their stored layout.
        ends: the row after the last of each expert; rows after the last end have none.
        product: the base's own kernel: x' -> (rows, out_features).
    """
    method, transposed = adapter.method, adapter.site.transposed
    starts = [0, *ends[:-1]]
    groups = [
        (adapter.expert(e).leaves, slice(start, end), weight[e])
        for e, (start, end) in enumerate(zip(starts, ends, strict=True))
        if end > start
    ]
    where, training, draw = adapter.site.name, adapter.training, adapter.draw
    entered = [adapt_input(method, p, x[rows], where) for p, rows, _ in groups]
    rest = slice(ends[-1], None)
    y = product(torch.cat([*(x for x, _ in entered), x[rest]]) if has_shift(method) else x)
    left = [
        adapt_output(
            method, p, saved, y[rows], DenseMap(w, None, transposed), where, training, draw
        )
        for (p, rows, w), (_, saved) in zip(groups, entered, strict=True)
    ]
    return torch.cat([*left, y[rest]])
