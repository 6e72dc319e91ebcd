"""Written down: what torch.compile is to compute once and store, not again wherever it is read.

torch.compile looks into no custom operator, so what goes into one and what comes out of it are
tensors in memory, and the kernels before and after it are not fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("fadapt::written", mutates_args=())
def written(tensor: Tensor) -> Tensor:
    """A copy, without a gradient."""
    return tensor.clone()


@written.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


@written.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], tensor: Tensor) -> tuple[Tensor, int | None]:
    return written(tensor), in_dims[0]
