"""Config: which parameters are adapted, by which method, in which dtype."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from .errors import ConfigError
from .method import Method

ROLES = ("reader", "writer", "inner")
DEFAULT_EXCLUDE = ("lm_head", "embed_tokens")

Rules = Method | Mapping[str, Method | None]


@dataclass(frozen=True)
class Config:
    """What to adapt, and how.

    Args:
        rules: a method for every linear map, or {regex: method or None}. Patterns are searched in
            parameter names (``model.layers.0.self_attn.q_proj.weight``); the first match wins,
            None leaves a parameter alone, and a rule that takes effect nowhere is an error.
        layers: only these layer indices (the first number in a name); negative ones count from
            the last layer. None means all.
        roles: only these roles: "reader" (reads the residual stream: its input is residual wide),
            "writer" (its output is), "inner" (neither). Empty means all.
        exclude: patterns never adapted.
        dtype: of the adapters and their arithmetic; None means float32, or float64 over a
            float64 base.
        seed: of the initial values. A site's start depends on the seed and its name alone.

    Raises:
        ConfigError: a value of the wrong type, a pattern that does not compile, an unknown role.
    """

    rules: Rules
    layers: Iterable[int] | None = None
    roles: tuple[str, ...] = ()
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rules = self.rules
        if isinstance(rules, type):
            raise ConfigError(f"{rules.__name__} is a class; write an instance: {rules.__name__}()")
        if isinstance(rules, Mapping):
            for pattern, method in rules.items():
                _check_pattern(pattern, "rule")
                if method is not None and not isinstance(method, Method):
                    raise ConfigError(
                        f"rule {pattern!r}: expected a method or None, got {method!r}; "
                        f"write {{{pattern!r}: fadapt.LoRA(r=8)}}"
                    )
            if not rules:
                raise ConfigError("rules is empty; write {regex: method} or a method for all")
            object.__setattr__(self, "rules", dict(rules))
        elif not isinstance(rules, Method):
            raise ConfigError(
                f"rules must be a method or a {{regex: method}} dict, got {rules!r}; "
                'write fadapt.LoRA(r=8) or {"q_proj|v_proj": fadapt.LoRA(r=8)}'
            )
        if self.layers is not None:
            layers = tuple(self.layers) if isinstance(self.layers, Iterable) else ()
            if not layers or not all(type(i) is int for i in layers):
                raise ConfigError(
                    "layers must be layer indices such as [0] or [-1], or None for all; got "
                    f"{self.layers!r}"
                )
            object.__setattr__(self, "layers", layers)
        roles = _strings(self.roles, "roles")
        if unknown := [r for r in roles if r not in ROLES]:
            raise ConfigError(f"unknown roles {unknown}; choose from {list(ROLES)}")
        object.__setattr__(self, "roles", roles)
        exclude = _strings(self.exclude, "exclude")
        for pattern in exclude:
            _check_pattern(pattern, "exclude")
        object.__setattr__(self, "exclude", exclude)
        if self.dtype is not None and not (
            isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        ):
            raise ConfigError(f"dtype must be a floating torch.dtype or None, got {self.dtype!r}")
        if not isinstance(self.seed, int):
            raise ConfigError(f"seed must be an int, got {self.seed!r}")

    @property
    def rule_list(self) -> tuple[tuple[str, Method | None], ...]:
        """The rules as (pattern, method) pairs; a bare method is the pattern ''."""
        if isinstance(self.rules, Method):
            return (("", self.rules),)
        return tuple(self.rules.items())

    def __hash__(self) -> int:
        return hash((self.rule_list, self.layers, self.roles, self.exclude, self.dtype, self.seed))


def as_config(cfg: Config | Rules) -> Config:
    """A Config from a method, a {pattern: method} dict or a Config."""
    return cfg if isinstance(cfg, Config) else Config(cfg)


def method_to_json(method: Method) -> dict[str, Any]:
    """{"method": name, "fields": {field: value}}; nested methods likewise.

    Raises:
        ConfigError: a field that JSON cannot hold.
    """
    fields = {}
    for field in (f for f in dataclasses.fields(method) if f.init):
        try:
            fields[field.name] = _to_json(getattr(method, field.name))
        except TypeError as error:
            raise ConfigError(
                f"{type(method).__name__}.{field.name}: {error}; a method's fields must be None, "
                "numbers, strings, methods, or tuples of them"
            ) from error
    return {"method": method_key(type(method)), "fields": fields}


def method_from_json(data: Mapping[str, Any]) -> Method:
    """The inverse of :func:`method_to_json`, over the Method classes defined in this process.

    Nothing is imported by name, so a file cannot choose code to run.

    Raises:
        ConfigError: an unknown method or field, or a value that the method refuses.
    """
    fields = {k: _from_json(v) for k, v in data["fields"].items()}
    key = data.get("method")
    classes = {method_key(cls): cls for cls in _subclasses(Method)}
    if key not in classes:
        raise ConfigError(
            f"unknown method {key!r}; this process knows {sorted(classes)}. "
            "Import the module that defines it first, or update fadapt"
        )
    try:
        return classes[cast(str, key)](**fields)
    except TypeError as error:
        raise ConfigError(f"method {key!r} does not take the fields {fields}: {error}") from error


def config_to_json(config: Config) -> dict[str, Any]:
    """A Config as JSON data."""
    return {
        "rules": [[p, m and method_to_json(m)] for p, m in config.rule_list],
        "layers": config.layers and list(config.layers),
        "roles": list(config.roles),
        "exclude": list(config.exclude),
        "dtype": config.dtype and str(config.dtype).removeprefix("torch."),
        "seed": config.seed,
    }


def config_from_json(data: Mapping[str, Any]) -> Config:
    """The inverse of :func:`config_to_json`."""
    rules = {p: m and method_from_json(m) for p, m in data["rules"]}
    return Config(
        rules=rules[""] if list(rules) == [""] and rules[""] is not None else rules,
        layers=data["layers"],
        roles=tuple(data["roles"]),
        exclude=tuple(data["exclude"]),
        dtype=data["dtype"] and getattr(torch, data["dtype"]),
        seed=data["seed"],
    )


def method_key(cls: type[Method]) -> str:
    """A method's name in files: bare for fadapt's own, module-qualified for others."""
    own = cls.__module__.split(".")[0] == __name__.split(".")[0]
    return cls.__name__ if own else f"{cls.__module__}:{cls.__qualname__}"


def _subclasses(cls: type[Method]) -> list[type[Method]]:
    return [s for c in cls.__subclasses__() for s in (c, *_subclasses(c))]


def _to_json(value: Any) -> Any:
    if isinstance(value, Method):
        return method_to_json(value)
    if isinstance(value, (tuple, list)):
        return [_to_json(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot save {value!r}")


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping) and "method" in value:
        return method_from_json(value)
    if isinstance(value, list):
        return tuple(_from_json(v) for v in value)
    return value


def _strings(value: Any, what: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise ConfigError(f"{what} must be a tuple of strings, () for none; got {value!r}")
    return tuple(value)


def _check_pattern(pattern: Any, what: str) -> None:
    try:
        if not isinstance(pattern, str):
            raise TypeError("expected a str")
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(f"{what} {pattern!r} is not a regular expression: {error}") from error
