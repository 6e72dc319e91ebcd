"""Checks of the arguments of calls, before anything is done with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

from .errors import ConfigError, FadaptError
from .fields import LARGEST_INT


def check_flags(error: type[FadaptError] = ConfigError, /, **flags: Any) -> None:
    """Refuses what is not True or False: "no", and much else, would count as True.

    Raises:
        FadaptError: of the given class; names the argument and the value.
    """
    for name, value in flags.items():
        if value is not True and value is not False:
            raise error(f"{name} must be True or False, got {value!r:.80}")


def check_function(
    name: str,
    value: Any,
    write: str,
    error: type[FadaptError] = ConfigError,
    needed: bool = False,
) -> None:
    """Refuses what cannot be called and is not None, or is None where it is ``needed``."""
    if not (callable(value) or (value is None and not needed)):
        what = "" if needed else " or None"
        raise error(f"{name} must be a function{what}, got {value!r:.80}; write {write}")


def check_int(name: str, value: Any, least: int, error: type[FadaptError] = ConfigError) -> None:
    """Refuses what is not an int from ``least``; bools and floats are not."""
    if type(value) is not int or not least <= value <= LARGEST_INT:
        raise error(f"{name} must be an int from {least} to {LARGEST_INT}, got {value!r:.80}")


def listed(name: str, value: Any, write: str, error: type[FadaptError] = ConfigError) -> list[Any]:
    """The items of a list, tuple, iterator or other iterable that has an order.

    Raises:
        FadaptError: of the given class; something else, a string, a set or a mapping among them.
    """
    ordered = isinstance(value, Iterable) and not isinstance(
        value, (str, bytes, Mapping, set, frozenset)
    )
    try:
        if ordered:
            return list(value)
        why = ""
    # An array or tensor without axes, a file that is closed: what it says is the reason.
    except Exception as failed:
        why = f" ({failed})"
    raise error(f"{name} must be a list, got {value!r:.80}{why}; write {write}")


def is_many(value: Any) -> bool:
    """Whether it may hold batches, also by ``__getitem__`` alone; looks at no element.

    Numbers of numpy and tensors without axes have the methods, and nothing to give.
    """
    reads = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return reads and not isinstance(value, (str, bytes, type)) and getattr(value, "shape", 1) != ()


def check_processes(group: Any, error: type[FadaptError] = ConfigError) -> None:
    """Refuses to exchange anything where there is no process group, or another than given."""
    if not (dist.is_available() and dist.is_initialized()):
        raise error(
            "there is no process group: start the script with torchrun and call "
            "torch.distributed.init_process_group() first, or leave this out in one process"
        )
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise error(
            f"group must be what torch.distributed.new_group returned, or None, got {group!r:.80}"
        )
