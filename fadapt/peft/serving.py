"""The form that vLLM, SGLang and LoRAX all take, and what each of them takes.

One rank for all sites and lora_alpha = r, because SGLang and LoRAX read no patterns and SGLang no
``use_rslora``; all of q, k and v, and of gate and up, because their kernels are fused (SGLang drops
or refuses the incomplete); every layer, because LoRAX drops a kind of layer that one layer lacks;
``init_lora_weights: true``, because vLLM refuses "pissa" and its like.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_int
from ..as_lora import as_lora
from ..base.weights import BaseWeight
from ..errors import CheckpointError
from ..methods.lora import LoRA
from ..params.adapter import Adapter
from ..params.params import Params
from .files import check_mapping, is_number, plain_config
from .format import wide
from .matching import check_patterns, pattern_value
from .places import LINEAR, PREFIX, QUANTIZED, Places

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""
VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
LORAX_RANKS = 128
"""The largest of LoRAX's batched kernels."""
HEADS = ("lm_head", "embed_tokens")


def as_served(model: nn.Module, params: Params) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config fields and tensors of one LoRA for all servers."""
    places = Places(model)
    at = places.for_sites(adapter.site for adapter in params.at_sites().values())
    for name, place in at.items():
        if place.layer not in (LINEAR, QUANTIZED):
            raise CheckpointError(
                f"{name}: not all servers take a LoRA of this {type(place.weight.module).__name__} "
                f"weight ({place.site.kind}); save without serving=True for one that does"
            )
    # A LoRA is one already, whatever its scale; most of what is served is.
    lora = params if _are_plain(params) else as_lora(model, params)
    rank = max(_rank(a) for a in lora.values())
    if rank > VLLM_RANKS[-1]:
        lora = as_lora(model, lora, r=VLLM_RANKS[-1])
        error = {n: getattr(a.method, "error", 0.0) for n, a in lora.items()}
        worst = max(error, key=lambda n: error[n])
        if error[worst]:
            raise CheckpointError(
                f"the LoRA has rank {rank}, vLLM takes at most {VLLM_RANKS[-1]}, and cutting it "
                f"there would change {worst} by {error[worst]:.2g} of its increment. If that will "
                "do, cut it: fadapt.as_lora(model, params, r=512)"
            )
        rank = max(_rank(a) for a in lora.values())
    r = next(n for n in VLLM_RANKS if n >= rank)
    tensors: dict[str, Tensor] = {}
    given = {at[name].module: adapter for name, adapter in lora.items()}
    suffixes = _suffixes(given, places)
    like = next(iter(lora.values())).train["A"]
    with torch.no_grad():
        for module, weight in places.modules.items():
            if module.rpartition(".")[2] not in suffixes:
                continue
            if places.layer(module, weight) not in (LINEAR, QUANTIZED):
                raise CheckpointError(
                    f"target_modules are ends of names, and {module} "
                    f"({type(weight.module).__name__}) has the same as an adapted layer"
                )
            a, b = _factors(given.get(module), weight, r, like)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b
    config = {
        "r": r,
        "lora_alpha": r,
        "target_modules": sorted(suffixes),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    return config, tensors


def _are_plain(params: Params) -> bool:
    return all(
        isinstance(a.method, LoRA)
        and type(a.method).delta is LoRA.delta
        and "strength" not in a.fixed
        for a in params.values()
    )


def _rank(adapter: Adapter) -> int:
    return adapter.train["A"].shape[-2]


def _suffixes(given: Mapping[str, Adapter], places: Places) -> set[str]:
    """The last names of the adapted modules, with what is fused with them."""
    found = {module.rpartition(".")[2] for module in given}
    for group in FUSED:
        if found & set(group):
            parents = {m.removesuffix(n) for m in given for n in group if m.endswith(n)}
            found |= {n for n in group for p in parents if p + n in places.modules}
    return found


def _factors(
    adapter: Adapter | None, weight: BaseWeight, r: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), scaled for lora_alpha = r, padded with zeros."""
    d_out, d_in = weight.shape
    if adapter is None:
        a, b = like.new_zeros(r, d_in), like.new_zeros(d_out, r)
        return a.detach(), b.detach()
    method, p = adapter.method, adapter.leaves
    assert isinstance(method, LoRA)
    s = float(p["s"]) if "s" in p else method.scaling
    a, b = p["A"].detach(), p["B"].detach()
    if s != 1:
        # In float32, which a scale does not round as it would bfloat16.
        a, b = wide(a), wide(b) * s
    missing = r - a.shape[0]
    if missing:
        a = torch.cat([a, a.new_zeros(missing, d_in)])
        b = torch.cat([b, b.new_zeros(d_out, missing)], 1)
    return a.contiguous(), b.contiguous()


@dataclass(frozen=True)
class Verdict:
    """What one server makes of an adapter; true if it takes it.

    Attributes:
        reasons: why it refuses it, or would run another map than PEFT.
        needs: how the server has to be started or called.

    Example:
        >>> verdict = fadapt.peft.Verdict(reasons=("no LoRA",))
        >>> bool(verdict), str(verdict)
        (False, 'no: no LoRA')
    """

    reasons: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        if self.reasons:
            return f"no: {'; '.join(self.reasons)}"
        return f"yes, with {' '.join(self.needs)}" if self.needs else "yes"


def served_by(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, layers: int | None = None
) -> dict[str, Verdict]:
    """Whether vLLM, SGLang and LoRAX take an adapter in PEFT's format, and why not.

    By the rules in their loaders (vLLM 0.33, SGLang 0.5.23, LoRAX of May 2026). What a server would
    take and run as another map than PEFT, such as a scale that it does not read, counts as refused.

    Args:
        config: the content of adapter_config.json.
        tensors: {key: tensor}, as in adapter_model.safetensors; meta tensors will do.
        layers: how many layers the model has; None for those that the keys name.

    Returns:
        {"vLLM": verdict, "SGLang": verdict, "LoRAX": verdict}.

    Raises:
        CheckpointError: something else than the contents of PEFT's files.
        ConfigError: ``layers`` is no number of layers.

    Example:
        >>> import torch, fadapt
        >>> layers = {name: torch.nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")}
        >>> model = torch.nn.Sequential(torch.nn.ModuleDict(layers))
        >>> params = fadapt.init(model, {"q_proj": fadapt.LoRA(r=2)})
        >>> served = fadapt.peft.served_by(*fadapt.peft.peft_dict(model, params))
        >>> print(served["SGLang"])
        no: layer 0 has ['q_proj'] without ['v_proj']: it is dropped
        >>> full = fadapt.peft.peft_dict(model, params, serving=True)
        >>> all(fadapt.peft.served_by(*full).values())
        True
    """
    config = plain_config(config, "config")
    check_mapping(tensors, "tensors")
    names = ("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
    check_patterns(config, names, "config")
    for name in names:
        kinds = dict if name.endswith("_pattern") else (str, list)
        if config.get(name) is not None and not isinstance(config[name], kinds):
            raise CheckpointError(f"config: {name} is {config[name]!r:.80}, and PEFT has none such")
    if layers is not None:
        check_int("layers", layers, 1)
    keys = _Keys(config, tensors, layers)
    every = _common(keys)
    return {
        "vLLM": Verdict((*every, *_vllm(keys)), _vllm_needs(keys)),
        "SGLang": Verdict((*every, *_sglang(keys)), _sglang_needs(keys)),
        "LoRAX": Verdict((*every, *_lorax(keys))),
    }


class _Keys:
    """A file, as servers read it."""

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], layers: int | None
    ):
        self.config = config
        self.ranks: dict[str, int] = {}
        self.odd: list[str] = []
        self.embeddings: list[str] = []
        for key, tensor in tensors.items():
            match = re.fullmatch(
                rf"{re.escape(PREFIX)}(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))", key
            )
            if match is None or tensor.dim() != 2:
                self.odd.append(key)
                continue
            if match[3]:
                self.embeddings.append(match[1])
            if "A" in (match[2], match[3]):
                self.ranks[match[1]] = tensor.shape[0]
        self.names: dict[int | None, set[str]] = {}
        for module in self.ranks:
            index = re.search(r"\.(\d+)\.", f".{module}.")
            layer = int(index[1]) if index else None
            self.names.setdefault(layer, set()).add(module.rpartition(".")[2])
        found = [i for i in self.names if i is not None]
        self.layers = range(layers if layers is not None else max(found, default=-1) + 1)

    def rank(self, module: str) -> int:
        found = pattern_value(self.config.get("rank_pattern") or {}, module)
        return self.config["r"] if found is None else found[1]

    @property
    def largest(self) -> int:
        return max(self.ranks.values(), default=0)


def _common(keys: _Keys) -> list[str]:
    config = keys.config
    reasons = []
    if config.get("peft_type") != "LORA":
        return [f"peft_type is {config.get('peft_type')!r}: servers know LORA alone"]
    numbers = {field: config.get(field) for field in ("r", "lora_alpha")}
    reasons += [f"{k} is {v!r}, and it is needed" for k, v in numbers.items() if not is_number(v)]
    if not config.get("target_modules"):
        reasons.append("target_modules is empty, and it is needed")
    if config.get("use_dora"):
        reasons.append("use_dora: no server has DoRA")
    if not keys.ranks:
        reasons.append("no tensors of a LoRA")
    if keys.odd:
        reasons.append(f"the key {keys.odd[0]} is none of a server's")
    if not reasons:
        for module, rank in keys.ranks.items():
            if rank != keys.rank(module):
                reasons.append(f"{module} has rank {rank}, its config says {keys.rank(module)}")
                break
    return reasons


def _vllm(keys: _Keys) -> list[str]:
    config, reasons = keys.config, []
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in VLLM_INITS:
        reasons.append(f"init_lora_weights={init!r} changes the base, which is refused")
    reasons += _set(config, "bias", "none", "a trained bias is refused")
    reasons += _set(config, "lora_bias", False, "a trained bias is refused")
    for field in ("alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora"):
        if config.get(field):
            reasons.append(f"{field} is refused")
    saved = config.get("modules_to_save") or []
    if extra := set([saved] if isinstance(saved, str) else saved) - {"classifier", "score"}:
        reasons.append(f"modules_to_save={sorted(extra)} is refused")
    if keys.largest > VLLM_RANKS[-1]:
        reasons.append(f"rank {keys.largest} is above {VLLM_RANKS[-1]}")
    return reasons


def _vllm_needs(keys: _Keys) -> tuple[str, ...]:
    bucket = next((n for n in VLLM_RANKS if n >= keys.largest), None)
    needs = [] if bucket is None or bucket <= 16 else [f"--max-lora-rank {bucket}"]
    if any(".base_layer" in m or m.endswith(".experts") for m in keys.ranks):
        needs.append("is_3d_lora_weight=true for the experts")
    return tuple(needs)


def _sglang(keys: _Keys) -> list[str]:
    config, reasons = keys.config, []
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        reasons.append("target_modules is an expression; a list of names is needed")
    if isinstance(targets, list) and any("." in t for t in targets):
        reasons.append("target_modules holds whole names; ends of names are needed")
    reasons += _patterns(keys)
    if config.get("use_rslora"):
        reasons.append("use_rslora is not read, so the scale would be alpha / r")
    reasons += _unread_start(config)
    reasons += _set(config, "bias", "none", "a trained bias is not read")
    reasons += _set(config, "lora_bias", False, "a trained bias is not read")
    for layer, names in keys.names.items():
        qkv = names & set(FUSED[0])
        if qkv and not {"q_proj", "v_proj"} <= qkv:
            lacks = sorted({"q_proj", "v_proj"} - qkv)
            reasons.append(f"layer {layer} has {sorted(qkv)} without {lacks}: it is dropped")
        if "up_proj" in names and "gate_proj" not in names:
            reasons.append(f"layer {layer} has up_proj without gate_proj: it is dropped")
        if layer is None and (odd := sorted(names - set(HEADS))):
            reasons.append(f"{odd[0]} is in no numbered layer")
    return _few(reasons)


def _sglang_needs(keys: _Keys) -> tuple[str, ...]:
    return (f"--max-lora-rank {keys.largest}",) if keys.largest else ()


def _lorax(keys: _Keys) -> list[str]:
    config = keys.config
    reasons = [*_patterns(keys), *_unread_start(config)]
    reasons += _set(config, "bias", "none", "a trained bias is not read")
    reasons += _set(config, "lora_bias", False, "a trained bias is not read")
    if isinstance(config.get("target_modules"), str):
        reasons.append("target_modules is an expression; a list of names is needed")
    if keys.embeddings:
        reasons.append(f"{keys.embeddings[0]} is an embedding, which is left out")
    if any(".experts" in f".{m}" for m in keys.ranks):
        reasons.append("experts are left out")
    names = set().union(*(n for i, n in keys.names.items() if i is not None))
    for name in sorted(names):
        lacks = [i for i in keys.layers if name not in keys.names.get(i, ())]
        if lacks:
            reasons.append(f"{name} is dropped from all layers, because layer {lacks[0]} lacks it")
    if keys.largest > LORAX_RANKS:
        reasons.append(f"rank {keys.largest} is above {LORAX_RANKS}, the largest of its kernels")
    return _few(reasons)


def _patterns(keys: _Keys) -> list[str]:
    """Ranks and scales that differ from the config's, where patterns are not read."""
    r, alpha = keys.config.get("r"), keys.config.get("lora_alpha")
    ranks = {n for n in keys.ranks.values() if n != r}
    alphas = keys.config.get("alpha_pattern") or {}
    found = []
    if ranks:
        found.append(f"rank_pattern is not read, and there are ranks {sorted(ranks)} beside r={r}")
    if any(v != alpha for v in alphas.values()):
        found.append("alpha_pattern is not read")
    return found


def _unread_start(config: Mapping[str, Any]) -> list[str]:
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal", "mica"):
        return [f"init_lora_weights={init!r} changes the base, which is not read"]
    return []


def _set(config: Mapping[str, Any], field: str, allowed: Any, reason: str) -> list[str]:
    value = config.get(field)
    return [] if value in (None, allowed) else [f"{field}={value!r}: {reason}"]


def _few(reasons: list[str]) -> list[str]:
    return reasons if len(reasons) < 6 else [*reasons[:5], f"and {len(reasons) - 5} more"]
