"""Split: which process updates which trial, where several train the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor


class Split:
    """Trials over the processes of a group, each of which keeps the optimiser's state of its own.

    All have the same values and gradients; a trial's new values come from the process that has
    updated it. The same in all processes, from the sizes alone.

    Args:
        sizes: {trial: how many numbers it trains}.
        group: the processes.
    """

    def __init__(self, sizes: Mapping[int, int], group: Any):
        self.group, self.rank = group, dist.get_rank(group)
        loads = [0] * dist.get_world_size(group)
        self._owners: dict[int, int] = {}
        for trial in sorted(sizes, key=lambda t: (-sizes[t], t)):  # the largest first
            owner = loads.index(min(loads))
            self._owners[trial] = owner
            loads[owner] += sizes[trial]

    def is_mine(self, trial: int) -> bool:
        """Whether this process updates a trial."""
        return self._owners[trial] == self.rank

    def send(self, trial: int, values: Iterable[Tensor]) -> None:
        """Gives all processes the values that a trial has in the one that updates it."""
        source = dist.get_global_rank(self.group, self._owners[trial])
        for value in values:
            sent = value.contiguous()
            dist.broadcast(sent, source, group=self.group)
            if sent is not value:
                value.copy_(sent)
