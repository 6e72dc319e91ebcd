"""run, apply, bound: the frozen model with adapters overlaid on its weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from .arguments import check_flags, check_function
from .base.checks import check_model
from .batch import Batch, call_arguments
from .errors import ConfigError
from .fold.losses import LossFn as LossFn
from .fold.run import apply_stack, run_one, run_stack, stack_sites
from .overlay.call import Bound, call
from .params.adapter import Adapted
from .params.params import Params
from .params.stack import Stack


def run(
    model: nn.Module,
    params: Params | Stack,
    batch: Batch,
    loss_fn: LossFn | None = None,
    *,
    per_adapter: bool = False,
    verify: bool = True,
) -> Tensor:
    """The loss of the adapted model on a batch; the model is not changed.

    Other threads may use the model, or models that share parts of it, at the same time; a thread
    that the forward itself starts sees the base as well. The first forward in each mode is watched
    for a weight that is adapted and that the model reads past its module: an error. Buffers of
    its state dict that a forward updates (BatchNorm's running statistics) are updated in copies,
    and lost: what is to be kept must be a leaf.

    A stack of N adapters gives N losses from one pass over the base. They are independent: the
    gradient of their sum holds each adapter's own gradient.

    Args:
        model: the frozen base. Its own requires_grad flags do not matter: no gradient reaches it.
        params: from :func:`fadapt.init`, joined from :func:`fadapt.split`, or a stack.
        batch: a dict of keyword arguments, a tuple of positional ones, or one tensor.
        loss_fn: ``loss_fn(output, batch)``; without it, the output's ``loss`` (Hugging Face models
            given labels), or the output itself where it is a scalar. For a stack it is applied
            to each adapter's slice of the output and of the batch; without it, the adapters of a
            model whose loss cannot be taken apart run one by one.
        per_adapter: for a stack, whether the batch holds (N, B, ...) tensors, one part for each
            adapter; otherwise all adapters see the same (B, ...) batch.
        verify: for a stack, whether to compare two of its members together and alone before the
            first pass over this model, this structure of stack and this kind of batch (a few more
            passes, then, and before the 16th, the 128th, and so on; not inside torch.compile,
            torch.func's transforms and ``bound``).

    Returns:
        The scalar loss, or (N,) losses for a stack, differentiable in the trainable leaves by
        ``backward`` and by torch.func.

    Raises:
        ConfigError: a batch of the wrong type, or an output without a loss.
        TargetError: params made for another model, or weights that it reads past its modules.
        FadaptError: a stack whose members are not independent in this model.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRA(r=2))
        >>> fadapt.run(model, params, x, loss_fn).backward()
        >>> params["0.weight"].train["B"].grad.shape
        torch.Size([16, 2])
    """
    check_flags(per_adapter=per_adapter, verify=verify)
    check_function("loss_fn", loss_fn, "def loss_fn(output, batch)")
    if isinstance(params, Stack):
        return run_stack(model, _checked(model, params), batch, loss_fn, per_adapter, verify)
    _check_alone(per_adapter)
    return run_one(model, _sites(model, params), batch, loss_fn, params)


def apply(
    model: nn.Module,
    params: Params | Stack,
    *args: Any,
    method: str = "forward",
    per_adapter: bool = False,
    verify: bool = True,
    **kwargs: Any,
) -> Any:
    """The adapted model's own output: ``model(*args, **kwargs)``, or another method of it.

    Args:
        model: the frozen base; it is not changed.
        params: from :func:`fadapt.init`, or a stack: every output tensor then becomes (N, B, ...);
            after :func:`fadapt.select` the output is an ordinary batch.
        *args: positional arguments, as the model takes them; or one batch, as :func:`run` takes it:
            a dict stands for keyword arguments, a tuple for positional ones.
        method: "forward", or the name of any method that calls it, such as "generate".
        per_adapter: for a stack, whether the arguments are (N, B, ...), one part per adapter.
        verify: for a stack, as for :func:`run`, of the outputs of "forward".
        **kwargs: keyword arguments, as the model takes them.

    Raises:
        ConfigError: the model has no such method, or an argument is given twice.
        TargetError: params made for another model.
        FadaptError: a stack whose members are not independent in this model.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRA(r=2))
        >>> fadapt.apply(model, params, x).shape
        torch.Size([6, 4])
        >>> torch.equal(fadapt.apply(model, params, {"input": x}), model(x))
        True
    """
    check_flags(per_adapter=per_adapter, verify=verify)
    if not isinstance(method, str):
        raise ConfigError(f'method must be a name such as "generate", got {method!r:.80}')
    args, kwargs = call_arguments(args, kwargs)
    if isinstance(params, Stack):
        stack = _checked(model, params)
        return apply_stack(model, stack, method, args, kwargs, per_adapter, verify)
    _check_alone(per_adapter)
    return call(model, _sites(model, params), method, args, kwargs, owner=params)


def bound(model: nn.Module, params: Params | Stack) -> AbstractContextManager[nn.Module]:
    """Inside the block the model *is* the adapted one: for loops, generation, checkpointing.

    That holds for the thread (or the asynchronous task) that entered it: for others the model is
    the base, and they may run it with other params. Nothing of the model is changed, also by an
    exception or an interrupt. Updates of the trainable leaves (an optimizer's step) take effect at
    once. In training mode, buffers such as BatchNorm's running statistics are copies, which end
    with the block. ``parameters``, ``state_dict``, ``to``, copies and pickles are the base's inside
    it as well. A generator that yields within the block leaves it entered for who asks it.

    Args:
        model: the frozen base; other params are refused for it inside the block.
        params: from :func:`fadapt.init`, or a stack.

    Yields:
        The model itself.

    Raises:
        FadaptError: the model is bound already; or, from ``backward`` after the block, a section
            that the model checkpoints by itself is recomputed too late.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRA(r=2))
        >>> with fadapt.bound(model, params):
        ...     loss = nn.functional.cross_entropy(model(x), labels)
        ...     loss.backward()
    """

    def sites() -> Mapping[str, Adapted]:
        if isinstance(params, Stack):
            return stack_sites(model, _checked(model, params), None)
        return _sites(model, params)

    return Bound(model, sites, params)


def _check_alone(per_adapter: bool) -> None:
    if per_adapter:
        raise ConfigError(
            "per_adapter=True gives each adapter of a stack its own part of the batch, and these "
            "params are one adapter: write fadapt.stack([params, ...]), or leave it out"
        )


def _checked(model: nn.Module, stack: Stack) -> Stack:
    check_model(model)
    stack.check_whole()
    return stack


def _sites(model: nn.Module, params: Params) -> Mapping[str, Adapted]:
    check_model(model)
    if not isinstance(params, Params):
        raise ConfigError(f"params must come from fadapt.init, load or join; got {type(params)}")
    params.check_one()
    return params
