"""CUDAGraphed: device work as one CUDA graph, so that a step launches no kernels one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...base.torch_private import pytree

WARMUP = 2
"""Calls that run as they are, for compilation and the libraries' own first use."""
MOST = 8
"""Forms of arguments that are recorded; each keeps its memory."""


class CUDAGraphed:
    """A function that is recorded once for each form of its argument, and from then on replayed.

    Args:
        function: of a tree of device tensors and constants; returns a tensor. All else that it
            reads and writes must stay where it is in memory, and it must not wait for the device.
        device: a CUDA device.
    """

    def __init__(self, function: Callable[[Any], Tensor], device: torch.device):
        self._function, self._device = function, device
        # One stream for all, so that the libraries' workspaces are those of the first calls.
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._recordings: dict[Any, _Recording] = {}

    def __call__(self, argument: Any) -> Tensor:
        """The function's result, in memory of its own."""
        leaves, spec = pytree.tree_flatten(argument)
        form = spec, tuple(_form(leaf) for leaf in leaves), _aliases(leaves)
        if form not in self._recordings:
            if len(self._recordings) == MOST:
                return self._beside(argument)
            self._recordings[form] = _Recording(leaves, spec)
        recording = self._recordings[form]
        recording.fill(leaves)
        if recording.calls < WARMUP:
            # On the recording's own tensors, so that nothing compiles anew while it is made.
            recording.calls += 1
            return self._beside(recording.argument)
        if recording.graph is None:
            self._record(recording)
        assert recording.graph is not None
        recording.graph.replay()
        return recording.result.clone()

    def _beside(self, argument: Any) -> Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._function(argument)
        current.wait_stream(self._stream)
        return result.clone()

    def _record(self, recording: _Recording) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                # Puts the current stream back, also where the capture breaks off.
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                # A DataLoader's thread may allocate pinned memory meanwhile.
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                recording.result = self._function(recording.argument)
        except RuntimeError as error:
            # What breaks a capture is raised first, that it broke second.
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise
        recording.graph = graph


class _Recording:
    """One form of the argument: tensors that stay where they are, and what is made of them.

    Attributes:
        argument: the tree that the function is called with.
        calls: so far, before it was recorded.
        graph, result: once recorded.
    """

    result: Tensor

    def __init__(self, leaves: list[Any], spec: Any):
        # A tensor that stands in two places stays one, which compiled code relies on.
        own = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)}
        self._leaves = [own.get(id(leaf), leaf) for leaf in leaves]
        self.argument = pytree.tree_unflatten(self._leaves, spec)
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def fill(self, leaves: list[Any]) -> None:
        """Takes over the values of an argument of the same form."""
        for held, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(held, Tensor):
                held.copy_(leaf)


def _aliases(leaves: list[Any]) -> tuple[int, ...]:
    """Where each tensor stands first."""
    first: dict[int, int] = {}
    return tuple(
        first.setdefault(id(leaf), i) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
    )


def _form(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf)
