"""Report: the outcome of a sweep, best first."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from ..errors import ConfigError
from ..params.params import Params
from .trial import Trial

Goal = Literal["min", "max"]


@dataclass(frozen=True)
class Outcome:
    """What became of one trial; the fields are those of :class:`Result`."""

    name: str
    status: str
    step: int
    loss: float
    score: float
    best_step: int
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """One trial's outcome.

    Attributes:
        status: "running" (an unfinished report), "finished", "stopped" by halving, or "diverged".
        step: the last step at which it trained.
        loss: mean training loss of its last steps, at most 10.
        score: the best evaluation, NaN without one.
        best_step: the step of that evaluation; its weights are the report's.
        reason: why it was stopped, or what was not finite.
    """

    name: str
    trial: Trial
    status: str
    step: int
    loss: float
    score: float
    best_step: int
    reason: str = ""


T = TypeVar("T", Outcome, Result)


@dataclass(frozen=True)
class Report:
    """What :func:`fadapt.sweep` returns; ``print(report)`` is a table.

    Attributes:
        results: best first.
        params: {name: Params}: of the best evaluation, or without evaluation the last ones.
        final: {name: Params}: the last finite ones.
        losses: {step: training losses by trial}, NaN where a trial did not train; in the order
            of ``names``, as are the scores.
        scores: {step: {metric: scores by trial}}.
        names: of the trials, in the order in which they were given.
        metric: what the trials are ranked by.
        goal: "min" or "max": the direction in which a score is better.
        seconds: of training and evaluation, over all restarts.
        chunk: the most adapters that ran in one pass.

    Example:
        >>> trials = fadapt.grid(fadapt.LoRA(r=2), lr=[1e-3, 1e-2])
        >>> report = fadapt.sweep(model, trials, [x], steps=3, loss_fn=loss_fn)
        >>> sorted(report.params) == sorted(report.names)
        True
    """

    results: list[Result]
    params: dict[str, Params]
    final: dict[str, Params]
    names: list[str]
    losses: dict[int, Tensor]
    scores: dict[int, dict[str, Tensor]]
    metric: str
    goal: Goal
    seconds: float
    chunk: int

    @property
    def best(self) -> Result:
        """The first of the table."""
        return self.results[0]

    def __str__(self) -> str:
        lines = table(self.results, self.metric)
        lines.append(f"{len(self.results)} trials, {self.seconds:.1f} s, {self.chunk} to a pass")
        return "\n".join(lines)

    def to_pandas(self) -> Any:
        """A DataFrame with a row per trial, best first: outcome and hyper-parameters.

        Raises:
            ConfigError: pandas is not installed.
        """
        pandas = _needs("pandas", "to_pandas")
        rows = []
        for r in self.results:
            row = {k: v for k, v in vars(r).items() if k != "trial"}
            values = {f.name: getattr(r.trial, f.name) for f in dataclasses.fields(Trial)}
            del values["name"], values["config"]
            rows.append({**row, "method": r.trial.label(), **values})
        return pandas.DataFrame(rows)

    def curves(self) -> Any:
        """A DataFrame with a row per step, trial and metric: ``loss`` and the scores.

        Raises:
            ConfigError: pandas is not installed.
        """
        pandas = _needs("pandas", "curves")
        rows = [
            {"step": step, "trial": name, "metric": metric, "value": value}
            for step, metric, values in self._series()
            for name, value in zip(self.names, values.tolist(), strict=True)
            if not math.isnan(value)
        ]
        return pandas.DataFrame(rows, columns=["step", "trial", "metric", "value"])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes the curves as a picture: training losses, and a panel for each metric.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        _needs("matplotlib", "plot")
        from matplotlib.figure import Figure

        metrics = list(dict.fromkeys(metric for _, metric, _ in self._series()))
        figure = Figure(figsize=(5.5 * len(metrics), 4), layout="constrained")
        axes = figure.subplots(1, len(metrics), squeeze=False)[0]
        shown = {r.name: f"C{i}" for i, r in enumerate(self.results[:5])}
        for axis, metric in zip(axes, metrics, strict=True):
            series = [(step, v.tolist()) for step, m, v in self._series() if m == metric]
            steps = [step for step, _ in series]
            for name in [*(n for n in self.names if n not in shown), *shown]:
                values = [v[self.names.index(name)] for _, v in series]
                front = name in shown
                axis.plot(
                    steps, values, color=shown.get(name, "0.8"), linewidth=1.6 if front else 0.8,
                    marker="o" if len(steps) == 1 else None, label=name if front else None,
                )  # fmt: skip
            axis.set_xlabel("step")
            axis.set_title(metric)
            axis.spines[["top", "right"]].set_visible(False)
        axes[-1].legend(frameon=False, fontsize=8)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)

    def _series(self) -> list[tuple[int, str, Tensor]]:
        losses = [(step, "loss", values) for step, values in sorted(self.losses.items())]
        # An evaluation called loss, too, must not join the training curve.
        return losses + [
            (step, "eval loss" if metric == "loss" else metric, values)
            for step, named in sorted(self.scores.items())
            for metric, values in named.items()
        ]


def table(results: Iterable[Result | Outcome], metric: str) -> list[str]:
    """The lines of a table of results, in their order."""
    listed = list(results)
    scored = any(not math.isnan(r.score) for r in listed)
    header = ["", "trial", *([f"{metric}", "at step"] if scored else []), "loss", "status"]
    rows = [header]
    for place, r in enumerate(listed, 1):
        score = [f"{r.score:.4g}", str(r.best_step or "")] if scored else []
        status = r.status if r.status == "finished" else f"{r.status} at step {r.step}"
        if r.status == "diverged":
            status += f": {r.reason}"
        rows.append([str(place), r.name, *score, f"{r.loss:.4g}", status])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    text = {1, len(header) - 1}
    return [
        "  ".join(
            cell.ljust(w) if i in text else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def ranked(results: Iterable[T], goal: Goal) -> list[T]:
    """The results, best first: diverged ones last; without scores the losses decide."""
    sign = 1 if goal == "min" else -1

    def key(r: T) -> tuple[bool, bool, float, float]:
        unscored = math.isnan(r.score)
        loss = r.loss if not math.isnan(r.loss) else math.inf
        return r.status == "diverged", unscored, 0.0 if unscored else sign * r.score, loss

    return sorted(results, key=key)


def _needs(package: str, what: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise ConfigError(f"report.{what} needs {package}: pip install 'fadapt[train]'") from error
