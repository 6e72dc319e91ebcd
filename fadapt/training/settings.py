"""Settings of a sweep, and their checks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import require
from ..run import LossFn
from .data import Order, check_batches
from .report import Goal
from .trial import Halving, Trial


@dataclass
class Settings:
    """The arguments of :func:`fadapt.sweep`, where they are described."""

    eval: Any = None
    steps: int | None = None
    loss_fn: LossFn | None = None
    per_adapter: bool = False
    order: Order = "shared"
    calib: Iterable[Any] | None = None
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    eval_every: int | None = None
    goal: Goal = "min"
    halving: Halving | None = None
    max_adapters: int | str | None = "auto"
    compile: bool | Mapping[str, Any] = False
    directory: str | os.PathLike[str] | None = None
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = 10.0
    resume: bool = True
    tensorboard: bool = False
    progress: bool | None = None
    log_every: int = 10
    seed: int = 0

    @property
    def path(self) -> Path | None:
        return None if self.directory is None else Path(self.directory)

    def checked(self, batches: Any, trials: Mapping[str, Trial]) -> int:
        """The number of steps; completes the settings.

        Raises:
            ConfigError: a value out of its range or that does not fit the others.
        """
        steps = self.steps
        check_batches(batches)
        require(not hasattr(batches, "__len__") or len(batches) > 0, "batches is empty")
        if steps is None and hasattr(batches, "__len__"):
            steps = len(batches)
        require(
            isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1,
            f"steps must be an int of at least 1, got {steps!r}"
            + ("" if steps is not None else "; these batches have no length, so pass steps="),
        )
        assert steps is not None
        for name in ("eval_every", "checkpoint_every", "log_every"):
            value = getattr(self, name)
            require(
                (value is None and name != "log_every") or (isinstance(value, int) and value >= 1),
                f"{name} must be an int of at least 1, got {value!r}",
            )
        minutes = self.checkpoint_minutes
        require(
            minutes is None or (math.isfinite(minutes) and minutes >= 0),
            f"checkpoint_minutes must be at least 0, got {minutes!r}",
        )
        most = self.max_adapters
        require(
            most in ("auto", None) or (isinstance(most, int) and most >= 1),
            f"max_adapters must be 'auto', None or an int of at least 1, got {most!r}",
        )
        require(self.goal in ("min", "max"), f"goal must be 'min' or 'max', got {self.goal!r}")
        require(isinstance(self.seed, int), f"seed must be an int, got {self.seed!r}")
        self._check_eval()
        require(
            not self.tensorboard or self.directory is not None,
            "tensorboard=True needs a directory=",
        )
        for name, trial in trials.items():
            require(
                steps % trial.accumulate == 0,
                f"{name}: accumulate={trial.accumulate} does not divide steps={steps} (a step is "
                f"one batch); use steps={steps - steps % trial.accumulate}",
            )
        return steps

    def _check_eval(self) -> None:
        if self.eval is None:
            require(
                self.halving is None and self.eval_every is None,
                "halving and eval_every need eval=: batches, or a function of (model, stack)",
            )
        elif not callable(self.eval):
            check_batches(self.eval)
            if isinstance(self.eval, Iterator):
                self.eval = list(self.eval)
            require(not hasattr(self.eval, "__len__") or len(self.eval) > 0, "eval is empty")


def device_of(model: nn.Module) -> torch.device:
    """Where the batches go: to the model's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
