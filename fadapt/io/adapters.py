"""save and load: one file that holds the adapters, their config and their base's fingerprints."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..adapted_map import SharedLeaves
from ..arguments import check_flags
from ..base.bound import refuse_adapted
from ..base.checks import check_model
from ..base.weights import BaseWeight, Kind, weights_by_name
from ..config import Config
from ..errors import CheckpointError, ConfigError
from ..method import STRENGTH, Method
from ..method_json import method_from_json, method_to_json
from ..params.adapter import Adapter
from ..params.params import Params, trainable_leaves
from ..params.stack import Stack
from ..site import Site
from ..targeting import coverage_of
from .expected import check_shared_specs, check_specs
from .hub import local_adapter, upload_advice
from .tensors import FORMAT_VERSION, TensorFile, TensorSpec, as_path, open_tensors, write_tensors


def save(params: Params, path: str | os.PathLike[str]) -> None:
    """Writes params to one file, whole or not at all.

    The file is written beside its final name, flushed to the disk and renamed, so an interrupted
    save leaves the earlier file as it was.

    Args:
        params: from :func:`fadapt.init`, trained or not.
        path: of the file; an earlier one is replaced. It is always a local one: a file is brought
            to the Hub by ``huggingface_hub.upload_file``.

    Raises:
        CheckpointError: nothing to save, meta tensors, or a directory or disk that refuses.
        ConfigError: a method with a field that JSON cannot hold.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRA(r=2))
        >>> fadapt.save(params, "adapter.safetensors")
    """
    if isinstance(params, Stack):
        raise CheckpointError(
            f"save writes one adapter to a file, and this is a stack of {len(params)}: write "
            "for i, p in enumerate(fadapt.unstack(stack)): fadapt.save(p, f'{i}.safetensors')"
        )
    if not isinstance(params, Params) or not params:
        raise CheckpointError(
            f"nothing to save: params is {params!r:.80}; write save(params, path)"
        )
    params.check_one()
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
        "config": params.config and params.config.to_dict(),
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
    if advice := upload_advice(as_path(path)):
        raise CheckpointError(f"could not write {path}: {advice}")
    write_tensors(tensors, meta, path)


def load(
    path: str | os.PathLike[str], model: nn.Module, *, allow_other_base: bool = False
) -> Params:
    """Reads params for a model; calibration data is never needed.

    Args:
        path: a file written by :func:`save`; or, where nothing has that name here, the id of a
            Hugging Face Hub repository that holds it as adapter.safetensors, "owner/name", or under
            another name, "owner/name/file", either with "@revision" (the ``hub`` extra).
        model: the base that the params were made for.
        allow_other_base: accept a base whose values differ (shapes must still agree).

    Returns:
        Params on the devices of the model's weights, with trainable leaves that require grad.

    Raises:
        CheckpointError: a missing, damaged, foreign or newer file, or a repository that cannot be
            had; missing or extra keys; wrong shapes; a method that this process does not know;
            another base. Names the key.

    Example:
        >>> fadapt.save(fadapt.init(model, fadapt.LoRA(r=2)), "adapter.safetensors")
        >>> fadapt.load("adapter.safetensors", model)["0.weight"].method
        LoRA(r=2, ...)
    """
    as_path(path)
    check_model(model)
    check_flags(allow_other_base=allow_other_base)
    with open_tensors(local_adapter(path)) as file:
        config, records = _records(file)
        refuse_adapted(model, "fadapt.load")
        weights = weights_by_name(model)
        shared = _shared_specs(file, records)
        for record in records:
            if not record.site.is_shared:
                bank = shared.get(record.method)
                weight = weights.get(record.site.name)
                _check_record(file, record, weight, allow_other_base, bank)
        # Nothing large has been read so far.
        tensors = file.read()
    adapters = {}
    devices = {r.method: weights[r.site.name].device for r in records if not r.site.is_shared}
    for record in records:
        name, site, method = record.site.name, record.site, record.method
        if isinstance(method, SharedLeaves):
            device = devices[method.of]
        else:
            weight = weights[name]
            device = weight.device
            site = dataclasses.replace(site, kind=weight.kind, fingerprint=weight.fingerprint())
        adapters[name] = Adapter(site, method, {}, {}).replace(
            *(
                {k: tensors[key].to(device) for k, key in part.items()}
                for part in (record.train, record.fixed)
            )
        )
    here = [name for name, adapter in adapters.items() if not adapter.site.is_shared]
    covered = coverage_of(model, here, config)
    return trainable_leaves(Params(adapters, config, covered))


@dataclasses.dataclass(frozen=True)
class _Record:
    """What a file says of one site; ``train`` and ``fixed`` are {leaf: key in the file}."""

    site: Site
    method: Method
    train: dict[str, str]
    fixed: dict[str, str]


def _records(file: TensorFile) -> tuple[Config | None, list[_Record]]:
    """The config and the records of a file, whose keys are those of its tensors."""
    where, meta = file.where, file.meta
    try:
        config = meta["config"] and Config.from_dict(meta["config"])
        records = [_record(name, record) for name, record in meta["sites"].items()]
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    # The file chooses a method and its fields; whatever their checks raise is said of the file.
    except Exception as error:
        raise CheckpointError(f"{where}: its metadata is not fadapt's: {error!r}") from error
    if not records:
        raise CheckpointError(f"{where} holds no adapter")
    keys = [key for r in records for part in (r.train, r.fixed) for key in part.values()]
    if missing := sorted(set(keys) - file.specs.keys()):
        raise CheckpointError(f"{where} lacks the key {missing[0]} ({len(missing)} in all)")
    if extra := sorted(file.specs.keys() - set(keys)):
        raise CheckpointError(f"{where}: the key {extra[0]} belongs to no site")
    if len(set(keys)) < len(keys):
        raise CheckpointError(f"{where}: a tensor belongs to two leaves")
    return config, records


def _record(name: str, record: Any) -> _Record:
    site = site_from_json(record["site"])
    if name != site.name:
        raise ConfigError(f"the record of {name} is that of {site.name}")
    parts = []
    for part in ("train", "fixed"):
        leaves = record[part]
        if not isinstance(leaves, list) or not all(isinstance(k, str) for k in leaves):
            raise ConfigError(f"{name}: {part} must be a list of names, got {leaves!r}")
        if len(set(leaves)) < len(leaves):
            raise ConfigError(f"{name}: a name occurs twice in {part}")
        parts.append({k: f"{name}|{part}|{k}" for k in leaves})
    return _Record(site, method_from_json(record["method"]), *parts)


def site_from_json(record: Any) -> Site:
    """The site that ``dataclasses.asdict`` made a record of, every field of the type that it has.

    Raises:
        ConfigError: another record.
    """
    types = {
        **dict.fromkeys(("name", "kind", "role", "note", "fingerprint"), str),
        **dict.fromkeys(("out_features", "in_features", "experts"), int),
    }
    known = {f.name for f in dataclasses.fields(Site)}
    if not isinstance(record, dict) or record.keys() != known:
        raise ConfigError(f"a site must have {sorted(known)}, got {record!r}")
    tied, kernel, bias = record["tied"], record["kernel"], record["bias"]
    sound = all(type(record[k]) is t for k, t in types.items())
    sound = sound and all(type(record[k]) is bool for k in ("transposed", "flat"))
    sound = sound and (bias is None or isinstance(bias, str))
    sound = sound and isinstance(tied, list) and all(isinstance(n, str) for n in tied)
    sound = sound and isinstance(kernel, list) and all(type(n) is int for n in kernel)
    if not sound or record["kind"] not in set(Kind):
        raise ConfigError(f"the record of a site has a value of the wrong kind: {record!r}")
    return Site(
        **{**record, "kind": Kind(record["kind"]), "tied": tuple(tied), "kernel": tuple(kernel)}
    )


def _shared_specs(
    file: TensorFile, records: Sequence[_Record]
) -> dict[Method, dict[str, TensorSpec]]:
    """{method: the leaves that its sites share}, after their checks."""
    found: dict[Method, dict[str, TensorSpec]] = {}
    users = {r.method for r in records if not r.site.is_shared}
    for record in records:
        who, method = f"{file.where}: {record.site.name}", record.method
        if record.site.is_shared != isinstance(method, SharedLeaves):
            raise CheckpointError(f"{who} is {record.site.kind}, under {method!r}")
        if not isinstance(method, SharedLeaves):
            continue
        if method.of not in users or method.of in found:
            raise CheckpointError(f"{who}: no site uses it, or another has the same leaves")
        parts = [{k: file.specs[key] for k, key in p.items()} for p in (record.train, record.fixed)]
        check_shared_specs(who, method, *parts)
        found[method.of] = {k: s for part in parts for k, s in part.items() if k != STRENGTH}
    return found


def _check_record(
    file: TensorFile,
    record: _Record,
    weight: BaseWeight | None,
    allow_other: bool,
    bank: dict[str, TensorSpec] | None,
) -> None:
    """Refuses a record that does not fit the model's weight, or leaves that do not fit it."""
    site, where = record.site, file.where
    if weight is None:
        raise CheckpointError(f"{where}: the model has no parameter {site.name}")
    if weight.is_meta:
        raise CheckpointError(
            f"{where}: {site.name} is a meta tensor in the model; load the weights first"
        )
    if what := site.mismatch(weight):
        raise CheckpointError(
            f"{where}: in the model, {site.name} {what} as in the base that the adapter was made "
            "for"
        )
    if not allow_other and weight.fingerprint() != site.fingerprint:
        raise CheckpointError(
            f"{where}: {site.name} has other values or another dtype ({weight.parameter.dtype}) "
            "than the base that the adapter was made for. Load that base, or pass "
            "allow_other_base=True"
        )
    parts = [{k: file.specs[key] for k, key in p.items()} for p in (record.train, record.fixed)]
    check_specs(f"{where}: {site.name}", site, record.method, parts[0], parts[1], bank)
