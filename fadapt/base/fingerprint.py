"""A cheap fingerprint of a frozen weight: shape, dtype and a sampled hash of its values."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .sharded import full, full_at

SAMPLES = 4096


def fingerprint(weight: Tensor) -> str:
    """32 hex digits over the shape, the dtype and up to 4,096 spread elements.

    All elements count in tensors of at most 4,096. Meta tensors have no values; theirs is "meta".
    """
    if weight.is_meta:
        return "meta"
    weight = weight.detach()
    n = weight.numel()
    if n > SAMPLES:
        # A large odd multiplier spreads the samples over rows and columns alike.
        index = torch.arange(SAMPLES, dtype=torch.int64, device="cpu") * 2654435761 % n
        flat = full_at(weight, index)
    else:
        flat = full(weight).reshape(-1)
    digest = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
