"""What is refused of a model: wrappers, lazy, offloaded and foreign weights."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import TargetError
from ..hugging_face import offload_hook
from .sharded import is_dtensor
from .torch_private import is_compiled, original_of

STEP = "torch.compile(lambda params, batch: fadapt.run(model, params, batch))"


def check_model(model: nn.Module) -> None:
    """Refuses wrappers whose parameters are not the ones that their forward uses."""
    if not isinstance(model, nn.Module):
        raise TargetError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if original_of(model) is not None:
        raise TargetError(
            "the model is already compiled: pass the model itself (model._orig_mod) and compile "
            f"the step: {STEP}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TargetError(
            "the model is a ScriptModule, whose weights cannot be replaced: pass "
            "the model that it was scripted or traced from"
        )


def check_module(name: str, module: nn.Module) -> None:
    """Refuses a part of the model whose forward does not use its parameters as they are."""
    if isinstance(module, nn.DataParallel):
        raise TargetError(
            f"{name or 'the model'} is an nn.DataParallel, which copies the parameters before its "
            "forward: pass model.module"
        )
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise TargetError(
            f"{name or 'the model'} is a DistributedDataParallel, which averages the gradients of "
            "its own parameters and never sees those of an adapter, so that each process would "
            "train another one: pass model.module, and after backward call "
            "fadapt.distributed.all_reduce_gradients(params)"
        )
    if hook := offload_hook(module):
        raise TargetError(
            f"{name or 'the model'} carries an offloading hook of accelerate ({hook}), which "
            "replaces the weights during the forward; load the model onto one device (without "
            "device_map or offload_folder), or quantised"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise TargetError(
            f"{name} is a ScriptModule, whose weights cannot be replaced: put the module in its "
            "place that it was scripted or traced from"
        )
    if is_compiled(module):
        raise TargetError(
            f"{name or 'the model'} is compiled on its own (module.compile() or torch.compile("
            f"module)); compile the step instead: {STEP}"
        )


def check_weight(name: str, module: nn.Module, weight: Tensor) -> None:
    """Refuses weights that are not plain floating tensors, naming them."""
    if isinstance(weight, nn.UninitializedParameter):
        raise TargetError(
            f"{name} is uninitialised (a lazy module); run the model once before fadapt"
        )
    if not weight.is_floating_point():
        raise TargetError(
            f"{name} holds {weight.dtype} of shape {tuple(weight.shape)} in a "
            f"{type(module).__name__}: fadapt does not know this quantised layer. Dequantise it, "
            "or quantise with bitsandbytes' Linear4bit or Linear8bitLt"
        )
    if type(weight) not in (Tensor, nn.Parameter) and not is_dtensor(weight):
        raise TargetError(
            f"{name} is a {type(weight).__name__} ({type(weight).__module__}): fadapt cannot read "
            "or multiply this kind of tensor. Use plain floating weights, or "
            "bitsandbytes' Linear4bit or Linear8bitLt"
        )


def check_one_way(name: str, weight: Any) -> None:
    """Refuses a weight that FSDP2 shards and tensor parallelism splits, both.

    Gathered, it would be a DTensor still, and could not be told from its shard.
    """
    if is_dtensor(weight) and sum(p.is_shard() for p in weight.placements) > 1:
        raise TargetError(
            f"{name} is sharded by FSDP2 and split by tensor parallelism at once, which fadapt "
            "does not combine; use fully_shard alone, or parallelize_module alone"
        )


def refuse_quantized_shard(name: str) -> NoReturn:
    """Raises the TargetError of a quantised layer that FSDP2 shards."""
    raise TargetError(
        f"{name} is a quantised layer of bitsandbytes in a unit of FSDP2, which loses its "
        "quantisation state (bitsandbytes issue 1945); leave the model whole in each process, or "
        "shard one that is not quantised"
    )
