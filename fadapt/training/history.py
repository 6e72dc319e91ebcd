"""History: the losses and scores of a sweep in memory, as JSON lines on disk, in TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError


class History:
    """What happened, per step and trial.

    Args:
        names: of the trials, by trial number.
        path: of the JSON lines, or None.
        tensorboard: a directory for TensorBoard, or None.

    Attributes:
        losses: {step: (trials,) float64 on the host}; NaN where a trial did not train.
        scores: {step: {metric: (trials,)}}.
    """

    def __init__(self, names: Sequence[str], path: Path | None, tensorboard: Path | None):
        self.names, self.path, self.tensorboard = list(names), path, tensorboard
        self.losses: dict[int, Tensor] = {}
        self.scores: dict[int, dict[str, Tensor]] = {}
        self._pending: list[tuple[int, list[int], Tensor, Tensor, dict[int, float]]] = []
        self._lines: list[dict[str, Any]] = []
        self._writer: Any = None

    def start(self, step: int) -> None:
        """Opens the outputs; lines of later steps, written before a restart, are dropped."""
        if self.tensorboard is not None:
            self._writer = _summary_writer(self.tensorboard, step)
        if self.path is None:
            return
        kept = [line for line in _read_lines(self.path) if line["step"] <= step] if step else []
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
            os.replace(temporary, self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise CheckpointError(f"could not write {self.path}: {error}") from error

    def add(
        self, step: int, order: list[int], losses: Tensor, alive: Tensor, rates: dict[int, float]
    ) -> None:
        """One step's losses and flags, in the stack's order; not read before :meth:`flush`."""
        self._pending.append((step, order, losses, alive, rates))

    def flush(self) -> list[tuple[int, int, float]]:
        """Takes over the pending steps.

        Returns:
            (step, trial, loss) of every flag found down, at the first step at which it was.
        """
        down: dict[int, tuple[int, int, float]] = {}
        for step, order, losses, alive, rates in self._pending:
            row = torch.full((len(self.names),), math.nan, dtype=torch.float64)
            values, flags = losses.to("cpu", torch.float64).tolist(), alive.tolist()
            for trial, value, flag in zip(order, values, flags, strict=True):
                if flag:
                    row[trial] = value
                else:
                    down.setdefault(trial, (step, trial, value))
            self.losses[step] = row
            self._line(step, loss=self._named(row), lr={self.names[t]: r for t, r in rates.items()})
            self._scalars("loss", step, row)
        self._pending.clear()
        self.write()
        return list(down.values())

    def score(self, step: int, scores: Mapping[str, Tensor]) -> None:
        """An evaluation: (trials,) numbers by metric; NaN where a trial no longer runs."""
        self.scores[step] = dict(scores)
        self._line(step, scores={k: self._named(v) for k, v in scores.items()})
        for metric, values in scores.items():
            self._scalars(f"eval/{metric}", step, values)

    def event(self, step: int, kind: str, trial: int, reason: str) -> None:
        """A trial that was stopped or diverged."""
        self._line(step, event=kind, trial=self.names[trial], reason=reason)

    def close(self) -> None:
        """Writes what is left."""
        self.write()
        if self._writer is not None:
            self._writer.close()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The record for a checkpoint."""
        steps, evaluated = sorted(self.losses), sorted(self.scores)
        tensors = {"losses": torch.stack([self.losses[s] for s in steps])} if steps else {}
        for s in evaluated:
            tensors |= {f"scores|{s}|{k}": v for k, v in self.scores[s].items()}
        return {"steps": steps, "evaluated": evaluated}, tensors

    def restore(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Takes back what :meth:`state` returned."""
        self.losses = dict(zip(meta["steps"], tensors.get("losses", ()), strict=True))
        self.scores = {s: {} for s in meta["evaluated"]}
        for key, values in tensors.items():
            if key != "losses":
                _, step, metric = key.split("|", 2)
                self.scores[int(step)][metric] = values

    def _named(self, row: Tensor) -> dict[str, float | None]:
        # JSON has no NaN; a trial that does not take part is left out.
        values = zip(self.names, row.tolist(), strict=True)
        return {n: v if math.isfinite(v) else None for n, v in values if not math.isnan(v)}

    def _line(self, step: int, **content: Any) -> None:
        if self.path is not None:
            self._lines.append({"step": step, **content})

    def write(self) -> None:
        """Appends the lines so far to the file: a checkpoint's log must not end before it."""
        if self.path is None or not self._lines:
            return
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise CheckpointError(f"could not write {self.path}: {error}") from error
        self._lines.clear()

    def _scalars(self, metric: str, step: int, row: Tensor) -> None:
        if self._writer is not None:
            for name, value in self._named(row).items():
                if value is not None:
                    self._writer.add_scalar(f"{metric}/{name}", value, step)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        for text in file:
            # A killed process may have left half a line.
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def _summary_writer(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard=True needs TensorBoard: pip install 'fadapt[tensorboard]'"
        ) from error
    return SummaryWriter(str(directory), purge_step=step + 1 if step else None)
