"""run, apply, bound: the frozen model with adapters overlaid on its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .base.checks import check_model
from .base.lock import bound_params, exclusive
from .base.quantized import has_quantized
from .batch import Batch, arguments
from .errors import ConfigError, FadaptError
from .fold import fold
from .fold.chunked_loss import FrozenHead, frozen_head
from .fold.losses import hugging_face_loss
from .linalg import inverse_permutation
from .overlay.mount import Mount, forwards_swapped, mounted, prepare
from .params.adapter import Adapted
from .params.params import Params
from .params.stack import Stack, alone

# Dynamo traces the removal of a module's attribute, which forwards_swapped needs, since 2.13.
_COMPILES_QUANTIZED = torch.__version__ >= "2.13"
LossFn = Callable[[Any, Any], Tensor]


def run(
    model: nn.Module,
    params: Params | Stack,
    batch: Batch,
    loss_fn: LossFn | None = None,
    *,
    per_adapter: bool = False,
) -> Tensor:
    """The loss of the adapted model on a batch; the model is not changed.

    A stack of N adapters gives N losses from one pass over the base. They are independent: the
    gradient of their sum holds each adapter's own gradient.

    Args:
        model: the frozen base. Its own requires_grad flags do not matter: no gradient reaches it.
        params: from :func:`fadapt.init`, joined from :func:`fadapt.split`, or a stack.
        batch: a dict of keyword arguments, a tuple of positional ones, or one tensor.
        loss_fn: ``loss_fn(output, batch)``; without it, the output's ``loss`` (Hugging Face models
            given labels), or the output itself where it is a scalar. For a stack it is applied
            to each adapter's slice of the output and of the batch.
        per_adapter: for a stack, whether the batch holds (N, B, ...) tensors, one part for each
            adapter; otherwise all adapters see the same (B, ...) batch.

    Returns:
        The scalar loss, or (N,) losses for a stack, differentiable in the trainable leaves by
        ``backward`` and by torch.func.

    Raises:
        ConfigError: a batch of the wrong type, or an output without a loss.
        TargetError: params made for another model.
    """
    if isinstance(params, Stack):
        return _run_stack(model, params, batch, loss_fn, per_adapter)
    output = _forward(model, params, None, batch)
    return _scalar(loss_fn(output, batch) if loss_fn else getattr(output, "loss", output), loss_fn)


def _run_stack(
    model: nn.Module, stack: Stack, batch: Batch, loss_fn: LossFn | None, per_adapter: bool
) -> Tensor:
    rows = fold.batch_rows(batch, stack, per_adapter)
    order = stack.order
    bound_to_it = not torch.compiler.is_compiling() and bound_params(model) is stack
    if order == sorted(order) or bound_to_it:
        return _run_folded(model, stack, rows, batch, loss_fn, per_adapter, range(stack.size))
    # Groups side by side, so that no site has to gather its rows and to spread them again.
    if per_adapter or stack.per_row:
        batch = fold.reorder(batch, order)
    turns = inverse_permutation(order)
    return _run_folded(model, stack.in_groups(), rows, batch, loss_fn, per_adapter, turns)


def _run_folded(
    model: nn.Module,
    stack: Stack,
    rows: int,
    batch: Batch,
    loss_fn: LossFn | None,
    per_adapter: bool,
    turns: Sequence[int],
) -> Tensor:
    """The losses of the adapters at ``turns``, in this order."""
    folded = fold.fold_batch(batch, stack, rows, per_adapter)
    if loss_fn is None:
        head = frozen_head(model, stack.sites, folded)
        loss_fn, folded, inputs = hugging_face_loss(model, folded)
        if head is not None and (torch.compiler.is_compiling() or bound_params(model) is None):
            output = _forward(model, stack, rows, inputs, head)
            if output.logits is head.hidden:
                return fold.take(head.losses(folded["labels"], stack.size), turns)
    else:
        inputs = folded
    output = _forward(model, stack, rows, inputs)
    outputs, batches = (fold.slices(tree, stack, rows) for tree in (output, folded))
    return torch.stack([_scalar(loss_fn(outputs[k], batches[k]), loss_fn) for k in turns])


def _forward(
    model: nn.Module,
    params: Params | Stack,
    rows: int | None,
    batch: Batch,
    head: FrozenHead | None = None,
) -> Any:
    args, kwargs = arguments(batch)
    # A key-value cache costs memory, and torch.func cannot return one.
    if "use_cache" not in kwargs and getattr(getattr(model, "config", None), "use_cache", False):
        kwargs["use_cache"] = False
    return _call(model, params, rows, "forward", args, kwargs, head)


def apply(
    model: nn.Module,
    params: Params | Stack,
    *args: Any,
    method: str = "forward",
    per_adapter: bool = False,
    **kwargs: Any,
) -> Any:
    """The adapted model's own output: ``model(*args, **kwargs)``, or another method of it.

    Args:
        params: for a stack, every output tensor becomes (N, B, ...); after :func:`fadapt.select`
            the output is an ordinary batch.
        method: "forward", or the name of any method that calls it, such as "generate".
        per_adapter: for a stack, whether the arguments are (N, B, ...), one part per adapter.

    Raises:
        ConfigError: the model has no such method.
        TargetError: params made for another model.
    """
    if not isinstance(params, Stack):
        return _call(model, params, None, method, args, kwargs)
    rows = fold.batch_rows((args, kwargs), params, per_adapter)
    args, kwargs = fold.fold_batch((args, kwargs), params, rows, per_adapter)
    return fold.unfold(_call(model, params, rows, method, args, kwargs), params, rows)


@contextmanager
def bound(model: nn.Module, params: Params | Stack) -> Iterator[nn.Module]:
    """Inside the block the model *is* the adapted one: for loops, generation, checkpointing.

    On leaving, also by an exception, every parameter is the same object as before. Updates of the
    trainable leaves (an optimiser's step) take effect at once.

        with fadapt.bound(model, params):
            loss = model(**batch).loss
            loss.backward()
    """
    with (
        exclusive(model, bound=params),
        mounted(prepare(model, _adapted_sites(model, params, None), lasting=True)),
    ):
        yield model


def _adapted_sites(
    model: nn.Module, params: Params | Stack, rows: int | None
) -> Mapping[str, Adapted]:
    check_model(model)
    if isinstance(params, Stack):
        if params.size == 1 and not params.per_row:
            return alone(params)
        fold.check_batch_first(model)
        return fold.folded_sites(params, rows)
    if not isinstance(params, Params):
        raise ConfigError(f"params must come from fadapt.init, load or join; got {type(params)}")
    return params


def _call(
    model: nn.Module,
    params: Params | Stack,
    rows: int | None,
    method: str,
    args: tuple,
    kwargs: dict,
    head: FrozenHead | None = None,
) -> Any:
    if not torch.compiler.is_compiling() and params is not None and bound_params(model) is params:
        return _method(model, method)(*args, **kwargs)
    if torch.compiler.is_compiling() and not _COMPILES_QUANTIZED and has_quantized(model):
        return _call_uncompiled(model, params, rows, method, args, kwargs, head)
    sites = _adapted_sites(model, params, rows)
    if head is not None:
        sites = {**sites, head.site.name: head}
    if torch.compiler.is_compiling():
        return _functional(model, prepare(model, sites, lasting=True), method, args, kwargs)
    with exclusive(model):
        mount = prepare(model, sites, lasting=False)
        if not mount.checkpointing:
            return _functional(model, mount, method, args, kwargs)
        mount = prepare(model, sites, lasting=True)
        with _recompute_adapted(model, params, mount):
            try:
                return _functional(model, mount, method, args, kwargs)
            except RuntimeError as error:
                if "functorch" not in str(error) and "torch.func" not in str(error):
                    raise
                raise FadaptError(
                    "gradient checkpointing does not work under torch.func transforms; call "
                    "model.gradient_checkpointing_disable(), or use loss.backward()"
                ) from error


_call_uncompiled: Any = torch.compiler.disable(
    _call,
    reason="fadapt compiles a step over bitsandbytes layers with torch 2.13 or later; with an "
    "older one leave out fullgraph=True, and the step runs as it is",
)


def _functional(model: nn.Module, mount: Mount, method: str, args: tuple, kwargs: dict) -> Any:
    with forwards_swapped(mount) if mount.forwards else nullcontext():
        if method == "forward":
            return functional_call(model, mount.by_name, args, kwargs, tie_weights=False)
        wrapper = _MethodCall(model, method)
        by_name = {f"model.{name}": tensor for name, tensor in mount.by_name.items()}
        return functional_call(wrapper, by_name, args, kwargs, tie_weights=False)


class _MethodCall(nn.Module):
    """functional_call reaches forward only; this makes another method a forward."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        _method(model, method)
        self.model, self.method = model, method
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.method)(*args, **kwargs)


def _method(model: nn.Module, name: str) -> Callable[..., Any]:
    if name == "forward":
        return model
    found = getattr(model, name, None)
    if not callable(found):
        raise ConfigError(f"{type(model).__name__} has no method {name!r}")
    return found


@contextmanager
def _recompute_adapted(model: nn.Module, params: Any, mount: Mount) -> Iterator[None]:
    """Makes the layers' checkpoint function recompute under the same overlays.

    Hugging Face layers keep theirs in ``_gradient_checkpointing_func``. For the duration of the
    forward it is replaced by the non-reentrant one (equal gradients; the reentrant one loses them
    where no input requires grad) with a context that mounts the overlays again in backward.
    """

    @contextmanager
    def again() -> Iterator[None]:
        if bound_params(model) is params:
            yield
            return
        with exclusive(model), mounted(mount):
            yield

    key = "_gradient_checkpointing_func"
    before = [(m, m.__dict__[key]) for m in mount.checkpointing if key in m.__dict__]
    try:
        for module, func in before:
            adapted = functools.partial(
                func, use_reentrant=False, context_fn=lambda: (nullcontext(), again())
            )
            setattr(module, key, adapted)
        yield
    finally:
        for module, func in before:
            setattr(module, key, func)


def _scalar(loss: Any, loss_fn: LossFn | None) -> Tensor:
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    if isinstance(loss, Tensor) and loss.shape == (1,):
        return loss.squeeze(0)
    what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ConfigError(
        f"no scalar loss: {'loss_fn returned' if loss_fn else 'the model returned'} {what}. "
        "Pass loss_fn(output, batch) -> scalar, or labels in the batch of a Hugging Face model"
    )
