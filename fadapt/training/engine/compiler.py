"""Compiler: torch.compile and CUDA graphs for the passes of a sweep."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...base.torch_private import pytree
from ...errors import ConfigError
from ...overlay.instead import run_by
from ...params.params import Params
from ...params.stack import Stack
from ...run import run
from .blocks import Blocks, BlocksOf
from .cuda_graphs import CUDAGraphed

# What torch calls the modes that record CUDA graphs without that part of them.
_RECORDING = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}

_numbers = itertools.count()


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python function, or of a bound method, with code of its own.

    torch counts recompilations by code, and all that it compiled of one code, for whatever
    structure, sweep and chunk, would share its small limit.
    """
    if isinstance(function, types.MethodType):
        return types.MethodType(_apart(function.__func__), function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    name = f"{function.__name__}_{next(_numbers)}"  # by which it counts shapes, too
    copy = types.FunctionType(
        function.__code__.replace(co_name=name),
        function.__globals__,
        name,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class Compiler:
    """torch.compile of ``run`` in one graph, once per structure of what it runs.

    Args:
        options: for torch.compile, such as {"dynamic": False}; True for its defaults, False to
            leave everything as it is. With {"regional": True} the equal blocks of a model, such as
            its layers, are compiled as one function, which is called for each. With one of the
            modes that stand for CUDA graphs, "reduce-overhead" and "max-autotune", on a CUDA
            device each pass, its gradient included, is recorded as one. torch's own modes record
            forward and backward apart, and check their guards between them at every step.
        device: of the model.
    """

    def __init__(self, options: bool | Mapping[str, Any], device: torch.device):
        self.compiles = options is not False
        self.options: dict[str, Any] = {"fullgraph": True}
        if isinstance(options, Mapping):
            self.options |= options
        self.device = device
        self.records = device.type == "cuda" and self.options.get("mode") in _RECORDING
        if self.records:
            mode = _RECORDING[self.options.pop("mode")]
            self.options |= {"mode": mode} if mode else {}
        self.regional = bool(self.options.pop("regional", False))
        self._blocks: Blocks | None = None
        self._parts: dict[int, BlocksOf] = {}
        self._made: dict[Any, Callable[..., Tensor]] = {}
        if self.compiles:
            try:  # which compiles nothing yet
                torch.compile(run, **self.options)
            except (TypeError, RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"compile={options!r:.200} is not what torch.compile takes: {error}"
                ) from None

    def run(self, params: Stack | Params) -> Callable[..., Tensor]:
        """:func:`fadapt.run`, compiled for params of this structure."""
        if not self.compiles:
            return run
        if self.regional:
            return functools.partial(self._run_by_blocks, params)
        leaves, spec = pytree.tree_flatten(params)
        key = spec, tuple((t.shape, t.dtype, t.device) for t in leaves)
        if key not in self._made:
            self._made[key] = self._compiled(run)
        return self._made[key]

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(_apart(function), **self.options)

    def _run_by_blocks(self, owner: Stack | Params, model: nn.Module, *args: Any, **kw: Any) -> Any:
        """``run`` with the equal blocks of the model compiled, each kind once."""
        if self._blocks is None or self._blocks.model is not model:
            self._blocks = Blocks(model, self._compiled)
            if not self._blocks.blocks:
                raise ConfigError(
                    f"compile={{'regional': True}} compiles one of several equal blocks, and "
                    f"{type(model).__name__} has no list of such blocks (layers without hooks, "
                    "buffers of the state dict, quantised or sharded weights); leave it out"
                )
        parts = self._parts.get(id(owner))
        if parts is None or parts.params is not owner or parts.blocks is not self._blocks:
            parts = self._parts[id(owner)] = BlocksOf(self._blocks, owner)
        with run_by(parts):
            return run(model, *args, **kw)

    def recorded(self, function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
        """A pass with its gradient, recorded where that was asked for; see :class:`CUDAGraphed`."""
        return CUDAGraphed(function, self.device) if self.records else function
