"""The checkpoint of a sweep: one file, replaced whole, from which it goes on bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.fingerprint import fingerprint
from ..errors import CheckpointError, ConfigError
from ..io.tensors import FORMAT_VERSION, read_tensors, write_tensors
from ..params.params import Params

FILE = "checkpoint.safetensors"
SEPARATOR = "|"


def write(directory: Path, meta: dict[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes named groups of tensors and JSON data; whole, or the earlier file stays.

    Raises:
        CheckpointError: the directory or the disk refuses.
    """
    tensors = {
        f"{part}{SEPARATOR}{k}": t for part, group in parts.items() for k, t in group.items()
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"could not make the directory {directory}: {error}") from error
    write_tensors(tensors, {"format_version": FORMAT_VERSION, **meta}, directory / FILE)


def read(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None:
    """What :func:`write` wrote last, or None where there is no checkpoint.

    Raises:
        CheckpointError: a damaged file.
    """
    path = directory / FILE
    # What a killed process was writing.
    for half in directory.glob(f".{FILE}.*.tmp"):
        with contextlib.suppress(OSError):
            half.unlink()
    if not path.exists():
        return None
    meta, tensors = read_tensors(path)
    if meta.get("kind") != "sweep":
        raise CheckpointError(f"{path} is not the checkpoint of a sweep")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(SEPARATOR)
        parts.setdefault(part, {})[rest] = tensor
    return meta, parts


def check_same(directory: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses to go on with another sweep than the one that the checkpoint is of.

    Raises:
        ConfigError: names what differs.
    """
    differing = sorted(k for k in saved.keys() | given.keys() if saved.get(k) != given.get(k))
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{directory} holds the checkpoint of another sweep; {differing} differ, {key}: "
            f"{saved.get(key)!r} there, {given.get(key)!r} here. Choose another directory, or "
            "pass resume=False to begin anew"
        )


def start_digest(params: Params) -> str:
    """A fingerprint of a trial's initial leaves, fixed ones included."""
    digest = hashlib.sha256()
    for name, adapter in params.items():
        for leaf, tensor in sorted(adapter.leaves.items()):
            digest.update(f"{name} {leaf} {fingerprint(tensor)}".encode())
    return digest.hexdigest()[:32]


def pack_states(
    states: Mapping[int, Sequence[Mapping[str, Any]]],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Optimiser states per trial and parameter, as JSON data and tensors."""
    numbers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for trial, parameters in states.items():
        for i, state in enumerate(parameters):
            for name, value in state.items():
                key = SEPARATOR.join((str(trial), str(i), name))
                if isinstance(value, Tensor):
                    tensors[key] = value
                    numbers[key] = value.device.type
                elif value is None or isinstance(value, (bool, int, float)):
                    numbers[key] = value
                else:
                    raise CheckpointError(
                        f"the optimiser keeps {name!r} as {type(value).__name__}, which a "
                        "checkpoint cannot hold; use another optimiser, or directory=None"
                    )
    return numbers, tensors


def unpack_states(
    numbers: Mapping[str, Any], tensors: Mapping[str, Tensor], devices: Mapping[int, torch.device]
) -> dict[int, list[dict[str, Any]]]:
    """The inverse of :func:`pack_states`; ``devices`` are those of the trials' parameters."""
    result: dict[int, list[dict[str, Any]]] = {}
    for key, value in numbers.items():
        trial, i, name = key.split(SEPARATOR, 2)
        parameters = result.setdefault(int(trial), [])
        parameters += [{} for _ in range(int(i) + 1 - len(parameters))]
        if key in tensors:
            device = torch.device("cpu") if value == "cpu" else devices[int(trial)]
            value = tensors[key].to(device)
        parameters[int(i)][name] = value
    return result


class Generators:
    """torch's global generators of the CPU and of some devices."""

    def __init__(self, device: torch.device):
        self.device = device if device.type == "cuda" else None

    def seed(self, seed: int) -> None:
        """Seeds them; call it inside :func:`torch.random.fork_rng`."""
        torch.default_generator.manual_seed(seed)
        if self.device is not None:
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def state(self) -> dict[str, Tensor]:
        """Their states."""
        states = {"cpu": torch.get_rng_state()}
        if self.device is not None:
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore(self, states: Mapping[str, Tensor]) -> None:
        """Sets them to states that :meth:`state` returned."""
        torch.set_rng_state(states["cpu"])
        if self.device is not None and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)
