"""inspect, merge and convert: the commands on one adapter's files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from ..as_lora import TruncatedLoRA, as_lora
from ..base.weights import Kind
from ..errors import ConfigError, FadaptWarning
from ..io.adapters import load, save
from ..io.hub import ADAPTER, HubId
from ..merge import merge as merged_weights
from ..params.params import Params
from ..params.summary import summary
from ..peft.files import CONFIG
from ..peft.load import load_peft
from ..peft.save import save_peft
from .describe import describe
from .merged import write_file, write_model
from .models import Dtype, load_base
from .output import show

File = Annotated[str, tyro.conf.arg(metavar="FILE")]
Out = Annotated[str, tyro.conf.arg(metavar="OUT")]
Base = Annotated[str, tyro.conf.arg(metavar="BASE")]
Device = Annotated[str, tyro.conf.arg(metavar="DEVICE")]
Name = Annotated[str | None, tyro.conf.arg(metavar="NAME")]
Folder = Annotated[str | None, tyro.conf.arg(metavar="DIRECTORY")]
Rank = Annotated[int | None, tyro.conf.arg(metavar="R")]
Patterns = Annotated[tuple[str, ...], tyro.conf.arg(metavar="REGEX")]

SUFFIX = ".safetensors"


def inspect(
    file: File,
    /,
    *,
    sites: bool = False,
    base: Annotated[str | None, tyro.conf.arg(metavar="BASE")] = None,
    base_dtype: Dtype | None = None,
    adapter: Name = None,
) -> None:
    """Say what a file holds: sites, methods, counts, and of which base. No tensors are read.

    Args:
        file: an adapter's file of fadapt's (or its statistics, or a sweep's checkpoint), or a
            directory in PEFT's format.
        sites: a line for each site, with the fingerprint of its weight, instead of one for sites
            that are alike.
        base: load this model and the adapter, too: says whether they fit, and what share of the
            model is adapted and trained.
        base_dtype: with --base, the dtype to load it in, as where the adapter was made; by default
            as its weights are stored.
        adapter: of several adapters in a directory of PEFT's, the name.
    """
    for line in describe(file, sites, adapter):
        show(line)
    if base is not None:
        model = load_base(base, base_dtype)
        params = _load(file, model, adapter=adapter)
        show(f"\nover {base}, which it fits:\n{summary(params, model)}")


def merge(
    file: File,
    out: Out,
    /,
    *,
    base: Base,
    base_dtype: Dtype | None = None,
    dtype: Dtype | None = None,
    adapter: Name = None,
    device: Device = "cpu",
    allow_other_base: bool = False,
) -> None:
    """Write a base model with an adapter merged into its weights.

    Args:
        file: the adapter: a file of fadapt's or a directory in PEFT's format.
        out: a new directory for the whole model with its tokenizer, as transformers writes it; or
            a name that ends in .safetensors for a file of the changed weights alone.
        base: the model: a directory or Hub id of a causal language model of transformers, or
            module:name, a function without arguments that returns it.
        base_dtype: to load it in, as where the adapter was made; by default as its weights are
            stored.
        dtype: of the changed weights; by default each keeps its own.
        adapter: of several adapters in a directory of PEFT's, the name.
        device: where to compute.
        allow_other_base: accept a base whose values differ from those that the adapter was made
            for.
    """
    _check_new(out)
    model = load_base(base, base_dtype, device)
    params = _load(file, model, adapter=adapter, other=allow_other_base)
    with warnings.catch_warnings():
        # They say what to do before loading, which is done here.
        warnings.filterwarnings("ignore", r".* is (tied to|new)\b", FadaptWarning)
        weights = merged_weights(model, params, dtype=None if dtype is None else _dtype(dtype))
    if out.endswith(SUFFIX):
        write_file(weights, out)
    else:
        quantized = [n for n, a in params.items() if a.site.kind is Kind.QUANTIZED]
        if quantized:
            raise ConfigError(
                f"{quantized[0]} is quantized, and a merged weight is dense: give the dense model "
                f"as the base, or write the weights alone: merge {file} weights{SUFFIX}"
            )
        write_model(model, weights, base, out)
    show(f"{out}: {_count(weights, 'changed weight')} of {_said(params)}")


def convert(
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[str, tyro.conf.arg(metavar="TARGET")],
    /,
    *,
    base: Base,
    base_dtype: Dtype | None = None,
    as_lora: bool = False,
    rank: Rank = None,
    drop_bias: Patterns = (),
    serving: bool = False,
    adapter: Name = None,
    initial: Folder = None,
    device: Device = "cpu",
    allow_other_base: bool = False,
) -> None:
    """Write an adapter in another form: fadapt's file, PEFT's directory, as a LoRA, for servers.

    Args:
        source: a file of fadapt's or a directory in PEFT's format.
        target: a name that ends in .safetensors for a file of fadapt's, any other for a directory
            in PEFT's format.
        base: the model that the adapter is for: a directory or Hub id of a causal language model
            of transformers, or module:name, a function without arguments that returns it.
        base_dtype: to load it in, as where the adapter was made; by default as its weights are
            stored.
        as_lora: as a LoRA, whatever the method: exactly where its increment has low rank, else
            with --rank.
        rank: with --as-lora or --serving, the largest rank; an increment of more is cut to it, and
            the error is said.
        drop_bias: with --as-lora or --serving, patterns of sites whose effect on the bias may be
            left out, as a LoRA has none.
        serving: as one LoRA in the form that vLLM, SGLang and LoRAX all take.
        adapter: of several adapters in a directory of PEFT's, the name.
        initial: for PEFT's starts that change the weight, the directory of the adapter before
            training.
        device: where to compute.
        allow_other_base: accept a base whose values differ from those that the adapter was made
            for.
    """
    to_file = target.endswith(SUFFIX)
    lora = as_lora or serving
    if serving and to_file:
        raise ConfigError(f"--serving is of PEFT's format, a directory: not {target}")
    if (rank is not None or drop_bias) and not lora:
        raise ConfigError("--rank and --drop-bias belong to --as-lora or --serving")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank must be at least 1, got {rank}")
    model = load_base(base, base_dtype, device)
    params = _load(source, model, adapter=adapter, initial=initial, other=allow_other_base)
    found = _as_lora(model, params, rank, drop_bias) if lora else params
    if to_file:
        save(found, target)
    else:
        save_peft(model, found, target, serving=serving)
    show(f"{target}: {_said(found)}")
    for line in _errors(found):
        show(line)


def _as_lora(
    model: nn.Module, params: Params, rank: int | None, drop_bias: tuple[str, ...]
) -> Params:
    return as_lora(model, params, rank, drop_bias=drop_bias)


def _load(
    text: str,
    model: nn.Module,
    *,
    adapter: str | None = None,
    initial: str | None = None,
    other: bool = False,
) -> Params:
    hub = HubId.read(text)
    if hub is not None and not hub.file:
        has_config = ADAPTER not in hub.fetch([ADAPTER, CONFIG])
    else:
        has_config = Path(text).is_dir()
    if has_config:
        return load_peft(text, model, adapter=adapter, initial=initial)
    if adapter is not None or initial is not None:
        raise ConfigError(f"--adapter and --initial are for directories of PEFT's: not {text}")
    return load(text, model, allow_other_base=other)


def _check_new(out: str) -> None:
    """Before anything large is loaded."""
    path = Path(out)
    if out.endswith(SUFFIX):
        if path.is_dir():
            raise ConfigError(f"{out} is a directory; name a file")
    elif path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{out} exists; name a new directory")


def _errors(params: Params) -> list[str]:
    """What a truncation cost, worst first."""
    cut = {n: a.method.error for n, a in params.items() if isinstance(a.method, TruncatedLoRA)}
    if not cut:
        return []
    worst = max(cut, key=lambda name: cut[name])
    count = f"{len(cut)} of {len(params)} sites were cut to the rank"
    return [f"{count}: relative errors up to {cut[worst]:.2g} (at {worst})"]


def _said(params: Params) -> str:
    methods = list(dict.fromkeys(type(a.method).__name__ for a in params.at_sites().values()))
    return f"{', '.join(methods)} on {_count(params.at_sites(), 'site')}"


def _count(things: Any, what: str) -> str:
    return f"{len(things):,} {what}{'s' if len(things) != 1 else ''}"


def _dtype(name: Dtype) -> Any:
    import torch

    return getattr(torch, name)
