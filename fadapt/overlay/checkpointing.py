"""Activation checkpointing, which recomputes a forward after its overlays have gone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from ..errors import FadaptError
from ..hugging_face import CHECKPOINT_FUNCTION, checkpoint_function
from ..params.adapter import Adapted


@dataclass(frozen=True)
class CallContext:
    """What the overlays of one call share.

    Attributes:
        lasting: the overlays stay in place for the backward pass (``bound``).
        grad: whether gradients were enabled when the call began.
    """

    lasting: bool
    grad: bool


def refuse_checkpoint(adapter: Adapted, call: CallContext) -> None:
    """Refuses a checkpointed section whose recomputation would see the frozen weights.

    torch runs it again in the backward pass, after functional_call has put the weights back;
    with use_reentrant=True the gradients would then silently be None.
    """
    if call.lasting or not call.grad or torch.compiler.is_compiling():
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            raise FadaptError(
                f"{adapter.site.name} is used inside torch.utils.checkpoint, which runs the "
                "section again during backward. Keep the adapters in place until then: "
                "with fadapt.bound(model, params): loss = ...; loss.backward()"
            )
        frame = frame.f_back


@contextmanager
def recomputed(
    modules: Sequence[nn.Module], again: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Makes the layers' checkpoint function recompute within ``again()``.

    Hugging Face layers keep theirs in ``_gradient_checkpointing_func``. For the duration of the
    forward it is replaced by the non-reentrant one (equal gradients; the reentrant one loses them
    where no input requires grad) with a context that mounts the overlays again in backward.
    """
    functions = [(module, checkpoint_function(module)) for module in modules]
    before = [(module, func) for module, func in functions if func is not None]
    try:
        for module, func in before:
            adapted = functools.partial(
                func, use_reentrant=False, context_fn=lambda: (nullcontext(), again())
            )
            setattr(module, CHECKPOINT_FUNCTION, adapted)
        yield
    finally:
        for module, func in before:
            setattr(module, CHECKPOINT_FUNCTION, func)
