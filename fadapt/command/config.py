"""A sweep's settings from a TOML file: checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..errors import CheckpointError, ConfigError, FadaptError
from ..method import Method
from ..method_json import method_class
from ..training.directory import Checkpoints
from ..training.grid import grid
from ..training.grid import named as names_of
from ..training.trial import Halving, Trial
from .models import call, importable_from, is_named, load_base, named
from .texts import TextFile, text_batches

TOP = {"base": str, "dtype": str, "device": str, "directory": str, "data": dict, "sweep": dict}
DATA = {"train": str, "eval": str, "calib": str, "length": int, "batch": int}
SWEEP = {
    "steps": int, "eval_every": int, "goal": str, "halving": dict, "order": str, "loss_fn": str,
    "eval": str, "optimizer": str, "max_adapters": (int, str), "compile": (bool, dict),
    "verify": bool, "per_adapter": bool, "tensorboard": bool, "log_every": int, "seed": int,
    "checkpoint_every": int,
}  # fmt: skip
FUNCTIONS = ("loss_fn", "eval", "optimizer")
WHERE = ("layers", "roles", "exclude", "dtype")
"""Of a trial's keys, those that are a Config's; their lists are values and not choices."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Job:
    """What is handed to :func:`fadapt.sweep`."""

    model: nn.Module
    trials: list[Trial]
    batches: Any
    options: dict[str, Any]


@dataclass(frozen=True)
class SweepConfig:
    """The checked settings of a file.

    Attributes:
        path: of the file; what it names is relative to its directory.
        directory: of the sweep.
        trials: in the order of the file.
        data: the table of that name.
        options: the table "sweep".
    """

    path: Path
    base: str
    dtype: Any
    device: str
    directory: Path
    trials: list[Trial]
    data: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def named_trials(self) -> dict[str, Trial]:
        """The trials by the names that the report will have."""
        return names_of(self.trials)

    def load(self, anew: bool = False) -> Job:
        """Loads the base and the data.

        Raises:
            ConfigError: a model, file or function that is not there.
        """
        with importable_from(self.path.parent):
            model = load_base(self._local(self.base), self.dtype, self.device)
            options = {
                k: named(v, f"{self.path}: [sweep] {k}") if k in FUNCTIONS else v
                for k, v in self.options.items()
            }
            if "halving" in options:
                options["halving"] = _checked(self.path, Halving, options["halving"])
            every = (
                {"every": options.pop("checkpoint_every")} if "checkpoint_every" in options else {}
            )
            kept = Checkpoints(self.directory, resume=not anew, **every)
            for key in ("eval", "calib"):
                if key in self.data:
                    options[key] = self._batches(key)
            return Job(model, self.trials, self._batches("train"), {**options, "directory": kept})

    def _batches(self, key: str) -> Any:
        text = self.data[key]
        if is_named(text):
            return call(text, f"{self.path}: [data] {key}")
        file = TextFile(Path(self._local(text)), self.data["length"], self.data["batch"])
        return text_batches(file, self._local(self.base))

    def _local(self, text: str) -> str:
        """A path of the file's own directory, where there is one; else the text."""
        beside = self.path.parent / text
        return text if is_named(text) or not beside.exists() else str(beside)


def read_config(path: str) -> SweepConfig:
    """The settings of a file.

    Raises:
        CheckpointError: no such file.
        ConfigError: no TOML, or a key or value that does not fit, by its name.
    """
    where = Path(path)
    try:
        data = tomllib.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # bad UTF-8 too
        raise ConfigError(f"{path} is not TOML: {error}") from error
    trials = data.pop("trials", None)
    _check(where, "the file", data, TOP)
    for key in ("base", "directory", "data"):
        if key not in data:
            raise ConfigError(f"{path} lacks {key}: {_example(key)}")
    if trials is None:
        raise ConfigError(f"{path} lacks trials: {_example('trials')}")
    given = {"length": 512, "batch": 8, **data["data"]}
    _check(where, "[data]", given, DATA)
    if "train" not in given:
        raise ConfigError(f"{path}: [data] lacks train: {_example('data')}")
    for key in ("length", "batch"):
        if given[key] < 1:
            raise ConfigError(f"{path}: [data] {key} must be at least 1, got {given[key]}")
    options = data.get("sweep", {})
    _check(where, "[sweep]", options, SWEEP)
    if "eval" in given and "eval" in options:
        raise ConfigError(
            f"{path}: [data] eval are batches and [sweep] eval is a function; give one of them"
        )
    dtype = data.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"{path}: dtype must be one of {list(DTYPES)}, got {dtype!r}")
    return SweepConfig(
        where, data["base"], dtype,
        data.get("device", "cuda" if torch.cuda.is_available() else "cpu"),
        where.parent / data["directory"], _trials(where, trials), given, options,
    )  # fmt: skip


def _example(key: str) -> str:
    return {
        "base": 'write base = "path/or/hub-id", or "module:function"',
        "directory": 'write directory = "out/first", for its log, checkpoints and adapters',
        "data": 'write [data] and train = "train.jsonl", or "module:function"',
        "trials": 'write [[trials]] and method = "LoRA", r = [4, 8], lr = [1e-3, 1e-2]',
    }[key]


def _check(path: Path, table: str, found: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key, value in found.items():
        if key not in known:
            raise ConfigError(f"{path}: {table} has no key {key!r}; {_near(key, known)}")
        kinds = known[key] if isinstance(known[key], tuple) else (known[key],)
        if type(value) not in kinds:
            wanted = " or ".join(_kind(k) for k in kinds)
            raise ConfigError(f"{path}: {table}: {key} must be {wanted}, got {value!r:.80}")


def _kind(kind: type) -> str:
    return {str: "a string", int: "a whole number", bool: "true or false", dict: "a table"}[kind]


def _near(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), 3, 0.5)
    return f"near keys are {near}" if near else f"there are {sorted(known)}"


def _trials(path: Path, tables: Any) -> list[Trial]:
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"{path}: trials must be tables: {_example('trials')}")
    found = []
    for number, table in enumerate(tables, 1):
        try:
            found += _trial(dict(table))
        except FadaptError as error:
            raise ConfigError(f"{path}: [[trials]] {number}: {error}") from error
    try:
        names_of(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return found


def _trial(table: dict[str, Any]) -> list[Trial]:
    """The trials of one table: every combination of its lists."""
    method = _method(table.pop("method", None))
    target, name = table.pop("target", None), table.pop("name", None)
    where = {key: table.pop(key) for key in WHERE if key in table}
    if "dtype" in where:
        if where["dtype"] not in DTYPES:
            raise ConfigError(f"dtype must be one of {list(DTYPES)}, got {where['dtype']!r}")
        where["dtype"] = getattr(torch, where["dtype"])
    if target is not None and not isinstance(target, str):
        raise ConfigError(f"target must be a pattern such as 'q_proj|v_proj', got {target!r}")
    own = {f.name for f in dataclasses.fields(method)} | {
        f.name for f in dataclasses.fields(Trial) if f.name not in ("config", "name")
    }
    if unknown := [key for key in table if key not in own]:
        more = ["method", "target", "name", *WHERE]
        raise ConfigError(
            f"no key {unknown[0]!r} for {method.__name__}; {_near(unknown[0], {*own, *more})}"
        )
    found = grid(method, **table)
    if name is not None:
        found = [dataclasses.replace(trial, name=name) for trial in found]
    if target is None and not where:
        return found
    made = []
    for trial in found:
        rules: Any = trial.config if target is None else {target: trial.config}
        made.append(dataclasses.replace(trial, config=Config(rules, **where)))
    return made


def _method(name: Any) -> type[Method]:
    if not isinstance(name, str):
        raise ConfigError(f'method must be a name such as "LoRA", got {name!r}')
    if is_named(name):
        found = named(name, "method")
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise ConfigError(f"{name} is no class of a method")
        return found
    return method_class(name)


def _checked(path: Path, cls: Any, fields: Mapping[str, Any]) -> Any:
    try:
        return cls(**fields)
    except (TypeError, FadaptError) as error:
        raise ConfigError(f"{path}: [sweep] halving: {error}") from error
