"""Merged weights on the disk: alone in a file, or in the whole model as transformers writes it."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, FadaptWarning
from ..io.tensors import replace_file
from .models import is_named, load_tokenizer, transformers_package, without_bars


def write_file(weights: Mapping[str, Tensor], out: str) -> None:
    """Writes the merged weights alone, as a plain safetensors file.

    Raises:
        CheckpointError: a directory or disk that refuses.
    """
    host = {k: t.detach().cpu().contiguous() for k, t in weights.items()}
    replace_file(out, [to_bytes(host, {"format": "pt"})])


def write_model(model: nn.Module, weights: Mapping[str, Tensor], base: str, out: str) -> None:
    """Writes a model of transformers with the merged weights in it, and its tokenizer.

    The directory gets its name when all of it is written.

    Args:
        model: the base; its weights are replaced.
        weights: what :func:`fadapt.merge` returned.
        base: where it is from, for the tokenizer.
        out: a directory that does not exist, or is empty.

    Raises:
        ConfigError: a model that cannot write itself, or whose class has no place for a weight.
        CheckpointError: a disk that refuses.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ConfigError(
            f"this {type(model).__name__} is no model of transformers, which could write itself: "
            "write the changed weights alone, to a name that ends in .safetensors"
        )
    _place(model, weights)
    _check_class(model, weights)
    target = Path(os.path.realpath(out))
    temporary = target.parent / f".{target.name[:40]}.{uuid.uuid4().hex}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with without_bars(transformers_package()):
            model.save_pretrained(temporary)  # type: ignore[operator]
        _save_tokenizer(base, temporary)
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    except OSError as error:
        raise CheckpointError(f"could not write {out}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary, ignore_errors=True)


def _place(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts new parameters in place, so that another use of a tied tensor keeps the old one."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for name, value in weights.items():
        path, _, key = name.rpartition(".")
        parameter = nn.Parameter(value, requires_grad=False)
        model.get_submodule(path).register_parameter(key, parameter)
    now: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for names in groups.values():
        first = now[names[0]]
        if all(torch.equal(now[name], first) for name in names[1:]):
            continue
        config: Any = model.config
        config.tie_word_embeddings = False
        for part in ("text_config", "decoder"):
            if hasattr(getattr(config, part, None), "tie_word_embeddings"):
                getattr(config, part).tie_word_embeddings = False
        warnings.warn(
            f"{names} were one tensor and are no longer: the model is written untied",
            FadaptWarning,
            stacklevel=3,
        )


def _check_class(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuses what the model's class would leave out, or tie again, when it is loaded."""
    with torch.device("meta"):
        fresh = type(model)(model.config)  # type: ignore[call-arg]
    tie: Any = getattr(fresh, "tie_weights", None)
    if callable(tie):
        tie()
    names: dict[int, list[str]] = {}
    for name, parameter in fresh.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    known = {name for group in names.values() for name in group}
    if lost := sorted(weights.keys() - known):
        raise ConfigError(
            f"{lost[0]} is new, and {type(model).__name__} has no place for it under this config: "
            "it would be lost when the model is loaded. Write the changed weights alone, to a name "
            "that ends in .safetensors, or merge into a class that has it"
        )
    now: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for group in names.values():
        for name in group[1:]:
            if not torch.equal(now[name], now[group[0]]):
                raise ConfigError(
                    f"{type(model).__name__} ties {name} to {group[0]} whenever it is loaded, and "
                    "merged they differ: write the changed weights alone, to a name that ends in "
                    ".safetensors"
                )


def _save_tokenizer(base: str, folder: Path) -> None:
    if is_named(base):
        return
    try:
        tokenizer = load_tokenizer(base)
    except ConfigError as error:
        warnings.warn(f"no tokenizer was written: {error}", FadaptWarning, stacklevel=3)
        return
    tokenizer.save_pretrained(folder)
