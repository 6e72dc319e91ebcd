"""The devices of a model, and batches on them."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .sharded import compute_device
from .torch_private import pytree


def device_of(model: nn.Module) -> torch.device:
    """Where the batches go: to the model's first parameter; the CPU without one."""
    return next((compute_device(p) for p in model.parameters()), torch.device("cpu"))


def cuda_devices_of(model: nn.Module) -> list[torch.device]:
    """The CUDA devices that its parameters are on, whose generators its forward may use."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device.

    Raises:
        ConfigError: a tensor without values.
    """

    def moved(t: Tensor) -> Tensor:
        if t.is_meta and device.type != "meta":
            raise ConfigError(
                f"a batch holds a meta tensor of shape {tuple(t.shape)}, which has no values; make "
                "the batches outside torch.device('meta')"
            )
        t = t.to(device, non_blocking=True)
        # Made under torch.inference_mode, it could not be kept for a gradient.
        return t.clone() if t.is_inference() else t

    if isinstance(batch, MutableMapping) and not isinstance(batch, dict):
        # Such as a tokenizer's BatchEncoding, which is a leaf for pytree; of its own type still.
        copied = copy.copy(batch)
        for key, value in batch.items():
            copied[key] = to_device(value, device)
        return copied
    return pytree.tree_map_only(Tensor, moved, batch)
