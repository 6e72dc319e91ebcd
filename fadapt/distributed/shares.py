"""Shares: how the trials of a sweep are spread over processes, by what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from ..params.params import Params


def cost(params: Params) -> float:
    """What a step of one adapter costs beside others, in multiplications for a row.

    The base's products forward and backward, and three for each number of the adapter.
    """
    total = 0
    for adapter in params.values():
        rows, columns = adapter.site.matrix_shape
        total += 2 * rows * columns + 3 * sum(t.numel() for t in adapter.leaves.values())
    return float(total)


def edges(costs: Sequence[float], parts: int) -> list[int]:
    """Where to cut a row of things into ``parts`` neighbours each, so that the dearest is least.

    Returns:
        ``parts`` + 1 positions; a part may be empty where there are fewer things than parts.

    Example:
        >>> edges([1, 1, 1, 3], 2)
        [0, 3, 4]
    """
    sums = {sum(costs[i:j]) for i in range(len(costs)) for j in range(i + 1, len(costs) + 1)}
    candidates = sorted(sums) or [0.0]
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _cut(costs, candidates[middle], parts) else (middle + 1, high)
    found = _cut(costs, candidates[low], parts)
    assert found is not None
    return found


def _cut(costs: Sequence[float], most: float, parts: int) -> list[int] | None:
    """The cuts into parts of at most so much, or None where that is too little."""
    cuts, total = [0], 0.0
    for i, one in enumerate(costs):
        if one > most:
            return None
        if total + one > most:
            cuts.append(i)
            total = 0.0
        total += one
    if len(cuts) > parts:
        return None
    return cuts + [len(costs)] * (parts + 1 - len(cuts))
