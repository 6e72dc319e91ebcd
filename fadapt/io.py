"""save and load: one safetensors file with JSON metadata; strict, atomic, no pickle.

Layout: tensors "{site}|train|{leaf}" and "{site}|fixed|{leaf}"; metadata "fadapt" is JSON with the
format version, the config, every site with its method and its base's fingerprint, the shape and
dtype of every leaf, and "sha256" over that JSON and all the tensor bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import config_from_json, config_to_json, method_from_json, method_to_json
from .errors import CheckpointError, ConfigError
from .fingerprint import fingerprint
from .sites import Site
from .tree import Adapter, Params, trainable_leaves

FORMAT_VERSION = 1


def save(params: Params, path: str | os.PathLike[str]) -> None:
    """Writes params to one file, whole or not at all.

    The file is written beside its final name, flushed to the disk and renamed, so an interrupted
    save leaves the earlier file as it was.

    Raises:
        CheckpointError: nothing to save, meta tensors, or a directory or disk that refuses.
    """
    if not isinstance(params, Params) or not params:
        raise CheckpointError(f"nothing to save: params is {params!r}")
    tensors = {
        f"{name}|{part}|{leaf}": tensor
        for name, adapter in params.items()
        for part, leaves in (("train", adapter.train), ("fixed", adapter.fixed))
        for leaf, tensor in leaves.items()
    }
    meta = {
        "format_version": FORMAT_VERSION,
        "config": params.config and config_to_json(params.config),
        "sites": {
            name: {
                "site": dataclasses.asdict(adapter.site),
                "method": method_to_json(adapter.method),
            }
            for name, adapter in params.items()
        },
    }
    write_tensors(tensors, meta, path)


def load(
    path: str | os.PathLike[str], model: nn.Module, *, allow_other_base: bool = False
) -> Params:
    """Reads params for a model; calibration data is never needed.

    Args:
        path: a file written by :func:`save`.
        model: the base that the params were made for.
        allow_other_base: accept a base whose values differ (shapes must still agree).

    Returns:
        Params on the devices of the model's weights, with trainable leaves that require grad.

    Raises:
        CheckpointError: a missing, damaged, foreign or newer file; missing or extra keys; wrong
            shapes; a method that this process does not know; another base. Names the key.
    """
    meta, tensors = read_tensors(path)
    where = f"{os.fspath(path)}"
    try:
        config = meta["config"] and config_from_json(meta["config"])
        records = {
            name: (_site(record["site"]), method_from_json(record["method"]))
            for name, record in meta["sites"].items()
        }
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: its metadata is not fadapt's: {error!r}") from error
    named = dict(model.named_parameters(remove_duplicate=False))
    adapters = {}
    for name, (site, method) in records.items():
        weight = _check_base(where, site, named.get(name), allow_other_base)
        train, fixed = (
            {k.split("|")[2]: tensors[k].to(weight.device) for k in sorted(tensors) if k.startswith(f"{name}|{part}|")}
            for part in ("train", "fixed")
        )  # fmt: skip
        adapters[name] = Adapter(site, method, {}, {}).replace(train, fixed)
    return trainable_leaves(Params(adapters, config))


def write_tensors(
    tensors: dict[str, Tensor], meta: dict[str, Any], path: str | os.PathLike[str]
) -> None:
    """Writes tensors and JSON metadata atomically, with a checksum over both."""
    if meta_key := next((k for k, t in tensors.items() if t.is_meta), None):
        raise CheckpointError(f"{meta_key} is a meta tensor without values")
    host = {k: t.detach().cpu().contiguous().clone() for k, t in sorted(tensors.items())}
    meta = {
        **meta,
        "leaves": {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in host.items()},
    }
    text = json.dumps(meta, sort_keys=True)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(host, temporary, {"fadapt": text, "sha256": _digest(text, host)})
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {target}: {error}. The earlier file, if any, is untouched"
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
        with safe_open(where, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{where} is truncated or not safetensors: {error}") from error
    if "fadapt" not in header:
        raise CheckpointError(
            f"{where} was not written by fadapt (no metadata); its keys start with "
            f"{sorted(tensors)[:3]}"
        )
    try:
        meta = json.loads(header["fadapt"])
        version = meta["format_version"]
        leaves = meta["leaves"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: its metadata is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {version}, this fadapt reads {FORMAT_VERSION}; "
            "update fadapt"
        )
    if missing := sorted(leaves.keys() - tensors.keys()):
        raise CheckpointError(f"{where} lacks the key {missing[0]} ({len(missing)} in all)")
    if extra := sorted(tensors.keys() - leaves.keys()):
        raise CheckpointError(f"{where} has the unknown key {extra[0]} ({len(extra)} in all)")
    for key, (shape, dtype) in leaves.items():
        found = list(tensors[key].shape), str(tensors[key].dtype).removeprefix("torch.")
        if found != (shape, dtype):
            raise CheckpointError(f"{where}: {key} is {found}, expected {(shape, dtype)}")
    if _digest(header["fadapt"], tensors) != header.get("sha256"):
        raise CheckpointError(f"{where} is corrupted: its contents do not match its checksum")
    return meta, tensors


def _check_base(where: str, site: Site, weight: Tensor | None, allow_other: bool) -> Tensor:
    if weight is None:
        raise CheckpointError(f"{where}: the model has no parameter {site.name}")
    if tuple(weight.shape) != site.stored_shape:
        raise CheckpointError(
            f"{where}: {site.name} has shape {tuple(weight.shape)} in the model, "
            f"the adapter was made for {site.stored_shape}"
        )
    if not allow_other and fingerprint(weight) != site.fingerprint:
        raise CheckpointError(
            f"{where}: {site.name} has other values or another dtype ({weight.dtype}) than the "
            "base that the adapter was made for. Load that base, or pass allow_other_base=True"
        )
    return weight


def _site(record: dict[str, Any]) -> Site:
    return Site(**{k: tuple(v) if isinstance(v, list) else v for k, v in record.items()})


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        flat = tensors[key].contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
    return digest.hexdigest()


def _flush(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
