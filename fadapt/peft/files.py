"""PEFT's directory: adapter_config.json and adapter_model.safetensors, with limits, whole.

Several adapters share a directory: the one named "default" lies in it, every other in a folder of
its own name. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import enum
import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from ..errors import CheckpointError
from ..io.hub import HubId
from ..io.tensors import DTYPES, as_path

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DEFAULT = "default"
LARGEST_CONFIG = 8 << 20
LARGEST_HEADER = 64 << 20

PathLike = str | os.PathLike[str]


def adapters_in(path: PathLike) -> list[str]:
    """The names of the adapters in a directory: "default" first, if it has one.

    Args:
        path: of the directory.

    Raises:
        CheckpointError: no such directory.

    Example:
        >>> import tempfile, torch, fadapt
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
        >>> folder, params = tempfile.mkdtemp(), fadapt.init(model, fadapt.LoRA(r=2))
        >>> fadapt.peft.save_peft(model, {"default": params, "style": params}, folder)
        >>> fadapt.peft.adapters_in(folder)
        ['default', 'style']
    """
    root = Path(as_path(path))
    try:
        if not root.is_dir():
            raise CheckpointError(f"{root} is not a directory")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(root)!r} is not a directory: {error}") from error
    found = [DEFAULT] if (root / CONFIG).is_file() else []
    return found + sorted(p.parent.name for p in root.glob(f"*/{CONFIG}"))


def local_directory(path: PathLike, adapter: str | None) -> PathLike:
    """A directory as it is, or the cached one of a repository on the Hub.

    Raises:
        CheckpointError: a repository that cannot be had.
    """
    hub = HubId.read(path)
    if hub is None:
        return path
    parts = [hub.file] if hub.file else []
    if adapter is not None:
        check_name(adapter)
        parts += [] if adapter == DEFAULT else [adapter]
    names = ["/".join([*parts, name]) for name in (CONFIG, WEIGHTS)]
    found = hub.fetch(names)
    root = next(iter(found.values())).parent
    return root.parent if parts and parts[-1] == adapter else root


def read_directory(path: PathLike, adapter: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of one adapter.

    Raises:
        CheckpointError: a missing, damaged, oversized or pickled file; see :func:`check_tensors`.
    """
    root = _root(path, adapter)
    config = _read_config(root / CONFIG)
    tensors = _read_tensors(root / WEIGHTS)
    check_tensors(tensors, str(root / WEIGHTS))
    return config, tensors


def outline_directory(
    path: PathLike, adapter: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of one adapter, and its tensors without their values: on the meta device.

    Raises:
        CheckpointError: as :func:`read_directory`, but for what the values alone tell.
    """
    root = _root(path, adapter)
    config = _read_config(root / CONFIG)
    where = root / WEIGHTS
    _check_header(where)
    try:
        with safe_open(where, "pt") as file:
            slices = {key: file.get_slice(key) for key in sorted(file.keys())}
            tensors = {
                key: torch.empty(s.get_shape(), dtype=DTYPES[s.get_dtype()], device="meta")
                for key, s in slices.items()
            }
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{where} is truncated or not safetensors: {error}") from error
    if not tensors:
        raise CheckpointError(f"{where} holds no tensors")
    return config, tensors


def _root(path: PathLike, adapter: str | None) -> Path:
    """The folder of one adapter, in which both files are."""
    root = Path(as_path(path))
    names = adapters_in(root)
    if adapter is not None:
        check_name(adapter)
        if adapter not in names:
            raise CheckpointError(f"{root} holds no adapter {adapter!r}; it holds {names}")
    elif DEFAULT not in names:
        raise CheckpointError(
            f"{root} lacks {CONFIG}"
            + (f'; it holds {names}: pass adapter="{names[0]}"' if names else "")
        )
    if adapter not in (None, DEFAULT):
        root = root / str(adapter)
    if not (root / WEIGHTS).is_file():
        if (root / PICKLE).is_file():
            raise CheckpointError(
                f"{root / PICKLE} is a pickle, which can run any code when it is read, so fadapt "
                "does not. Write it anew with PEFT: model.save_pretrained(path)"
            )
        raise CheckpointError(f"{root} lacks {WEIGHTS}")
    return root


def plain_config(config: Any, where: str) -> dict[str, Any]:
    """A config as adapter_config.json holds it; PEFT's own objects have sets and enumerations.

    Raises:
        CheckpointError: something else than a dict of what JSON can hold.
    """
    if not isinstance(config, Mapping) or not all(isinstance(k, str) for k in config):
        raise CheckpointError(
            f"{where} must be the content of adapter_config.json, a dict, got {config!r:.80}"
        )
    return {name: _plain(value, f"{where}: {name}") for name, value in config.items()}


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, enum.Enum):
        return _plain(value.value, what)
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return [_plain(item, what) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, what) for key, item in value.items()}
    raise CheckpointError(
        f"{what} is {value!r:.80}, which JSON cannot hold: pass the content of adapter_config.json"
    )


def check_mapping(tensors: Any, where: str) -> None:
    """Refuses what is no {key: tensor}."""
    named = isinstance(tensors, Mapping) and all(isinstance(k, str) for k in tensors)
    if not named or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(
            f"{where} must be {{key: tensor}}, as adapter_model.safetensors holds, got "
            f"{tensors!r:.80}"
        )


PLACES, INTEGERS = (".shira_indices",), (torch.int32, torch.int64)
"""The ends of the keys under which files hold places, not values."""


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuses what cannot be an adapter's values.

    Raises:
        CheckpointError: no tensors; a tensor that is not floating, or holds NaN or Inf; places
            may be integers.
    """
    if not tensors:
        raise CheckpointError(f"{where} holds no tensors")
    for key, tensor in tensors.items():
        if key.endswith(PLACES) and isinstance(tensor, Tensor) and tensor.dtype in INTEGERS:
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = getattr(tensor, "dtype", type(tensor).__name__)
            raise CheckpointError(f"{where}: {key} is {found}, not a floating tensor")
    found = {k: t for k, t in tensors.items() if not t.is_meta}
    # A sum carries NaN and Inf along, without a temporary of the tensor's size; all are read at
    # once, so that the host waits for a device once.
    sums = [t.detach().sum(dtype=torch.float32) for t in found.values()]
    if sums and bool(torch.stack([s.to(sums[0].device) for s in sums]).isfinite().all()):
        return
    for key, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{where}: {key} holds NaN or Inf")


def check_name(adapter: str) -> None:
    """Refuses a name that is not a plain folder's."""
    if (
        not isinstance(adapter, str)
        or adapter in ("", ".", "..")
        or set(adapter) & set("/\\\0")
        or Path(adapter).name != adapter
    ):
        raise CheckpointError(f"{adapter!r} is not the name of an adapter: write a plain word")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > LARGEST_CONFIG:
            raise CheckpointError(
                f"{path} has {size:,} bytes; a config has at most {LARGEST_CONFIG:,}"
            )
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error!r}"[:400]) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object")
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no name occurs twice: the last would win in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.80} occurs twice")
    return found


def _check_header(path: Path) -> None:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > min(LARGEST_HEADER, path.stat().st_size):
            raise CheckpointError(
                f"{path} is truncated or not safetensors: it announces a header of {length:,} bytes"
            )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    _check_header(path)
    try:
        return tensors_from_bytes(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or not safetensors: {error}") from error


def write_directory(
    adapters: Mapping[str, tuple[dict[str, Any], dict[str, Tensor]]], path: PathLike
) -> None:
    """Writes adapters to a directory, whole or not at all.

    A new directory appears under its name when all of it is on the disk. In one that exists, other
    files stay; the files are first written beside their names, and the old config goes before the
    old tensors do, so that what an interrupted save leaves is refused and never mixed.
    """
    where = as_path(path)
    files: dict[Path, bytes] = {}
    for name, (config, tensors) in adapters.items():
        check_name(name)
        folder = Path() if name == DEFAULT else Path(name)
        host = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        files[folder / WEIGHTS] = tensors_to_bytes(host, {"format": "pt"})
        files[folder / CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    try:
        target = Path(os.path.realpath(where))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"could not write {where!r}: {error}") from error
    mark = f".{uuid.uuid4().hex}.tmp"
    temporary = target.parent / f".{target.name[:40]}{mark}"
    try:
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target} is a file; name a directory")
        _write(files, temporary)
        if not target.exists():
            os.replace(temporary, target)
            return
        for folder in {f.parent for f in files}:
            (target / folder).mkdir(exist_ok=True)
            (target / folder / CONFIG).unlink(missing_ok=True)
            for name in (WEIGHTS, CONFIG):
                os.replace(temporary / folder / name, target / folder / name)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CheckpointError(f"could not write {where!r}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary, ignore_errors=True)


def _write(files: Mapping[Path, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def is_number(value: Any) -> bool:
    """Whether JSON's value is a finite number."""
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
