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
        if odd := [k for k in batch if not isinstance(k, str)]:
            raise ConfigError(
                f"a batch that is a dict holds keyword arguments, and this one has the key "
                f"{odd[0]!r:.80}; a model that takes one dict gets it in a tuple: (it,)"
            )
        return (), dict(batch)
    if isinstance(batch, tuple):
        return batch, {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise ConfigError(
        "batch must be a dict of keyword arguments, a tuple of positional ones or a tensor; "
        f"got {type(batch).__name__}"
    )


def call_arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call whose only positional one may be a whole batch, a dict or a tuple.

    A model whose forward takes one dict or one tuple gets it in another tuple: ``(it,)``.
    """
    if len(args) != 1 or not isinstance(args[0], (Mapping, tuple)):
        return args, dict(kwargs)
    positional, named = arguments(args[0])
    if twice := sorted(named.keys() & kwargs.keys()):
        raise ConfigError(f"{twice} are given in the batch and as keyword arguments; leave one out")
    return positional, {**named, **kwargs}
