"""Layers that torch runs as one fused kernel: in an adapted call where the base does, not else.

``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` in eval mode have such a kernel, which
rounds otherwise than the layers one by one, and gives 0 at padding. torch takes it for plain
weights, where autograd has nothing to record. So:

- without autograd the layer sees the adapted weights themselves, and what decides about the kernel
  is what decides for the base;
- with autograd, a base whose weights require grad runs without it. Its weights here are frozen, and
  would be taken; so one of them declines (:class:`Unfused`). So does one of the first layer of an
  ``nn.TransformerEncoder`` of which a later layer cannot take the kernel: by its first layer alone
  the encoder decides whether to pack padded rows for all, which only the kernel understands.

What is left is autograd over a frozen base: that runs the kernel, and an adapter cannot, which has
gradients. The members of a stack have no common weight, and never run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.flow import is_step
from ..base.scope import PARAMETERS, OnRead, Place, own_tensors
from ..base.torch_private import is_transformed, parameters_of, pytree
from ..params.adapter import Adapter
from .checkpointing import refuse_checkpoint
from .tensor import adapted_bias, materialize, overlay


class Unfused(Tensor):
    """A frozen tensor as any other, but that no fused kernel of torch takes."""

    plain: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        plain: Any = pytree.tree_map_only(Unfused, lambda t: t.plain, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def _unfused(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if is_transformed():
        return tensor
    result = tensor.as_subclass(Unfused)
    result.plain = tensor
    return result


NEVER = OnRead(_unfused)
"""What a call sees of a tensor that keeps its layer from being fused."""

NOT_RECORDED = OnRead(lambda t: _unfused(t) if torch.is_grad_enabled() else t.detach(), same=True)
"""The same, as long as autograd records."""


class _Weight(OnRead):
    """An adapted weight of such a layer."""

    __slots__ = ("adapter", "layer")

    def __init__(self, adapter: Adapter, layer: nn.Module):
        super().__init__(self._made)
        self.adapter, self.layer = adapter, layer

    @is_step
    def _made(self, weight: Tensor) -> Tensor:
        made = overlay(weight.detach(), self.adapter, required_grad=weight.requires_grad)
        if not _may_be_fused(self.layer):
            return made
        refuse_checkpoint(self.adapter)
        return materialize(made)


class _Bias(OnRead):
    """The bias beside a weight whose method acts on it."""

    __slots__ = ("key", "module", "seen", "weight")

    def __init__(self, weight: _Weight, module: nn.Module, key: str, seen: Mapping[str, Any]):
        super().__init__(self._made)
        self.weight, self.module, self.key, self.seen = weight, module, key, seen

    @is_step
    def _made(self, bias: Tensor) -> Tensor:
        if self.seen[self.key] is not self.weight or not _may_be_fused(self.weight.layer):
            return bias.detach()  # beside an overlay, which acts on it
        weight = own_tensors(parameters_of(self.module))[self.key]
        assert weight is not None
        return adapted_bias(self.weight.adapter, weight.detach(), bias.detach())


def _may_be_fused(layer: nn.Module) -> bool:
    return not (
        layer.training
        or torch.is_grad_enabled()
        or not torch.backends.mha.get_fastpath_enabled()
        or is_transformed()
    )


def let_fuse(layers: Sequence[nn.Module], seen: dict[Place, Any]) -> list[nn.Module]:
    """Changes what a call is to see of layers that torch may run as one kernel.

    Args:
        layers: the modules of such types; see :class:`Walk`.
        seen: what the call is to see, as for :class:`View`.

    Returns:
        Modules of whose parameters the call was to see none, and now is.
    """
    more: list[nn.Module] = []

    def put(module: nn.Module, key: str, value: OnRead) -> None:
        place = id(module), PARAMETERS
        if place not in seen:
            more.append(module)
        seen.setdefault(place, {})[key] = value

    def decline(module: nn.Module, key: str, value: OnRead) -> None:
        own = own_tensors(parameters_of(module)).get(key)
        there = seen.get((id(module), PARAMETERS), {}).get(key)
        keeps = there is NEVER or isinstance(there, _Bias) or hasattr(there, "adapter")
        if own is not None and not keeps:
            put(module, key, value)

    for layer in layers:
        if isinstance(layer, nn.TransformerEncoder):
            if later := _adapters([*layer.layers][1:], seen):
                apart = all(isinstance(adapter, Adapter) for adapter in later)
                first: Any = layer.layers[0]
                decline(first.norm1, "bias", NOT_RECORDED if apart else NEVER)
            continue
        parts = _parts_of(layer)
        for module in parts:
            for key, value in [*seen.get((id(module), PARAMETERS), {}).items()]:
                adapter = getattr(value, "adapter", None)
                if not isinstance(adapter, Adapter) or isinstance(value, _Weight):
                    continue
                weight = _Weight(adapter, layer)
                put(module, key, weight)
                if adapter.acts_on_bias and adapter.site.bias is not None:
                    bias = _Bias(weight, module, key, seen[id(module), PARAMETERS])
                    put(module, adapter.site.bias.rpartition(".")[2], bias)
        tensors = [t for m in _all_parts_of(layer) for t in own_tensors(parameters_of(m)).values()]
        if any(t is not None and t.requires_grad for t in tensors):
            attends = isinstance(layer, nn.MultiheadAttention)
            decline(parts[0], "in_proj_bias" if attends else "bias", NOT_RECORDED)
    return more


def _adapters(layers: Iterable[nn.Module], seen: Mapping[Place, Any]) -> list[Any]:
    """Those of the layers' weights."""
    return [
        value.adapter
        for layer in layers
        for module in layer.modules()
        for value in seen.get((id(module), PARAMETERS), {}).values()
        if getattr(value, "adapter", None) is not None
    ]


def _parts_of(layer: nn.Module) -> list[nn.Module]:
    """Those whose parameters the layer's own kernel takes, beside those of its attention."""
    if isinstance(layer, nn.MultiheadAttention):
        return [layer, layer.out_proj]
    assert isinstance(layer, nn.TransformerEncoderLayer)
    return [layer.norm1, layer.norm2, layer.linear1, layer.linear2]


def _all_parts_of(layer: nn.Module) -> list[nn.Module]:
    inner = getattr(layer, "self_attn", None)
    return _parts_of(layer) + (_parts_of(inner) if isinstance(inner, nn.MultiheadAttention) else [])
