"""Which tensors of a pass are computed from others, seen in the operations below autograd."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
            a Python number, or a switch for many others at once (``torch.where`` on one yes or
            no), by which the model can take another way.
    """

    def __init__(self, sources: Iterable[Tensor], read: Callable[[str], None] | None = None):
        super().__init__()
        self._known: dict[int, StorageWeakRef] = {}
        self._read = read
        self._leaving = _Leaving(self)
        for tensor in sources:
            self._mark(tensor)

    def __enter__(self) -> Self:
        super().__enter__()
        if self._read is not None:
            self._leaving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._read is not None:
            self._leaving.__exit__(*error)
        super().__exit__(*error)

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
                    if not chooses or leaf.is_floating_point() or not leaf.dim():
                        self._mark(leaf)
                    if leaf.numel() > 1 and any(map(self._is_switch, given)):
                        self._note()
                elif isinstance(leaf, (bool, int, float, complex)):
                    self._note()
            written = given[0] if func.overloadpacket.__name__.endswith("_") else kwargs.get("out")
            if isinstance(written, Tensor):
                self._mark(written)
        return result

    def _is_switch(self, tensor: Tensor) -> bool:
        """Whether it is one yes or no that follows from the sources, as ``h.mean() > 0``."""
        return tensor.dtype is torch.bool and tensor.numel() == 1 and self.reaches(tensor)

    def _note(self) -> None:
        if self._read is not None and not in_backward() and (where := models_own()):
            self._read(where)

    @is_step
    def left(self, tensor: Tensor) -> None:
        """Notes a tensor whose values go to Python below all operations."""
        if self.reaches(tensor):
            self._note()


class _Leaving(TorchFunctionMode):
    """Sees the functions that read a tensor's memory, which are no operations."""

    def __init__(self, flow: Flow):
        super().__init__()
        self._flow = flow

    @is_step
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _MEMORY and args and isinstance(args[0], Tensor):
            self._flow.left(args[0])
        return func(*args, **(kwargs or {}))


_MEMORY = frozenset((Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__))
