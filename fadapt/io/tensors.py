"""Tensor files: atomic, checksummed safetensors with JSON metadata; no pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from ..errors import CheckpointError

FORMAT_VERSION = 1


def write_tensors(
    tensors: dict[str, Tensor], meta: dict[str, Any], path: str | os.PathLike[str]
) -> None:
    """Writes tensors and JSON metadata atomically, with a checksum over both."""
    if meta_key := next((k for k, t in tensors.items() if t.is_meta), None):
        raise CheckpointError(f"{meta_key} is a meta tensor without values")
    host = {k: t.detach().cpu().contiguous().clone() for k, t in sorted(tensors.items())}
    meta = {
        **meta,
        "leaves": {
            k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in host.items()
        },
    }
    text = json.dumps(meta, sort_keys=True)
    # A link stays a link: the file that it names is the one written.
    target = Path(os.path.realpath(path))
    if not os.fspath(path) or target.is_dir():
        raise CheckpointError(f"{os.fspath(path)!r} is not a file name")
    temporary = target.parent / f".{target.name[:40]}.{uuid.uuid4().hex}.tmp"
    data = tensors_to_bytes(host, {"fadapt": text, "sha256": _digest(text, host)})
    try:
        # Not safetensors' save_file, which makes files that only their owner can read.
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {os.fspath(path)}: {error}. The earlier file, if any, is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads what :func:`write_tensors` wrote, checked against its checksum and key list."""
    where = os.fspath(path)
    if not os.path.isfile(where):
        raise CheckpointError(f"{where} is not a file")
    try:
        # Read at once, so that a file which is replaced or rewritten meanwhile or later does no
        # harm; safe_open opens the path twice and keeps it mapped.
        data = Path(where).read_bytes()
        tensors = tensors_from_bytes(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{where} is truncated or not safetensors: {error}") from error
    if "fadapt" not in header:
        raise CheckpointError(
            f"{where} was not written by fadapt (no metadata); its keys start with "
            f"{sorted(tensors)[:3]}"
        )
    try:
        meta = json.loads(header["fadapt"])
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{where}: its metadata is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version}, this fadapt reads {FORMAT_VERSION}; "
            "update fadapt"
        )
    leaves = meta.get("leaves")
    if not isinstance(leaves, dict):
        raise CheckpointError(f"{where}: its metadata is damaged: it lists no leaves")
    if missing := sorted(leaves.keys() - tensors.keys()):
        raise CheckpointError(f"{where} lacks the key {missing[0]} ({len(missing)} in all)")
    if extra := sorted(tensors.keys() - leaves.keys()):
        raise CheckpointError(f"{where} has the unknown key {extra[0]} ({len(extra)} in all)")
    for key, expected in leaves.items():
        found = [list(tensors[key].shape), str(tensors[key].dtype).removeprefix("torch.")]
        if found != expected:
            raise CheckpointError(f"{where}: {key} is {found}, expected {expected}")
    if _digest(header["fadapt"], tensors) != header.get("sha256"):
        raise CheckpointError(f"{where} is corrupted: its contents do not match its checksum")
    return meta, tensors


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        flat = tensors[key].contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
