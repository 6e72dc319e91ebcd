"""One check of all hyper-parameters, from the annotations of a dataclass."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import inspect
import math
import numbers
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union

from .errors import ConfigError

LARGEST_INT = 2**31
LARGEST = 1e12
"""Products of a few such numbers do not overflow float32, in which adapters compute."""

Namespace = dict[str, Any]


def check_fields(instance: Any) -> None:
    """Checks every field of a frozen dataclass against its annotation.

    Numbers of other libraries become Python's own, and lists become tuples, so that an instance can
    be compared, hashed and written to a file.

    Raises:
        ConfigError: a value of another type, not finite, absurdly large, or not hashable. Names
            the class, the field, the value and what to write.
    """
    for field in dataclasses.fields(instance):
        if not hasattr(instance, field.name):  # init=False, set later by __post_init__
            continue
        value = getattr(instance, field.name)
        try:
            new = _checked(value, _hints(type(instance)).get(field.name, Any))
        except _Misfit as misfit:
            raise ConfigError(
                f"{type(instance).__name__}.{field.name} must be {misfit.wanted}, got {value!r}; "
                f"write {_example(instance, field, misfit)}"
            ) from None
        if new is not value:
            object.__setattr__(instance, field.name, new)


class _Misfit(Exception):  # noqa: N818
    def __init__(self, wanted: str, instead: Any = dataclasses.MISSING):
        super().__init__(wanted)
        self.wanted, self.instead = wanted, instead


def _example(instance: Any, field: dataclasses.Field, misfit: _Misfit) -> str:
    name, value = type(instance).__name__, misfit.instead
    if value is dataclasses.MISSING:
        value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return f"{name}({field.name}=...) with such a value"
    return f"{name}({field.name}={value!r})"


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    """{field: annotation}. One that cannot be evaluated counts as Any."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        scope: Namespace = {**vars(builtins), **vars(typing)}
        scope.update(vars(sys.modules.get(base.__module__, builtins)))
        scope[base.__name__] = base
        for name, hint in inspect.get_annotations(base).items():
            if isinstance(hint, str):
                try:
                    hint = eval(hint, scope, dict(vars(base)))
                except Exception:  # a name that only a type checker imports
                    hint = Any
            found[name] = hint
    return found


def _checked(value: Any, hint: Any) -> Any:
    """The value as the annotation has it, or a _Misfit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _checked(value, arguments[0])
    if origin is Literal:
        if not any(type(value) is type(a) and value == a for a in arguments):
            raise _Misfit(f"one of {', '.join(map(repr, arguments))}", arguments[0])
        return value
    if origin in (Union, types.UnionType):
        return _of_any(value, arguments)
    if hint is None or hint is type(None):
        if value is not None:
            raise _Misfit("None", None)
        return value
    if hint is bool:
        if type(value).__name__ in ("bool", "bool_"):
            return bool(value)
        raise _Misfit("True or False")
    if hint is int:
        return _integer(value)
    if hint is float:
        return _real(value)
    if hint is str:
        if not isinstance(value, str):
            raise _Misfit("a string")
        return value
    if origin is tuple or hint is tuple:
        return _tuple(value, arguments)
    if isinstance(hint, type) and origin is None and hint not in (Any, object):
        if not isinstance(value, hint):
            what = f"an instance of {hint.__name__}"
            own = isinstance(value, type) and issubclass(value, hint)
            raise _Misfit(f"{what}, with brackets" if own else what)
        return _hashable(value)
    return _hashable(value)


def _of_any(value: Any, hints: tuple[Any, ...]) -> Any:
    misfits = []
    for hint in hints:
        try:
            return _checked(value, hint)
        except _Misfit as misfit:
            misfits.append(misfit)
    raise _Misfit(" or ".join(m.wanted for m in misfits))


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _Misfit("an int", *_as_int(value))
    if abs(int(value)) > LARGEST_INT:
        raise _Misfit(f"an int of magnitude {LARGEST_INT} at most")
    return value if type(value) is int else int(value)


def _as_int(value: Any) -> Iterator[int]:
    if isinstance(value, bool):
        return
    try:
        as_float = float(value)
        if as_float.is_integer() and abs(as_float) < LARGEST_INT:
            yield int(as_float)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _Misfit("a number", *_as_float(value))
    try:
        as_float = float(value)
    except OverflowError:
        as_float = math.inf
    if not math.isfinite(as_float):
        raise _Misfit("a finite number")
    if abs(as_float) > LARGEST:
        raise _Misfit(f"a number of magnitude {LARGEST:.0e} at most")
    return value if isinstance(value, (int, float)) and type(value) in (int, float) else as_float


def _as_float(value: Any) -> Iterator[float]:
    if isinstance(value, bool):
        return
    try:
        if math.isfinite(as_float := float(value)):
            yield as_float
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass


def _tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    what = "a tuple"
    if len(hints) == 2 and hints[1] is Ellipsis and isinstance(hints[0], type):
        what = f"a tuple of {hints[0].__name__}"
    if not isinstance(value, (tuple, list, Iterator)):
        alone = ()
        if len(hints) == 2 and hints[1] is Ellipsis:
            with contextlib.suppress(_Misfit):
                alone = ((_checked(value, hints[0]),),)
        raise _Misfit(what, *alone)
    items = tuple(value)
    if len(hints) == 2 and hints[1] is Ellipsis:
        items_hints: tuple[Any, ...] = (hints[0],) * len(items)
    else:
        items_hints = hints if hints and hints != ((),) else (Any,) * len(items)
    if len(items_hints) != len(items):
        raise _Misfit(f"a tuple of {len(items_hints)}")
    try:
        new = tuple(_checked(v, h) for v, h in zip(items, items_hints, strict=True))
    except _Misfit as misfit:
        raise _Misfit(f"{what}, each {misfit.wanted}") from None
    if isinstance(value, tuple) and all(a is b for a, b in zip(new, value, strict=True)):
        return value
    return new


def _hashable(value: Any) -> Any:
    """What has no narrower annotation: lists become tuples, numbers must be finite."""
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return _tuple(value, ())
    what = "None, a number, a string, a method, or a tuple of them"
    if hasattr(value, "untyped_storage"):  # tensors hash by identity: equal ones would differ
        raise _Misfit(what)
    try:
        hash(value)
    except TypeError:
        raise _Misfit(what) from None
    if isinstance(value, float) and value != value:
        raise _Misfit("equal to itself, which NaN is not")
    return value
