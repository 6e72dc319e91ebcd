"""Parts of a model that are run by another function for one call, with their adapters and all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..params.adapter import Adapted

F = TypeVar("F", bound=Callable[..., Any])


class Instead(Protocol):
    """What runs parts of a model in its own way."""

    def forwards(
        self, model: nn.Module, sites: Mapping[str, Adapted]
    ) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """(part, what is called in place of its forward) for a call of the model.

        Nothing is put over the weights in these parts, which the function does itself.
        """
        ...

    def function(self, function: F) -> F:
        """What is called in place of a pure function of tensors."""
        ...


_active: ContextVar[Instead | None] = ContextVar("fadapt.instead", default=None)


@contextmanager
def run_by(instead: Instead) -> Iterator[None]:
    """Within the block, calls of this context are run so."""
    token = _active.set(instead)
    try:
        yield
    finally:
        _active.reset(token)


def forwards_instead(
    model: nn.Module, sites: Mapping[str, Adapted]
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Of the open block; none outside of one."""
    instead = _active.get()
    return [] if instead is None else instead.forwards(model, sites)


def is_run_otherwise() -> bool:
    """Whether such a block is open."""
    return _active.get() is not None


def function_instead(function: F) -> F:
    """Of the open block; the function itself outside of one, and within a compiled call."""
    # Dynamo cannot trace the look-up before torch 2.13; a compiled call is run by no other
    # function.
    instead = None if torch.compiler.is_compiling() else _active.get()
    return function if instead is None else instead.function(function)
