"""The table, PEFT's result files, and the pictures."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

SCHEMA = json.loads((Path(__file__).parent / "peft_schema.json").read_text())
"""{path: type} of every field in a result file of PEFT's method comparison."""

COLUMNS = {
    "method": "method",
    "accuracy": "test accuracy, %",
    "interval": "95 % interval",
    "lr": "best rate",
    "valid": "validation, %",
    "parameters": "trainable",
    "macs": "added MACs a token",
    "forward_ms": "forward, ms",
    "backward_ms": "backward, ms",
    "init_s": "init, s",
    "calibration_s": "calibration, s",
    "peak_mb": "peak, MB",
    "quantized": "4/8 bit",
    "lora_rank": "exact LoRA",
    "forgetting": "forgetting",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, best first."""
    head = "| " + " | ".join(COLUMNS.values()) + " |"
    line = "|" + "---|" * len(COLUMNS)
    return "\n".join(
        [head, line, *("| " + " | ".join(_cell(k, r.get(k)) for k in COLUMNS) + " |" for r in rows)]
    )


def _cell(key: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if key in ("accuracy", "valid"):
        return f"{100 * value:.1f}"
    if key == "interval":
        return f"{100 * value[0]:.1f} to {100 * value[1]:.1f}"
    if key in ("parameters", "macs", "peak_mb"):
        return f"{value:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def peft_result(
    *,
    name: str,
    method: str,
    train_config: dict[str, Any],
    peft_config: dict[str, Any] | None,
    seconds: float,
    metrics: list[dict[str, Any]],
    parameters: int,
    total_parameters: int,
    file_size: int,
    extra: dict[str, Any],
    status: str = "success",
    error: str = "",
) -> dict[str, Any]:
    """One run in the schema of PEFT's method comparison."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {
        "run_info": {
            "created_at": dt.datetime.now(dt.UTC).isoformat(),
            "total_time": seconds,
            "experiment_name": f"{method.lower()}/{name}",
            "peft_branch": "main",
            "peft_worktree_is_dirty": False,
            "train_config": train_config,
            "peft_config": peft_config,
            "error_msg": error,
            "fadapt": extra,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 0,
            "accelerator_memory_max": 0,
            "accelerator_memory_reserved_99th": 0,
            "train_time": seconds,
            "file_size": file_size,
            "num_trainable_params": parameters,
            "num_total_params": total_parameters,
            "status": status,
            "metrics": metrics,
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {
                "metamath": {"sha": None, "created_at": None},
                "gsm8k": {"sha": None, "created_at": None},
            },
            "package_info": {
                key: value
                for p in packages
                for key, value in ((f"{p}-version", version(p)), (f"{p}-commit-hash", None))
            },
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "version": platform.version(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": accelerator,
            },
            "pytorch_info": torch.__config__.show(),
        },
    }


def check_schema(result: dict[str, Any]) -> list[str]:
    """What a result lacks or has of another type, compared with PEFT's own files.

    A run that failed may end before its first evaluation, and PEFT's tables skip it.
    """
    failed = result.get("train_info", {}).get("status") != "success"
    kinds = {
        "str": str,
        "float": (int, float),
        "int": int,
        "bool": bool,
        "dict": dict,
        "list": list,
        "any": object,
    }
    wrong = []
    for path, kind in SCHEMA.items():
        if failed and path.startswith("train_info.metrics."):
            continue
        value: Any = result
        try:
            for part in path.split("."):
                value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError):
            wrong.append(f"{path} is missing")
            continue
        optional = kind.endswith("?")
        if not (optional and value is None) and not isinstance(value, kinds[kind.rstrip("?")]):
            wrong.append(f"{path} is {value!r}, not {kind}")
    return wrong


def write(value: dict[str, Any], path: Path) -> None:
    """Writes JSON; of PEFT's result files, only those that are whole, and as PEFT writes them.

    In all others null stands for what is no finite number, which JSON does not know.

    Raises:
        AssertionError: what such a file lacks.
    """
    if "run_info" in value and (wrong := check_schema(value)):
        raise AssertionError(f"{path.name}: {wrong}")
    if "run_info" not in value:
        value = _finite(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pictures(
    rows: list[dict[str, Any]], scores: dict[str, dict[float, list[float]]], out: Path
) -> list[Path]:
    """Accuracy over trainable parameters, and over the learning rate.

    Args:
        scores: {method: {rate: accuracies of the seeds}}.
    """
    order = [row["method"] for row in rows if row["method"] in scores]
    figures = {
        "accuracy_over_parameters.png": _over_parameters(rows),
        "accuracy_over_rate.png": _over_rate({name: scores[name] for name in order}),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=90)
    return [out / name for name in figures]


def _over_parameters(rows: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", xlabel="trainable parameters", ylabel="test accuracy, %")
    found = sorted((r for r in rows if r.get("parameters")), key=lambda r: r["parameters"])
    columns: list[list[dict[str, Any]]] = []
    for row in found:  # those whose names would stand in one column
        if columns and row["parameters"] < 1.6 * columns[-1][0]["parameters"]:
            columns[-1].append(row)
        else:
            columns.append([row])
    for column in columns:
        column.sort(key=lambda r: r["accuracy"])
        right = 1.1 * max(row["parameters"] for row in column)
        heights = spread([100 * row["accuracy"] for row in column], 2.1)
        for row, height in zip(column, heights, strict=True):
            x, y = row["parameters"], 100 * row["accuracy"]
            low, high = row["interval"]
            error = [[y - 100 * low], [100 * high - y]]
            axes.errorbar(x, y, yerr=error, fmt="o", capsize=2, ms=4, color="C0", elinewidth=0.6)
            axes.plot([x, right], [y, height], color="grey", lw=0.4)
            axes.text(right, height, row["method"], fontsize=7, va="center")
    for row in rows:
        if not row.get("parameters"):
            axes.axhline(100 * row["accuracy"], color="grey", lw=0.8, ls=":")
    if found:
        axes.set_xlim(0.7 * found[0]["parameters"], 4 * found[-1]["parameters"])
    return figure


def spread(values: list[float], gap: float) -> list[float]:
    """Rising values, moved as little as is needed to be ``gap`` apart."""
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _edge(groups[-1], gap, -1) - _edge(groups[-2], gap, 1) < gap:
            last = groups.pop()
            groups[-1] += last
    return [_edge(g, gap, -1) + gap * i for g in groups for i in range(len(g))]


def _edge(group: list[float], gap: float, side: int) -> float:
    return sum(group) / len(group) + side * gap * (len(group) - 1) / 2


def _over_rate(scores: dict[str, dict[float, list[float]]]) -> Any:
    """A panel for each method, with the others' curves in grey."""
    from matplotlib.figure import Figure

    across = min(6, max(len(scores), 1))
    down = -(-max(len(scores), 1) // across)
    figure = Figure(figsize=(1.9 * across + 0.6, 1.35 * down + 0.9), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    curves = {
        name: [(rate, 100 * sum(v) / len(v)) for rate, v in sorted(by_rate.items())]
        for name, by_rate in scores.items()
    }
    for panel, (name, curve) in zip(panels, curves.items(), strict=False):
        for other in curves.values():
            panel.plot(*zip(*other, strict=True), color="0.88", lw=0.5)
        panel.plot(*zip(*curve, strict=True), marker=".", ms=4)
        panel.set_title(name, fontsize=8, pad=2)
        panel.tick_params(labelsize=7)
        panel.set_xscale("log")
    for panel in panels[len(curves) :]:
        panel.set_axis_off()
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("validation accuracy, %", fontsize=9)
    return figure
