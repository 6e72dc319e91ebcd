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
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

from .config import config_from_json, config_to_json, method_from_json, method_to_json
from .errors import CheckpointError, ConfigError
from .fingerprint import fingerprint
from .guard import exclusive
from .linear_map import DenseMap
from .method import STRENGTH
from .quantized import QuantizedMap
from .sites import Site
from .slots import check_model, find_slots, quantized_at
from .tree import Adapter, Params, trainable_leaves

FORMAT_VERSION = 1


def save(params: Params, path: str | os.PathLike[str]) -> None:
    """Writes params to one file, whole or not at all.

    The file is written beside its final name, flushed to the disk and renamed, so an interrupted
    save leaves the earlier file as it was.

    Raises:
        CheckpointError: nothing to save, meta tensors, or a directory or disk that refuses.
        ConfigError: a method with a field that JSON cannot hold.
    """
    if not isinstance(params, Params) or not params:
        raise CheckpointError(f"nothing to save: params is {params!r}; write save(params, path)")
    tensors: dict[str, Tensor] = {}
    for name, adapter in params.items():
        for part, leaves in (("train", adapter.train), ("fixed", adapter.fixed)):
            for leaf, tensor in leaves.items():
                key = f"{name}|{part}|{leaf}"
                if key in tensors:
                    raise CheckpointError(f"two leaves have the key {key}; rename one of them")
                tensors[key] = tensor
    meta = {
        "format_version": FORMAT_VERSION,
        "config": params.config and config_to_json(params.config),
        "sites": {
            name: {
                "site": dataclasses.asdict(adapter.site),
                "method": method_to_json(adapter.method),
                "train": sorted(adapter.train),
                "fixed": sorted(adapter.fixed),
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
    if not isinstance(path, (str, os.PathLike)):
        raise CheckpointError(f"expected a path, got {type(path).__name__}: load(path, model)")
    check_model(model)
    meta, tensors = read_tensors(path)
    where = os.fspath(path)
    try:
        config = meta["config"] and config_from_json(meta["config"])
        records = {
            name: (
                _site(record["site"]),
                method_from_json(record["method"]),
                {k: f"{name}|train|{k}" for k in record["train"]},
                {k: f"{name}|fixed|{k}" for k in record["fixed"]},
            )
            for name, record in meta["sites"].items()
        }
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{where}: its metadata is not fadapt's: {error!r}") from error
    keys = [k for _, _, *parts in records.values() for part in parts for k in part.values()]
    if missing := sorted(set(keys) - tensors.keys()):
        raise CheckpointError(f"{where} lacks the key {missing[0]} ({len(missing)} in all)")
    if extra := sorted(tensors.keys() - set(keys)):
        raise CheckpointError(f"{where}: the key {extra[0]} belongs to no site")
    with exclusive(model):
        named = dict(model.named_parameters(remove_duplicate=False))
        biases = {n: s.bias for s in find_slots(model) for n in s.names}
        adapters = {}
        for name, (site, method, *parts) in records.items():
            if name != site.name:
                raise CheckpointError(f"{where}: the record of {name} is that of {site.name}")
            weight = named.get(name)
            mark = _check_base(where, site, weight, quantized_at(model, name), allow_other_base)
            assert weight is not None
            if biases.get(name) != site.bias:
                raise CheckpointError(
                    f"{where}: the bias of {name} is {biases.get(name)} in the model, the adapter "
                    f"was made for {site.bias}"
                )
            adapter = Adapter(
                dataclasses.replace(site, fingerprint=mark),
                method,
                *({k: tensors[key] for k, key in part.items()} for part in parts),
            )
            _check_leaves(where, adapter)
            adapters[name] = adapter.replace(
                *(
                    {k: t.to(weight.device) for k, t in p.items()}
                    for p in (adapter.train, adapter.fixed)
                )
            )
    return trainable_leaves(Params(adapters, config))


def _check_leaves(where: str, adapter: Adapter) -> None:
    """Runs the adapted map on meta tensors: leaves of other shapes or names do not fit it."""
    site, leaves = adapter.site, adapter.leaves
    if odd := [k for k, t in leaves.items() if not t.is_floating_point()]:
        raise CheckpointError(f"{where}: {site.name}: {odd[0]} is {leaves[odd[0]].dtype}")
    with torch.no_grad(), torch.device("meta"):
        bias = torch.empty(site.out_features) if site.bias else None
        base = DenseMap(torch.empty(site.matrix_shape), bias)
        p = {k: t.to("meta") for k, t in leaves.items()}
        if site.experts:  # one of them stands for all
            p = {k: t if k == STRENGTH else t[0] for k, t in p.items()}
        shapes = {k: tuple(t.shape) for k, t in p.items()}
        try:
            shape = tuple(adapter.method(p, torch.empty(3, site.in_features), base).shape)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{where}: the leaves {shapes} of {site.name} do not fit "
                f"{adapter.method!r}: {error}"
            ) from error
    if shape != (3, site.out_features):
        raise CheckpointError(f"{where}: the leaves of {site.name} do not fit its shape")


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


def _check_base(
    where: str,
    site: Site,
    weight: Tensor | None,
    quantized: QuantizedMap | None,
    allow_other: bool,
) -> str:
    """The fingerprint of the model's weight, after the checks."""
    if weight is None:
        raise CheckpointError(f"{where}: the model has no parameter {site.name}")
    if weight.is_meta:
        raise CheckpointError(
            f"{where}: {site.name} is a meta tensor in the model; load the weights first"
        )
    shape = quantized.shape if quantized else tuple(weight.shape)
    if shape != site.stored_shape:
        raise CheckpointError(
            f"{where}: {site.name} has shape {shape} in the model, "
            f"the adapter was made for {site.stored_shape}"
        )
    mark = quantized.fingerprint() if quantized else fingerprint(weight)
    if not allow_other and mark != site.fingerprint:
        raise CheckpointError(
            f"{where}: {site.name} has other values or another dtype ({weight.dtype}) than the "
            "base that the adapter was made for. Load that base, or pass allow_other_base=True"
        )
    return mark


def _site(record: dict[str, Any]) -> Site:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Site(**fields)


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
