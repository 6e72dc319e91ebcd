"""The base model and other objects that a command's arguments and a config name in words."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
NAMED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_named(text: str) -> bool:
    """Whether a text is ``module:name``, an object of Python's."""
    return NAMED.fullmatch(text) is not None and not os.path.exists(text)


def named(text: str, what: str) -> Any:
    """The object that ``module:name`` names.

    The module is looked for as Python does, and first in the present directory.

    Raises:
        ConfigError: no such module, or nothing of that name in it.
    """
    if not is_named(text):
        raise ConfigError(f"{what} is {text!r}; write module:name, such as my_project.data:batches")
    module, _, path = text.partition(":")
    with importable_from(Path.cwd()):
        try:
            found: Any = importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"{what}: {module} cannot be imported: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{what}: {module} has no {path}")
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def importable_from(directory: Path) -> Iterator[None]:
    """Inside, modules that lie in a directory can be imported."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(directory))


def load_base(text: str, dtype: Dtype | None = None, device: str = "cpu") -> nn.Module:
    """A frozen model in eval mode.

    Args:
        text: a directory or Hub id of a causal language model of transformers; or ``module:name``,
            a function without arguments that returns any model.
        dtype: of its weights; None means as they are stored.
        device: where to.

    Raises:
        ConfigError: it cannot be loaded, with the reason.
    """
    if is_named(text):
        model = call(text, "base")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"base: {text} returned a {type(model).__name__}, not a model")
        model = model if dtype is None else model.to(getattr(torch, dtype))
    else:
        model = _pretrained(text, "auto" if dtype is None else getattr(torch, dtype))
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"the base cannot be moved to the device {device!r}: {error}") from error
    return model.eval().requires_grad_(False)


def call(text: str, what: str) -> Any:
    """What the function named returns, called without arguments.

    Raises:
        ConfigError: no such function.
    """
    function = named(text, what)
    if not callable(function):
        raise ConfigError(f"{what}: {text} is a {type(function).__name__}, not a function")
    return function()


def load_tokenizer(text: str) -> Any:
    """The tokenizer that belongs to a base.

    Raises:
        ConfigError: there is none.
    """
    transformers = transformers_package()
    try:
        return transformers.AutoTokenizer.from_pretrained(text)
    # Whatever a damaged directory leads to is said of it.
    except Exception as error:
        raise ConfigError(f"the tokenizer of {text!r} cannot be loaded: {_first(error)}") from error


def _pretrained(text: str, dtype: Any) -> nn.Module:
    transformers = transformers_package()
    try:
        with without_bars(transformers):
            return transformers.AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
    except Exception as error:
        raise ConfigError(
            f"the base {text!r} cannot be loaded as a causal language model of transformers "
            f"({_first(error)}); for any other model write module:name, a function that returns it"
        ) from error


@contextlib.contextmanager
def without_bars(transformers: Any) -> Iterator[None]:
    """Inside, transformers draws no progress bars."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def transformers_package() -> Any:
    """Transformers.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            "a base by its directory or Hub id needs transformers: pip install 'fadapt[hf]'; or "
            "write module:name, a function that returns a model"
        ) from error


def _first(error: Exception) -> str:
    """The first sentence or so of an error that may be a page long."""
    return " ".join(str(error).split())[:300] or type(error).__name__
