"""Fingerprints of data and of functions, in words that an error can show."""

from __future__ import annotations

import dis
import functools
import hashlib
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType, NoneType
from typing import Any

from torch import Tensor, nn

from ..base.fingerprint import fingerprint
from ..base.torch_private import pytree

SAMPLED = 1024
"""Batches of a list that count."""
DEPTH = 4
"""Of functions in functions, and of data sets in data sets."""


def data_of(data: Any, depth: int = DEPTH) -> str:
    """In words and a fingerprint, what batches or a data set hold.

    Lists and tensors by their values; what makes its items when it is asked, perhaps at random, by
    its class and length.
    """
    kind = type(data).__name__
    if data is None or isinstance(data, Iterator) or depth == 0:
        return kind
    size = f" of {len(data)}" if hasattr(data, "__len__") else ""
    if isinstance(data, (list, tuple)):
        step = max(1, -(-len(data) // SAMPLED))
        return f"{kind}{size}, {_digest(_values(list(data[::step])))}"
    inner = [n for n in ("dataset", "tensors") if hasattr(data, n)]
    parts = [f"{n}={data_of(getattr(data, n), depth - 1)}" for n in inner]
    parts += [f"{n}={getattr(data, n)!r}" for n in ("batch_size", "drop_last") if hasattr(data, n)]
    return " ".join([kind + size, *parts])


def batch_of(batch: Any) -> str:
    """A fingerprint of one batch."""
    return _digest(_values(batch))


def code_of(function: Any, depth: int = DEPTH) -> str:
    """The name of a function, a fingerprint of its code, and the values that it closes over.

    A method or a callable object counts by its class and by the plain attributes that a call does
    not set; functions that it calls by their names, and those that it holds by their code.
    """
    if function is None or depth == 0:
        return type(function).__name__
    if isinstance(function, functools.partial):
        values = {**dict(enumerate(function.args)), **function.keywords}
        inner = code_of(function.func, depth - 1)
        return f"partial of {inner}, {_digest(_values(list(values.items())))}"
    if isinstance(function, MethodType):
        return f"{code_of(function.__func__, depth - 1)}{_attributes(function.__self__, depth)}"
    if isinstance(function, nn.Module):
        return f"{function!r}{_attributes(function, depth)}"
    if isinstance(function, FunctionType):
        digest = hashlib.sha256()
        for piece in _code(function.__code__):
            digest.update(piece.encode() + b"\0")
        for piece in _constants(function, depth):
            digest.update(piece.encode() + b"\0")
        return f"{function.__qualname__}, code {digest.hexdigest()[:12]}"
    if hasattr(function, "__qualname__"):  # a class, or a function in C
        return function.__qualname__
    call = code_of(type(function).__call__, depth - 1)
    return f"{type(function).__name__}: {call}{_attributes(function, depth)}"


def _code(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield from (*code.co_names, *code.co_varnames, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        elif isinstance(constant, frozenset):
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _attributes(instance: Any, depth: int) -> str:
    """Of an object's attributes, those that only its making sets; not the functions, callbacks."""
    attributes = {
        name: value
        for name, value in getattr(instance, "__dict__", {}).items()
        if name != "training" and not isinstance(value, (FunctionType, MethodType, NoneType))
    }
    for cls in type(instance).__mro__[:-1]:
        for name, member in vars(cls).items():
            if cls is not nn.Module and name != "__init__" and isinstance(member, FunctionType):
                for step in dis.get_instructions(member.__code__):
                    if step.opname == "STORE_ATTR":
                        attributes.pop(step.argval, None)
    pieces = [piece for n, value in attributes.items() for piece in _plain(n, value, depth)]
    return f", {_digest(pieces)}" if pieces else ""


def _plain(name: Any, value: Any, depth: int) -> Iterator[str]:
    if value is None or isinstance(value, (bool, int, float, str)):
        yield f"{name}={value!r}"
    elif isinstance(value, tuple):
        for at, item in enumerate(value):
            yield from _plain(f"{name}.{at}", item, depth)
    elif isinstance(value, Tensor):
        if value.numel() <= SAMPLED:
            yield f"{name}={fingerprint(value)}"
    elif callable(value):
        yield f"{name}={code_of(value, depth - 1)}"


def _constants(function: FunctionType, depth: int) -> Iterator[str]:
    """Defaults and what is closed over, but for what the function itself sets."""
    named: dict[Any, Any] = dict(function.__kwdefaults__ or {})
    named |= dict(enumerate(function.__defaults__ or ()))
    own = {i.argval for i in dis.get_instructions(function.__code__) if i.opname == "STORE_DEREF"}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if name not in own:
            named[name] = value
    for name, value in named.items():
        yield from _plain(name, value, depth)


def _values(tree: Any) -> Iterator[str]:
    leaves, spec = pytree.tree_flatten(tree)
    yield str(spec)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            yield fingerprint(leaf)
        elif leaf is None or isinstance(leaf, (bool, int, float, str, bytes)):
            yield repr(leaf)
        else:
            yield type(leaf).__qualname__


def _digest(pieces: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode(errors="replace") + b"\0")
    return digest.hexdigest()[:16]
