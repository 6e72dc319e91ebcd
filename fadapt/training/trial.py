"""Trial: what one adapter of a sweep is trained with. Halving: which trials stop early."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..arguments import check_int
from ..config import Config, Rules
from ..errors import ConfigError, require, require_takes
from ..fields import LARGEST_INT
from ..method import Method
from ..params.params import Params

NAME_LENGTH = 500
"""Characters of a trial's name."""

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
        lr_ratio: {leaf: factor of the learning rate}, for the leaves of that name at all sites:
            ``{"B": 16.0}`` is LoRA+ (arXiv:2402.12354), ``{"A": 0.0}`` trains B alone, as LoRA-FA
            does (arXiv:2308.03303). A leaf at 0 is no part of the clipped norm either.
        name: the key in the report; None makes one from what differs between the trials.

    Raises:
        ConfigError: a value of the wrong type or out of its range.

    Example:
        >>> import fadapt
        >>> fadapt.Trial(fadapt.LoRA(r=4), lr=3e-4, schedule="cosine", warmup=10).label()
        'LoRA(r=4)'
    """

    config: Rules | Config | Params
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Schedule = "constant"
    seed: int | None = None
    clip: float | None = None
    accumulate: int = 1
    lr_ratio: Mapping[str, float] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.config, type):
            raise ConfigError(f"Trial: {self.config.__name__} is a class; write an instance of it")
        if not isinstance(self.config, (Method, Mapping, Config)):
            raise ConfigError(f"Trial: config must be a method, rules or Params: {self.config!r}")
        if isinstance(self.config, Params):
            self.config.check_one()
        elif not isinstance(self.config, Config):
            Config(self.config)  # which says what is wrong
        for field in ("lr", "weight_decay"):
            value = getattr(self, field)
            require(
                is_number(value) and value >= 0,
                f"Trial: {field} must be a finite number of at least 0, got {value!r}",
            )
        require(
            self.clip is None or (is_number(self.clip) and self.clip > 0),
            f"Trial: clip must be a positive number or None, got {self.clip!r}",
        )
        for field, least in (("warmup", 0), ("accumulate", 1)):
            value = getattr(self, field)
            require(
                type(value) is int and least <= value <= LARGEST_INT,
                f"Trial: {field} must be an int of at least {least}, got {value!r:.80}",
            )
        known = isinstance(self.schedule, str) and self.schedule in SCHEDULES
        require(
            callable(self.schedule) or known,
            f"Trial: schedule must be one of {list(SCHEDULES)} or a function, "
            f"got {self.schedule!r}",
        )
        if callable(self.schedule):
            require_takes(self.schedule, ("fraction",), "schedule")
        require(
            self.seed is None or type(self.seed) is int,
            f"Trial: seed must be an int or None, got {self.seed!r}",
        )
        check_ratios("Trial: lr_ratio", self.lr_ratio)
        self._check_name()

    def _check_name(self) -> None:
        name = self.name
        require(name is None or isinstance(name, str), f"Trial: name must be a str, got {name!r}")
        # It stands in tables, in a log of lines, and in the names of files.
        require(
            name is None or (0 < len(name) <= NAME_LENGTH and name.isprintable()),
            f"Trial: name must be of 1 to {NAME_LENGTH} printable characters, got {name!r:.80}",
        )

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
        check_int("update", update, 0)
        check_int("updates", updates, 1)
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        done = (update - self.warmup) / max(updates - self.warmup, 1)
        if not callable(self.schedule):
            return self.lr * SCHEDULES[self.schedule](done)
        factor: Any = self.schedule(done)
        try:
            value = float(factor)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            value = math.nan
        require(
            math.isfinite(value) and value >= 0,
            f"the schedule {_function_name(self.schedule)} returned {factor!r:.80} at {done:.3g}; "
            "it must return a finite number of at least 0",
        )
        return self.lr * value

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate at one batch (from 0) of so many."""
        return self.rate(step // self.accumulate, steps // self.accumulate)

    def ratio(self, leaf: str | None) -> float:
        """What the leaves of a name multiply the learning rate by."""
        require(
            leaf is None or isinstance(leaf, str), f"leaf must be a name or None, got {leaf!r:.80}"
        )
        return (self.lr_ratio or {}).get(leaf or "", 1.0)

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
        values["config"] = repr(config) if isinstance(config, Params) else config.to_dict()
        if callable(self.schedule):
            values["schedule"] = _function_name(self.schedule)
        if self.lr_ratio is not None:
            values["lr_ratio"] = dict(self.lr_ratio)
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

    Raises:
        ConfigError: a value of the wrong type or out of its range.

    Example:
        >>> import fadapt
        >>> fadapt.Halving(first=10).rungs(steps=100, trials=8)
        {10: 4, 20: 2, 40: 1}
    """

    first: int
    factor: float = 2.0
    least: int = 1
    shrink: bool | None = None

    def __post_init__(self) -> None:
        fits = (
            type(self.first) is int and 1 <= self.first <= LARGEST_INT,
            is_number(self.factor) and 1 < self.factor <= LARGEST_INT,
            type(self.least) is int and 1 <= self.least <= LARGEST_INT,
            self.shrink is None or isinstance(self.shrink, bool),
        )
        if not all(fits):
            raise ConfigError(
                f"{self!r}: needs first and least, ints of at least 1, factor, a finite number "
                "above 1, and shrink=True, False or None"
            )

    def rungs(self, steps: int, trials: int) -> dict[int, int]:
        """{step: how many trials stay after it}, whatever happens to single trials.

        Raises:
            ConfigError: a factor so small that not even the first rung stops a trial.
        """
        check_int("steps", steps, 1)
        check_int("trials", trials, 1)
        result: dict[int, int] = {}
        step = self.first
        while step < steps and trials > self.least:
            kept = max(self.least, math.ceil(trials / self.factor))
            if kept == trials:
                require(
                    bool(result),
                    f"{self!r} stops none of {trials} trials; factor must be at least "
                    f"{trials / (trials - 1):.4g}",
                )
                break
            result[step] = trials = kept
            step = max(step + 1, round(self.first * self.factor ** len(result)))
        return result


def is_number(value: Any) -> bool:
    """An int or float, neither infinite nor NaN nor a bool, that a float can hold."""
    try:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        return real and math.isfinite(value)
    except OverflowError:
        return False


def check_ratios(what: str, ratios: Any) -> None:
    """Refuses what is no {leaf: factor}.

    Raises:
        ConfigError: names the wrong entry.
    """
    require(
        ratios is None or isinstance(ratios, Mapping),
        f'{what} must be a dict such as {{"B": 16.0}}, got {ratios!r}',
    )
    for leaf, ratio in (ratios or {}).items():
        require(
            isinstance(leaf, str) and is_number(ratio) and ratio >= 0,
            f"{what} must give leaves finite factors of at least 0, got {{{leaf!r}: {ratio!r}}}",
        )


def _function_name(function: Any) -> str:
    return getattr(function, "__qualname__", repr(function))


def _method_label(method: Method) -> str:
    """As repr, without the fields that have their default; the rank is always there."""
    shown = [
        f"{f.name}={getattr(method, f.name)!r}"
        for f in dataclasses.fields(method)
        if f.name == "r" or getattr(method, f.name) != f.default
    ]
    return f"{type(method).__name__}({', '.join(shown)})" if shown else type(method).__name__
