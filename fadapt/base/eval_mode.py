"""A model in eval mode for a while, and passes that must not fall into it.

The flags are one for all threads. So training passes and evaluations of a model, or of models that
share modules, take turns: any number of the one kind at a time, or of the other.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from torch import nn

from .leaving import Block

# Held by ``with`` alone, whose enter and exit are then single C calls: no interrupt keeps it.
_lock = threading.RLock()
_turns: list[_Turn] = []


def modules_by_id(model: nn.Module) -> dict[int, nn.Module]:
    """What a turn has to itself."""
    return {id(module): module for module in model.modules()}


class _Turn(Block):
    """A turn.

    Args:
        model: whose modules it has to itself.
        modules: these, where they are known.
    """

    def __init__(self, model: nn.Module, modules: dict[int, nn.Module] | None = None):
        self.modules = modules_by_id(model) if modules is None else modules
        self.thread, self.has = threading.get_ident(), False

    def __enter__(self) -> None:
        with _lock:
            _turns.append(self)
        while not self._take():
            time.sleep(0.001)  # rarely: threads that train and evaluate one model at a time

    def _take(self) -> bool:
        with _lock:
            others = [t for t in _turns if t is not self and t.modules.keys() & self.modules.keys()]
            nested = any(t.has and t.thread == self.thread for t in others)
            # An evaluation that waits goes before a pass that comes later, else it might for ever.
            if not nested and any(
                type(t) is not type(self) and (t.has or isinstance(t, evaluating)) for t in others
            ):
                return False
            self.has = True
            self.begin()
            return True

    def begin(self) -> None:
        """Called when it is this one's turn."""

    def end(self) -> None:
        """Called when it is over; more than once after an interrupt."""

    def undo(self) -> None:
        with _lock:
            self.has = False
            if self in _turns:
                _turns.remove(self)
            self.end()


class _Flagged(_Turn):
    """All flags set to one value; every module's own flag is restored."""

    flag: bool
    own: dict[int, tuple[dict[str, Any], bool]]
    """{id of a module whose flag is set: (its attributes, its own flag)}, of all such blocks."""

    def begin(self) -> None:
        # Not model.eval(), which a model may override.
        for key, module in self.modules.items():
            attributes = module.__dict__
            self.own.setdefault(key, (attributes, attributes["training"]))
            attributes["training"] = self.flag

    def end(self) -> None:
        kind = type(self)
        still = [t.modules.keys() for t in _turns if t.has and type(t) is kind]
        for key in self.modules:
            if key in self.own and not any(key in keys for keys in still):
                attributes, flag = self.own[key]
                attributes["training"] = flag
                del self.own[key]


class training_pass(_Turn):  # noqa: N801
    """A forward and backward pass of a sweep or a fit: never in another thread's evaluation."""


class evaluating(_Flagged):  # noqa: N801
    """The model in eval mode."""

    flag, own = False, {}


class training(_Flagged):  # noqa: N801
    """The model in training mode."""

    flag, own = True, {}
