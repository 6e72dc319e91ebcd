"""Statistics of several processes, each of which observed its own share of the data."""

from __future__ import annotations

from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CalibrationError
from ..statistics.reduction import Reduction, State
from .stats import Stats


def all_reduce(stats: Stats, group: dist.ProcessGroup | None = None) -> Stats:
    """The combined statistics of all processes of a group, the same in each.

    Sums and maxima are all-reduced leaf by leaf. A centred Gram is gathered and combined, one state
    at a time, which for a moment takes its size times the number of processes.

    Args:
        stats: this process's own, on a device that the group's backend takes.
        group: of processes that all call this; by default all.

    Raises:
        CalibrationError: the processes observed different models, sites or statistics.
    """
    order = sorted(stats.states, key=repr)
    kinds = [(stream, sorted(map(repr, stats.states[stream]))) for stream in order]
    mine = (dict(stats.streams), kinds, dict(stats.base))
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group)
    # Every process sees every description, so all of them raise together and none is left waiting.
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise CalibrationError(
                f"the processes {0} and {rank} observed different models, sites or statistics; "
                "observe with the same model, config and options everywhere"
            )
    states = {
        stream: {
            r: _reduce(r, stats.states[stream][r], group)
            for r in sorted(stats.states[stream], key=repr)
        }
        for stream in order
    }
    return Stats(stats.streams, states, stats.base, stats.tolerance)


def _reduce(reduction: Reduction, state: State, group: dist.ProcessGroup | None) -> State:
    if not reduction.leafwise or reduction.constants:
        parts: list[State] = [{} for _ in range(dist.get_world_size(group))]
        for leaf in sorted(state):
            for part, tensor in zip(parts, _gather(state[leaf], group), strict=True):
                part[leaf] = tensor
        return reduce(reduction.combine, parts)
    result = {}
    for leaf in sorted(state):
        result[leaf] = state[leaf].clone()
        op = dist.ReduceOp.MAX if leaf in reduction.maxima else dist.ReduceOp.SUM
        dist.all_reduce(result[leaf], op, group)
    return result


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group)
    return parts
