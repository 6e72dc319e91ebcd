"""Methods and configs as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch

from ..config import Config
from ..errors import ConfigError
from ..method import Method


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
