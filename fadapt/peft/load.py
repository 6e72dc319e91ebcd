"""load_peft: from PEFT's files to params, strictly."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapted_map import SharedLeaves
from ..base.bound import refuse_adapted
from ..base.checks import check_model
from ..base.weights import BaseWeight, Kind
from ..errors import CheckpointError, FadaptWarning
from ..methods.bitfit import BitFit
from ..params.adapter import Adapter
from ..params.params import Params, trainable_leaves
from ..site import shared_site
from .bias import with_bias
from .files import (
    PathLike,
    check_mapping,
    check_tensors,
    local_directory,
    plain_config,
    read_directory,
)
from .format import Format, Read, Settings, Shared, Taken, build
from .formats import format_named
from .matching import ALL_LINEAR, check_patterns, is_parameter_targeted, is_targeted
from .places import NESTED, PARAMETER, PREFIX, ROOT, TIED, UNKNOWN, Place, Places
from .saved import take_saved
from .tokens import take_tokens

# Fields of every config, which say nothing of the map.
COMMON = frozenset(
    "peft_type task_type base_model_name_or_path revision inference_mode auto_mapping peft_version "
    "target_modules exclude_modules layers_to_transform layers_pattern bias modules_to_save "
    "init_weights tokenizer_config".split()
)
NAMES = (
    *("target_modules", "target_parameters", "exclude_modules", "layers_pattern"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "lambda_pattern", "feedforward_modules"),
    *("block_size_pattern", "n_frequency_pattern"),
)


def load_peft(
    path: PathLike,
    model: nn.Module,
    *,
    adapter: str | None = None,
    initial: PathLike | None = None,
) -> Params:
    """Reads a directory that PEFT wrote, as params whose outputs are PEFT's.

    Strict: every tensor has its place in the model and every module that the config means has its
    tensors, in the shapes that the weights need. Dropout of a linear layer's input is a method's
    field; of embeddings and kernels, where it acts in training alone, it is left out. Leaves are
    float32 or better, as PEFT has them.

    Args:
        path: a directory with adapter_config.json and adapter_model.safetensors; or, where nothing
            has that name here, the id of a Hugging Face Hub repository that holds them,
            "owner/name", also with "@revision" (the ``hub`` extra).
        model: the base; for a start that changes the weight (PiSSA, OLoRA, CorDA) the original one.
        adapter: of several adapters in one directory, the name; None for the one that lies in it.
        initial: the directory of the same adapter before training, for LoRA starts that change the
            weight and cannot be computed again ("corda", "lora_ga", "pissa_niter_4").

    Returns:
        Params on the devices of the model's weights, with trainable leaves that require grad.

    Raises:
        CheckpointError: a missing, damaged, oversized or pickled file; an unknown ``peft_type``; a
            key without a place, a module without tensors, another base's shapes, a pattern that
            matches nothing; what fadapt's methods cannot hold. Nothing is loaded then.

    Warns:
        FadaptWarning: config fields that fadapt does not know, by name.

    Example:
        >>> import tempfile, torch, fadapt
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
        >>> folder = tempfile.mkdtemp()
        >>> fadapt.peft.save_peft(model, fadapt.init(model, fadapt.LoRA(r=2)), folder)
        >>> fadapt.peft.load_peft(folder, model)
        Params(LoRA(r=2, ...) x 1; 32 trainable)
    """
    config, tensors = read_directory(local_directory(path, adapter), adapter)
    before = None
    if initial is not None:
        before = read_directory(local_directory(initial, None), None)[1]
    return _read(model, config, tensors, before, str(path))


def from_peft_dict(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Params:
    """:func:`load_peft` of a config and tensors in memory; the inverse of :func:`peft_dict`.

    Args:
        model: the base that the adapter is for.
        config: the content of adapter_config.json.
        tensors: {key: tensor}, as in adapter_model.safetensors.

    Raises:
        CheckpointError: as :func:`load_peft`.

    Example:
        >>> config, tensors = fadapt.peft.peft_dict(model, fadapt.init(model, fadapt.LoRA(r=2)))
        >>> fadapt.peft.from_peft_dict(model, config, tensors)["0.weight"].method
        LoRA(r=2, ...)
    """
    check_mapping(tensors, "tensors")
    check_tensors(tensors, "tensors")
    return _read(model, plain_config(config, "config"), tensors, None, "config")


@dataclass
class _Sorted:
    """A file's tensors by what they belong to: sites by name, the file, or neither."""

    places: dict[str, Place]
    own: dict[str, dict[str, Tensor]]
    shared: dict[str, Tensor]
    rest: dict[str, Tensor]


def _read(
    model: nn.Module,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    initial: Mapping[str, Tensor] | None,
    where: str,
) -> Params:
    check_model(model)
    tensors = {key: _wide(tensor) for key, tensor in tensors.items()}
    initial = None if initial is None else {key: _wide(t) for key, t in initial.items()}
    form = format_named(config.get("peft_type"), where)
    settings = Settings(config, where)
    _check_config(form, settings)
    refuse_adapted(model, "fadapt.peft.load_peft")
    with torch.no_grad():
        places = Places(model)
        found = _sort(form, places, tensors, config, where)
        start = None if initial is None else _sort(form, places, initial, config, f"{where}: start")
        _check_targets(form, places, found, settings)
        rows, row_banks = take_tokens(places, found.rest, config, where)
        saved = take_saved(places, found.rest, config, where)
        biases = _biases(places, found, where)
        taken: dict[Place, Taken] = {}
        for place in places.in_order(found.places.values()):
            before = None
            if start is not None:
                own = start.own.get(place.site.name, {})
                before = Taken(own, place, f"{where}: the initial adapter")
            taken[place] = Taken(found.own[place.site.name], place, where, before)
        shared = Shared(found.shared, where, places)
        reads, banks = build(lambda: _read_places(form, settings, taken, shared), where)
        adapters = {}
        for place, one in reads.items():
            parts = [biases.pop(place.site.bias or "", None)]
            if place in taken:
                parts.append(form.read_bias(settings, place, taken[place]))
            if found_biases := [d for d in parts if d is not None]:
                if any(one.method == bank.method for bank in banks):
                    raise settings.fail(
                        f"it trains the bias of {place.module}, beside leaves that modules share, "
                        "which fadapt does not read together"
                    )
                one = with_bias(one, sum(found_biases[1:], found_biases[0]))
            adapters[place.site.name] = _adapter(place, one, where)
        adapters.update(_holders({**reads, **rows}, [*banks, *row_banks]))
        for place, one in [*rows.items(), *saved.items()]:
            if place.site.name in adapters:
                raise settings.fail(f"it adapts {place.site.name} in two ways")
            bias = biases.pop(place.site.bias or "", None)
            one = one if bias is None else with_bias(one, bias)
            adapters[place.site.name] = _adapter(place, one, where)
        form.finish(settings)
        adapters.update(_bias_alone(places, biases, where))
    return trainable_leaves(Params(adapters))


def _read_places(
    form: Format, settings: Settings, taken: Mapping[Place, Taken], shared: Shared
) -> tuple[Mapping[Place, Read], Sequence[Read]]:
    """What a file says of every place, and what places share."""
    reads = {
        place: form.with_dropout(settings, place, form.read(settings, place, tensors))
        for place, tensors in taken.items()
    }
    return form.read_shared(settings, reads, shared)


def _holders(reads: Mapping[Place, Read], banks: Sequence[Read]) -> dict[str, Adapter]:
    """Where the leaves are held that several places share."""
    found: dict[str, Adapter] = {}
    for bank in banks:
        weight = next(place.weight for place, read in reads.items() if read.method == bank.method)
        site = shared_site(bank.method, found)
        method = SharedLeaves(bank.method)
        found[site.name] = Adapter(site, method, {}, {}).replace(
            _placed(weight, bank.train), _placed(weight, bank.fixed)
        )
    return found


def _wide(tensor: Tensor) -> Tensor:
    """Numbers of a byte as float32, which holds each; torch computes with no others of them."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _check_config(form: Format, settings: Settings) -> None:
    config = settings.config
    check_patterns(config, NAMES, settings.where)
    for field in ("modules_to_save", "target_parameters"):
        value = config.get(field)
        if not (value is None or isinstance(value, (str, list))):
            raise settings.fail(f"{field} is {value!r:.80}, not a list of names")
        if isinstance(value, list) and not all(isinstance(name, str) for name in value):
            raise settings.fail(f"{field} holds {value!r:.80}, not names")
    bias = config.get("bias")
    if not (bias in (None, "none", "all") or (isinstance(bias, str) and bias.endswith("_only"))):
        raise settings.fail(f"bias is {bias!r:.80}, and PEFT knows none, all and <type>_only")
    if "fan_in_fan_out" in form.fields:  # of no effect here, where the layer itself says it
        settings.flag("fan_in_fan_out", False)
    for field, reason in form.refused.items():
        if config.get(field):
            raise settings.fail(f"{field} is set, and fadapt cannot hold that: {reason}")
    layers = config.get("layers_to_transform")
    if not (
        layers is None
        or type(layers) is int
        or (isinstance(layers, list) and all(type(i) is int for i in layers))
    ):
        raise settings.fail(f"layers_to_transform is {layers!r}, not layer indices")
    known = COMMON | form.fields | form.refused.keys()
    unknown = sorted(k for k, v in config.items() if k not in known and v)
    if unknown:
        warnings.warn(
            f"{settings.where}: fadapt does not know the config fields {unknown[:8]} and reads the "
            "file without them",
            FadaptWarning,
            stacklevel=5,
        )


def _sort(
    form: Format,
    places: Places,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    where: str,
) -> _Sorted:
    found = _Sorted({}, {}, {}, {})
    for full, tensor in sorted(tensors.items()):
        name = full.removeprefix(ROOT)
        if name.partition(".")[0] in form.shared and full.startswith(ROOT):
            found.shared[name] = tensor
            continue
        if not full.startswith(PREFIX):
            raise CheckpointError(f"{where}: the key {full!r} does not start with {PREFIX!r}")
        key = full.removeprefix(PREFIX)
        suffix = next((s for s in form.suffixes if key.endswith(f".{s}")), None)
        if suffix is None:
            found.rest[key] = tensor
            continue
        path = key.removesuffix(f".{suffix}")
        place = form.place(places, path, suffix, config)
        if place is None or place.layer == UNKNOWN:
            raise CheckpointError(_no_place(where, full, path, place, places))
        if place.layer not in form.layers:
            raise CheckpointError(
                f"{where}: {full}: {form.peft_type} of a {place.layer} weight is not known"
            )
        name = place.site.name
        found.places.setdefault(name, place)
        found.own.setdefault(name, {})[suffix] = tensor
    return found


def _no_place(where: str, full: str, path: str, place: Place | None, places: Places) -> str:
    if place is not None:
        return (
            f"{where}: {full}: PEFT and fadapt adapt {place.module} "
            f"({type(place.weight.module).__name__}) in other ways, so the file cannot be read"
        )
    near = difflib.get_close_matches(path, list(places.modules), 3, 0.6)
    return f"{where}: the key {full!r} matches no weight of this {type(places.model).__name__}" + (
        f"; near names are {near}" if near else ""
    )


def _check_targets(form: Format, places: Places, found: _Sorted, settings: Settings) -> None:
    config, where = settings.config, settings.where
    targets = config.get("target_modules")
    present = {p.module for p in found.places.values() if p.layer not in (PARAMETER, TIED)}
    if targets and targets != ALL_LINEAR:
        known = form.modules(places)
        meant = {m for m in known if is_targeted(config, m)}
        if missing := sorted(meant - present):
            raise CheckpointError(
                f"{where} has no tensors for {missing[0]} ({len(missing)} in all), which its "
                "target_modules mean"
            )
        if extra := sorted(present - meant):
            raise CheckpointError(
                f"{where} has tensors for {extra[0]} ({len(extra)} in all), which its "
                "target_modules do not mean: PEFT would leave them out"
            )
        if isinstance(targets, list):
            for target in targets:
                one = {**config, "target_modules": [target]}
                if not any(is_targeted(one, m) for m in known):
                    raise CheckpointError(f"{where}: target_modules: {target!r} matches no module")
    if config.get("target_parameters"):
        for target in config["target_parameters"]:
            one = {"target_parameters": [target]}
            if not any(is_parameter_targeted(one, w.name) for w in places.weights):
                raise CheckpointError(
                    f"{where}: target_parameters: {target!r} matches no parameter that can be "
                    "adapted"
                )
        meant = {w.name for w in places.weights if is_parameter_targeted(config, w.name)}
        present = {p.weight.name for p in found.places.values() if p.layer == PARAMETER}
        if missing := sorted(meant - present):
            raise CheckpointError(
                f"{where} has no tensors for {missing[0]}, which its target_parameters mean"
            )
    if not found.places:
        raise CheckpointError(f"{where} has no tensors of {form.peft_type}")


def _biases(places: Places, found: _Sorted, where: str) -> dict[str, Tensor]:
    """{bias name: increment} of trained biases; whatever else a file replaces is refused.

    Copies of the base's own values, which PEFT saves of adapted embeddings, are passed over.
    """
    changed: dict[str, Tensor] = {}
    for key, tensor in found.rest.items():
        name = key.replace(f"{NESTED}.", ".")
        own = places.named.get(name)
        if own is None:
            raise CheckpointError(
                f"{where}: the key {PREFIX + key!r} matches nothing that fadapt reads"
            )
        if own.shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensor.shape)} in the file and "
                f"{tuple(own.shape)} in the model: the file was made for another base"
            )
        if torch.equal(tensor.to(own), own):
            continue
        if tensor.dim() != 1 or not name.endswith("bias"):
            raise CheckpointError(
                f"{where}: it replaces all of {name} (modules_to_save, or a resized embedding), "
                "and fadapt's adapters are increments: load those values into the model first"
            )
        exact = torch.promote_types(own.dtype, torch.float32)
        changed[name] = tensor.to(own.device, exact) - own.detach().to(exact)
    return changed


def _bias_alone(places: Places, biases: Mapping[str, Tensor], where: str) -> dict[str, Adapter]:
    """Adapters of weights whose bias alone is trained."""
    weights = {weight.bias: (module, weight) for module, weight in places.modules.items()}
    found = {}
    for name, d in biases.items():
        module, weight = weights.get(name, ("", None))
        layer = UNKNOWN if weight is None else places.layer(module, weight)
        if weight is None or layer == UNKNOWN:
            raise CheckpointError(
                f"{where}: it replaces {name}, and fadapt trains the biases of linear layers and "
                "convolutions alone: load that value into the model first"
            )
        place = Place(module, weight, places.site(weight), module, layer)
        found[place.site.name] = _adapter(place, Read(BitFit(), {"d": d}, {}), where)
    return found


def _adapter(place: Place, read: Read, where: str) -> Adapter:
    weight = place.weight
    if weight.is_meta:
        raise CheckpointError(
            f"{where}: {weight.name} is a meta tensor in the model; load the weights first"
        )
    weight.check()
    build(lambda: read.method.check(place.site), f"{where}: {weight.name}")
    site = replace(place.site, fingerprint=weight.fingerprint())
    return Adapter(site, read.method, {}, {}).replace(
        _placed(weight, read.train), _placed(weight, read.fixed)
    )


def _placed(weight: BaseWeight, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves on the device of a weight, in float32 or better."""
    base = torch.float32 if weight.kind is Kind.QUANTIZED else weight.dtype
    least = torch.promote_types(base, torch.float32)
    wide = {k: torch.promote_types(t.dtype, least) for k, t in leaves.items()}
    return {
        k: t.detach().to(weight.device, wide[k] if t.is_floating_point() else None).contiguous()
        for k, t in leaves.items()
    }
