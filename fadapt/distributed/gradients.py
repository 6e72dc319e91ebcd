"""Gradients of adapters, the same in all processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arguments import check_flags, check_processes, listed
from ..errors import ConfigError
from ..params.params import Params
from ..params.stack import Stack

BUCKET = 2**26
"""Numbers that are exchanged at a time: a copy of them exists meanwhile."""


def all_reduce_gradients(
    params: Params | Stack | Iterable[Tensor], *, mean: bool = True, group: Any = None
) -> None:
    """Makes the gradients of trainable leaves those of all processes together; after backward.

    Adapters are no parameters of the model, so DistributedDataParallel and FSDP2 do not see them.
    A leaf that got no gradient in one process counts as zero there; one that got none anywhere
    keeps None.

    Args:
        params: the adapter or stack that is trained, or its leaves (``fadapt.trainable(params)``):
            the same in all processes, with the same values.
        mean: divide the sum by the number of processes, as DDP does: right for a loss that is the
            mean over equally many rows in each. Pass False where the losses were divided by the
            number of rows or tokens of all processes.
        group: of processes that all call this; by default all.

    Raises:
        ConfigError: leaves that differ between the processes in number, shape or dtype, or no
            process group.

    Example:
        >>> import torch, fadapt
        >>> from fadapt.distributed import all_reduce_gradients
        >>> model = torch.nn.Linear(4, 2)
        >>> params = fadapt.init(model, fadapt.LoRA(r=1))
        >>> fadapt.apply(model, params, torch.ones(3, 4)).sum().backward()
        >>> if torch.distributed.is_initialized():  # under torchrun
        ...     all_reduce_gradients(params)
    """
    check_flags(mean=mean)
    check_processes(group)
    whole = isinstance(params, (Params, Stack))
    if isinstance(params, Tensor):
        raise ConfigError("params is one tensor, and its rows are no leaves; write [leaf]")
    leaves = params.trainable() if whole else listed("params", params, "fadapt.trainable(params)")
    if odd := [t for t in leaves if not isinstance(t, Tensor)]:
        raise ConfigError(
            f"params must be Params, a Stack or leaves, got {odd[0]!r:.80} among them"
        )
    world = dist.get_world_size(group)
    mine = [(tuple(t.shape), str(t.dtype)) for t in leaves]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, (mine, [t.grad is not None for t in leaves]), group)
    for rank, (other, _) in enumerate(everyone):
        if other != everyone[0][0]:
            raise ConfigError(
                f"the processes 0 and {rank} train other leaves: {len(everyone[0][0])} and "
                f"{len(other)} of them, or other shapes or dtypes; make the same params everywhere"
            )
    known = [any(has) for has in zip(*(flags for _, flags in everyone), strict=True)]
    kinds: dict[Any, list[Tensor]] = {}
    for leaf, has in zip(leaves, known, strict=True):
        if has:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            kinds.setdefault((leaf.grad.dtype, leaf.device), []).append(leaf.grad)
    for grads in kinds.values():
        for bucket in _buckets(grads):
            reduce_together(bucket, world if mean else 1, group)


def reduce_together(tensors: list[Tensor], divisor: int = 1, group: Any = None) -> None:
    """Sums tensors of one dtype over the processes in place, in one exchange."""
    whole = tensors[0].is_contiguous() and len(tensors) == 1
    flat = tensors[0].view(-1) if whole else torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    if divisor != 1:
        flat.div_(divisor)
    if not whole:
        parts = flat.split([t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket
