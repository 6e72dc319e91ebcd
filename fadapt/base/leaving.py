"""Leaving a block, whatever interrupts it.

Python calls the handler of a signal between two instructions, also before the first one of an
``__exit__``, which then never runs. What is put here is undone nevertheless: at the latest when
the frame that holds the block is unwound.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any


class _Token:
    __slots__ = ("__weakref__",)


class _Exit:
    """``__exit__`` of a :class:`Block`, as a descriptor.

    ``with`` asks the manager for its exit before it enters, keeps that one reference on the
    stack of its frame, where no traceback sees it, and drops it when it has left. So what hangs
    on it ends with the block, even if its first instruction is never reached.
    """

    def __get__(self, block: Any, cls: Any) -> Callable[..., None]:
        if block is None:  # contextlib.ExitStack asks the class
            return lambda block, *error: block.undo()
        token, undo = _Token(), block.undo
        guard = weakref.ref(token, functools.partial(_unwound, undo))
        leave: Any = functools.partial(_leave, guard, undo)
        leave.token = token
        _guards[id(guard)] = guard
        return leave


_guards: dict[int, weakref.ref[_Token]] = {}
"""Of the blocks that were not left yet; a weak reference must live longer than what it watches."""


def _leave(guard: weakref.ref[_Token], undo: Callable[[], None], *error: Any) -> None:
    undo()
    _guards.pop(id(guard), None)


def _unwound(undo: Callable[[], None], guard: weakref.ref[_Token]) -> None:
    undo()
    _guards.pop(id(guard), None)


class Block:
    """A context manager whose ``undo`` is called when its block is left.

    ``undo`` may be called more than once, and before or within ``__enter__``.
    """

    __exit__: Any = _Exit()

    def __enter__(self) -> Any:
        raise NotImplementedError

    def undo(self) -> None:
        """Takes back what ``__enter__`` did, as far as it came."""
        raise NotImplementedError
