"""Compiler: torch.compile of the passes of a sweep."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..run import run
from ..stack import Stack
from ..tree import Params


class Compiler:
    """torch.compile of ``run`` in one graph, once per structure of what it runs.

    Args:
        options: for torch.compile, such as {"mode": "reduce-overhead"}.
    """

    def __init__(self, options: Mapping[str, Any]):
        self.options = {"fullgraph": True, **options}
        # Otherwise the chunks of all sweeps of a process would share torch's small limit.
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            self.options.setdefault("isolate_recompiles", True)
        self._made: dict[Any, Callable[..., Tensor]] = {}

    def __call__(self, params: Stack | Params) -> Callable[..., Tensor]:
        leaves, spec = pytree.tree_flatten(params)
        key = spec, tuple((t.shape, t.dtype, t.device) for t in leaves)
        if key not in self._made:
            self._made[key] = torch.compile(run, **self.options)
        return self._made[key]


def eager(params: Stack | Params) -> Callable[..., Tensor]:
    """The passes of a sweep that is not compiled."""
    return run
