"""Recorded: device work as a CUDA graph, so that a step does not launch its kernels one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

WARMUP = 2
"""Calls that run as they are, for compilation and the libraries' own first use."""
MOST = 8
"""Forms of arguments that are recorded; each keeps its memory."""


class Recorded:
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
        self._calls: Counter[Any] = Counter()
        self._recordings: dict[Any, tuple[torch.cuda.CUDAGraph, list[Any], Tensor]] = {}

    def __call__(self, argument: Any) -> Tensor:
        """The function's result, in memory of its own."""
        leaves, spec = pytree.tree_flatten(argument)
        form = spec, tuple(_form(leaf) for leaf in leaves)
        if form not in self._recordings:
            self._calls[form] += 1
            if self._calls[form] <= WARMUP or len(self._recordings) == MOST:
                return self._call(argument)
            self._recordings[form] = self._record(leaves, spec)
        graph, static, result = self._recordings[form]
        for held, leaf in zip(static, leaves, strict=True):
            if isinstance(held, Tensor):
                held.copy_(leaf)
        graph.replay()
        return result.clone()

    def _call(self, argument: Any) -> Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self._function(argument)
        current.wait_stream(self._stream)
        return result.clone()

    def _record(self, leaves: list[Any], spec: Any) -> tuple[torch.cuda.CUDAGraph, list, Tensor]:
        static = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
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
                result = self._function(pytree.tree_unflatten(static, spec))
        except RuntimeError as error:
            # What breaks a capture is raised first, that it broke second.
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise
        return graph, static, result


def _form(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf)
