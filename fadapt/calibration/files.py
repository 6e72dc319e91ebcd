"""Statistics as safetensors files: the states as tensors, the rest as JSON metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CalibrationError
from ..statistics.moments import CentredGram, Gram
from ..statistics.pairs import PairedSums
from ..statistics.reduction import Reduction, State, Stream
from ..statistics.sketch import Sketch
from ..statistics.sums import MaxAbs, Sum, SumAbs, SumSq

FORMAT = "fadapt-stats-1"
KINDS = {
    cls.__name__: cls for cls in (Sum, SumSq, SumAbs, MaxAbs, Gram, CentredGram, Sketch, PairedSums)
}


def write(
    streams: Mapping[str, str],
    states: Mapping[Stream, Mapping[Reduction, State]],
    base: Mapping[str, str],
    tolerance: float,
    path: str | Path,
) -> None:
    """Writes a file for :func:`read`."""
    tensors: dict[str, Tensor] = {}
    index = []
    for (site, side), kinds in states.items():
        for reduction, state in kinds.items():
            kind = type(reduction).__name__
            if kind not in KINDS:
                raise CalibrationError(f"{site}: {reduction} is not one of {sorted(KINDS)}")
            for leaf, tensor in state.items():
                tensors[f"{len(index)}.{leaf}"] = tensor.contiguous()
            index.append([site, side, kind, dataclasses.asdict(reduction)])
    meta = {
        "streams": dict(streams),
        "base": dict(base),
        "tolerance": tolerance,
        "states": index,
    }
    save_file(tensors, str(path), {"format": FORMAT, "fadapt": json.dumps(meta)})


def read(
    path: str | Path,
) -> tuple[dict[str, str], dict[Stream, dict[Reduction, State]], dict[str, str], float]:
    """The streams, states, base and tolerance of a file.

    Raises:
        CalibrationError: not such a file, or a damaged one.
    """
    if not Path(path).is_file():
        raise CalibrationError(f"{path} does not exist")
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        known = header.get("format") == FORMAT
        meta = json.loads(header["fadapt"]) if known else {}
        states: dict[Stream, dict[Reduction, State]] = {}
        for i, (site, side, kind, fields) in enumerate(meta.get("states", ())):
            reduction = KINDS[kind](**fields)
            leaves = {"n", "bad", *reduction.leaves(1)}
            state = {leaf: tensors[f"{i}.{leaf}"] for leaf in sorted(leaves)}
            states.setdefault((site, side), {})[reduction] = state
    except Exception as error:
        raise CalibrationError(f"{path} is not a readable statistics file: {error!r}") from error
    if not known:
        raise CalibrationError(
            f"{path} has the format {header.get('format')!r}, not {FORMAT!r}: it was not "
            "written by Stats.save"
        )
    return meta["streams"], states, meta["base"], meta["tolerance"]
