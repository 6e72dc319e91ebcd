"""Trial: what one adapter of a sweep is trained with. Halving: which trials stop early."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import Config, Rules
from ..errors import ConfigError, require
from ..io.as_json import config_to_json
from ..method import Method
from ..params.params import Params

Schedule = str | Callable[[float], float]
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


@dataclass(frozen=True)
class Trial:
    """One adapter of a sweep and its hyper-parameters.

    Args:
        config: a method, a {pattern: method} dict or a Config, for :func:`fadapt.init`; or Params
            to go on from (they are copied).
        lr: the peak learning rate.
        weight_decay: the optimiser's own; towards zero increments, so towards the base model.
        warmup: updates over which the learning rate rises linearly to ``lr``.
        schedule: "constant", "linear" or "cosine" (both to zero), or a function of the fraction
            of updates done after the warm-up, in [0, 1), that returns a factor.
        seed: of the initial values and of the trial's own data order; None takes the config's.
        clip: largest 2-norm of this adapter's gradient, or None.
        accumulate: batches per update; the gradient is their mean.
        name: the key in the report; None makes one from what differs between the trials.

    Raises:
        ConfigError: a value out of its range.
    """

    config: Rules | Config | Params
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Schedule = "constant"
    seed: int | None = None
    clip: float | None = None
    accumulate: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.config, type):
            raise ConfigError(f"Trial: {self.config.__name__} is a class; write an instance of it")
        if not isinstance(self.config, (Method, Mapping, Config)):
            raise ConfigError(f"Trial: config must be a method, rules or Params: {self.config!r}")
        for field in ("lr", "weight_decay"):
            value = getattr(self, field)
            require(
                isinstance(value, (int, float)) and math.isfinite(value) and value >= 0,
                f"Trial: {field} must be a finite number of at least 0, got {value!r}",
            )
        require(
            self.clip is None or (math.isfinite(self.clip) and self.clip > 0),
            f"Trial: clip must be a positive number or None, got {self.clip!r}",
        )
        for field, least in (("warmup", 0), ("accumulate", 1)):
            value = getattr(self, field)
            require(
                isinstance(value, int) and value >= least,
                f"Trial: {field} must be an int of at least {least}, got {value!r}",
            )
        require(
            callable(self.schedule) or self.schedule in SCHEDULES,
            f"Trial: schedule must be one of {list(SCHEDULES)} or a function, "
            f"got {self.schedule!r}",
        )
        if self.seed is not None and not isinstance(self.seed, int):
            raise ConfigError(f"Trial: seed must be an int, got {self.seed!r}")

    def resolved(self) -> Config | Params:
        """The config with this trial's seed, or the Params."""
        if isinstance(self.config, Params):
            return self.config
        config = self.config if isinstance(self.config, Config) else Config(self.config)
        return config if self.seed is None else dataclasses.replace(config, seed=self.seed)

    @property
    def data_seed(self) -> int:
        config = self.resolved()
        return config.seed if isinstance(config, Config) else self.seed or 0

    def rate(self, update: int, updates: int) -> float:
        """The learning rate of one update (from 0) of so many."""
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        done = (update - self.warmup) / max(updates - self.warmup, 1)
        schedule = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        return self.lr * schedule(done)

    def label(self) -> str:
        """The methods, for names and tables."""
        if isinstance(self.config, Params):
            methods = [a.method for _, a in self.config.items()]
        elif isinstance(self.config, Method):
            methods = [self.config]
        else:
            rules = self.config.rules if isinstance(self.config, Config) else self.config
            methods = [rules] if isinstance(rules, Method) else list(rules.values())
        return "+".join(dict.fromkeys(_method_label(m) for m in methods if m is not None))

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint compares; Params and functions appear by what they are called."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        config = self.resolved()
        values["config"] = repr(config) if isinstance(config, Params) else config_to_json(config)
        if callable(self.schedule):
            values["schedule"] = getattr(self.schedule, "__qualname__", repr(self.schedule))
        return values


@dataclass(frozen=True)
class Halving:
    """Successive halving: at each rung the best part of the running trials stays.

    Args:
        first: the step of the first rung; the others follow at ``first * factor**k``.
        factor: one in ``factor`` trials stays at each rung.
        least: trials that always stay.
        shrink: whether the fold becomes smaller at a rung, which costs a compiled sweep one
            compilation per rung. None: yes, unless compiled; then a stopped trial's place runs
            idle until all trials of its chunk have stopped.
    """

    first: int
    factor: float = 2.0
    least: int = 1
    shrink: bool | None = None

    def __post_init__(self) -> None:
        if not (self.first >= 1 and 1 < self.factor < math.inf and self.least >= 1):
            raise ConfigError(f"{self!r}: needs first >= 1, factor > 1 and least >= 1")

    def rungs(self, steps: int, trials: int) -> dict[int, int]:
        """{step: how many trials stay after it}, whatever happens to single trials."""
        result: dict[int, int] = {}
        for k in itertools.count():
            step = round(self.first * self.factor**k)
            if step >= steps:
                return result
            trials = min(trials, max(self.least, math.ceil(trials / self.factor)))
            result[step] = trials
        raise AssertionError


def _method_label(method: Method) -> str:
    """As repr, without the fields that have their default; the rank is always there."""
    shown = [
        f"{f.name}={getattr(method, f.name)!r}"
        for f in dataclasses.fields(method)
        if f.name == "r" or getattr(method, f.name) != f.default
    ]
    return f"{type(method).__name__}({', '.join(shown)})" if shown else type(method).__name__
