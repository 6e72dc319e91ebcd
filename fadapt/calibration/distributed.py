"""Statistics of several processes, each of which observed its own share of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..arguments import check_processes
from ..base.sharded import agreed, groups_of
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
        CalibrationError: the processes observed different models, sites or statistics, or there is
            no process group.
    """
    if not isinstance(stats, Stats):
        raise CalibrationError(f"all_reduce takes the Stats of fadapt.observe, got {stats!r:.80}")
    check_processes(group, CalibrationError)
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


def in_step(model: nn.Module, batches: Iterable[Any]) -> Iterable[Any]:
    """Batches for a base of which each forward needs all processes; as they are for any other.

    Raises:
        CalibrationError: while they are read, in all processes, where one has no further batch or
            fails to make it.
    """
    if not groups_of(model):
        return batches
    found = _InStep(model, batches)
    return iter(found) if isinstance(batches, Iterator) else found


class _InStep:
    def __init__(self, model: nn.Module, batches: Iterable[Any]):
        self.model, self.batches = model, batches

    def __iter__(self) -> Iterator[Any]:
        iterator, count, end = iter(self.batches), 0, object()
        while True:
            failed: Exception | None = None
            batch = end
            try:
                batch = next(iterator, end)
            except Exception as error:
                failed = error
            mine = batch is not end
            if not agreed(self.model, mine):
                # Of a failure the others have to learn as of an end.
                any_has = agreed(self.model, mine or failed is not None, some=True)
                if failed is not None:
                    raise failed
                if not any_has:
                    return
                raise CalibrationError(
                    "the base is spread over processes, each of which takes part in every "
                    f"forward: after {count} batches this one has {'a' if mine else 'no'} further "
                    "batch, unlike another, where making it may have failed; give all processes "
                    "equally many"
                )
            yield batch
            count += 1


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
