"""Losses of single adapters from one pass over the rows of all.

A Hugging Face model takes its loss over the whole batch, in one call of its ``loss_function``. For
the time of a folded pass this function takes each adapter's loss over the adapter's own rows, and
the model gets an object without any arithmetic in place of its loss. A model that returns this very
object has no other loss than that call. A model that adds to it (a router's loss), or that never
calls its ``loss_function``, cannot be taken apart: its adapters run one by one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..base.torch_private import pytree
from ..errors import ConfigError
from ..hugging_face import LOSS_FUNCTION, loss_of
from .chunked_loss import FrozenHead
from .fold import take

LossFn = Callable[[Any, Any], Tensor]
"""(output, batch) -> a scalar loss."""


class NotApartError(Exception):
    """A model's own loss is not one call of its loss function on rows: its adapters need turns."""


class LossesApart:
    """What stands where a model's loss was: (N,) losses, with which a model can do nothing."""

    def __init__(self, values: Tensor):
        self.values = values

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise NotApartError("the model goes on computing with the value of its loss function")

    __add__ = __radd__ = __iadd__ = __sub__ = __rsub__ = __isub__ = _refuse
    __mul__ = __rmul__ = __imul__ = __truediv__ = __rtruediv__ = __itruediv__ = _refuse
    __neg__ = __pow__ = __getitem__ = __iter__ = __len__ = __float__ = __bool__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # protocols that torch and dataclasses ask for
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, *_: Any) -> NoReturn:
        raise NotApartError("the model goes on computing with the value of its loss function")


class LossPerAdapter:
    """A model's ``loss_function``, applied to each adapter's rows.

    Args:
        function: the model's own.
        rows: of each adapter.
        turns: the adapters' positions in the batch, in the order of the losses.
        head: the stand-in for the model's head in this pass, if there is one.
    """

    def __init__(
        self, function: Callable[..., Any], rows: int, turns: Sequence[int], head: FrozenHead | None
    ):
        self.function, self.rows, self.turns, self.head = function, rows, turns, head

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _taking_apart.get() is not self:
            return self.function(*args, **kwargs)  # a plain call of the model, in another thread
        if self.head is not None:
            return self._chunked(self.head, args, kwargs)
        columns = [self._split(value) for value in args]
        named = {key: self._split(value) for key, value in kwargs.items()}
        losses = [
            scalar_loss(
                self.function(*(c[k] for c in columns), **{key: c[k] for key, c in named.items()}),
                None,
            )
            for k in self.turns
        ]
        return LossesApart(torch.stack(losses))

    def _chunked(self, head: FrozenHead, args: tuple, kwargs: dict[str, Any]) -> LossesApart:
        given = dict(zip(("logits", "labels", "vocab_size"), args, strict=False), **kwargs)
        width = head.weight.shape[0]
        if given.get("logits") is not head.hidden or given.get("vocab_size") != width:
            raise NotApartError("the model does more with its logits than to take their loss")
        try:
            losses = head.losses(given["labels"], len(self.turns))
        except ValueError as error:
            raise NotApartError(str(error)) from None
        return LossesApart(take(losses, self.turns))

    def _split(self, value: Any) -> Sequence[Any]:
        n = len(self.turns)
        if isinstance(value, Tensor) and value.dim():
            if value.shape[0] != n * self.rows:
                raise NotApartError(
                    f"its loss function gets a tensor of shape {tuple(value.shape)}, not one with "
                    f"the {n} x {self.rows} rows of the adapters"
                )
            return value.split(self.rows)
        leaves = [] if isinstance(value, Tensor) else pytree.tree_leaves(value)
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            raise NotApartError(f"its loss function gets a {type(value).__name__} of tensors")
        return (value,) * n


_taking_apart: ContextVar[LossPerAdapter | None] = ContextVar("fadapt_taking_apart", default=None)
_turnstiles: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_registry = threading.Lock()


def turnstile(model: nn.Module) -> threading.RLock:
    """One thread at a time per model, for what is put on the model itself for a while."""
    with _registry:
        return _turnstiles.setdefault(model, threading.RLock())


@contextmanager
def taken_apart(
    model: nn.Module, rows: int, turns: Sequence[int], head: FrozenHead | None
) -> Iterator[None]:
    """Within the block, the model's loss function gives each adapter its own loss.

    Only to calls from this very context; calls from elsewhere get the plain loss.
    """
    compiling = torch.compiler.is_compiling()
    with nullcontext() if compiling else turnstile(model):
        before = model.__dict__.get(LOSS_FUNCTION)
        if isinstance(before, LossPerAdapter):  # left by an interrupt
            before = None
            delattr(model, LOSS_FUNCTION)
        apart: Any = LossPerAdapter(loss_of(model), rows, turns, head)
        token = None if compiling else _taking_apart.set(apart)
        setattr(model, LOSS_FUNCTION, apart)
        try:
            yield
        finally:
            if before is not None:
                setattr(model, LOSS_FUNCTION, apart.function)
            else:
                delattr(model, LOSS_FUNCTION)
            if token is not None:
                _taking_apart.reset(token)


def scalar_loss(loss: Any, loss_fn: LossFn | None) -> Tensor:
    """The loss, which must be one number; of the model's own where there is no ``loss_fn``."""
    if isinstance(loss, Tensor) and loss.is_complex():
        raise ConfigError(
            f"the loss is complex ({loss.dtype}), and has no gradient; return a real one, such as "
            "its .abs()"
        )
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    if isinstance(loss, Tensor) and loss.shape == (1,):
        return loss.squeeze(0)
    what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ConfigError(
        f"no scalar loss: {'loss_fn returned' if loss_fn else 'the model returned'} {what}. "
        "Put labels into the batch of a Hugging Face model, or pass loss_fn(output, batch) -> "
        "scalar"
    )
