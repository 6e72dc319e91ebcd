"""save and load: one file that holds the adapters, their config and their base's fingerprints."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..base.checks import check_model
from ..base.linear_map import DenseMap
from ..base.lock import exclusive
from ..base.weights import BaseWeight, Kind, weights_by_name
from ..errors import CheckpointError, ConfigError
from ..method import STRENGTH
from ..params.adapter import Adapter
from ..params.params import Params, trainable_leaves
from ..site import Site
from .as_json import config_from_json, config_to_json, method_from_json, method_to_json
from .tensors import FORMAT_VERSION, read_tensors, write_tensors


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
        weights = weights_by_name(model)
        adapters = {}
        for name, (site, method, *parts) in records.items():
            if name != site.name:
                raise CheckpointError(f"{where}: the record of {name} is that of {site.name}")
            weight = weights.get(name)
            if weight is None:
                raise CheckpointError(f"{where}: the model has no parameter {name}")
            mark = _check_base(where, site, weight, allow_other_base)
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


def _check_base(where: str, site: Site, weight: BaseWeight, allow_other: bool) -> str:
    """The fingerprint of the model's weight, after the checks."""
    if weight.is_meta:
        raise CheckpointError(
            f"{where}: {site.name} is a meta tensor in the model; load the weights first"
        )
    if what := site.mismatch(weight):
        raise CheckpointError(
            f"{where}: in the model, {site.name} {what} as in the base that the adapter was made "
            "for"
        )
    mark = weight.fingerprint()
    if not allow_other and mark != site.fingerprint:
        raise CheckpointError(
            f"{where}: {site.name} has other values or another dtype ({weight.parameter.dtype}) "
            "than the base that the adapter was made for. Load that base, or pass "
            "allow_other_base=True"
        )
    return mark


def _site(record: dict[str, Any]) -> Site:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Site(**{**fields, "kind": Kind(record["kind"])})
