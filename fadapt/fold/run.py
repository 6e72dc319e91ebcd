"""A stack in one adapted call, and the losses of its members."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base import generators
from ..base.eval_mode import evaluating
from ..base.memory import is_out_of_memory
from ..base.torch_private import pytree
from ..batch import Batch
from ..errors import ConfigError, FadaptError
from ..hugging_face import calls_loss_function
from ..linalg import inverse_permutation
from ..overlay.call import call, call_on_batch, is_bound_to
from ..params.adapter import Adapted
from ..params.params import Params
from ..params.stack import Stack, alone, views
from . import fold, proof
from .chunked_loss import FrozenHead, frozen_head
from .losses import (
    LossesApart,
    LossFn,
    NotApartError,
    scalar_loss,
    taken_apart,
)


def run_one(
    model: nn.Module,
    params: Mapping[str, Adapted],
    batch: Batch,
    loss_fn: LossFn | None,
    owner: Any,
) -> Tensor:
    """The loss of one adapter, as :func:`fadapt.run` has it."""
    output = call_on_batch(model, params, batch, owner=owner)
    return scalar_loss(
        loss_fn(output, batch) if loss_fn else getattr(output, "loss", output), loss_fn
    )


def run_stack(
    model: nn.Module,
    stack: Stack,
    batch: Batch,
    loss_fn: LossFn | None,
    per_adapter: bool,
    verify: bool = True,
) -> Tensor:
    """(N,) losses, as :func:`fadapt.run` has them."""
    if stack.size == 1 and not stack.per_row:
        part = fold.parts(batch, stack, per_adapter)[0]
        return run_one(model, alone(stack), part, loss_fn, stack)[None]
    rows = fold.batch_rows(batch, stack, per_adapter)
    if loss_fn is None and not _may_come_apart(model, batch):
        return run_in_turn(model, stack, batch, loss_fn, per_adapter)
    members, folded, turns = _in_groups(model, stack, rows, batch, per_adapter)
    if not is_bound_to(model, stack):
        stack_sites(model, stack, rows)  # refuses what cannot be folded before anything runs
    if verify and (why := difference(model, stack, batch, loss_fn, per_adapter)):
        raise FadaptError(f"{why} {proof.WAYS_OUT}")
    try:
        return _run_folded(model, members, rows, folded, loss_fn, turns)
    except NotApartError:
        _one_by_one.setdefault(model, set()).add(_names(batch))
        return run_in_turn(model, stack, batch, loss_fn, per_adapter)


def run_in_turn(
    model: nn.Module, stack: Stack, batch: Batch, loss_fn: LossFn | None, per_adapter: bool
) -> Tensor:
    """(N,) losses of the members, one after the other, each by the model's own forward."""
    if is_bound_to(model, stack):
        raise FadaptError(
            f"{type(model).__name__} has no loss of each adapter's own rows, so its adapters run "
            "one by one, which they cannot inside fadapt.bound; leave the block, or pass "
            "loss_fn(output, batch) -> scalar"
        )
    pairs = zip(views(stack), fold.parts(batch, stack, per_adapter), strict=True)
    return torch.stack([run_one(model, params, part, loss_fn, params) for params, part in pairs])


def one_by_one(
    model: nn.Module,
    stack: Stack,
    batch: Batch,
    loss_fn: LossFn | None,
    per_adapter: bool,
    gradients: bool,
    passes: int | None = None,
) -> str:
    """Why the members of a stack have to run one by one on such batches; "" where they need not.

    Two members run together and alone, once for a model, a structure of the stack and a kind of
    batch; and again after some numbers of ``passes``.
    """
    name = type(model).__name__
    if loss_fn is None and not _may_come_apart(model, batch):
        return f"the loss of {name} is not one call of its loss function on each adapter's own rows"
    # A batch that no member could take is the caller's error, not a reason.
    rows = fold.batch_rows(batch, stack, per_adapter)
    if not per_adapter and (why := _misfit(model, stack, batch, loss_fn, rows)):
        return why
    fold.fold_batch(batch, stack, rows, per_adapter)
    try:
        fold.check_rows_apart(model)
        fold.folded_sites(stack, None)
        why = difference(model, stack, batch, loss_fn, per_adapter, gradients, passes)
    except FadaptError as error:
        return str(error)
    if not why and loss_fn is None and not _may_come_apart(model, batch):
        return f"{name} computes more than the loss function's value on each adapter's own rows"
    return why


def _misfit(model: nn.Module, stack: Stack, batch: Batch, loss_fn: LossFn | None, rows: int) -> str:
    """Why a batch has no rows for each adapter, though the model takes it whole."""
    try:
        fold.fold_batch(batch, stack, rows, False)
    except ConfigError as error:
        misfit = error
    else:
        return ""
    known, kind = _misfits.setdefault(model, set()), proof.batch_kind(batch)
    if kind in known:
        return str(misfit)
    try:
        with evaluating(model), torch.no_grad(), generators.forked(model):
            run_one(model, views(stack)[0], batch, loss_fn, None)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise misfit from error
    known.add(kind)
    return str(misfit)


# {model: the kinds of batches that it takes whole and that cannot be parted}
_misfits: weakref.WeakKeyDictionary[nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()


def _numbers(loss: Tensor) -> Tensor:
    """A loss that can be compared: a comparison, which run takes for its value, as 0 or 1."""
    return loss.float() if loss.dtype is torch.bool else loss


def difference(
    model: nn.Module,
    stack: Stack,
    batch: Batch,
    loss_fn: LossFn | None,
    per_adapter: bool,
    gradients: bool = False,
    passes: int | None = None,
) -> str:
    """How losses of two members in one pass differ from the same two alone; "" if they do not."""
    if is_bound_to(model, stack) or not proof.possible():
        return ""

    def folded(two: Stack, rows: int, joined: Any) -> list[proof.Named]:
        try:
            losses = _run_folded(model, two, rows, joined, loss_fn, range(two.size))
        except NotApartError:
            _one_by_one.setdefault(model, set()).add(_names(batch))
            return []
        return [{"loss": _numbers(loss)} for loss in losses]

    def single(params: Params, part: Any) -> proof.Named:
        return {"loss": _numbers(run_one(model, params, part, loss_fn, params))}

    kind = ("run", getattr(loss_fn, "__code__", type(loss_fn)), gradients)
    return proof.difference(
        model, stack, batch, per_adapter, kind, folded, single, gradients, passes
    )


def apply_stack(
    model: nn.Module,
    stack: Stack,
    method: str,
    args: tuple,
    kwargs: dict[str, Any],
    per_adapter: bool,
    verify: bool = True,
) -> Any:
    """The output with (N, B, ...) tensors, as :func:`fadapt.apply` has it."""
    given = (args, kwargs)
    rows = fold.batch_rows(given, stack, per_adapter)
    args, kwargs = fold.fold_batch(given, stack, rows, per_adapter)
    # Beams and several sequences of a row stand side by side, each with the adapter of its row.
    known = None if stack.per_row and method != "forward" else rows
    sites = stack_sites(model, stack, known)
    folds = stack.size > 1 and method == "forward"
    if verify and folds and not is_bound_to(model, stack) and proof.possible():
        why = _outputs_differ(model, stack, given, per_adapter)
        if why:
            raise FadaptError(f"{why} {proof.WAYS_OUT}")
    output = call(model, sites, method, args, kwargs, owner=stack)
    return fold.unfold(output, stack, rows)


def _outputs_differ(model: nn.Module, stack: Stack, given: Any, per_adapter: bool) -> str:
    def folded(two: Stack, rows: int, joined: Any) -> list[proof.Named]:
        args, kwargs = joined
        sites = stack_sites(model, two, rows)
        output = call(model, sites, "forward", args, kwargs)
        if stack.per_row:
            # An ordinary batch: what has no row of its own is a property of the whole.
            output = pytree.tree_map_only(
                Tensor, lambda t: t if t.dim() and t.shape[0] == two.size else None, output
            )
        return [proof.named(part) for part in fold.slices(output, two, rows)]

    def single(params: Params, part: Any) -> proof.Named:
        args, kwargs = part
        return proof.named(call(model, params, "forward", args, kwargs))

    return proof.difference(
        model, stack, given, per_adapter, "apply", folded, single, gradients=False
    )


def stack_sites(model: nn.Module, stack: Stack, rows: int | None) -> Mapping[str, Adapted]:
    """What stands where the weights are: folds, or the adapters of the only member.

    Args:
        rows: per adapter, or None where that is not known (``bound``).
    """
    if stack.size == 1 and not stack.per_row:
        return alone(stack)
    fold.check_rows_apart(model)
    return fold.folded_sites(stack, rows)


def _in_groups(
    model: nn.Module, stack: Stack, rows: int, batch: Batch, per_adapter: bool
) -> tuple[Stack, Batch, Sequence[int]]:
    """The stack with its groups side by side, the folded batch, and where each adapter is now.

    So no site has to gather its rows and to spread them again.
    """
    order = stack.order
    turns: Sequence[int] = range(stack.size)
    if order != sorted(order) and not is_bound_to(model, stack):
        if per_adapter or stack.per_row:
            batch = fold.reorder(batch, order)
        turns = inverse_permutation(order)
        stack = stack.in_groups()
    return stack, fold.fold_batch(batch, stack, rows, per_adapter), turns


def _run_folded(
    model: nn.Module,
    stack: Stack,
    rows: int,
    folded: Batch,
    loss_fn: LossFn | None,
    turns: Sequence[int],
) -> Tensor:
    """The losses of the adapters at ``turns``, in this order.

    Raises:
        NotApartError: without ``loss_fn``, a model whose loss is not each adapter's own.
    """
    sites = stack_sites(model, stack, rows)
    if loss_fn is not None:
        output = call_on_batch(model, sites, folded, owner=stack)
        outputs, batches = (fold.slices(tree, stack, rows) for tree in (output, folded))
        return torch.stack([scalar_loss(loss_fn(outputs[k], batches[k]), loss_fn) for k in turns])
    head = frozen_head(model, stack.sites, folded)
    if head is not None and not is_bound_to(model, stack):
        try:
            return _own_losses(model, sites, stack, rows, folded, turns, head)
        except NotApartError:  # it caps or scales its logits
            pass
    return _own_losses(model, sites, stack, rows, folded, turns)


def _own_losses(
    model: nn.Module,
    sites: Mapping[str, Adapted],
    stack: Stack,
    rows: int,
    folded: Batch,
    turns: Sequence[int],
    head: FrozenHead | None = None,
) -> Tensor:
    if head is not None:
        head.adapters = stack.size
        sites = {**sites, head.site.name: head}  # type: ignore[dict-item]
    with taken_apart(model, rows, turns, head):
        output = call_on_batch(model, sites, folded, owner=stack)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, LossesApart):
        raise NotApartError("the model's loss is not the value of its loss function")
    return loss.values


# {model: the names of the batches with which its loss does not come apart}
_one_by_one: weakref.WeakKeyDictionary[nn.Module, set[frozenset[str]]] = weakref.WeakKeyDictionary()


def _may_come_apart(model: nn.Module, batch: Batch) -> bool:
    if not calls_loss_function(model):
        return False
    return torch.compiler.is_compiling() or _names(batch) not in _one_by_one.get(model, ())


def _names(batch: Batch) -> frozenset[str]:
    return frozenset(batch) if isinstance(batch, Mapping) else frozenset()
