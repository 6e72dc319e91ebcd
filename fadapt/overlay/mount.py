"""Mounting: adapters put where a model's weights are, for one call or for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.checks import check_module, check_weight
from ..base.quantized import QuantizedMap, quantized_map
from ..base.torch_private import parameters_of
from ..errors import ConfigError, FadaptError, TargetError
from ..hugging_face import checkpoints, forward_key
from ..params.adapter import Adapted
from .checkpointing import CallContext, refuse_checkpoint
from .rules import overlay
from .tensor import Overlay


class SwappedForward:
    """The ``forward`` of a quantised layer for one call: its weight cannot be overlaid.

    Args:
        base: the layer's frozen map.
        adapter: the layer's adapter, or None: then the layer is its own, but in a form that
            torch.func can transform.
        call: as for an overlay.
    """

    def __init__(self, base: QuantizedMap, adapter: Adapted | None, call: CallContext):
        self.base, self.adapter, self.call = base, adapter, call

    def __call__(self, x: Tensor) -> Tensor:
        if self.adapter is None:
            return self.base(x)
        refuse_checkpoint(self.adapter, self.call)
        return self.adapter(x, self.base)


@dataclass(frozen=True)
class Mount:
    """Replacements for one call: by full name for functional_call, by place for bound.

    Of a quantised layer, whose kernel takes no overlay, the ``forward`` is replaced.
    """

    by_name: dict[str, Tensor]
    places: list[tuple[nn.Module, str, Tensor]]
    forwards: list[tuple[nn.Module, str, SwappedForward]]
    checkpointing: list[nn.Module]


def prepare(model: nn.Module, sites: Mapping[str, Adapted], lasting: bool) -> Mount:
    """An overlay for every site, and a detached alias for every other trainable base parameter."""
    call = CallContext(lasting, torch.is_grad_enabled())
    by_name: dict[str, Tensor] = {}
    places: list[tuple[nn.Module, str, Tensor]] = []
    forwards: list[tuple[nn.Module, str, SwappedForward]] = []
    checkpointing: list[nn.Module] = []
    found: set[str] = set()
    for prefix, module in model.named_modules():
        if call.grad and checkpoints(module):
            checkpointing.append(module)
        check_module(prefix, module)
        for key, weight in parameters_of(module).items():
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
                forwards.append(_swap(name, module, base, sites.get(name), call))
                continue
            if name in sites:
                new = _overlay_site(name, module, weight, sites[name], call)
            elif weight.requires_grad:
                new = weight.detach()
            else:
                continue
            by_name[name] = new
            places.append((module, key, new))
    if missing := [name for name in sites if name not in found]:
        raise TargetError(
            f"the params adapt {missing[0]} and {len(missing) - 1} more weights that this "
            f"{type(model).__name__} does not have; they were made for another model"
        )
    return Mount(by_name, places, forwards, checkpointing)


def _swap(
    name: str, module: nn.Module, base: QuantizedMap, adapter: Adapted | None, call: CallContext
) -> tuple[nn.Module, str, SwappedForward]:
    key = forward_key(module)
    if adapter is not None:
        if isinstance(module.__dict__.get(key), SwappedForward):
            raise FadaptError(f"{name} is already adapted: the model is inside fadapt.bound")
        base.check(name)
        _check_site(name, base.shape, base.module.weight, adapter.site.matrix_shape, adapter)
    return module, key, SwappedForward(base, adapter, call)


def _overlay_site(
    name: str, module: nn.Module, weight: Tensor, adapter: Adapted, call: CallContext
) -> Overlay:
    if isinstance(weight, Overlay):
        raise FadaptError(f"{name} is already adapted: the model is inside fadapt.bound")
    check_weight(name, module, weight)
    _check_site(name, tuple(weight.shape), weight, adapter.site.stored_shape, adapter)
    return overlay(weight.detach(), adapter, call)


def _check_site(
    name: str, found: tuple[int, ...], weight: Tensor, wanted: tuple[int, ...], adapter: Adapted
) -> None:
    if found != wanted:
        raise TargetError(
            f"{name} has shape {found}, but its adapter was made for {wanted}: another base model"
        )
    device = adapter.device or weight.device
    if device.type == "meta" and not weight.is_meta:
        raise TargetError(
            f"the adapter of {name} was made on a meta model and has no values; call fadapt.init "
            "or fadapt.load with this model"
        )
    if device != weight.device:
        raise ConfigError(
            f"{name} is on {weight.device}, its adapter on {device}; "
            f"write params = params.to({str(weight.device)!r})"
        )
    if weight.is_meta:
        raise TargetError(f"{name} is a meta tensor without values; load the weights to run it")


@contextmanager
def mounted(mount: Mount) -> Iterator[None]:
    """Everything in its place within the block, and as it was afterwards."""
    before = [(module, key, parameters_of(module)[key]) for module, key, _ in mount.places]
    try:
        for module, key, new in mount.places:
            parameters_of(module)[key] = new
        with forwards_swapped(mount):
            yield
    finally:
        for module, key, old in reversed(before):
            parameters_of(module)[key] = old


@contextmanager
def forwards_swapped(mount: Mount) -> Iterator[None]:
    """Only the quantised layers, for functional_call to replace the rest."""
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
