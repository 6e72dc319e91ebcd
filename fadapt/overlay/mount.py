"""Mounting: adapters put where a model's weights are, for one call or for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.checks import check_module, check_one_way, check_weight
from ..base.quantized import QuantizedMap, quantized_map
from ..base.scope import BUFFERS, PARAMETERS, OnRead, Place, ScopedFunction, View, own_tensors
from ..base.sharded import Units, compute_device, is_dtensor
from ..base.torch_private import buffers_of, is_persistent, parameters_of
from ..dropout import fresh_draw
from ..errors import ConfigError, TargetError
from ..hugging_face import CHECKPOINT_FUNCTION, checkpoint_function, forward_key
from ..params.adapter import Adapted
from .checkpointing import Recomputed, refuse_checkpoint
from .exact import marked_like
from .rules import overlay
from .tensor import Overlay


class SwappedForward:
    """The ``forward`` of a quantised layer for one call: its weight cannot be overlaid.

    Args:
        base: the layer's frozen map.
        adapter: the layer's adapter, or None: then the layer is its own, but in a form that
            torch.func can transform.
    """

    def __init__(self, base: QuantizedMap, adapter: Adapted | None):
        self.base, self.adapter = base, adapter

    def __call__(self, x: Tensor) -> Tensor:
        if self.adapter is None:
            return self.base(x)
        refuse_checkpoint(self.adapter)
        return self.adapter(x, self.base)


@dataclass(frozen=True)
class Mount:
    """What one call is to see in the places of a model's own tensors and functions.

    Attributes:
        tensors: (full name, module, PARAMETERS or BUFFERS, key, tensor).
        sharded: as ``tensors``, of weights that are spread over processes: what is seen there is
            made when the module reads it.
        forwards: (module, attribute, function) of the quantised layers, whose kernels take no
            overlay.
        checkpoints: (module, attribute, function) where the model checkpoints activations.
        modules: all modules of the model.
    """

    tensors: list[tuple[str, nn.Module, str, str, Tensor]]
    sharded: list[tuple[str, nn.Module, str, str, OnRead]]
    forwards: list[tuple[nn.Module, str, SwappedForward]]
    checkpoints: list[tuple[nn.Module, str, Recomputed]]
    modules: list[nn.Module]

    def by_name(self) -> dict[str, Tensor]:
        """The tensors, for torch.func.functional_call."""
        return {name: tensor for name, _, _, _, tensor in self.tensors}

    def view(self, model: nn.Module, owner: Any = None) -> View:
        """The model as the call sees it."""
        seen: dict[Place, Any] = {}
        places = []
        for _, module, attribute, key, tensor in (*self.tensors, *self.sharded):
            place = id(module), attribute
            if place not in seen:
                seen[place] = {}
                places.append((module, attribute))
            seen[place][key] = tensor
        for module, attribute, function in (*self.forwards, *self.checkpoints):
            seen[id(module), attribute] = function
            places.append((module, attribute))
        view = View(model, frozenset(map(id, self.modules)), seen, places, owner)
        for _, _, function in self.checkpoints:
            function.view = view
        return view


def prepare(model: nn.Module, sites: Mapping[str, Adapted], any_mode: bool = False) -> Mount:
    """An overlay for every site, a detached alias for every other trainable base parameter.

    And copies of the buffers that training mode may write to, such as the running statistics of
    BatchNorm: the base stays as it is.

    Args:
        any_mode: whether the mode may change before the model runs, as in a ``bound`` block.
    """
    mount = Mount([], [], [], [], [])
    found: set[str] = set()
    units = Units()
    draws = _Draws(any_mode)
    for prefix, module in model.named_modules():
        mount.modules.append(module)
        in_unit = units.hold(prefix, module)
        if (function := checkpoint_function(module)) is not None:
            own = function.plain() if isinstance(function, ScopedFunction) else function
            mount.checkpoints.append((module, CHECKPOINT_FUNCTION, Recomputed(own)))
        check_module(prefix, module)
        for key, weight in own_tensors(parameters_of(module)).items():
            if weight is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            found.add(name)
            if isinstance(weight, nn.UninitializedParameter):
                check_weight(name, module, weight)
            if weight.is_meta:
                raise TargetError(
                    f"{name} is a meta tensor without values; load the weights to run the model"
                )
            if key == "weight" and (base := quantized_map(module)) is not None:
                if in_unit:
                    raise TargetError(
                        f"{name} is a quantised layer of bitsandbytes in a unit of FSDP2, which "
                        "loses its quantisation state (bitsandbytes issue 1945); leave the model "
                        "whole in each process, or shard one that is not quantised"
                    )
                mount.forwards.append(_swap(name, module, base, sites.get(name), draws))
                continue
            if in_unit or is_dtensor(weight):
                adapter = sites.get(name)
                if adapter is not None:
                    check_weight(name, module, weight)
                    _check_site(name, tuple(weight.shape), weight, adapter)
                    adapter = adapter.within(module, draws.of(adapter, module))
                elif not weight.requires_grad:
                    continue
                if in_unit:
                    check_one_way(name, weight)
                seen = OnRead(Gathered(adapter, in_unit))
                mount.sharded.append((name, module, PARAMETERS, key, seen))
                continue
            if name in sites:
                adapter = sites[name].within(module, draws.of(sites[name], module))
                new = _overlay_site(name, module, weight, adapter)
            elif weight.requires_grad:
                new = marked_like(weight.detach(), True)
            else:
                continue
            mount.tensors.append((name, module, PARAMETERS, key, new))
        if (any_mode or module.training) and (buffers := own_tensors(buffers_of(module))):
            for key, buffer in buffers.items():
                if buffer is not None and _may_be_updated(module, key, buffer):
                    name = f"{prefix}.{key}" if prefix else key
                    mount.tensors.append((name, module, BUFFERS, key, buffer.clone()))
    if missing := [n for n, a in sites.items() if n not in found and not a.site.is_shared]:
        raise TargetError(
            f"the params adapt {missing[0]} and {len(missing) - 1} more weights that this "
            f"{type(model).__name__} does not have; they were made for another model"
        )
    return mount


class _Draws:
    """The number from which all masks of dropout in one call follow.

    It is drawn before the call, so that a recomputation has the same.

    Args:
        any_mode: whether there are many calls, which draw their own.
    """

    def __init__(self, any_mode: bool):
        self.any_mode = any_mode
        self.drawn: Tensor | None = None

    def of(self, adapter: Adapted, module: nn.Module) -> Tensor | None:
        """For an adapter in its layer; None where it needs none, or a new one each time."""
        if self.any_mode or not module.training or not adapter.drops:
            return None
        if self.drawn is None:
            self.drawn = fresh_draw(adapter.device or torch.device("cpu"))
        return self.drawn


class Gathered:
    """The overlay of a weight as it is when its layer reads it: gathered by FSDP2, or a DTensor.

    Args:
        adapter: what is to stand there, or None for the frozen weight itself.
        in_unit: whether FSDP2 gathers it.
    """

    def __init__(self, adapter: Adapted | None, in_unit: bool):
        self.adapter, self.in_unit = adapter, in_unit

    def __call__(self, weight: Tensor) -> Tensor:
        adapter = self.adapter
        if is_dtensor(weight):
            if self.in_unit:
                # Not gathered: FSDP2 itself asks. A layer cannot compute with it.
                return weight
            mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
            adapter = adapter and adapter.over_mesh(mesh)
        return weight.detach() if adapter is None else overlay(weight.detach(), adapter)


def _may_be_updated(module: nn.Module, key: str, buffer: Tensor) -> bool:
    """Whether a forward in training mode may write to a buffer of the model's state.

    Not to those outside the state dict, which a model makes anew from its configuration, nor to
    matrices of integers, in which quantised layers of other libraries pack their weights.
    """
    if not is_persistent(module, key) or buffer.is_meta:
        return False
    return buffer.is_floating_point() or buffer.is_complex() or buffer.dim() < 2


def _swap(
    name: str, module: nn.Module, base: QuantizedMap, adapter: Adapted | None, draws: _Draws
) -> tuple[nn.Module, str, SwappedForward]:
    key = forward_key(module)
    if adapter is not None:
        base.check(name)
        _check_site(name, base.shape, base.module.weight, adapter, adapter.site.matrix_shape)
        adapter = adapter.within(module, draws.of(adapter, module))
    return module, key, SwappedForward(base, adapter)


def _overlay_site(name: str, module: nn.Module, weight: Tensor, adapter: Adapted) -> Overlay:
    check_weight(name, module, weight)
    _check_site(name, tuple(weight.shape), weight, adapter)
    return overlay(weight.detach(), adapter, required_grad=weight.requires_grad)


def _check_site(
    name: str,
    found: tuple[int, ...],
    weight: Tensor,
    adapter: Adapted,
    wanted: tuple[int, ...] | None = None,
) -> None:
    wanted = wanted or adapter.site.stored_shape
    where = compute_device(weight)
    if found != wanted:
        raise TargetError(
            f"{name} has shape {found}, but its adapter was made for {wanted}: another base model"
        )
    device = adapter.device or where
    if device.type == "meta" and not weight.is_meta:
        raise TargetError(
            f"the adapter of {name} was made on a meta model and has no values; call fadapt.init "
            "or fadapt.load with this model"
        )
    if device != where:
        raise ConfigError(
            f"{name} is on {where}, its adapter on {device}; "
            f"write params = params.to({str(where)!r})"
        )
    if weight.is_meta:
        raise TargetError(f"{name} is a meta tensor without values; load the weights to run it")


@contextmanager
def forwards_swapped(mount: Mount) -> Iterator[None]:
    """The forwards in their places, as torch.compile traces it; the rest is functional_call's."""
    before = [(m, key, m.__dict__.get(key)) for m, key, _ in mount.forwards]
    try:
        for module, key, new in mount.forwards:
            setattr(module, key, new)
        yield
    finally:
        for module, key, old in reversed(before):
            if old is None:
                module.__dict__.pop(key, None)
            else:
                setattr(module, key, old)
