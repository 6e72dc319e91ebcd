"""A stack in one adapted call, and the losses of its members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..linalg import inverse_permutation
from ..overlay.call import call, call_on_batch, is_bound_to
from ..params.adapter import Adapted
from ..params.stack import Stack, alone
from . import fold
from .chunked_loss import frozen_head
from .losses import LossFn, hugging_face_loss, scalar_loss


def run_stack(
    model: nn.Module, stack: Stack, batch: Batch, loss_fn: LossFn | None, per_adapter: bool
) -> Tensor:
    """(N,) losses, as :func:`fadapt.run` has them."""
    rows = fold.batch_rows(batch, stack, per_adapter)
    order = stack.order
    if order == sorted(order) or is_bound_to(model, stack):
        return _run_folded(model, stack, rows, batch, loss_fn, per_adapter, range(stack.size))
    # Groups side by side, so that no site has to gather its rows and to spread them again.
    if per_adapter or stack.per_row:
        batch = fold.reorder(batch, order)
    turns = inverse_permutation(order)
    return _run_folded(model, stack.in_groups(), rows, batch, loss_fn, per_adapter, turns)


def apply_stack(
    model: nn.Module,
    stack: Stack,
    method: str,
    args: tuple,
    kwargs: dict[str, Any],
    per_adapter: bool,
) -> Any:
    """The output with (N, B, ...) tensors, as :func:`fadapt.apply` has it."""
    rows = fold.batch_rows((args, kwargs), stack, per_adapter)
    args, kwargs = fold.fold_batch((args, kwargs), stack, rows, per_adapter)
    # Beams and several sequences of a row stand side by side, each with the adapter of its row.
    known = None if stack.per_row and method != "forward" else rows
    output = call(model, stack_sites(model, stack, known), method, args, kwargs, owner=stack)
    return fold.unfold(output, stack, rows)


def stack_sites(model: nn.Module, stack: Stack, rows: int | None) -> Mapping[str, Adapted]:
    """What stands where the weights are: folds, or the adapters of the only member.

    Args:
        rows: per adapter, or None where that is not known (``bound``).
    """
    if stack.size == 1 and not stack.per_row:
        return alone(stack)
    fold.check_batch_first(model)
    return fold.folded_sites(stack, rows)


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
    folded = inputs = fold.fold_batch(batch, stack, rows, per_adapter)
    sites = stack_sites(model, stack, rows)
    loss: Callable[[Any, Any], Tensor]
    if loss_fn is not None:
        loss = loss_fn
    else:
        head = frozen_head(model, stack.sites, folded)
        loss, folded, inputs = hugging_face_loss(model, folded)
        if head is not None and not is_bound_to(model, stack):
            output = call_on_batch(model, {**sites, head.site.name: head}, inputs, owner=stack)
            if output.logits is head.hidden:
                return fold.take(head.losses(folded["labels"], stack.size), turns)
    output = call_on_batch(model, sites, inputs, owner=stack)
    outputs, batches = (fold.slices(tree, stack, rows) for tree in (output, folded))
    return torch.stack([scalar_loss(loss(outputs[k], batches[k]), loss_fn) for k in turns])
