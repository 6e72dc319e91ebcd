"""What one call sees of a model: other tensors in the place of its own, for nobody else.

A module finds its parameters in a dict. For the time of a call another dict stands in its place,
which answers the call with the call's own tensors, and everybody else (other threads, other
tasks, a plain call of the model from anywhere) with the module's. Which call asks is known from a
context variable. The dict of the module itself is never written to, so that what an interrupt may
leave behind changes nothing.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..errors import FadaptError, TargetError
from .flow import is_step, models_own
from .leaving import Block
from .torch_private import (
    BUFFERS,
    CALL,
    PARAMETERS,
    hand_to_backward,
    handed_to_backward,
    in_backward,
    is_move,
)

TENSORS = (PARAMETERS, BUFFERS)

Place = tuple[int, str]
"""(id of a module, name of an attribute)."""

_ABSENT: Any = object()
_active: ContextVar[View | None] = ContextVar("fadapt.view", default=None)
_TLS = "fadapt.view"
# Held for dict operations only, by ``with``, whose enter and exit are then single C calls; a
# garbage collection within may come here again.
_lock = threading.RLock()


class OnRead:
    """What a call sees of a tensor that is made of the module's own when it is read.

    Args:
        make: from the module's own tensor, as it is then.
        passes_writes: whether what is written meanwhile becomes the module's own.
    """

    __slots__ = ("make", "passes_writes", "same")

    def __init__(self, make: Callable[[Any], Any], passes_writes: bool = False, same: bool = False):
        self.make, self.passes_writes, self.same = make, passes_writes, same


class View(Block):
    """A model as one call sees it: a block, inside which this context sees it so.

    Args:
        model: whose modules are seen so; those of other models are seen as without this block.
        modules: the ids of all modules of the model.
        seen: {place: what is seen there}: for PARAMETERS and BUFFERS a dict of tensors by
            their names, for others the attribute itself.
        places: (module, attribute) of every place in ``seen``.
        owner: the params of a ``bound`` block, else None.
        recomputes: whether it is open again for what a checkpoint recomputes.

    Attributes:
        open: whether it is.
        grad: whether gradients were enabled when it was entered.
        pending: whether a checkpointed section of a ``bound`` block is still to be recomputed.
        copies: what is to live as long as the block.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: frozenset[int],
        seen: dict[Place, Any],
        places: list[tuple[nn.Module, str]],
        owner: Any = None,
        recomputes: bool = False,
    ):
        self.model, self.modules, self.seen, self.places = model, modules, seen, places
        self.owner, self.recomputes = owner, recomputes
        self.outer: View | None = None
        self.open = self.pending = False
        self.copies: dict[str, Any] = {}
        self.grad, self.thread = torch.is_grad_enabled(), threading.get_ident()

    def again(self) -> View:
        """The same view, to be opened again: for what a checkpoint recomputes."""
        return View(self.model, self.modules, self.seen, self.places, recomputes=True)

    def runs(self) -> bool:
        """Whether a module of the model is being called, in this thread, as it asks."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is CALL and id(frame.f_locals.get("self")) in self.modules:
                return True
            frame = frame.f_back
        return False

    def __enter__(self) -> nn.Module:
        self.outer, self.open = _active.get(), True
        _put(self)
        if self.owner is not None:
            hand_to_backward(_TLS, weakref.ref(self))
        _active.set(self)
        return self.model

    def undo(self) -> None:
        self.open = False
        if _active.get() is self:
            outer = self.outer
            while outer is not None and not outer.open:
                outer = outer.outer
            _active.set(outer)
        _take_away(self)


def own_tensors(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The module's own parameters or buffers, also within a call that sees others."""
    # Not isinstance, which the abstract class behind a ScopedTensors answers in Python.
    return tensors.own if type(tensors) is ScopedTensors else tensors


def open_view(module: int | None = None) -> View | None:
    """The innermost open view of this context; with the id of a module, one that has it."""
    view = _active.get() or _view_of_backward()
    while view is not None:
        if view.open and (module is None or module in view.modules):
            return view
        view = view.outer
    return None


def bound_view(model: nn.Module) -> View | None:
    """The innermost open ``bound`` block around this context that has the model."""
    view = _active.get()
    while view is not None:
        if view.open and view.owner is not None and id(model) in view.modules:
            return view
        view = view.outer
    return None


def _view_of_backward() -> View | None:
    """In autograd's own threads, the ``bound`` block in which backward was called."""
    # A backward pass over a GPU runs in a thread of autograd's, which does not have the context of
    # the thread that asked for it.
    ref = handed_to_backward(_TLS) if in_backward() else None
    view = None if ref is None else ref()
    return None if view is None or view.thread == threading.get_ident() else view


class _Stand:
    """What stands at a place while views of it are open.

    Attributes:
        place: where.
        own: the module's own value there; _ABSENT if there was none.
        views: of the calls that may ask, by id.
        expired: whether a block was left of which a checkpointed section was not recomputed yet.
    """

    __slots__ = ()

    place: Place
    own: Any
    views: dict[int, weakref.ref[View]]
    expired: bool

    def put(self, module: nn.Module, attribute: str, own: Any) -> None:
        self.place, self.own, self.views = (id(module), attribute), own, {}
        self.expired = False

    def seen(self) -> Any:
        """What the call that asks sees here, or _ABSENT."""
        view = open_view(self.place[0])
        if view is not None:
            return view.seen.get(self.place, _ABSENT)
        if self.expired and in_backward():
            raise FadaptError(
                "a section under torch.utils.checkpoint was run inside fadapt.bound(model, params) "
                "and is recomputed after the block, where the model is the base again; call "
                "backward inside the block"
            )
        return _ABSENT

    def in_use(self) -> bool:
        if not self.views:
            return False
        views = [ref() for ref in self.views.values()]
        return any(view is not None and view.open for view in views)


class ScopedTensors(_Stand, MutableMapping[str, Any], dict[str, Any]):  # type: ignore[misc]
    """Stands where a module has its parameters or its buffers.

    A dict by its type alone, which is what nn.Module asks for: what it holds are the module's own,
    or the call's.
    """

    __slots__ = ("expired", "own", "place", "views")

    def __getitem__(self, key: str) -> Any:
        seen = self.seen()
        if seen is _ABSENT or key not in seen:
            return self.own[key]
        value = seen[key]
        return value.make(self.own[key]) if isinstance(value, OnRead) else value

    def __setitem__(self, key: str, value: Any) -> None:
        seen = self.seen()
        own = seen is _ABSENT or key not in seen
        if not own and isinstance(seen[key], OnRead):
            own = seen[key].passes_writes
        if not own and self._is_asked_by_others():
            if not is_move(sys._getframe(1)):
                raise FadaptError(
                    f"{key} of a layer is set inside fadapt.bound(model, params), where an adapter "
                    "or a copy stands in its place (by an assignment, or torch.func."
                    "functional_call); call the model itself there, or leave the block first"
                )
            if not isinstance(seen[key], OnRead):  # a copy, of a buffer
                seen[key] = value.clone()
            own = True
        (self.own if own else seen)[key] = value

    def items(self) -> Any:
        # parameters(), state_dict(), to(): in a bound block they are of the base, as it is, unless
        # the model's forward asks.
        return self.own.items() if self._is_asked_by_others() else super().items()

    def values(self) -> Any:
        return self.own.values() if self._is_asked_by_others() else super().values()

    def _is_asked_by_others(self) -> bool:
        """Whether someone asks inside ``bound`` who is not the model's forward."""
        if torch.compiler.is_compiling():
            return False
        view = open_view(self.place[0])
        return view is not None and view.owner is not None and not view.runs()

    def __delitem__(self, key: str) -> None:
        seen = self.seen()
        if seen is not _ABSENT and key in seen:
            raise FadaptError(f"the model's forward removes its {key}, which is frozen")
        del self.own[key]

    def __contains__(self, key: object) -> bool:
        return key in self.own

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self.own)

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __repr__(self) -> str:
        return repr(self.own)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy of the model, or a pickle, is one of the model as it is; but in its own forward one
        # would expect what the forward sees there.
        view = open_view(self.place[0])
        if view is not None and view.runs():
            for value in view.seen.get(self.place, {}).values():
                if (adapter := getattr(value, "adapter", None)) is not None:
                    name = adapter.site.name
                    raise TargetError(
                        f"{name} is adapted, and the model's forward reads it (copy, "
                        f"{models_own() or 'a pickle'}) in a copy or a pickle of its layer, which "
                        "are of the base; have it call the layer itself, or leave this weight out: "
                        f"{{{name!r}: None, ...}}"
                    )
        return dict, (dict(self.own),)

    __hash__ = None  # type: ignore[assignment]


class ScopedFunction(_Stand):
    """Stands where a module has a function of its own, or its class has one."""

    __slots__ = ("expired", "module", "own", "place", "views")

    def put(self, module: nn.Module, attribute: str, own: Any) -> None:
        super().put(module, attribute, own)
        self.module = weakref.ref(module)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.plain()  # for inspect.signature

    @is_step
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        view, place = _active.get(), self.place
        if view is not None and view.open and place[0] in view.modules:  # as of ``seen``
            seen = view.seen.get(place, _ABSENT)
        else:
            seen = self.seen()
        return (self.plain() if seen is _ABSENT else seen)(*args, **kwargs)

    def plain(self) -> Callable[..., Any]:
        """The module's own function."""
        if self.own is not _ABSENT:
            return self.own
        return getattr(type(self.module()), self.place[1]).__get__(self.module())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self.plain(),)


def own_function(function: Any) -> Any:
    """A module's own function, also within a call that sees another; None where it has none."""
    if not isinstance(function, ScopedFunction):
        return function
    return None if function.own is _ABSENT else function.own


def _itself(function: Any) -> Any:
    return function


def _put(view: View) -> None:
    ref, key = weakref.ref(view), id(view)
    with _lock:
        for module, attribute in view.places:
            attributes = module.__dict__
            stand = attributes.get(attribute, _ABSENT)
            if not isinstance(stand, _Stand):
                own = stand
                stand = ScopedTensors() if attribute in TENSORS else ScopedFunction()
                stand.put(module, attribute, own)
                stand.views[key] = ref
                attributes[attribute] = stand
            else:
                stand.views[key], stand.expired = ref, False


def _take_away(view: View) -> None:
    key, pending = id(view), view.pending
    with _lock:
        for module, attribute in view.places:
            stand = module.__dict__.get(attribute)
            if not isinstance(stand, _Stand):
                continue
            stand.views.pop(key, None)
            stand.expired |= pending
            if not stand.expired and not stand.in_use():
                if stand.own is _ABSENT:
                    module.__dict__.pop(attribute, None)
                else:
                    module.__dict__[attribute] = stand.own
