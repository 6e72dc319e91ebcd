"""One adapted call: a model run with something adapted in the place of some of its weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from ..base.bound import bound_params, refuse_bound
from ..base.flow import is_entry
from ..base.leaving import Block
from ..base.quantized import has_quantized
from ..base.scope import View
from ..batch import Batch, arguments
from ..errors import ConfigError, FadaptError, FadaptWarning, TargetError
from ..hugging_face import without_cache
from ..params.adapter import Adapted
from .instead import forwards_instead
from .mount import Mount, forwards_swapped, prepare

# Dynamo traces the removal of a module's attribute, which forwards_swapped needs, since 2.13.
_COMPILES_QUANTIZED = torch.__version__ >= "2.13"


@is_entry
def call(
    model: nn.Module,
    sites: Mapping[str, Adapted],
    method: str,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    owner: Any = None,
) -> Any:
    """``model.method(*args, **kwargs)`` with the sites adapted, for the time of the call.

    Args:
        sites: {name of a weight: what computes in its place}.
        method: "forward", or the name of a method that calls it.
        owner: the object from which the sites were made. Inside ``bound`` to that very object the
            model is called as it is.
    """
    if torch.compiler.is_compiling():
        if not _COMPILES_QUANTIZED and has_quantized(model):
            return _call_uncompiled(model, sites, method, args, kwargs, owner=owner)
        return _functional(model, prepare(model, sites), method, args, kwargs)
    function = method_of(model, method)
    if is_bound_to(model, owner):
        return function(*args, **kwargs)
    refuse_bound(model, "a call with other params")
    mount = prepare(model, sites)
    with mount.view(instead=forwards_instead(model, sites)):
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "Inference tensors cannot be saved" in str(error):
                raise TargetError(
                    "the model or the batch was made under torch.inference_mode, and its tensors "
                    "can be part of no gradient; make it outside, or call under torch.no_grad()"
                ) from error
            transformed = "functorch" in str(error) or "torch.func" in str(error)
            if not mount.checkpoints or not transformed:
                raise
            raise FadaptError(
                "gradient checkpointing does not work under torch.func transforms; call "
                "model.gradient_checkpointing_disable(), or use loss.backward()"
            ) from error


_call_uncompiled: Any = torch.compiler.disable(
    call,
    reason="fadapt compiles a step over bitsandbytes layers with torch 2.13 or later; with an "
    "older one leave out fullgraph=True, and the step runs as it is",
)


def call_on_batch(
    model: nn.Module, sites: Mapping[str, Adapted], batch: Batch, *, owner: Any = None
) -> Any:
    """The output of the adapted model on a batch, in one forward from which nothing goes on."""
    args, kwargs = arguments(batch)
    # A key-value cache costs memory, and torch.func cannot return one.
    kwargs = without_cache(model, kwargs)
    return call(model, sites, "forward", args, kwargs, owner=owner)


class Bound(Block):
    """A block inside which the sites of the model are adapted.

    Args:
        model: the base.
        sites: gives what computes in the place of the weights, when the block is entered.
        owner: from which the sites are made.
    """

    def __init__(self, model: nn.Module, sites: Callable[[], Mapping[str, Adapted]], owner: Any):
        self.model, self.sites, self.owner = model, sites, owner
        self.view: View | None = None

    def __enter__(self) -> nn.Module:
        refuse_bound(self.model, "another fadapt.bound")
        mount = prepare(self.model, self.sites(), any_mode=True)
        self.view = mount.view(self.owner)
        return self.view.__enter__()

    def undo(self) -> None:
        if self.view is not None:
            self.view.undo()

    def __del__(self) -> None:
        # Left by nobody: entered by hand, and dropped.
        if self.view is not None and self.view.open:
            self.view.undo()
            warnings.warn(
                "fadapt.bound(...) was entered and never left, and ends with its object: write "
                "`with fadapt.bound(model, params):`, or keep it in a contextlib.ExitStack",
                FadaptWarning,
                stacklevel=2,
            )


def is_bound_to(model: nn.Module, owner: Any) -> bool:
    """Whether the model is inside ``bound`` to this very object; never while it is compiled."""
    return owner is not None and not torch.compiler.is_compiling() and bound_params(model) is owner


def method_of(model: nn.Module, name: str) -> Callable[..., Any]:
    """The model itself for "forward", or its method of that name."""
    if name == "forward":
        return model
    found = getattr(model, name, None)
    if not callable(found):
        raise ConfigError(f"{type(model).__name__} has no method {name!r}")
    return found


def _functional(model: nn.Module, mount: Mount, method: str, args: tuple, kwargs: dict) -> Any:
    if mount.sharded:
        raise TargetError(
            f"{mount.sharded} is spread over processes, and torch.compile cannot trace the "
            "hooks that gather it; call it uncompiled"
        )
    forwards = mount.forwards()
    with forwards_swapped(forwards) if forwards else nullcontext():
        if method == "forward":
            return functional_call(model, mount.by_name(), args, kwargs, tie_weights=False)
        wrapper = _MethodCall(model, method)
        by_name = {f"model.{name}": tensor for name, tensor in mount.by_name().items()}
        return functional_call(wrapper, by_name, args, kwargs, tie_weights=False)


class _MethodCall(nn.Module):
    """functional_call reaches forward only; this makes another method a forward."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        method_of(model, method)
        self.model, self.method = model, method
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.method)(*args, **kwargs)
