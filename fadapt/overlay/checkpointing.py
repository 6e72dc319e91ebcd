"""Activation checkpointing, which recomputes a forward after its overlays have gone."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

import torch
import torch.utils.checkpoint

from ..errors import FadaptError
from ..params.adapter import Adapted


@dataclass(frozen=True)
class Call:
    """What the overlays of one call share.

    Attributes:
        lasting: the overlays stay in place for the backward pass (``bound``).
        grad: whether gradients were enabled when the call began.
    """

    lasting: bool
    grad: bool


def refuse_checkpoint(adapter: Adapted, call: Call) -> None:
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
