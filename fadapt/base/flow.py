"""Which tensors of a pass are computed from others, seen in the operations below autograd."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

from .torch_private import (
    StorageWeakRef,
    TorchDispatchMode,
    in_backward,
    plain_attributes,
    pytree,
    storage_key,
)

_CHOICES = frozenset(
    "argmax argmin argsort sort topk max min kthvalue mode median nonzero multinomial searchsorted "
    "bucketize unique unique2 _unique2".split()
)
"""Operations whose whole numbers are places and not amounts: which expert, which token."""

_STEPS: set[CodeType] = set()
"""Of functions of the package that run parts of the model as the model would."""

_ENTRIES: set[CodeType] = set()
"""Of functions of the package that call the model."""


def is_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """Says of a function of the package that it runs a part of the model in the model's place."""
    _STEPS.add(function.__code__)
    return function


def is_entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """Says of a function of the package that it calls the model."""
    _ENTRIES.add(function.__code__)
    return function


def models_own() -> str:
    """Where in the model's own code an operation is asked for, as "file:line".

    Returns:
        "" where the package itself asks within the model's forward, or where no model runs, as in a
        loss function.
    """
    frame: FrameType | None = sys._getframe(1)
    found = ""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if frame.f_code in _ENTRIES:
            return found or "the model"
        if name.partition(".")[0] == __name__.partition(".")[0]:
            if frame.f_code not in _STEPS and name != __name__:
                return ""
        elif not found and name.partition(".")[0] != "torch":
            found = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Flow(TorchDispatchMode):
    """A block in which what is computed from some tensors is known, and when Python reads it.

    Args:
        sources: the tensors.
        read: called with the place in the model's code where a value that follows from them becomes
            a Python number, by which the model can take another way.
    """

    def __init__(self, sources: Iterable[Tensor], read: Callable[[str], None] | None = None):
        super().__init__()
        self._known: dict[int, StorageWeakRef] = {}
        self._read = read
        for tensor in sources:
            self._mark(tensor)

    def reaches(self, tensor: Tensor) -> bool:
        """Whether the tensor follows from the sources."""
        return storage_key(tensor) in self._known

    def _mark(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key is not None:
            # The reference keeps the address from being used again.
            self._known[key] = StorageWeakRef(tensor.untyped_storage())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with plain_attributes():
            return self._follow(func, args, kwargs)

    def _follow(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(map(self.reaches, given)):
            chooses = func.overloadpacket.__name__ in _CHOICES
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    if not chooses or leaf.is_floating_point():
                        self._mark(leaf)
                elif isinstance(leaf, (bool, int, float, complex)):
                    self._note()
            written = given[0] if func.overloadpacket.__name__.endswith("_") else kwargs.get("out")
            if isinstance(written, Tensor):
                self._mark(written)
        return result

    def _note(self) -> None:
        if self._read is not None and not in_backward() and (where := models_own()):
            self._read(where)
