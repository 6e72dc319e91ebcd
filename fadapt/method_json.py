"""Methods as JSON data: by name and fields; no code is chosen by a file."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Mapping
from typing import Any, cast

from .errors import ConfigError, FadaptWarning
from .method import Method

MAX_DEPTH = 16
"""How deep methods, and tuples in their fields, may hold each other in a file."""


def method_to_json(method: Method, depth: int = 0) -> dict[str, Any]:
    """{"method": name, "fields": {field: value}}; nested methods likewise.

    Raises:
        ConfigError: a field that JSON cannot hold, or methods nested too deep.
    """
    fields = {}
    for field in (f for f in dataclasses.fields(method) if f.init):
        try:
            fields[field.name] = _to_json(getattr(method, field.name), depth + 1)
        except TypeError as error:
            raise ConfigError(
                f"{type(method).__name__}.{field.name}: {error}; a method's fields must be None, "
                "numbers, strings, methods, or tuples of them"
            ) from error
    key = method_key(type(method))
    if key.startswith("__main__:"):
        warnings.warn(
            f"a file that holds {key} loads only where a script defines {type(method).__name__} "
            f'itself; give the class a name for files: name = "my_project:{type(method).__name__}"',
            FadaptWarning,
            stacklevel=2,
        )
    return {"method": key, "fields": fields}


def method_from_json(data: Mapping[str, Any], depth: int = 0) -> Method:
    """The inverse of :func:`method_to_json`, over the Method classes defined in this process.

    Nothing is imported by name, so a file cannot choose code to run.

    Raises:
        ConfigError: an unknown method or field, or a value that the method refuses.
    """
    fields = {k: _from_json(v, depth + 1) for k, v in data["fields"].items()}
    key = data.get("method")
    classes = _classes()
    if key not in classes:
        known = sorted(k for k, c in classes.items() if "._" not in c.__module__)
        raise ConfigError(
            f"unknown method {key!r}; this process knows {known}. "
            "Import the module that defines it first, or update fadapt"
        )
    try:
        return classes[cast(str, key)](**fields)
    except TypeError as error:
        raise ConfigError(f"method {key!r} does not take the fields {fields}: {error}") from error


def method_class(key: str) -> type[Method]:
    """The class of a name in files.

    Raises:
        ConfigError: a name that this process does not know, with those that are near.
    """
    classes = _classes()
    if key not in classes:
        known = sorted(k for k, c in classes.items() if "._" not in c.__module__)
        near = difflib.get_close_matches(key, known, 3, 0.5)
        hint = f"near names are {near}" if near else f"this process knows {known}"
        raise ConfigError(f"unknown method {key!r}; {hint}")
    return classes[key]


def method_key(cls: type[Method]) -> str:
    """A method's name in files: bare for fadapt's own; for others ``name`` or module:Class.

    Raises:
        ConfigError: a ``name`` that belongs to fadapt.
    """
    if _is_own(cls):
        return cls.__name__
    name = vars(cls).get("name")  # its own: a subclass is another method
    is_field = any(f.name == "name" for f in dataclasses.fields(cls))
    if not isinstance(name, str) or not name or is_field:
        return f"{cls.__module__}:{cls.__qualname__}"
    if any(_is_own(c) and c.__name__ == name for c in _subclasses(Method)):
        raise ConfigError(
            f"{cls.__qualname__}.name = {name!r} is fadapt's own; write another, such as "
            f"{cls.__module__ + ':' + cls.__name__!r}"
        )
    return name


def _is_own(cls: type[Method]) -> bool:
    return cls.__module__.split(".")[0] == __name__.split(".")[0]


def _classes() -> dict[str, type[Method]]:
    """All classes by their names in files, and where these do not clash by their former names."""
    every = _subclasses(Method)
    classes = {method_key(cls): cls for cls in every}
    for cls in every:
        for alias in vars(cls).get("aliases", ()):
            classes.setdefault(alias, cls)
    return classes


def _subclasses(cls: type[Method]) -> list[type[Method]]:
    return [s for c in cls.__subclasses__() for s in (c, *_subclasses(c))]


def _to_json(value: Any, depth: int) -> Any:
    _check_depth(depth)
    if isinstance(value, Method):
        return method_to_json(value, depth)
    if isinstance(value, (tuple, list)):
        return [_to_json(v, depth + 1) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot save {value!r}")


def _from_json(value: Any, depth: int) -> Any:
    _check_depth(depth)
    if isinstance(value, Mapping) and "method" in value:
        return method_from_json(value, depth)
    if isinstance(value, list):
        return tuple(_from_json(v, depth + 1) for v in value)
    return value


def _check_depth(depth: int) -> None:
    if depth > 2 * MAX_DEPTH:  # a method in a tuple is two levels
        raise ConfigError(f"methods are nested more than {MAX_DEPTH} deep")
