"""Weights that are spread over processes: the shards of FSDP2, and tensor parallelism's DTensors.

FSDP2 puts the gathered weight of a layer into its parameters in a hook of its own, right before the
layer's forward, and takes it away after it. So nothing can be put over such a weight beforehand;
what a call is to see there is made when the weight is read.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; imports nothing."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this very module."""
    # fully_shard gives the module a class of its own, whose name it begins so.
    if not type(module).__name__.startswith("FSDP"):
        return False
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before ``fully_shard``."""
    return type(module).__mro__[2] if is_unit(module) else type(module)


def is_sharded(model: nn.Module) -> bool:
    """Whether any part of the model is a unit of FSDP2 or holds a DTensor."""
    return any(is_unit(m) for m in model.modules()) or any(map(is_dtensor, model.parameters()))


def has_units(model: nn.Module) -> bool:
    """Whether any part of the model is a unit of FSDP2; quick where there are no processes."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return False
    return any(map(is_unit, model.modules()))


class Units:
    """Which modules of a model lie in a unit of FSDP2, told while they are walked from the top."""

    def __init__(self) -> None:
        self._prefixes: list[str] = []

    def hold(self, prefix: str, module: nn.Module) -> bool:
        """Whether the module at this path is in a unit; to be asked in ``named_modules``' order."""
        if is_unit(module):
            self._prefixes.append(prefix)
        return any(not p or prefix == p or prefix.startswith(f"{p}.") for p in self._prefixes)


def reshard(model: nn.Module) -> None:
    """Back to the shards: after a forward, a unit may still hold its gathered weights.

    Those may be in the dtype of a MixedPrecisionPolicy.
    """
    for module in model.modules():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def full(tensor: Tensor) -> Tensor:
    """The values of a weight as an ordinary tensor; of a DTensor, gathered from all processes.

    All processes of its mesh have to call this, in the same order.
    """
    if not is_dtensor(tensor) or tensor.is_meta:
        return tensor
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    # A CPUOffloadPolicy keeps the shards on the host, where the mesh cannot gather them.
    return tensor.detach().to(mesh.device_type).full_tensor()  # type: ignore[attr-defined]


def full_rows(tensor: Tensor, low: int, high: int) -> Tensor:
    """``full(tensor)[low:high]``, of which no process gathers the rest; the same calls as for full.

    Rows of a stack of experts, which is too large to be gathered for each of its matrices.
    """
    shard = _shard(tensor)
    if shard is None:
        return full(tensor)[low:high]
    start, axis, group = shard
    local = local_of(tensor.detach())
    if axis:
        part, offset = local[low:high], start
    else:
        begin, end = (min(max(row - start, 0), len(local)) for row in (low, high))
        part, offset = local[begin:end], start + begin - low
    shape = (high - low, *tensor.shape[1:])
    whole = torch.zeros(shape, dtype=tensor.dtype, device=compute_device(tensor))
    if part.numel():
        whole.narrow(axis, offset, part.shape[axis]).copy_(part)
    return _joined(whole, group)


def full_at(tensor: Tensor, index: Tensor) -> Tensor:
    """``full(tensor).flatten()[index]``, without gathering the rest; the same calls as for full."""
    shard = _shard(tensor)
    if shard is None:
        flat = full(tensor).reshape(-1)
        return flat[index.to(flat.device)]
    start, axis, group = shard
    local = local_of(tensor.detach())
    places = list(torch.unravel_index(index.to(local.device), tensor.shape))
    places[axis] = places[axis] - start
    mine = (places[axis] >= 0) & (places[axis] < local.shape[axis])
    values = torch.zeros(index.shape, dtype=tensor.dtype, device=local.device)
    values[mine] = local[tuple(place[mine] for place in places)]
    return _joined(values.to(compute_device(tensor)), group)


def _shard(tensor: Tensor) -> tuple[int, int, Any] | None:
    """Where this process's part of a DTensor begins, on which axis, and the group of the others.

    None for what is not cut along one axis in order: any other tensor, and other placements.
    """
    if not is_dtensor(tensor) or tensor.is_meta:
        return None
    from torch.distributed.tensor import Shard

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    cut = [i for i, p in enumerate(placements) if not p.is_replicate()]
    # The exact class: a shard of a shard derives from it, and is in another order.
    if len(cut) != 1 or type(placements[cut[0]]) is not Shard:
        return None
    axis = placements[cut[0]].dim % tensor.dim()
    length = tensor.shape[axis]
    each = -(-length // mesh.size(cut[0]))  # as torch.chunk: the last ones may have fewer, or none
    return min(mesh.get_local_rank(cut[0]) * each, length), axis, mesh.get_group(cut[0])


def _joined(values: Tensor, group: Any) -> Tensor:
    """The values of which each process has some, and zeros in the place of the others."""
    import torch.distributed as dist

    # As bytes: sums of floats would lose the sign of -0.0 and the payload of NaN.
    dist.all_reduce(values.view(-1).view(torch.uint8), group=group)
    return values


def like(values: Tensor, tensor: Tensor) -> Tensor:
    """Full values, the same in all processes, spread as a weight is spread."""
    if not is_dtensor(tensor):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    whole = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    spread: Any = whole.redistribute(mesh, placements)
    return spread.to(tensor.device) if spread.device != tensor.device else spread


def replicated(tensor: Tensor, mesh: Any) -> Tensor:
    """A tensor that all processes of a mesh have, as a DTensor; its gradient is summed."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def local_of(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor is its own."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def compute_device(tensor: Tensor) -> torch.device:
    """Where a weight is multiplied: of a DTensor its mesh's, wherever the shards are kept."""
    if not is_dtensor(tensor) or tensor.is_meta:
        return tensor.device
    kind = tensor.device_mesh.device_type  # type: ignore[attr-defined]
    if tensor.device.type == kind:
        return tensor.device
    return torch.device(kind, getattr(torch, kind).current_device())


def groups_of(model: nn.Module) -> list[Any]:
    """The process groups over which a model's weights are spread, each once.

    Not those that hold copies of them, as the nodes do where FSDP2 shards within each: they never
    wait for each other.
    """
    found: dict[str, Any] = {}
    for tensor in model.parameters():
        if is_dtensor(tensor):
            mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
            placements: Any = tensor.placements  # type: ignore[attr-defined]
            for axis, placement in enumerate(placements):
                if not placement.is_replicate():
                    group = mesh.get_group(axis)
                    found.setdefault(group.group_name, group)
    return list(found.values())


def split_by_tensor_parallelism(model: nn.Module) -> str:
    """The name of a weight that is a DTensor outside of FSDP2's units, or ""."""
    units = Units()
    for prefix, module in model.named_modules():
        inside = units.hold(prefix, module)
        for key, parameter in module.named_parameters(recurse=False):
            if is_dtensor(parameter) and not inside:
                return f"{prefix}.{key}" if prefix else key
    return ""


def shapes_of(model: nn.Module) -> dict[str, str]:
    """{parameter: shape, dtype and how it is spread}: what processes can compare without values."""
    return {
        name: f"{tuple(p.shape)} {p.dtype} {getattr(p, 'placements', '')}"
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def agreed(model: nn.Module, flag: bool, some: bool = False) -> bool:
    """Whether a flag is up in all processes of a sharded model, or in ``some`` of them.

    Processes that see other rows must come to the same decisions: each forward gathers weights,
    for which all have to be there.
    """
    groups = groups_of(model)
    if not groups:
        return flag
    import torch.distributed as dist

    device = next(compute_device(p) for p in model.parameters() if is_dtensor(p))
    value = torch.tensor(int(flag), device=device)
    for group in groups:
        dist.all_reduce(value, dist.ReduceOp.MAX if some else dist.ReduceOp.MIN, group)
    return bool(value)
