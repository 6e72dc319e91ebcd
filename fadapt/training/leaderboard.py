"""Leaderboard: where each trial of a sweep stands, which of them stop, and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor

from ..params.params import Params, Train, join, split, trainable_leaves
from .checkpoint import (
    SEPARATOR,
    State,
    expect,
    expect_float,
    expect_int,
    expect_keys,
    expect_like,
)
from .history import Event, History
from .report import Goal, Report, Result, ranked
from .trial import Trial

STATUSES = "running", "finished", "stopped", "diverged"
LAST = 10
"""Training losses that a report averages."""


@dataclass(frozen=True)
class Standing:
    """Where one trial stands; the fields are those of :class:`Result`."""

    status: str = "running"
    step: int = 0
    reason: str = ""
    score: float = math.nan
    best_step: int = 0


class Leaderboard:
    """The standings, the best weights, and the last ones of trials that left the stack.

    Args:
        trials: by name.
        starts: their initial params.
        goal: whether a lower or a higher score is better.

    Attributes:
        metric: the score that trials are ranked by.
        best: {trial: train leaves} of the best evaluation.
        left: {trial: train leaves} of trials that are no longer in the stack.
    """

    def __init__(self, trials: Mapping[str, Trial], starts: Sequence[Params], goal: Goal):
        self.names, self.trials = list(trials), list(trials.values())
        self.goal: Goal = goal
        self.devices = [p.trainable()[0].device for p in starts]
        self.frames = [split(p)[1] for p in starts]
        self.shapes = [
            {
                SEPARATOR.join((site, leaf)): torch.empty_like(t, device="meta")
                for site, leaves in split(p)[0].items()
                for leaf, t in leaves.items()
            }
            for p in starts
        ]
        self.metric = "loss"
        self.standings = [Standing() for _ in self.trials]
        self.best: dict[int, Train] = {}
        self.left: dict[int, Train] = {}

    def running(self) -> list[int]:
        """The trials that still train."""
        return [t for t, x in enumerate(self.standings) if x.status == "running"]

    def close(self, trial: int, status: str, reason: str, step: int) -> None:
        """A trial diverged, was stopped or finished."""
        new = replace(self.standings[trial], status=status, reason=reason, step=step)
        self.standings[trial] = new

    def improved(self, step: int, scores: Tensor) -> list[int]:
        """Takes in an evaluation, (trials,); returns the trials that are better than before."""
        found = []
        for trial, score in enumerate(scores.tolist()):
            old = self.standings[trial]
            better = score < old.score if self.goal == "min" else score > old.score
            if math.isfinite(score) and (better or math.isnan(old.score)):
                self.standings[trial] = replace(old, score=score, best_step=step)
                found.append(trial)
        return found

    def losers(self, kept: int, scores: Tensor) -> list[tuple[int, str]]:
        """The running trials that are not among the best ``kept`` by scores (trials,), and why."""
        values, sign = scores.tolist(), 1 if self.goal == "min" else -1
        running = self.running()
        ranked = sorted(running, key=lambda t: (math.isnan(values[t]), sign * values[t]))
        return [
            (t, f"place {place} of {len(ranked)}, {self.metric} {values[t]:.4g}")
            for place, t in enumerate(ranked, 1)
            if place > kept
        ]

    def leader(self) -> str:
        """The best trial so far, in words; nothing without evaluation."""
        scored = [
            (x.score, n)
            for x, n in zip(self.standings, self.names, strict=True)
            if math.isfinite(x.score)
        ]
        if not scored:
            return ""
        score, name = min(scored) if self.goal == "min" else max(scored)
        return f"best {self.metric} {score:.4g} ({name})"

    def events(self) -> list[Event]:
        """The trials that no longer run though the sweep went on, for the log."""
        return [
            (x.step, x.status, trial, x.reason)
            for trial, x in enumerate(self.standings)
            if x.status in ("diverged", "stopped")
        ]

    def state_dict(self) -> State:
        """Standings and weights for a checkpoint."""
        return {
            "metric": self.metric,
            "standings": [asdict(x) for x in self.standings],
            "best": _flatten(self.best),
            "left": _flatten(self.left),
        }

    def load_state_dict(
        self, state: State, step: int, members: Sequence[int], metrics: Sequence[str]
    ) -> None:
        """Takes back what :meth:`state_dict` returned.

        Args:
            state: that.
            step: after how many steps.
            members: the trials that were still in the stack.
            metrics: the names of the scores so far.
        """
        metric, found = state["metric"], state["standings"]
        expect(
            metric == (metrics[0] if metrics else "loss"), f"metric is {metric!r} of {metrics!r}"
        )
        expect(
            isinstance(found, list) and len(found) == len(self.trials),
            f"standings are not {len(self.trials)}",
        )
        standings = [_standing(x, step) for x in found]
        for trial, x in enumerate(standings):
            expect(x.status != "running" or trial in members, f"trial {trial} runs nowhere")
        best = {t for t, x in enumerate(standings) if x.best_step}
        left = set(range(len(self.trials))) - set(members)
        trees = [self._unflatten(state.get(k, {}), t) for k, t in (("best", best), ("left", left))]
        self.metric, self.standings, (self.best, self.left) = metric, standings, trees

    def _unflatten(self, tensors: State, trials: set[int]) -> dict[int, Train]:
        likes = {
            SEPARATOR.join((str(trial), key)): like
            for trial in trials
            for key, like in self.shapes[trial].items()
        }
        expect_keys(tensors, likes, "the weights that were kept")
        # A site of which nothing trains (the bases that VeRA's sites share) left no trace.
        trees: dict[int, Train] = {t: {site: {} for site in self.frames[t]} for t in trials}
        for key, like in likes.items():
            trial, site, leaf = key.split(SEPARATOR)
            tensor = expect_like(tensors[key], like, key, finite=True)
            trees[int(trial)][site][leaf] = tensor
        return trees

    def report(
        self, last: Mapping[int, Train], step: int, record: History, seconds: float, chunk: int
    ) -> Report:
        """The outcome so far; ``last`` holds the weights of the trials in the stack.

        Trials of which no weights are known, as another process has them, are without params.
        """
        last = {**last, **self.left}
        results = [
            Result(
                name, self.trials[t], x.status, x.step or step, self._loss(t, record),
                x.score, x.best_step, x.reason,
            )
            for t, (name, x) in enumerate(zip(self.names, self.standings, strict=True))
        ]  # fmt: skip
        final = {r.name: self._params(t, last[t]) for t, r in enumerate(results) if t in last}
        best = {
            r.name: self._params(t, self.best[t]) for t, r in enumerate(results) if t in self.best
        }
        results, known = ranked(results, self.goal), final | best
        return Report(
            results, {r.name: known[r.name] for r in results if r.name in known}, final, self.names,
            record.losses, record.scores, self.metric, self.goal, seconds, chunk,
        )  # fmt: skip

    def _params(self, trial: int, train: Train) -> Params:
        device = self.devices[trial]
        moved = {s: {k: t.to(device) for k, t in leaves.items()} for s, leaves in train.items()}
        return trainable_leaves(join(moved, self.frames[trial]))

    def _loss(self, trial: int, record: History) -> float:
        values = [float(record.losses[s][trial]) for s in sorted(record.losses)]
        values = [v for v in values if not math.isnan(v)][-LAST:]
        return sum(values) / len(values) if values else math.nan


def _standing(found: object, step: int) -> Standing:
    expect(isinstance(found, dict), f"a standing is a {type(found).__name__}")
    assert isinstance(found, dict)
    expect_keys(found, [f.name for f in fields(Standing)], "a standing")
    x = Standing(**found)
    expect(x.status in STATUSES, f"a status is {x.status!r}")
    expect(isinstance(x.reason, str), f"a reason is {x.reason!r}")
    running = x.status == "running"
    expect_int(x.step, 0 if running else 1, 0 if running else step, "a trial's last step")
    expect_float(x.score, "a score", nan=True)
    expect_int(x.best_step, 0, step, "the step of the best score")
    expect(math.isnan(x.score) == (x.best_step == 0), f"{x.score!r} at step {x.best_step}")
    return x


def _flatten(trees: Mapping[int, Train]) -> dict[str, Tensor]:
    return {
        SEPARATOR.join((str(trial), site, leaf)): tensor
        for trial, train in trees.items()
        for site, leaves in train.items()
        for leaf, tensor in leaves.items()
    }


def on_all(order: Sequence[int], values: Tensor, take: set[int], count: int) -> Tensor:
    """(count,) float64 by trial, NaN outside ``take``, from values in the order of flat params."""
    row = torch.full((count,), math.nan, dtype=torch.float64)
    for trial, value in zip(order, values.tolist(), strict=True):
        if trial in take:
            row[trial] = value
    return row
