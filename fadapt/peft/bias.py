"""Trained biases: BitFit beside another method or alone, and the biases that PEFT saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..method import DROPOUT_KEY, RUNTIME_LEAVES
from ..methods.bitfit import BitFit
from ..methods.chain import Chain
from ..params.adapter import Adapter
from .format import Format, Read, Tensors, strength
from .places import PREFIX, Place, Places


def with_bias(read: Read, d: Tensor) -> Read:
    """What a file says of a weight, and its trained bias as an increment d."""
    first, second = BitFit(), read.method
    # A method that acts on the bias acts on the trained one.
    order = (first, second) if read.method.acts_on_bias else (second, first)
    place = order.index(first)
    train, fixed = (
        {k if k == DROPOUT_KEY else f"{1 - place}.{k}": t for k, t in part.items()}
        for part in (read.train, read.fixed)
    )
    return Read(Chain(order), {**train, f"{place}.d": d}, fixed)


def split_bias(adapter: Adapter) -> tuple[Adapter | None, Tensor | None]:
    """The adapter without its trained bias, and that bias at its strength; None for neither."""
    method = adapter.method
    if isinstance(method, BitFit):
        return None, strength(adapter) * adapter.leaves["d"]
    methods = method.methods if isinstance(method, Chain) else ()
    if len(methods) != 2 or sum(isinstance(m, BitFit) for m in methods) != 1:
        return adapter, None
    own = int(isinstance(methods[0], BitFit))
    prefix = f"{own}."
    train, fixed, bank = (
        {k.removeprefix(prefix): t for k, t in part.items() if k.startswith(prefix)}
        for part in (adapter.train, adapter.fixed, adapter.bank)
    )
    fixed.update({k: adapter.fixed[k] for k in RUNTIME_LEAVES if k in adapter.fixed})
    plain = replace(adapter, method=methods[own], train=train, fixed=fixed, bank=bank)
    return plain, strength(adapter) * adapter.leaves[f"{1 - own}.d"]


def written_biases(
    form: Format,
    places: Places,
    adapters: Mapping[Place, Adapter],
    biases: Mapping[Place, Tensor],
) -> tuple[dict[str, Any], Tensors]:
    """Config fields and {key: tensor} of trained biases.

    Args:
        adapters: without their trained biases.
        biases: increments; of places that have no other adapter, too.
    """
    if not biases:
        return {}, {}
    if not form.bias_only:
        name = next(iter(biases)).site.name
        raise CheckpointError(f"{name}: PEFT's {form.peft_type} trains no bias beside its adapter")
    bare = [place for place in biases if place.site.bias is None]
    if bare:
        return _own(form, adapters, biases, bare[0])
    alone = biases.keys() - adapters.keys()
    increments = {place.site.bias: d for place, d in biases.items()}
    own = {place.site.bias: place.key for place in adapters}
    tensors = {}
    for name, parameter in places.named.items():
        if name not in own and not (alone and (name == "bias" or name.endswith(".bias"))):
            continue
        value = parameter.detach()
        if name in increments:
            exact = torch.promote_types(value.dtype, torch.float32)
            value = value.to(exact) + increments[name].to(exact)
        key = f"{own[name]}.base_layer.bias" if name in own else name
        tensors[PREFIX + key] = value.detach()
    return {"bias": "all" if alone else form.bias_only}, tensors


def _own(
    form: Format,
    adapters: Mapping[Place, Adapter],
    biases: Mapping[Place, Tensor],
    bare: Place,
) -> tuple[dict[str, Any], Tensors]:
    """Biases of layers that have none, as a part of the adapter."""
    tensors = {}
    for place in biases.keys() | adapters.keys():
        adapter = adapters.get(place)
        zero = torch.zeros(place.site.out_features, device=place.weight.device)
        pair = None if adapter is None else form.own_bias(place, adapter, biases.get(place, zero))
        if pair is None:
            raise CheckpointError(
                f"{bare.site.name} has no bias, and PEFT's {form.peft_type} adds none to such a "
                f"layer where {place.site.name} has not one of its own, too"
            )
        tensors[f"{PREFIX}{place.key}.{pair[0]}"] = pair[1].detach()
    return {"lora_bias": True}, tensors
