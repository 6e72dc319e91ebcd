"""Statistics as safetensors files: the states as tensors, the rest as JSON metadata."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CalibrationError
from .compact import PairedSums, Sketch
from .moments import CentredGram, Gram
from .reductions import MaxAbs, Reduction, State, Stream, Sum, SumAbs, SumSq

if TYPE_CHECKING:
    from .stats import Stats

FORMAT = "fadapt-stats-1"
KINDS = {
    cls.__name__: cls for cls in (Sum, SumSq, SumAbs, MaxAbs, Gram, CentredGram, Sketch, PairedSums)
}


def write(stats: Stats, path: str | Path) -> None:
    """Writes a file for :func:`read`."""
    tensors: dict[str, Tensor] = {}
    index = []
    for (site, side), kinds in stats.states.items():
        for reduction, state in kinds.items():
            kind = type(reduction).__name__
            if kind not in KINDS:
                raise CalibrationError(f"{site}: {reduction} is not one of {sorted(KINDS)}")
            for leaf, tensor in state.items():
                tensors[f"{len(index)}.{leaf}"] = tensor.contiguous()
            index.append([site, side, kind, dataclasses.asdict(reduction)])
    meta = {
        "streams": dict(stats.streams),
        "base": dict(stats.base),
        "tolerance": stats.tolerance,
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
