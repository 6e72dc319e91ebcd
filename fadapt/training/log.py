"""What the directory of a sweep tells of it without its model: the log, and a checkpoint's header.

The log is the newer of the two while a sweep runs: it is written at each reading of the losses.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..io.tensors import as_path, open_tensors
from . import checkpoint
from .directory import ADAPTERS
from .leaderboard import LAST
from .report import Goal, Outcome, ranked, table

LOG = "log.jsonl"


@dataclass(frozen=True)
class SweepLog:
    """A sweep so far.

    Attributes:
        directory: where it is.
        outcomes: of the trials, in the order in which they were given.
        scores: {trial: [(step, score)]} by the metric that ranks.
        metric: that; "loss" without an evaluation.
        goal: whether a lower or a higher score is better, as the sweep was told.
        step: the last of the log.
        steps: of the whole sweep, or None where there is no checkpoint to tell.
        seconds, chunk: as in the report, or None.
    """

    directory: Path
    outcomes: list[Outcome]
    scores: dict[str, list[tuple[int, float]]]
    metric: str
    goal: Goal
    step: int
    steps: int | None
    seconds: float | None
    chunk: int | None

    def results(self, goal: Goal | None = None) -> list[Outcome]:
        """The outcomes, best first."""
        wanted = goal or self.goal
        sign = 1 if wanted == "min" else -1
        found = []
        for one in self.outcomes:
            scored = [(s, step) for step, s in self.scores.get(one.name, []) if math.isfinite(s)]
            score, at = min(scored, key=lambda x: (sign * x[0], x[1]), default=(math.nan, 0))
            found.append(replace(one, score=score, best_step=at))
        return ranked(found, wanted)

    def table(self, goal: Goal | None = None) -> str:
        """As a :class:`fadapt.Report` is printed."""
        of = "" if self.steps is None else f" of {self.steps}"
        ending = f"{len(self.outcomes)} trials, step {self.step}{of}"
        if self.seconds is not None:
            ending += f", {self.seconds:.1f} s, {self.chunk} to a pass"
        return "\n".join([*table(self.results(goal), self.metric), ending])

    def best_file(self, goal: Goal | None = None) -> Path | None:
        """The adapter of the first in the table, which a finished sweep has written."""
        names = [one.name for one in self.outcomes]
        number = names.index(self.results(goal)[0].name)
        return next(iter((self.directory / ADAPTERS).glob(f"{number:03d}-*.safetensors")), None)


@dataclass
class _Lines:
    """The lines of a log, taken in."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)
    events: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    step: int = 0


def read_log(directory: str | os.PathLike[str]) -> SweepLog:
    """What a sweep's directory tells.

    Raises:
        CheckpointError: no such directory, no log in it, or a damaged one.
    """
    root = Path(as_path(directory))
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory")
    path = root / LOG
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{root} has no {LOG}: it is not the directory of a sweep, which is what was given to "
            "sweep(directory=...)"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    found = _Lines()
    complete = text.endswith("\n")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            _take(found, json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if number == len(lines) and not complete:
                break  # what a killed sweep was writing
            raise CheckpointError(f"{path}, line {number} is damaged: {error!r:.200}") from error
    return _log(root, found, _header(root))


def _take(found: _Lines, line: Any) -> None:
    step = line["step"]
    if type(step) is not int or step < 1:
        raise ValueError(f"step is {step!r}")
    found.step = max(found.step, step)
    if "loss" in line:
        for name, value in line["loss"].items():
            found.losses.setdefault(name, []).append(_number(value))
    elif "scores" in line:
        for metric, values in line["scores"].items():
            series = found.scores.setdefault(metric, {})
            for name, value in values.items():
                series.setdefault(name, []).append((step, _number(value)))
    elif line["event"] in ("diverged", "stopped"):
        found.events[line["trial"]] = (step, line["event"], str(line["reason"]))
    else:
        raise ValueError(f"event is {line['event']!r}")


def _number(value: Any) -> float:
    """JSON has no infinity and no NaN: null stands for them."""
    if value is None:
        return math.inf
    if type(value) not in (int, float):
        raise ValueError(f"a number is {value!r}")
    return float(value)


def _header(root: Path) -> Mapping[str, Any]:
    """The metadata of the checkpoint; nothing where there is none."""
    path = root / checkpoint.FILE
    if not path.is_file():
        return {}
    with open_tensors(path) as file:
        meta = file.meta
    if meta.get("kind") != "sweep" or not isinstance(meta.get("sweep"), dict):
        raise CheckpointError(f"{path} is not the checkpoint of a sweep")
    return meta


def _log(root: Path, found: _Lines, meta: Mapping[str, Any]) -> SweepLog:
    sweep = meta.get("sweep", {})
    names = sweep.get("names")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        names = list(dict.fromkeys([*found.losses, *found.events]))
    if not names:
        raise CheckpointError(f"{root / LOG} tells of no trial yet")
    finished = _finished(root, meta, names)
    outcomes = []
    for name in names:
        step, status, reason = found.events.get(name, (found.step, "running", ""))
        if status == "running" and name in finished:
            status = "finished"
        losses = found.losses.get(name, [])[-LAST:]
        loss = sum(losses) / len(losses) if losses else math.nan
        outcomes.append(Outcome(name, status, step, loss, math.nan, 0, reason))
    metric = next(iter(found.scores), "loss")
    goal, steps = sweep.get("goal"), sweep.get("steps")
    seconds, chunk = meta.get("seconds"), meta.get("chunk")
    return SweepLog(
        root, outcomes, found.scores.get(metric, {}), metric,
        "max" if goal == "max" else "min", found.step,
        steps if type(steps) is int else None,
        seconds if type(seconds) is float else None,
        chunk if type(chunk) is int else None,
    )  # fmt: skip


def _finished(root: Path, meta: Mapping[str, Any], names: list[str]) -> set[str]:
    """The trials that trained to the end, by the standings or by the files of the end."""
    standings = meta.get("standings")
    if isinstance(standings, list) and len(standings) == len(names):
        return {
            name
            for name, x in zip(names, standings, strict=True)
            if isinstance(x, dict) and x.get("status") == "finished"
        }
    return set(names) if any((root / ADAPTERS).glob("*.safetensors")) else set()
