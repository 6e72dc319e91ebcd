"""What one walk over a model found, kept between calls for as long as the model is as it was.

A walk asks every module and every parameter a number of questions, which costs more than all that
an adapted call does besides. What the answers rest on (which modules and parameters there are, what
they are, where and in what dtype) is compared before each use instead, at a fraction of the cost.
A part of the model that is replaced, moved, cast, frozen, compiled, sharded or quantised since then
is seen so, and the walk is done anew.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TargetError
from ..hugging_face import CHECKPOINT_FUNCTION, HOOK, checkpoint_function, offload_hook
from .checks import check_module, check_weight, refuse_quantized_shard
from .quantized import QuantizedMap, quantized_map_class
from .scope import own_function, own_tensors
from .sharded import Units, is_dtensor
from .torch_private import (
    BUFFERS,
    CHILDREN,
    COMPILED_CALL,
    PARAMETERS,
    buffers_of,
    is_compiled,
    parameters_of,
    plain_attributes,
)

FUSED = nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder
"""Layers that torch may run as one kernel, and what hands them nested tensors then."""

_LINEAR_FORWARD = nn.Linear.forward
_FUNCTIONAL_LINEAR = F.linear


@dataclass(frozen=True)
class Held:
    """A parameter in its module.

    Attributes:
        name: the first of its names.
        at: the number of its module in the survey.
        key: its name in the module.
        requires_grad: of the base's own.
        quantized: the kind of the module's map, if it is a quantised layer and this its weight.
        in_unit: whether it lies in a unit of FSDP2.
        sharded: whether it is spread over processes.
        plain_linear: whether it is the weight of an ``nn.Linear`` that runs torch's own forward.
    """

    name: str
    at: int
    key: str
    requires_grad: bool
    quantized: type[QuantizedMap] | None
    in_unit: bool
    sharded: bool
    plain_linear: bool


class Walk:
    """A model's modules and parameters, each once, checked for what no adapted call can run.

    Args:
        model: to be walked over.

    Attributes:
        modules: all of them, in the model's order.
        held: all parameters, in the model's order.
        checkpointed: the numbers of the modules that hold a function for checkpointing.
        buffered: (path, number) of the modules that hold buffers.
        fused: the numbers of the layers that torch may run as one kernel.

    Raises:
        TargetError: a wrapper, or a weight without values.
    """

    def __init__(self, model: nn.Module):
        self.modules: list[nn.Module] = []
        self.held: list[Held] = []
        self.checkpointed: list[int] = []
        self.buffered: list[tuple[str, int]] = []
        self.fused: list[int] = []
        units = Units()
        for prefix, module in model.named_modules():
            at = len(self.modules)
            self.modules.append(module)
            in_unit = units.hold(prefix, module)
            if checkpoint_function(module) is not None:
                self.checkpointed.append(at)
            check_module(prefix, module)
            for key, weight in own_tensors(parameters_of(module)).items():
                if weight is not None:
                    name = f"{prefix}.{key}" if prefix else key
                    self.held.append(_held(name, at, module, key, weight, in_unit))
            if isinstance(module, FUSED):
                self.fused.append(at)
            if buffers_of(module):
                self.buffered.append((prefix, at))


class Survey:
    """A walk that is kept, without keeping the model.

    Args:
        walk: what is kept; its list of modules is not.

    Attributes:
        kept: what others derive from the walk, for as long as it holds.
        watched: the kinds of calls of which one was watched.
        ids: of all modules.
    """

    def __init__(self, walk: Walk):
        modules, walk.modules = walk.modules, []
        self.walk = walk
        self.kept: dict[Any, Any] = {}
        self.watched: set[Hashable] = set()
        self.ids = frozenset(map(id, modules))
        self._alive = True
        # Where one object has died, another may have its address.
        self._modules = [weakref.ref(module, self._died) for module in modules]
        self._weights = [weakref.ref(w, self._died) for m in modules for w in _weights(m)]
        self._facts = _facts(modules)

    def _died(self, _: Any) -> None:
        self._alive = False

    def present(self) -> list[nn.Module] | None:
        """The modules, if all is as it was; else None."""
        modules: list[Any] = [ref() for ref in self._modules]
        if not self._alive or _facts(modules) != self._facts or not self._alive:
            return None
        return modules


_known: weakref.WeakKeyDictionary[nn.Module, Survey] = weakref.WeakKeyDictionary()
# Held for dict operations only, by ``with``, whose enter and exit are then single C calls; a
# garbage collection within may come here again.
_lock = threading.RLock()


def survey(model: nn.Module) -> tuple[Survey, list[nn.Module]]:
    """The survey of a model as it is now, and its modules.

    Raises:
        TargetError: see :class:`Walk`.
    """
    with _lock:
        found = _known.get(model)
    modules = None if found is None else found.present()
    if found is None or modules is None:
        walk = Walk(model)
        modules, found = walk.modules, Survey(walk)
        with _lock:
            _known[model] = found
    return found, modules


def _held(name: str, at: int, module: nn.Module, key: str, weight: Tensor, in_unit: bool) -> Held:
    if isinstance(weight, nn.UninitializedParameter):
        check_weight(name, module, weight)
    if weight.is_meta:
        raise TargetError(
            f"{name} is a meta tensor without values; load the weights to run the model"
        )
    quantized = quantized_map_class(module) if key == "weight" else None
    if quantized is not None and in_unit:
        refuse_quantized_shard(name)
    sharded = quantized is None and (in_unit or is_dtensor(weight))
    linear = (
        not torch.compiler.is_compiling()
        and key == "weight"
        and type(module) is nn.Linear
        and not sharded
        and _own_forward(module) is None
        and nn.Linear.forward is _LINEAR_FORWARD
        and F.linear is _FUNCTIONAL_LINEAR
    )
    return Held(name, at, key, weight.requires_grad, quantized, in_unit, sharded, linear)


def _own_forward(module: nn.Module) -> Any:
    """The forward that was set on a module itself, or None."""
    return own_function(module.__dict__.get("forward"))


def _weights(module: nn.Module) -> Iterable[Tensor]:
    return (w for w in own_tensors(parameters_of(module)).values() if w is not None)


def _facts(modules: list[nn.Module]) -> list[Any]:
    """What a walk found, in brief, to be compared; ids are those of objects that live.

    Before every call: so it asks as little as it can, and only then those whose answers matter.
    """
    facts: list[Any] = [nn.Linear.forward is _LINEAR_FORWARD, F.linear is _FUNCTIONAL_LINEAR]
    # A subclass of Tensor may ask for each attribute itself, as bitsandbytes' does.
    with plain_attributes():
        _add_facts(facts, modules)
    return facts


def _add_facts(facts: list[Any], modules: list[nn.Module]) -> None:
    for module in modules:
        attributes = module.__dict__
        facts.append(module.__class__)
        if children := attributes[CHILDREN]:
            facts += children
            facts += map(id, children.values())
        if parameters := attributes[PARAMETERS]:
            parameters = own_tensors(parameters)
            facts += parameters
            for weight in parameters.values():
                if weight is not None:
                    facts += (id(weight), weight.requires_grad, weight.dtype, weight.device)
                    facts.append(weight.shape)
        if attributes[BUFFERS]:
            facts.append(BUFFERS)
        if "forward" in attributes and _own_forward(module) is not None:
            facts.append("forward")
        if CHECKPOINT_FUNCTION in attributes:
            facts.append(checkpoint_function(module) is not None)
        if HOOK in attributes:
            facts.append(offload_hook(module))
        if COMPILED_CALL in attributes:
            facts.append(is_compiled(module))
