"""Activation checkpointing, which recomputes a forward after its overlays have gone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint

from ..base.flow import is_step
from ..base.scope import View, open_view
from ..base.torch_private import in_backward, pytree, saving_is_hooked
from ..errors import FadaptError
from ..params.adapter import Adapted


def refuse_checkpoint(adapter: Adapted) -> None:
    """Refuses a checkpointed section whose recomputation would see the frozen weights.

    torch runs it again in the backward pass, when the call is over; with use_reentrant=True the
    gradients would then silently be None. In a ``bound`` block that is in order as long as the
    block lasts; it is noted that a section waits for its recomputation.
    """
    if torch.compiler.is_compiling():
        return
    # Inside a checkpoint autograd saves through its hooks, or, if it is the reentrant one, nothing.
    outside = torch.is_grad_enabled() and not saving_is_hooked()
    again = in_backward()
    if outside and not again:
        return
    view = open_view()
    if view is None or view.recomputes or not view.grad:
        return
    if again:
        view.pending = False
        return
    frame: FrameType | None = sys._getframe()
    inside = False
    while frame is not None:
        if frame.f_code is Recomputed.__call__.__code__:
            return
        inside = inside or frame.f_code.co_filename == torch.utils.checkpoint.__file__
        if frame.f_code is _REENTRANT and not _requires_grad(frame.f_locals.get("args")):
            raise FadaptError(
                f"{adapter.site.name} is used inside torch.utils.checkpoint with "
                "use_reentrant=True, which loses its gradient, since no input of the section "
                "requires grad; pass use_reentrant=False"
            )
        frame = frame.f_back
    if not inside:
        return
    if view.owner is not None:
        view.pending = True
        return
    raise FadaptError(
        f"{adapter.site.name} is used inside torch.utils.checkpoint, which runs the "
        "section again during backward. Keep the adapters in place until then: "
        "with fadapt.bound(model, params): loss = ...; loss.backward()"
    )


_REENTRANT = torch.utils.checkpoint.CheckpointFunction.forward.__code__


def _requires_grad(tree: Any) -> bool:
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in pytree.tree_leaves(tree))


class Recomputed:
    """A layer's checkpoint function, for one call: what it recomputes sees the call's view again.

    transformers and diffusers keep such a function in ``_gradient_checkpointing_func``: torch's
    checkpoint with arguments, or one of their own that is called with the section and its inputs.

    Args:
        function: the layer's own.
        view: of the call, given when it exists.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.view: View | None = None

    @is_step
    def __call__(self, section: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.view is not None
        function = self.function
        inner = function.func if isinstance(function, functools.partial) else function
        if inner is torch.utils.checkpoint.checkpoint:
            # Not the reentrant one: it loses the gradients where no input requires grad.
            kwargs["use_reentrant"] = False
            again = self.view.again
            kwargs["context_fn"] = lambda: (nullcontext(), again())
            return function(section, *args, **kwargs)
        output = function(_Section(section, self.view), *args, **kwargs)
        self._check(output)
        return output

    def _check(self, output: Any) -> None:
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
        if torch.is_grad_enabled() and tensors and not any(t.requires_grad for t in tensors):
            raise FadaptError(
                f"{self.function} is the model's own function for gradient checkpointing, and its "
                "output has no gradient (torch's use_reentrant=True loses it where no input "
                "requires grad); call torch.utils.checkpoint with use_reentrant=False in it"
            )


class _Section:
    """A checkpointed part of the model, which opens the view for itself whenever it is run."""

    def __init__(self, section: Any, view: View):
        self.section, self.view = section, view

    @is_step
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.view.again():
            return self.section(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.section, name)
