"""The checkpoint of a sweep: one file, replaced whole, from which it goes on bit for bit.

A state is a flat dict of named entries: JSON values, tensors, or flat dicts of both. Every part of
a sweep gives its own by ``state_dict`` and takes it back by ``load_state_dict``, which compares it
with what a sweep of these settings can have written before it takes anything: a file is whole (its
checksum tells), but whoever wrote it may have meant another sweep, or harm.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, FadaptError
from ..io.tensors import FORMAT_VERSION, TensorFile, open_tensors, write_tensors

FILE = "checkpoint.safetensors"
SEPARATOR = "|"

State = dict[str, Any]


def write(directory: Path, state: Mapping[str, Any]) -> None:
    """Writes a state; whole, or the earlier file stays.

    Raises:
        CheckpointError: the directory or the disk refuses.
    """
    meta: State = {}
    tensors: dict[str, Tensor] = {}
    for part, content in state.items():
        if not isinstance(content, Mapping):
            meta[part] = content
            continue
        tensors |= {f"{part}{SEPARATOR}{k}": t for k, t in content.items() if isinstance(t, Tensor)}
        values = {k: v for k, v in content.items() if not isinstance(v, Tensor)}
        if values:
            meta[part] = values
    make_directory(directory)
    write_tensors(tensors, {"format_version": FORMAT_VERSION, **meta}, directory / FILE)


@contextmanager
def opened(directory: Path) -> Iterator[TensorFile | None]:
    """What :func:`write` wrote last, its header checked, or None where there is no checkpoint.

    Raises:
        CheckpointError: a damaged file; also where the block fails over contents that do not fit.
    """
    path = directory / FILE
    try:
        # What a killed process was writing.
        for half in directory.glob(f".{FILE}.*.tmp"):
            with contextlib.suppress(OSError):
                half.unlink()
        there = path.exists()
    except OSError as error:
        raise CheckpointError(f"could not look into {directory}: {error}") from error
    if not there:
        yield None
        return
    with open_tensors(path) as file:
        if file.meta.get("kind") != "sweep":
            raise CheckpointError(f"{path} is not the checkpoint of a sweep")
        with fitting(path):
            yield file


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """A block in which a state is taken in.

    Raises:
        CheckpointError: it does not fit.
    """
    try:
        yield
    except FadaptError:
        raise
    # What an entry of another type than expected leads to, beside the checks.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} does not fit this sweep: {why}. Choose another directory, or pass "
            "Checkpoints(directory, resume=False) to begin anew"
        ) from error


def state_of(file: TensorFile) -> State:
    """The state that a file holds."""
    state: State = {k: v for k, v in file.meta.items() if k not in ("format_version", "leaves")}
    for key, tensor in file.read().items():
        part, _, rest = key.partition(SEPARATOR)
        group = state.setdefault(part, {})
        expect(isinstance(group, dict), f"{part} is a {type(group).__name__}")
        group[rest] = tensor
    return state


def make_directory(directory: Path) -> None:
    """Makes a directory with its parents.

    Raises:
        CheckpointError: the disk refuses.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"could not make the directory {directory}: {error}") from error


def expect(condition: bool, message: str) -> None:
    """Raises a ValueError, which :func:`opened` turns into a CheckpointError."""
    if not condition:
        raise ValueError(message)


def expect_keys(found: Any, expected: Any, what: str) -> None:
    """Whether a dict has these keys, no more and no less."""
    expect(isinstance(found, dict), f"{what} is a {type(found).__name__}")
    wrong = sorted(map(str, found.keys() ^ set(expected)))
    expect(not wrong, f"{what} lacks or adds {wrong[:3]} ({len(wrong)} in all)")


def expect_int(value: Any, low: int, high: int, what: str) -> int:
    """An int within bounds, both included."""
    expect(type(value) is int and low <= value <= high, f"{what} is {value!r}")
    return value


def expect_float(value: Any, what: str, nan: bool = False) -> float:
    """A float that is finite, or NaN where that stands for nothing."""
    fits = type(value) is float and (math.isfinite(value) or (nan and math.isnan(value)))
    expect(fits, f"{what} is {value!r}")
    return value


def expect_like(found: Any, like: Tensor, what: str, finite: bool = False) -> Tensor:
    """A tensor of the shape and dtype of another one, and perhaps without NaN or infinity."""
    expect(isinstance(found, Tensor), f"{what} is a {type(found).__name__}")
    expect(
        found.shape == like.shape and found.dtype == like.dtype,
        f"{what} is {tuple(found.shape)} {found.dtype}, expected {tuple(like.shape)} {like.dtype}",
    )
    expect(not finite or bool(torch.isfinite(found).all()), f"{what} is not finite")
    return found
