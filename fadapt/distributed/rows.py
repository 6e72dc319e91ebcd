"""The rows of a batch over processes, and means over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..base.torch_private import pytree
from ..errors import ConfigError
from ..hugging_face import has_causal_loss

IGNORED = -100


def part_of(batch: Any, shards: int, shard: int, axis: int) -> Any:
    """One process's rows of a batch.

    Args:
        batch: a tree of tensors.
        shards: how many parts there are.
        shard: which to take.
        axis: of the rows: 0, or 1 in a batch of (N, B, ...) tensors.

    Raises:
        ConfigError: rows that do not divide.
    """
    tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > axis]
    rows = max((t.shape[axis] for t in tensors), default=0)
    if rows == 0 or rows % shards:
        raise ConfigError(
            f"a batch of {rows} rows does not divide over {shards} processes; give batches of a "
            f"multiple of {shards} rows (DataLoader(drop_last=True))"
        )

    def take(t: Tensor) -> Tensor:
        if t.dim() <= axis or t.shape[axis] == 1:
            return t
        if t.shape[axis] != rows:
            raise ConfigError(
                f"a batch of {rows} rows holds a tensor of shape {tuple(t.shape)}; give every "
                "tensor the batch axis first"
            )
        return t.narrow(axis, shard * (rows // shards), rows // shards)

    return pytree.tree_map_only(Tensor, take, batch)


def share_of(
    batch: Any, model: nn.Module, own_loss: bool, per_adapter: bool, group: Any, device: Any
) -> Tensor:
    """What of the whole batch's mean comes from this process's rows: (N,) or (1,) numbers.

    By counted labels where the model takes the mean over them, else by rows, of which all
    processes have equally many.

    Raises:
        ConfigError: in all processes, if one of them has nothing that counts.
    """
    labels = batch.get("labels") if own_loss and isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.dim() > int(per_adapter):
        counted = labels[..., 1:] if has_causal_loss(model) and labels.dim() > 1 else labels
        counted = (counted != IGNORED) if not counted.is_floating_point() else counted == counted
        count = counted.flatten(1).sum(1) if per_adapter else counted.sum()[None]
    else:
        count = torch.ones(1)
    count = count.to(device, torch.float32 if device.type == "mps" else torch.float64)
    total, least = count.clone(), count.clone()
    dist.all_reduce(total, group=group)
    dist.all_reduce(least, dist.ReduceOp.MIN, group)
    if not bool((least > 0).all()):
        raise ConfigError(
            "a process has rows in which no label counts (all are -100), while others train: give "
            "batches whose rows all have labels, or in an order that mixes them"
        )
    return count / total
