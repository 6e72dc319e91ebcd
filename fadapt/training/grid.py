"""grid: trials of every combination; and the names of trials."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from ..arguments import listed
from ..errors import ConfigError, require
from ..method import Method
from .trial import Trial


def grid(config: Any, **values: Any) -> list[Trial]:
    """Trials of every combination.

        grid([LoRA(r=4), DoRA(r=8)], lr=[1e-3, 1e-2], seed=range(3))     # 12 trials
        grid(LoRA, r=[4, 8], lr=[1e-3, 1e-2], warmup=10)                 # 4 trials

    Args:
        config: a method, rules, Config or Params, a method class, or a list of these.
        values: fields of :class:`Trial` or, for a method class, of the method; a list, tuple or
            range is varied, anything else is the same in all trials.

    Raises:
        ConfigError: an empty grid, or a field that neither has.

    Example:
        >>> trials = fadapt.grid(fadapt.LoRA, r=[1, 2], lr=[1e-3, 1e-2], warmup=10)
        >>> len(trials)
        4
    """
    trials: list[Trial] = []
    own = {f.name for f in dataclasses.fields(Trial)} - {"config", "name"}
    choices: list[Any] = _choices(config)
    for choice in choices:
        is_class = isinstance(choice, type) and issubclass(choice, Method)
        fields = {f.name for f in dataclasses.fields(choice)} if is_class else set()
        if unknown := sorted(values.keys() - own - fields):
            hint = "" if is_class else "; to vary a method's fields pass its class: grid(LoRA, r=)"
            raise ConfigError(f"grid: unknown fields {unknown}; a trial has {sorted(own)}{hint}")
        for combination in itertools.product(*map(_choices, values.values())):
            given = dict(zip(values, combination, strict=True))
            inner = {k: given.pop(k) for k in list(given) if k in fields}
            method: Any = choice(**inner) if is_class else choice
            trials.append(Trial(method, **given))
    require(bool(trials), "grid: empty; give every field at least one value")
    return trials


def named(trials: Iterable[Trial]) -> dict[str, Trial]:
    """The trials by name, with names made where they have none.

    Raises:
        ConfigError: no trials, something else than trials, or one name twice.
    """
    if isinstance(trials, (Trial, Method)):
        raise ConfigError(
            f"sweep: trials must be a list of fadapt.Trial, got {trials!r:.80}; write [Trial(...)]"
        )
    many = listed("sweep: trials", trials, "[fadapt.Trial(...), ...]")
    require(bool(many), "sweep: no trials")
    if wrong := [t for t in many if not isinstance(t, Trial)]:
        raise ConfigError(
            f"sweep takes fadapt.Trial objects, got {wrong[0]!r:.80}; write Trial(it)"
        )
    defaults = {
        f.name: f.default
        for f in dataclasses.fields(Trial)
        if f.name not in ("config", "name")
        and any(getattr(t, f.name) != getattr(many[0], f.name) for t in many)
    }
    result: dict[str, Trial] = {}
    for trial in many:
        own = {f: getattr(trial, f) for f in defaults}
        shown = [f for f in own if f == "lr" or own[f] != defaults[f]]
        parts = [trial.label(), *(f"{f}={_short(own[f])}" for f in shown)]
        base = trial.name or " ".join(parts)
        name, copies = base, itertools.count(2)
        while name in result and trial.name is None:
            name = f"{base} #{next(copies)}"
        require(name not in result, f"sweep: two trials are called {name!r}")
        result[name] = trial
    return result


def _choices(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple, range)) else [value]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else getattr(value, "__name__", str(value))
