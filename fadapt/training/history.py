"""History: the losses and scores of a sweep in memory, as JSON lines on disk, in TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .checkpoint import SEPARATOR, State, expect, expect_int, expect_keys, expect_like

Event = tuple[int, str, int, str]
"""(step, "diverged" or "stopped", trial, reason)."""


class History:
    """What happened, per step and trial.

    Args:
        names: of the trials, by trial number.
        rate: (trial, step from 0) -> learning rate.
        path: of the JSON lines, or None.
        tensorboard: a directory for TensorBoard, or None.

    Attributes:
        losses: {step: (trials,) float64 on the host}; NaN where a trial did not train.
        scores: {step: {metric: (trials,)}}.
    """

    def __init__(
        self,
        names: Sequence[str],
        rate: Callable[[int, int], float],
        path: Path | None,
        tensorboard: Path | None,
    ):
        self.names, self.path, self.tensorboard = list(names), path, tensorboard
        self.losses: dict[int, Tensor] = {}
        self.scores: dict[int, dict[str, Tensor]] = {}
        self._rate = rate
        self._pending: list[tuple[int, list[int], Tensor, Tensor]] = []
        self._lines: list[tuple[tuple[int, int, int], dict[str, Any]]] = []
        self._writer: Any = None

    def start(self, step: int, events: Iterable[Event]) -> None:
        """Opens the outputs of a sweep that goes on after a step.

        The lines so far are made anew from what the checkpoint holds: those on the disk may be of
        later steps, or damaged.
        """
        if self.tensorboard is not None:
            self._writer = _summary_writer(self.tensorboard, step)
        if self.path is None:
            return
        for at, row in self.losses.items():
            self._loss_line(at, row)
        for at, scores in self.scores.items():
            self._score_line(at, scores)
        for event in events:
            self.event(*event)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(self._text())
            os.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise CheckpointError(f"could not write {self.path}: {error}") from error
        self._lines.clear()

    def add(self, step: int, order: list[int], losses: Tensor, alive: Tensor) -> None:
        """One step's losses and flags of the trials ``order``; not read before :meth:`flush`."""
        self._pending.append((step, order, losses, alive))

    def exchange(self, gather: Callable[[Any], list[Any]]) -> None:
        """Puts the pending steps of all processes together, each of which has its own trials."""
        mine = [
            (step, order, losses.to("cpu", torch.float64), alive.cpu())
            for step, order, losses, alive in self._pending
        ]
        steps: dict[int, list[tuple[list[int], Tensor, Tensor]]] = {}
        for part in gather(mine):
            for step, *rest in part:
                steps.setdefault(step, []).append(tuple(rest))
        self._pending = [
            (
                step,
                [t for order, _, _ in parts for t in order],
                torch.cat([losses for _, losses, _ in parts]),
                torch.cat([alive for _, _, alive in parts]),
            )
            for step, parts in sorted(steps.items())
        ]

    def flush(self) -> list[tuple[int, int, float]]:
        """Takes over the pending steps.

        Returns:
            (step, trial, loss) of every flag found down, at the first step at which it was.
        """
        down: dict[int, tuple[int, int, float]] = {}
        for step, order, losses, alive in self._pending:
            row = torch.full((len(self.names),), math.nan, dtype=torch.float64)
            values, flags = losses.to("cpu", torch.float64).tolist(), alive.tolist()
            for trial, value, flag in zip(order, values, flags, strict=True):
                if flag:
                    row[trial] = value
                else:
                    down.setdefault(trial, (step, trial, value))
            self.losses[step] = row
            self._loss_line(step, row)
            self._scalars("loss", step, row)
        self._pending.clear()
        return list(down.values())

    def score(self, step: int, scores: Mapping[str, Tensor]) -> None:
        """An evaluation: (trials,) numbers by metric; NaN where a trial no longer runs.

        Raises:
            ConfigError: other metrics than before.
        """
        before = list(next(iter(self.scores.values()), scores))
        if list(scores) != before:
            raise ConfigError(
                f"eval returned the metrics {list(scores)} at step {step}, but {before} before; it "
                "must return the same ones in the same order, the one that ranks first"
            )
        self.scores[step] = dict(scores)
        self._score_line(step, scores)
        for metric, values in scores.items():
            self._scalars(f"eval/{metric}", step, values)

    def event(self, step: int, kind: str, trial: int, reason: str) -> None:
        """A trial that was stopped or diverged."""
        # A loss that is not finite is known before the scores, a loser after them.
        place = (step, 1 if kind == "diverged" else 3, trial)
        content = {"step": step, "event": kind, "trial": self.names[trial], "reason": reason}
        self._line(place, content)

    def close(self) -> None:
        """Writes what is left."""
        self.write()
        if self._writer is not None:
            self._writer.close()

    def state_dict(self) -> State:
        """The losses and scores for a checkpoint."""
        steps, evaluated = sorted(self.losses), sorted(self.scores)
        metrics = list(next(iter(self.scores.values()), ()))
        state: State = {"steps": len(steps), "evaluated": evaluated, "metrics": metrics}
        if steps:
            state["losses"] = torch.stack([self.losses[s] for s in steps])
        for step in evaluated:
            for metric, values in self.scores[step].items():
                state[SEPARATOR.join(("scores", str(step), metric))] = values
        return state

    def load_state_dict(self, state: State, step: int) -> None:
        """Takes back what :meth:`state_dict` returned after so many steps."""
        expect(
            type(state["steps"]) is int and state["steps"] == step,
            f"history.steps is {state['steps']!r} at step {step}",
        )
        evaluated, metrics = state["evaluated"], state["metrics"]
        expect(
            isinstance(metrics, list)
            and all(isinstance(m, str) for m in metrics)
            and len(set(metrics)) == len(metrics)
            and bool(metrics) == bool(evaluated),
            f"history.metrics is {metrics!r}",
        )
        expect(
            isinstance(evaluated, list) and evaluated == sorted(set(evaluated)),
            f"history.evaluated is {evaluated!r}",
        )
        row = torch.empty(len(self.names), dtype=torch.float64)
        scores: dict[int, dict[str, Tensor]] = {
            expect_int(s, 1, step, "history.evaluated"): {} for s in evaluated
        }
        losses: dict[int, Tensor] = {}
        keys = {"steps", "evaluated", "metrics"}
        if step:
            like = row.new_empty((step, len(self.names)))
            losses = dict(enumerate(expect_like(state["losses"], like, "history.losses"), 1))
            keys.add("losses")
        for at, named in scores.items():
            for metric in metrics:
                key = SEPARATOR.join(("scores", str(at), metric))
                named[metric] = expect_like(state[key], row, f"history.{key}")
                keys.add(key)
        expect_keys(state, keys, "history")
        self.losses, self.scores = losses, scores

    def write(self) -> None:
        """Appends the lines so far to the file: a checkpoint's log must not end before it."""
        if self.path is None or not self._lines:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(self._text())
        except OSError as error:
            raise CheckpointError(f"could not write {self.path}: {error}") from error
        self._lines.clear()

    def _text(self) -> str:
        """The pending lines in an order that does not depend on when they were read."""
        lines = sorted(self._lines, key=lambda line: line[0])
        return "".join(json.dumps(content) + "\n" for _, content in lines)

    def _loss_line(self, step: int, row: Tensor) -> None:
        loss = self._named(row)
        numbers = [t for t, value in enumerate(row.tolist()) if not math.isnan(value)]
        lr = {self.names[t]: self._rate(t, step - 1) for t in numbers}
        self._line((step, 0, 0), {"step": step, "loss": loss, "lr": lr})

    def _score_line(self, step: int, scores: Mapping[str, Tensor]) -> None:
        content = {k: self._named(v) for k, v in scores.items()}
        self._line((step, 2, 0), {"step": step, "scores": content})

    def _named(self, row: Tensor) -> dict[str, float | None]:
        # JSON has no NaN; a trial that does not take part is left out.
        values = zip(self.names, row.tolist(), strict=True)
        return {n: v if math.isfinite(v) else None for n, v in values if not math.isnan(v)}

    def _line(self, place: tuple[int, int, int], content: dict[str, Any]) -> None:
        if self.path is not None:
            self._lines.append((place, content))

    def _scalars(self, metric: str, step: int, row: Tensor) -> None:
        if self._writer is not None:
            for name, value in self._named(row).items():
                if value is not None:
                    self._writer.add_scalar(f"{metric}/{name}", value, step)


def _summary_writer(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard=True needs TensorBoard: pip install 'fadapt[tensorboard]'"
        ) from error
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)
