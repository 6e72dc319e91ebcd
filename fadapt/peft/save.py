"""save_peft and peft_dict: from params to PEFT's files, or a reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_flags
from ..base.bound import refuse_adapted
from ..base.checks import check_model
from ..errors import CheckpointError
from ..params.adapter import Adapter
from ..params.params import Params
from .bias import split_bias, written_biases
from .files import DEFAULT, PathLike, check_tensors, write_directory
from .format import Format
from .formats import format_named, format_of
from .matching import is_parameter_targeted
from .places import PARAMETER, PREFIX, ROOT, UNKNOWN, Place, Places
from .saved import split_saved, written_saved
from .serving import as_served
from .tokens import FIELD, split_tokens, written_tokens

Adapters = Params | Mapping[str, Params]


def save_peft(model: nn.Module, params: Adapters, path: PathLike, *, serving: bool = False) -> None:
    """Writes a directory that PEFT loads, with every key that it looks for and no other.

    Whole or not at all: everything is checked, made and flushed to the disk before the directory
    gets its name.

    Args:
        model: the base that the params were made for.
        params: from :func:`fadapt.init`, trained or not; or {name: Params} for several adapters in
            one directory, where "default" lies in it and others in folders of their names.
        path: of the directory. Files of one that exists are replaced, others in it stay.
        serving: write one LoRA that vLLM, SGLang and LoRAX take; see :func:`peft_dict`.

    Raises:
        CheckpointError: what PEFT's format cannot hold, with the reason; values that are not
            finite; a directory or disk that refuses.
        ConfigError: with ``serving``, an increment that no LoRA holds; see
            :func:`fadapt.as_lora`.

    Example:
        >>> import os, tempfile, torch, fadapt
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
        >>> folder = tempfile.mkdtemp()
        >>> fadapt.peft.save_peft(model, fadapt.init(model, fadapt.DoRA(r=2)), folder)
        >>> sorted(os.listdir(folder))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    named = {DEFAULT: params} if isinstance(params, Params) else params
    if not isinstance(named, Mapping) or not named:
        raise CheckpointError(
            f"nothing to save: params is {type(params).__name__}; write "
            "save_peft(model, params, path), the members of a stack one by one: "
            "fadapt.unstack(stack)"
        )
    write_directory({k: peft_dict(model, p, serving=serving) for k, p in named.items()}, path)


def peft_dict(
    model: nn.Module, params: Params, *, serving: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and tensors in memory, for servers that take them without a file.

    Args:
        model: the base that the params were made for.
        params: from :func:`fadapt.init`, trained or not.
        serving: write what vLLM, SGLang and LoRAX all take: the adapter as one LoRA
            (:func:`fadapt.as_lora`) of one rank that vLLM has, with lora_alpha = r and the scale
            in B; no patterns; q, k and v, gate and up, and every layer together, with zeros where
            nothing is adapted.

    Returns:
        The content of adapter_config.json, and {key: tensor} on the adapters' devices.

    Raises:
        CheckpointError: what PEFT's format cannot hold, with the reason; values that are not
            finite.
        ConfigError: with ``serving``, an increment that no LoRA holds.

    Example:
        >>> import torch, fadapt
        >>> layer = torch.nn.ModuleDict({f"{name}_proj": torch.nn.Linear(8, 8) for name in "qkv"})
        >>> model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
        >>> params = fadapt.init(model, {"q_proj": fadapt.HRA(r=2)})
        >>> config, tensors = fadapt.peft.peft_dict(model, params, serving=True)
        >>> config["r"], config["lora_alpha"], config["target_modules"]
        (8, 8, ['k_proj', 'q_proj', 'v_proj'])
    """
    if not isinstance(params, Params) or not params:
        raise CheckpointError(
            f"nothing to save: params is {params!r}; write save_peft(model, params, path), and "
            "the members of a stack one by one: fadapt.unstack(stack)"
        )
    params.check_one()
    check_model(model)
    check_flags(CheckpointError, serving=serving)
    if serving:
        config, tensors = as_served(model, params)
        fields = config_fields(model, format_named("LORA", "serving"))
        check_tensors(tensors, "params")
        return {**fields, **config}, tensors
    refuse_adapted(model, "fadapt.peft.save_peft")
    with torch.no_grad():
        places = Places(model)
        own = params.at_sites()
        at = places.for_sites(adapter.site for adapter in own.values())
        adapters, biases = _split(at, own)
        adapters, saved = split_saved({p: adapters[p] for p in places.in_order(adapters)})
        if not adapters:
            raise CheckpointError(
                "PEFT has no format for trained biases alone, nor for whole modules (Full); its "
                "files hold them beside another adapter: fadapt.Chain((method, fadapt.BitFit()))"
            )
        adapters, rows = split_tokens(adapters)
        form = _one_format(adapters)
        if rows and FIELD not in form.fields:
            raise CheckpointError(
                f"{next(iter(rows)).site.name}: PEFT's {form.peft_type} trains no rows of an "
                f"embedding beside its adapters, and LORA does ({FIELD}): save them apart"
            )
        adapters = form.arrange(places, adapters)
        _check_places(form, adapters)
        settings = {**form.settings(adapters), **form.written_dropout(adapters)}
        tensors: dict[str, Tensor] = {}
        for place, adapter in adapters.items():
            for suffix, tensor in form.write(place, adapter, settings).items():
                tensors[f"{PREFIX}{place.key}.{suffix}"] = tensor.detach().contiguous()
        for name, tensor in form.write_shared(adapters, settings).items():
            tensors[f"{ROOT}{name}"] = tensor.detach().contiguous()
        if saved and not form.saves_modules:
            raise CheckpointError(
                f"{next(iter(saved)).site.name}: PEFT's {form.peft_type} saves no whole modules "
                "(Full) beside its adapters, and LORA does: save them apart"
            )
        tokens, moved = written_tokens(places, rows, adapters)
        whole, kept = written_saved(places, saved, {**adapters, **rows}, biases)
        bias, trained = written_biases(form, places, adapters, biases)
        if whole and bias.get("bias") == "all":
            raise CheckpointError(
                "PEFT's files with biases of layers that have no adapter (bias=all) and whole "
                "modules (Full) hold keys that PEFT does not read: use fadapt.Full() for those "
                "layers, too"
            )
        tensors.update({**trained, **kept, **moved})
        targets = _targets(form, places, adapters)
        config = {**config_fields(model, form), **targets, **settings, **bias, **whole, **tokens}
    check_tensors(tensors, "params")
    return config, tensors


def config_fields(model: nn.Module, form: Format) -> dict[str, Any]:
    """The fields that every config has."""
    causal = hasattr(model, "prepare_inputs_for_generation") and type(model).__name__.endswith(
        ("CausalLM", "LMHeadModel")
    )
    return {
        "peft_type": form.peft_type,
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": getattr(model, "name_or_path", "") or None,
        "revision": None,
        "inference_mode": True,
        **({"modules_to_save": None} if form.saves_modules else {}),
        # A format without a field for biases has none for this either.
        **({"bias": "none"} if form.bias_only else {}),
    }


def _split(
    at: Mapping[str, Place], params: Mapping[str, Adapter]
) -> tuple[dict[Place, Adapter], dict[Place, Tensor]]:
    """The adapters without their trained biases, and these."""
    adapters, biases = {}, {}
    for name, adapter in params.items():
        plain, bias = split_bias(adapter)
        if plain is not None:
            adapters[at[name]] = plain
        if bias is not None:
            biases[at[name]] = bias
    return adapters, biases


def _one_format(adapters: Mapping[Place, Adapter]) -> Format:
    forms: dict[Format, str] = {}
    for place, adapter in adapters.items():
        forms.setdefault(format_of(place.site.name, adapter), place.site.name)
    if len(forms) > 1:
        (a, first), (b, second) = list(forms.items())[:2]
        raise CheckpointError(
            f"a file of PEFT's holds one kind of adapter, and {first} is {a.peft_type} where "
            f"{second} is {b.peft_type}: save them apart, or convert them: fadapt.as_lora"
        )
    return next(iter(forms))


def _check_places(form: Format, adapters: Mapping[Place, Adapter]) -> None:
    for place, adapter in adapters.items():
        if place.layer not in form.layers or place.layer == UNKNOWN:
            what = place.layer if place.layer != UNKNOWN else f"{place.site.kind}"
            raise CheckpointError(
                f"{place.site.name}: PEFT's {form.peft_type} does not adapt this "
                f"{type(place.weight.module).__name__} weight ({what}) in fadapt's way"
            )
        if any(t.is_meta for t in adapter.leaves.values()):
            raise CheckpointError(f"{place.site.name}: its adapter is a meta tensor without values")


def _targets(form: Format, places: Places, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
    fields: dict[str, Any] = {"target_modules": form.targets(adapters, places.module_names)}
    if names := sorted(p.weight.name for p in adapters if p.layer == PARAMETER):
        meant = {w.name for w in places.weights for t in names if _means(t, w.name)}
        if odd := sorted(meant - set(names)):
            raise CheckpointError(
                f"PEFT's target_parameters are ends of names, and {names} would mean {odd[0]} too"
            )
        fields["target_parameters"] = names
    return fields


def _means(target: str, name: str) -> bool:
    return is_parameter_targeted({"target_parameters": [target]}, name)
