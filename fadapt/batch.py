"""What a batch may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .errors import ConfigError

Batch = Mapping[str, Any] | tuple[Any, ...] | Tensor


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple):
        return batch, {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise ConfigError(
        "batch must be a dict of keyword arguments, a tuple of positional ones or a tensor; "
        f"got {type(batch).__name__}"
    )
