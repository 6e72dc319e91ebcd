"""Settings: the options of a sweep, their types, and their checks."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict, TypeVar, Unpack

import torch
from torch.optim import Optimizer

from ..arguments import check_flags
from ..calibration.stats import Stats
from ..errors import ConfigError, require, require_takes
from ..fields import LARGEST_INT
from ..run import LossFn
from .data import Order, check_batches
from .directory import Checkpoints
from .report import Goal
from .trial import Halving, Trial

F = TypeVar("F", bound=Callable[..., Any])


class Options(TypedDict, total=False):
    """The keyword arguments of :func:`fadapt.sweep`, where they are described."""

    eval: Any
    steps: int | None
    loss_fn: LossFn | None
    per_adapter: bool
    order: Order
    calib: Stats | Iterable[Any] | None
    optimizer: Callable[..., Optimizer]
    eval_every: int | None
    goal: Goal
    halving: Halving | None
    max_adapters: int | str | None
    verify: bool
    compile: bool | Mapping[str, Any]
    directory: str | os.PathLike[str] | Checkpoints | None
    tensorboard: bool
    progress: bool | None
    log_every: int
    seed: int
    mesh: Any


class Settings(SimpleNamespace):
    """All options of a sweep: :class:`Options` has their types, `sweep` their defaults."""

    def __init__(self, **options: Unpack[Options]):
        super().__init__(**options)
        if self.directory is not None and not isinstance(self.directory, Checkpoints):
            self.directory = Checkpoints(self.directory)

    @property
    def path(self) -> Path | None:
        """The directory, if there is one."""
        return None if self.directory is None else self.directory.path

    def of_processes(self) -> dict[str, str]:
        """What processes that train together need alike, beside what the numbers depend on.

        The directory is the first process's; the others may call it something else.
        """
        kept = self.directory
        names = "max_adapters", "verify", "compile", "log_every"
        return {
            **{name: repr(getattr(self, name)) for name in names},
            "directory": "None" if kept is None else "a directory",
            "Checkpoints(every=)": repr(kept and kept.every),
            "calib": "None" if self.calib is None else "data",
        }

    def checked(self, batches: Any, trials: Mapping[str, Trial]) -> int:
        """The number of steps; completes the settings.

        Raises:
            ConfigError: a value of the wrong type, out of its range or that does not fit the
                others.
        """
        self._check_types()
        self._check_eval()
        steps = self._count(batches)
        for name, trial in trials.items():
            require(
                steps % trial.accumulate == 0,
                f"{name}: accumulate={trial.accumulate} does not divide steps={steps} (a step is "
                f"one batch); use steps={steps - steps % trial.accumulate or trial.accumulate}",
            )
            for step in (0, steps // 2, steps - 1):
                trial.rate_at(step, steps)
        if self.halving is not None:
            self.halving.rungs(steps, len(trials))
        return steps

    def _count(self, batches: Any) -> int:
        steps = self.steps
        check_batches(batches)
        require(not hasattr(batches, "__len__") or len(batches) > 0, "batches is empty")
        if steps is None and hasattr(batches, "__len__"):
            steps = len(batches)
        require(
            type(steps) is int and 1 <= steps <= LARGEST_INT,
            f"steps must be an int from 1 to {LARGEST_INT}, got {steps!r:.80}"
            + ("" if steps is not None else "; these batches have no length, so pass steps="),
        )
        assert steps is not None
        return steps

    def _check_types(self) -> None:
        for name in ("eval_every", "log_every"):
            value = getattr(self, name)
            require(
                (value is None and name != "log_every") or (type(value) is int and value >= 1),
                f"{name} must be an int of at least 1, got {value!r}",
            )
        check_flags(per_adapter=self.per_adapter, tensorboard=self.tensorboard, verify=self.verify)
        if self.progress is not None:
            check_flags(progress=self.progress)
        most = self.max_adapters
        require(
            most is None or (type(most) is int and most >= 1) or _is_word(most, "auto"),
            f"max_adapters must be 'auto', None or an int of at least 1, got {most!r:.80}",
        )
        require(
            isinstance(self.compile, (bool, Mapping)),
            f"compile must be True, False or a dict of options for torch.compile, got "
            f"{self.compile!r}",
        )
        require(
            _is_word(self.goal, "min", "max"),
            f"goal must be 'min' or 'max', got {self.goal!r:.80}",
        )
        require(
            _is_word(self.order, "shared", "own"),
            f"order must be 'shared' or 'own', got {self.order!r:.80}",
        )
        require(
            type(self.seed) is int and -(2**63) <= self.seed < 2**64,
            f"seed must be an int that torch.manual_seed takes, got {self.seed!r}",
        )
        require(
            self.halving is None or isinstance(self.halving, Halving),
            f"halving must be a fadapt.Halving, got {self.halving!r}",
        )
        for name in ("loss_fn", "optimizer"):
            value = getattr(self, name)
            require(
                callable(value) or (value is None and name == "loss_fn"),
                f"{name} must be callable, got {value!r}",
            )
        if self.loss_fn is not None:
            require_takes(self.loss_fn, ("output", "batch"), "loss_fn")
        if isinstance(self.optimizer, functools.partial):
            held = sorted(self.optimizer.keywords.keys() & {"lr", "weight_decay", "params"})
            require(
                not held,
                f"the optimizer is given {held}, which have no effect: each trial has its own. "
                "Write Trial(..., lr=, weight_decay=), or fit(..., lr=, weight_decay=)",
            )
        require(
            not self.tensorboard or self.directory is not None,
            "tensorboard=True needs a directory=",
        )

    def _check_eval(self) -> None:
        if self.eval is None:
            require(
                self.halving is None and self.eval_every is None,
                "halving and eval_every need eval=: batches, or a function of (model, stack)",
            )
        elif callable(self.eval):
            require_takes(self.eval, ("model", "stack"), "eval")
        else:
            check_batches(self.eval)
            if isinstance(self.eval, Iterator):
                self.eval = list(self.eval)
            require(not hasattr(self.eval, "__len__") or len(self.eval) > 0, "eval is empty")


def _is_word(value: Any, *words: str) -> bool:
    return isinstance(value, str) and value in words


def with_named_options(function: F) -> F:
    """A function whose unknown keywords are refused by :func:`named_options`."""
    known = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **named_options(function.__name__, kwargs, known))

    return call  # type: ignore[return-value]


def named_options(function: str, given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The keyword arguments under their present names.

    ``checkpoint_every``, ``checkpoint_minutes`` and ``resume``, which are a :class:`Checkpoints`
    now, and ``optimizer_args``, which is a functools.partial, are taken as such.

    Raises:
        ConfigError: a name that is neither, with those that are near.
    """
    options, names = dict(given), list(known)
    kept = {k: options.pop(k) for k in ("checkpoint_every", "resume") if k in options}
    every = kept.pop("checkpoint_every", None)
    minutes = options.pop("checkpoint_minutes", None)
    if every is None and minutes is not None:
        try:
            every = timedelta(minutes=minutes)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"checkpoint_minutes={minutes!r}: {error}") from error
    if every is not None:
        kept["every"] = every
    where = options.get("directory")
    if kept and where is not None and not isinstance(where, Checkpoints):
        options["directory"] = Checkpoints(where, **kept)
    elif kept and where is not None:
        raise ConfigError(f"{function}: {sorted(kept)} belong into directory=Checkpoints(...)")
    if (more := options.pop("optimizer_args", None)) is not None:
        require(
            isinstance(more, Mapping) and all(isinstance(k, str) for k in more),
            f"{function}: optimizer_args must be a dict of keyword arguments, got {more!r}; write "
            "optimizer=functools.partial(torch.optim.AdamW, betas=...)",
        )
        factory = options.get("optimizer", torch.optim.AdamW)
        options["optimizer"] = functools.partial(factory, **more) if more else factory
    if unknown := [name for name in options if name not in names]:
        near = difflib.get_close_matches(unknown[0], names, 3, 0.5)
        hint = f"near names are {near}" if near else f"there are {names}"
        raise ConfigError(f"{function} has no option {unknown[0]!r}; {hint}")
    return options
