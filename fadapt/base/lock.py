"""One call at a time per model: functional_call swaps parameters, so threads must take turns."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import FadaptError


class _Guard:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.owner: int | None = None
        self.bound: Any = None


_guards: weakref.WeakKeyDictionary[nn.Module, _Guard] = weakref.WeakKeyDictionary()
_registry = threading.Lock()


def _guard(model: nn.Module) -> _Guard:
    with _registry:
        return _guards.setdefault(model, _Guard())


def bound_params(model: nn.Module) -> Any:
    """The params that the model is bound to at this moment, or None."""
    return _guard(model).bound


def refuse_bound(model: nn.Module, what: str) -> None:
    """Raises FadaptError if the model is inside ``bound``, where its weights are not its own."""
    if bound_params(model) is not None:
        raise FadaptError(
            f"{what} inside fadapt.bound(model, params) would read the adapted weights; leave the "
            "block first"
        )


@contextmanager
def exclusive(model: nn.Module, bound: Any = None) -> Iterator[None]:
    """Holds the model for this thread; a thread that finds it held waits its turn.

    Args:
        bound: the params of a ``bound`` block, which may last long: others then get an error
            instead of a wait.

    Raises:
        FadaptError: the model is inside ``bound``, or this thread already runs it.
    """
    guard, me = _guard(model), threading.get_ident()
    with guard.changed:
        while guard.owner is not None:
            if guard.bound is not None:
                raise FadaptError(
                    "the model is inside fadapt.bound(model, params): call the model itself there, "
                    "or leave the block before using it with other params"
                )
            if guard.owner == me:
                raise FadaptError(
                    "the model is called again from inside its own adapted forward (a hook?); "
                    "use another copy of the model there"
                )
            guard.changed.wait()
        guard.owner, guard.bound = me, bound
    try:
        yield
    finally:
        with guard.changed:
            guard.owner = guard.bound = None
            guard.changed.notify()
