"""How torch says that memory ran out."""

from __future__ import annotations

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device, or the process, had no more memory for a tensor."""
    if not isinstance(error, RuntimeError):
        return False
    signs = "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(s in str(error) for s in signs)
