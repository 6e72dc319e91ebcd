"""What makes a sweep the same one when it goes on: settings, base model, data, loss and eval."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..base.fingerprint import fingerprint
from ..errors import CheckpointError, ConfigError
from ..params.params import Params
from .fingerprints import code_of, data_of
from .settings import Settings
from .trial import Trial

FORMAT = 3
"""The number of what a checkpoint holds; those of other formats are refused."""


def settings_of(settings: Settings, trials: Mapping[str, Trial], steps: int) -> dict[str, Any]:
    """All settings that the numbers of a sweep depend on, as JSON data."""
    s = settings
    data = {
        **{f"trial {name}": trial.to_json() for name, trial in trials.items()},
        "names": list(trials),
        "steps": steps,
        "optimizer": _optimizer(s.optimizer),
        "eval_every": s.eval_every,
        "goal": s.goal,
        "halving": s.halving and dataclasses.asdict(s.halving),
        "order": s.order,
        "per_adapter": s.per_adapter,
        "seed": s.seed,
    }
    return json.loads(json.dumps(data))


def given_of(settings: Settings, batches: Any) -> dict[str, str]:
    """Fingerprints of what the caller's own code decides: data, loss and eval."""
    evaluates = settings.eval
    return {
        "batches": data_of(batches),
        "eval": code_of(evaluates) if callable(evaluates) else data_of(evaluates),
        "loss_fn": code_of(settings.loss_fn),
    }


def base_of(model: nn.Module) -> dict[str, str]:
    """A fingerprint of every weight and buffer of the model, by name.

    Statistics that a module in training mode may keep of its inputs are left out.
    """
    prints = {n: fingerprint(p)[:16] for n, p in model.named_parameters()}
    for prefix, module in model.named_modules():
        if getattr(module, "track_running_stats", False) and module.training:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            prints[f"{prefix}.{name}" if prefix else name] = fingerprint(buffer)[:16]
    return prints


def starts_of(trials: Mapping[str, Params]) -> dict[str, str]:
    """A fingerprint of each trial's initial leaves, fixed ones included.

    Leaves that trials share, as those of one config do, are read once.
    """
    prints: dict[int, str] = {}
    found = {}
    for name, params in trials.items():
        digest = hashlib.sha256()
        for site, adapter in params.items():
            for leaf, tensor in sorted(adapter.leaves.items()):
                if id(tensor) not in prints:
                    prints[id(tensor)] = fingerprint(tensor)
                digest.update(f"{site} {leaf} {prints[id(tensor)]}".encode())
        found[name] = digest.hexdigest()[:32]
    return found


def _optimizer(factory: Any) -> str:
    if isinstance(factory, functools.partial):
        values = {**dict(enumerate(factory.args)), **factory.keywords}
        return f"{_optimizer(factory.func)}, {sorted((str(k), repr(v)) for k, v in values.items())}"
    return getattr(factory, "__qualname__", repr(type(factory)))


def check(directory: Path, saved: Mapping[str, Any], own: Mapping[str, Any], other: bool) -> None:
    """Refuses to go on with another sweep than the one that a checkpoint is of.

    Args:
        directory: of the checkpoint.
        saved: its metadata.
        own: the same of this sweep.
        other: whether data, loss and eval may be others.

    Raises:
        ConfigError: other settings, data, loss or eval.
        CheckpointError: another format, base model, or other initial adapters.
    """
    anew = "Choose another directory, or pass Checkpoints(directory, resume=False) to begin anew"
    if saved.get("format") != own["format"]:
        raise CheckpointError(
            f"{directory} holds a checkpoint of format {saved.get('format', 'before 3')}, this "
            f"fadapt reads {own['format']}: earlier ones do not tell of which base and data they "
            f"are. {anew}"
        )
    for part in ("sweep", "given", "base", "starts"):
        if not isinstance(saved.get(part), dict):
            raise CheckpointError(f"{directory}: the checkpoint lacks {part}. {anew}")
    if differing := _differing(saved["sweep"], own["sweep"]):
        key = differing[0]
        raise ConfigError(
            f"{directory} holds the checkpoint of another sweep; {differing} differ, {key}: "
            f"{saved['sweep'].get(key)!r} there, {own['sweep'].get(key)!r} here. {anew}"
        )
    if differing := _differing(saved["base"], own["base"]):
        key = differing[0]
        raise CheckpointError(
            f"{directory} holds the checkpoint of a sweep over another base model: {key} differs, "
            f"and {len(differing) - 1} more of {len(own['base'])} weights. {anew}"
        )
    if differing := _differing(saved["starts"], own["starts"]):
        raise CheckpointError(
            f"{directory}: {differing[0]} and {len(differing) - 1} more trials begin with other "
            f"values than in the checkpoint: other calibration data, or other params. {anew}"
        )
    if (differing := _differing(saved["given"], own["given"])) and not other:
        key = differing[0]
        raise ConfigError(
            f"{directory} holds the checkpoint of a sweep with other {differing}; {key}: "
            f"{saved['given'].get(key)} there, {own['given'].get(key)} here. "
            f"Checkpoints(directory, resume='anyway') goes on with the new. {anew}"
        )


def _differing(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    return sorted(k for k in saved.keys() | own.keys() if saved.get(k) != own.get(k))
