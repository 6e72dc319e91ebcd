"""Modules that PEFT trains and saves as a whole (``modules_to_save``): Full on their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..base.weights import Kind
from ..errors import CheckpointError
from ..methods.full import Full
from ..params.adapter import Adapter
from .format import Read, Tensors, strength
from .places import PREFIX, Place, Places


def take_saved(
    places: Places, rest: dict[str, Tensor], config: Mapping[str, Any], where: str
) -> dict[Place, Read]:
    """Takes the saved modules out of a file's other tensors, as increments of the base.

    Biases of linear layers stay among them, as these are trained by BitFit.

    Args:
        rest: {key without its prefix: tensor}.
    """
    targets = config.get("modules_to_save") or []
    targets = [targets] if isinstance(targets, str) else targets
    found: dict[Place, Read] = {}
    for module in _meant(places, targets):
        for name, own in _state(places, module).items():
            # With bias="all" PEFT writes the biases of the module and of its copy once more; the
            # first is not used while the adapter is.
            key = name.removeprefix(f"{module}.")
            rest.pop(f"{module}.original_module.{key}", None)
            again = rest.pop(f"{module}.modules_to_save.{key}", None)
            if again is not None and (name not in rest or not torch.equal(again, rest[name])):
                raise CheckpointError(f"{where} holds {name} twice, with other values")
            if name not in rest:
                raise CheckpointError(f"{where} lacks {PREFIX}{name}, of its modules_to_save")
            tensor, weight = rest[name], places.by_name.get(name)
            if own.shape != tensor.shape:
                continue  # refused where all that is left is read
            if weight is None and not torch.equal(tensor.to(own), own):
                raise CheckpointError(
                    f"{where}: it replaces {name}, of its modules_to_save, which is no parameter: "
                    "load that value into the model first"
                )
            if weight is not None and name in places.biases:
                continue
            del rest[name]
            if weight is not None:
                found[_place(places, name, config, where)] = Read(
                    Full(), {"D": places.site(weight).matrix(_minus(tensor, own))}, {}
                )
    return found


def _place(places: Places, name: str, config: Mapping[str, Any], where: str) -> Place:
    weight = places.by_name[name]
    site, module = places.site(weight), name.rpartition(".")[0]
    what = None
    if weight.kind is Kind.QUANTIZED:
        what = "is quantized"
    elif len(weight.names) > 1:
        what = f"is one parameter of {weight.names}"
    elif site.tied and config.get("ensure_weight_tying"):
        what = f"is tied to {site.tied} (ensure_weight_tying)"
    if what is not None:
        raise CheckpointError(f"{where}: modules_to_save: {name} {what}, which fadapt cannot hold")
    return Place(module, weight, site, module, "saved")


def split_saved(
    adapters: Mapping[Place, Adapter],
) -> tuple[dict[Place, Adapter], dict[Place, Adapter]]:
    """The adapters that a format holds, and those that are saved as whole modules."""
    saved = {place: a for place, a in adapters.items() if type(a.method) is Full}
    return {place: a for place, a in adapters.items() if place not in saved}, saved


def written_saved(
    places: Places,
    saved: Mapping[Place, Adapter],
    adapters: Mapping[Place, Adapter],
    biases: dict[Place, Tensor],
) -> tuple[dict[str, Any], Tensors]:
    """Config fields and {key: tensor} of the modules that hold Full's parameters.

    Args:
        adapters: all others.
        biases: increments; those of saved modules are taken out.
    """
    if not saved:
        return {}, {}
    modules = sorted({place.module for place in saved})
    if "" in modules:
        bare = next(place for place in saved if not place.module)
        raise CheckpointError(f"{bare.site.name} is of no module that PEFT could save as a whole")
    if odd := sorted(set(_meant(places, modules)) - set(modules)):
        raise CheckpointError(
            f"PEFT's modules_to_save are ends of names, and {modules} would mean {odd[0]} too"
        )
    tensors: Tensors = {}
    moved = {place.site.name: _increment(place, adapter) for place, adapter in saved.items()}
    for place in [p for p in biases if p.module in modules]:
        moved[str(place.site.bias)] = biases.pop(place)
    for module in modules:
        state = _state(places, module)
        if both := [p.site.name for p in adapters if p.site.name in state]:
            raise CheckpointError(
                f"PEFT saves {module} as a whole (modules_to_save), and {both[0]} has another "
                "adapter: use fadapt.Full() for all of it, or fadapt.BitFit() for its bias"
            )
        for name, own in state.items():
            value = own.detach()
            if name in moved:
                exact = torch.promote_types(value.dtype, torch.float32)
                value = value.to(exact) + moved.pop(name).to(exact)
            tensors[PREFIX + name] = value
    if moved:
        raise CheckpointError(
            f"{next(iter(moved))} is no part of its module's state dict, which PEFT saves"
        )
    return {"modules_to_save": modules}, tensors


def _increment(place: Place, adapter: Adapter) -> Tensor:
    return strength(adapter) * place.site.parameter(adapter.leaves["D"])


def _meant(places: Places, targets: list[str]) -> list[str]:
    """Modules with one of these ends, as PEFT finds them."""
    return [name for name in places.module_names if name and any(map(name.endswith, targets))]


def _state(places: Places, module: str) -> dict[str, Tensor]:
    """What PEFT saves of a module, by its names in the model."""
    held = places.model.get_submodule(module).state_dict(keep_vars=True)
    return {f"{module}.{key}": tensor for key, tensor in held.items()}


def _minus(tensor: Tensor, own: Tensor) -> Tensor:
    exact = torch.promote_types(own.dtype, torch.float32)
    return tensor.to(own.device, exact) - own.detach().to(exact)
