"""Statistics as files: the states as tensors, the rest as metadata, in the format of ``io``."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..io.tensors import FORMAT_VERSION, TensorFile, TensorSpec, open_tensors, write_tensors
from ..statistics.moments import CenteredGram, Gram
from ..statistics.pairs import PairedSums
from ..statistics.reduction import Reduction, State, Stream
from ..statistics.sketch import Sketch
from ..statistics.sums import MaxAbs, Sum, SumAbs, SumSq

FORMAT = "fadapt-stats-2"
KINDS = {
    cls.__name__: cls
    for cls in (Sum, SumSq, SumAbs, MaxAbs, Gram, CenteredGram, Sketch, PairedSums)
}
NOT_NEGATIVE = {"n", "bad", "sum_sq", "sum_abs", "max_abs", "trace", "wins"}
SECOND_MOMENTS = {"gram", "scatter"}

Streams = dict[str, str]
States = dict[Stream, dict[Reduction, State]]


def write(
    streams: Mapping[str, str],
    states: Mapping[Stream, Mapping[Reduction, State]],
    base: Mapping[str, str],
    tolerance: float,
    path: str | os.PathLike[str],
) -> None:
    """Writes a file for :func:`read`.

    Raises:
        CheckpointError: a reduction that a file does not know, or a path that refuses.
    """
    tensors: dict[str, Tensor] = {}
    index = []
    for (site, side), kinds in states.items():
        for reduction, state in kinds.items():
            if type(reduction) not in KINDS.values():
                raise CheckpointError(
                    f"{site}: {reduction} cannot be saved, only {sorted(KINDS)}; keep these Stats "
                    "in memory"
                )
            for leaf, tensor in state.items():
                tensors[f"{len(index)}.{leaf}"] = tensor
            fields = dataclasses.asdict(reduction)
            index.append([site, side, type(reduction).__name__, fields])
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "streams": dict(streams),
        "base": dict(base),
        "tolerance": tolerance,
        "states": index,
    }
    write_tensors(tensors, meta, path)


def read(path: str | os.PathLike[str]) -> tuple[Streams, States, dict[str, str], float]:
    """The streams, states, base and tolerance of a file.

    Raises:
        CheckpointError: not such a file, a damaged one, or one of an earlier format.
    """
    try:
        with open_tensors(path) as file:
            streams, base, tolerance = _metadata(file)
            keys = _index(file, streams)
            tensors = file.read()
    except CheckpointError as error:
        raise CheckpointError(
            f"not statistics that this fadapt reads: {error}. Statistics of earlier versions had "
            "no checksum and are not read: observe again"
        ) from error
    states: States = {}
    for (stream, reduction), leaves in keys.items():
        state = {leaf: tensors[key] for leaf, key in leaves.items()}
        _check_values(file.where, stream, state)
        states.setdefault(stream, {})[reduction] = state
    return streams, states, base, tolerance


def _metadata(file: TensorFile) -> tuple[Streams, dict[str, str], float]:
    meta = file.meta
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{file.where} has the format {meta.get('format')!r}, not {FORMAT!r}: it was not "
            "written by Stats.save"
        )
    streams, base = (_names(file, k) for k in ("streams", "base"))
    tolerance: Any = meta.get("tolerance")
    if not streams or any(streams.get(first) != first for first in streams.values()):
        raise CheckpointError(f"{file.where}: a site shares the stream of a site that has none")
    if type(tolerance) not in (int, float) or not 0 <= tolerance <= 1:
        raise CheckpointError(f"{file.where}: the tolerance is {tolerance!r}, not from 0 to 1")
    return streams, base, float(tolerance)


def _names(file: TensorFile, key: str) -> dict[str, str]:
    table = file.meta.get(key)
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{file.where}: {key} must be {{name: name}}, got {table!r:.80}")
    return table


def _index(file: TensorFile, streams: Streams) -> dict[tuple[Stream, Reduction], dict[str, str]]:
    """{(stream, reduction): {leaf: key}}, whose shapes and dtypes are those of the reduction."""
    index: dict[tuple[Stream, Reduction], dict[str, str]] = {}
    widths: dict[Stream, int] = {}
    entries = file.meta.get("states")
    try:
        if not isinstance(entries, list) or not entries:
            raise ValueError("it holds no states")
        for i, (site, side, kind, fields) in enumerate(entries):
            where = f"the state {i} of {site}"
            if side not in ("in", "out", "grad") or site not in streams:
                raise ValueError(f"{where} is of no known stream ({side!r})")
            if side == "in" and streams[site] != site:
                raise ValueError(f"{where} belongs to {streams[site]}, whose stream it shares")
            reduction = _reduction(kind, fields)
            keys = {leaf: f"{i}.{leaf}" for leaf in ("n", "bad", *reduction.leaves(1))}
            width = _width(where, reduction, {leaf: file.specs[k] for leaf, k in keys.items()})
            if widths.setdefault((site, side), width) != width:
                raise ValueError(f"{where} is {width} wide, another {widths[site, side]}")
            if index.setdefault(((site, side), reduction), keys) is not keys:
                raise ValueError(f"{where}: {reduction} is there twice")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file.where}: its states are damaged: {error!r}") from error
    known = {key for keys in index.values() for key in keys.values()}
    if extra := sorted(file.specs.keys() - known):
        raise CheckpointError(f"{file.where}: the key {extra[0]} belongs to no state")
    return index


def _reduction(kind: str, fields: dict[str, Any]) -> Reduction:
    known = {f.name: f for f in dataclasses.fields(KINDS[kind])}
    if fields.keys() != known.keys():
        raise ValueError(f"{kind} has the fields {sorted(known)}, not {sorted(fields)}")
    for name, value in fields.items():
        number = type(value) is int and 0 <= value < 2**63 and (name != "k" or value >= 1)
        boolean = name == "center" and type(value) is bool
        nothing = name == "k" and value is None and kind == "PairedSums"
        if not (boolean or nothing or (number and name != "center")):
            raise ValueError(f"{kind} has {name} = {value!r}")
    return KINDS[kind](**fields)


def _width(where: str, reduction: Reduction, specs: dict[str, TensorSpec]) -> int:
    """The width of the rows that a state is of, after a check of all its leaves."""
    first = next(k for k, shape in reduction.leaves(1).items() if shape)
    width = specs[first].shape[0] if specs[first].shape else 0
    expected = {"n": (), "bad": (), **reduction.leaves(width)}
    if isinstance(reduction, PairedSums) and len(specs["basis"].shape) == 2:
        # A site with fewer inputs than outputs has fewer directions than leaves() can know.
        k = min(specs["basis"].shape[1], expected["basis"][1])
        expected |= {"basis": (width, k), "wins": (k,)}
    for leaf, spec in specs.items():
        constant = leaf in reduction.constants and spec.dtype.is_floating_point
        if spec.shape != tuple(expected[leaf]) or not (constant or spec.dtype == torch.float64):
            wanted = TensorSpec(tuple(expected[leaf]), torch.float64)
            raise ValueError(f"{where}: {leaf} is {spec}, not {wanted}")
    if width < 1:
        raise ValueError(f"{where} is of rows without a width")
    return width


def _check_values(where: str, stream: Stream, state: State) -> None:
    """Refuses what no rows can have summed up to; NaN and infinities are ``Stats.get``'s to say."""
    n, bad = float(state["n"]), float(state["bad"])
    if not all(math.isfinite(x) and 0 <= x < 2**53 and x == int(x) for x in (n, bad)):
        raise CheckpointError(f"{where}: {stream[0]} has {n} rows and {bad} unusable ones")
    for leaf, tensor in state.items():
        least = tensor.diagonal() if leaf in SECOND_MOMENTS else tensor
        if leaf in NOT_NEGATIVE | SECOND_MOMENTS and bool((least < 0).any()):
            raise CheckpointError(f"{where}: {leaf} of {stream[0]} is negative")
        if leaf == "wins" and bool((tensor > n).any()):
            raise CheckpointError(f"{where}: {leaf} of {stream[0]} is more than its {n} pairs")
        if leaf in SECOND_MOMENTS and tensor.isfinite().all():
            # The products were float32, whose sums depend on their order.
            gap = (tensor - tensor.mT).abs().max()
            if bool(gap > 1e-3 * tensor.abs().max()):
                raise CheckpointError(f"{where}: {leaf} of {stream[0]} is not symmetric")
