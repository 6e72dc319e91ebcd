"""describe: the lines that inspect prints, from the headers of files alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..io.outline import Outline, outline_of
from ..io.tensors import open_tensors
from ..params.summary import Row, site_table
from ..peft.files import adapters_in, outline_directory
from ..peft.serving import served_by


def describe(path: str, sites: bool = False, adapter: str | None = None) -> Iterator[str]:
    """The lines for a file of fadapt's or a directory in PEFT's format.

    Args:
        path: of it.
        sites: whether sites that are alike have a line each.
        adapter: of several adapters in a directory, the name.

    Raises:
        CheckpointError: nothing is there, or something else.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist")
    if os.path.isdir(path):
        if (Path(path) / "log.jsonl").is_file() and not adapters_in(path):
            raise CheckpointError(f"{path} is the directory of a sweep: write fadapt report {path}")
        yield from _directory(path, sites, adapter)
        return
    if adapter is not None:
        raise CheckpointError(f"--adapter is for directories of PEFT's, and {path} is a file")
    with open_tensors(path) as file:
        meta = file.meta
        if meta.get("kind") == "sweep":
            yield from _checkpoint(path, meta)
        elif str(meta.get("format")).startswith("fadapt-stats"):
            yield from _statistics(path, meta)
        else:
            yield from _adapter(path, outline_of(file), sites)


def _adapter(path: str, found: Outline, sites: bool) -> Iterator[str]:
    yield f"{path}: an adapter of fadapt's, {found.nbytes:,} bytes of values"
    yield ""
    rows = [Row(s.site, s.method, _values(s.train)) for s in found.sites]
    if sites:
        for one in sorted(found.sites, key=lambda s: s.site.name):
            site = one.site
            shape = "shared" if site.is_shared else f"{site.out_features} x {site.in_features}"
            yield f"{site.name}  {shape}  {one.method}  {site.fingerprint}"
            for leaf, spec in {**one.train, **one.fixed}.items():
                yield f"    {leaf}  {spec}{'' if leaf in one.train else '  (fixed)'}"
    else:
        lines, notes = site_table(rows)
        yield from [*lines, *notes]
    held = [s for s in found.sites if not s.site.is_shared]
    fixed = sum(_values(s.fixed) for s in found.sites)
    trained = sum(row.trainable for row in rows)
    yield f"{len(held)} sites, {trained:,} trainable and {fixed:,} fixed values"
    dtypes = Counter(
        str(spec.dtype).removeprefix("torch.") for s in found.sites for spec in s.train.values()
    )
    yield f"trainable values are {', '.join(dtypes) or 'none'}"
    yield f"base: fingerprint {found.base_fingerprint}, over its {len(held)} adapted weights"


def _values(specs: Mapping[str, Any]) -> int:
    total = 0
    for spec in specs.values():
        count = 1
        for n in spec.shape:
            count *= n
        total += count
    return total


def _directory(path: str, sites: bool, adapter: str | None) -> Iterator[str]:
    names = adapters_in(path)
    if not names:
        raise CheckpointError(f"{path} is no adapter's directory: it lacks adapter_config.json")
    if adapter is None and "default" not in names and len(names) == 1:
        adapter = names[0]
    config, tensors = outline_directory(path, adapter)
    which = "" if len(names) == 1 else f" {adapter or 'default'!r} of {names}"
    yield f"{path}: an adapter{which} in PEFT's format, {config.get('peft_type')!s:.80}"
    yield ""
    for field in ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "base_model_name_or_path"):
        if config.get(field) not in (None, False, "none"):
            yield f"{field}: {config[field]!s:.200}"
    for field in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
        if config.get(field):
            yield f"{field}: {config[field]!s:.400}"
    count = sum(t.numel() for t in tensors.values())
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    yield f"{len(tensors)} tensors, {count:,} values, {', '.join(dtypes)}"
    if sites:
        for key, tensor in tensors.items():
            yield f"    {key}  {list(tensor.shape)}"
    yield from _servers(config, tensors)


def _servers(config: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[str]:
    try:
        verdicts = served_by(config, tensors)
    # A config's fields may be of any type; the loader names what is wrong with them.
    except Exception as error:
        yield f"served by: cannot be told ({type(error).__name__}: {error!s:.200})"
        return
    for server, verdict in verdicts.items():
        yield f"served by {server}: {verdict!s:.400}"


def _statistics(path: str, meta: Mapping[str, Any]) -> Iterator[str]:
    streams, states = meta.get("streams"), meta.get("states")
    if not isinstance(streams, dict) or not isinstance(states, list):
        raise CheckpointError(f"{path}: its metadata is damaged")
    yield f"{path}: statistics of fadapt's"
    yield ""
    kinds = Counter(f"{s[2]} ({s[1]})" for s in states if isinstance(s, list) and len(s) > 2)
    yield f"{len(streams)} sites, {len(states)} states: " + ", ".join(
        f"{kind} x {n}" for kind, n in kinds.items()
    )


def _checkpoint(path: str, meta: Mapping[str, Any]) -> Iterator[str]:
    sweep = meta.get("sweep")
    if not isinstance(sweep, dict):
        raise CheckpointError(f"{path}: its metadata is damaged")
    names = sweep.get("names")
    count = len(names) if isinstance(names, list) else 0
    yield (
        f"{path}: the checkpoint of a sweep of {count} trials, after step {meta.get('step')} of "
        f"{sweep.get('steps')}; fadapt report {os.path.dirname(path) or '.'} has its table"
    )
