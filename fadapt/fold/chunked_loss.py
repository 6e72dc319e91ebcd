"""The loss over a frozen head, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..base.sharded import is_dtensor, is_unit, plain_class
from ..fusion import written
from ..hugging_face import LOSS_ARGUMENTS, calls_loss_function, has_causal_loss, output_head
from ..overlay.instead import function_instead
from ..site import Site

CHUNKED_FROM = 2**24
"""Logits of a stack, in numbers, from which a causal language model's loss is taken in chunks."""


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    adapters: int = 1,
    ignore_index: int = -100,
    chunk: int = 1024,
) -> Tensor:
    """Each adapter's mean next-token cross-entropy, without the logits of all tokens at once.

    Equal to the causal language model loss on ``F.linear(hidden, weight, bias)``. The gradient of
    a chunk is taken in the forward pass, while its logits exist, so nothing is computed twice and
    only a gradient of the size of ``hidden`` is kept. Differentiable once, in ``hidden`` alone.

    Args:
        hidden: (N·B, T, d), the frozen head's input, adapter after adapter.
        labels: (N·B, T) class indices; position t is predicted from t - 1.
        weight: (vocabulary, d) of the frozen head.
        bias: (vocabulary,), or None.
        adapters: N.
        ignore_index: label of positions that do not count.
        chunk: tokens whose logits exist at the same time, in float32 or better.

    Returns:
        (N,) losses, NaN for an adapter without a counting position.
    """
    target = F.pad(labels[..., 1:], (0, 1), value=ignore_index).reshape(-1).to(hidden.device)
    rows = hidden.reshape(-1, hidden.shape[-1])
    keep = torch.is_grad_enabled() and hidden.requires_grad
    nll, _ = _LinearNLL.apply(rows, weight, bias, target, ignore_index, chunk, keep)  # type: ignore[misc]
    counted = (target != ignore_index).reshape(adapters, -1).sum(1)
    return nll.reshape(adapters, -1).sum(1) / counted


class _LinearNLL(torch.autograd.Function):
    """Negative log-likelihood per row of a frozen linear head, and its gradient per row."""

    @staticmethod
    def forward(
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        chunk: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(rows.dtype, torch.float32)
        losses, grads = [], []
        for x, t in zip(rows.split(chunk), target.split(chunk), strict=True):
            logits = F.linear(x, weight, bias).to(wide)
            if torch.compiler.is_compiling():
                # Else each kernel that reads them shifts and pads the labels again, per logit.
                t = written(t)
            counts = t != ignore_index
            index = torch.where(counts, t, 0)[:, None]
            both = torch.cat([logits.logsumexp(1, keepdim=True), logits.gather(1, index)], 1)
            if torch.compiler.is_compiling():
                # A kernel of its own. In one with what else reads the logits, a thread block would
                # go along a whole row three times; and these would live until the loss is summed.
                both = written(both)
            total, picked = both.split(1, 1)
            losses.append(torch.where(counts, (total - picked)[:, 0], 0))
            if keep:
                slope = _softmax_minus_target(logits, total, index) * counts[:, None]
                grads.append(slope.to(x.dtype) @ weight.to(x.dtype))
        return torch.cat(losses), torch.cat(grads) if keep else rows.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        scaled = slopes.to(grads[0].dtype) * grads[0][:, None]
        return scaled.to(slopes.dtype), None, None, None, None, None, None


def _softmax_minus_target(logits: Tensor, total: Tensor, index: Tensor) -> Tensor:
    """exp(logits - total) - onehot(index)."""
    if torch.compiler.is_compiling():
        # Fuses with what comes before and after it, where a scatter would be written in full.
        place = torch.arange(logits.shape[1], device=logits.device)
        return (logits - total).exp() - (place == index).to(logits.dtype)
    slope = (logits - total).exp_()
    return slope.scatter_add_(1, index, slope.new_full((), -1.0).expand_as(index))


class FrozenHead:
    """Stands where a causal language model's frozen head is, and hands its input through.

    The model's loss function then gets the head's input as its logits, from which :meth:`losses`
    are taken in chunks. A model that does more with its logits (caps or scales them) does not pass
    that very tensor; then the caller runs it again as it is.

    Args:
        name: of the head's weight.
        head: the head.
        labels: of the batch where FSDP2 gathers the head's weight for its forward alone: then the
            losses are taken within it.

    Attributes:
        hidden: what the head was given last.
    """

    acts_on_bias: bool = False
    device: torch.device | None = None

    def __init__(self, name: str, head: nn.Linear, labels: Tensor | None = None):
        self.site = Site(name, head.out_features, head.in_features)
        # As it is now: during the pass, the layer's own weight is this stand-in's overlay.
        self.weight = head.weight.detach()
        self.bias = None if head.bias is None else head.bias.detach()
        self.hidden: Tensor | None = None
        self.labels, self.adapters = labels, 1
        self._taken: Tensor | None = None

    def __call__(self, x: Tensor, base: Any) -> Tensor:
        self.hidden = x
        if self.labels is not None:
            self._taken = chunked_cross_entropy(
                x, self.labels, base.weight().detach(), base.bias, adapters=self.adapters
            )
        return x

    def embed(self, one_hot: Any, base: Any) -> Tensor:
        return base(one_hot)

    def dense(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias

    def within(self, module: nn.Module, draw: Tensor | None = None) -> Self:
        return self

    @property
    def drops(self) -> bool:
        return False

    def over_mesh(self, mesh: Any) -> Self:
        return self

    def losses(self, labels: Tensor, adapters: int) -> Tensor:
        """(N,) losses of the last forward."""
        assert self.hidden is not None
        if self._taken is not None:
            if labels is not self.labels:
                raise ValueError("the model computes its loss on other labels than the batch's")
            return self._taken
        take = function_instead(chunked_cross_entropy)
        return take(self.hidden, labels, self.weight, self.bias, adapters=adapters)


def frozen_head(model: nn.Module, adapted: Container[str], batch: Any) -> FrozenHead | None:
    """The head of a model whose losses can be taken in chunks, where that pays; or None.

    It must be a plain nn.Linear without an adapter, in a model with the causal language model
    loss, and the batch must hold labels and nothing else that bears on the loss.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("labels"), Tensor):
        return None
    if not has_causal_loss(model) or not calls_loss_function(model):
        return None
    if any(name in batch for name in LOSS_ARGUMENTS):
        return None
    head = output_head(model)
    if head is None or plain_class(head) is not nn.Linear:
        return None
    assert isinstance(head, nn.Linear)
    gathers = any(map(is_unit, model.modules()))
    if is_dtensor(head.weight) and not gathers:
        return None
    if batch["labels"].numel() * head.out_features < CHUNKED_FROM:
        return None
    names = [n for n, module in model.named_modules(remove_duplicate=False) if module is head]
    if len(names) != 1 or f"{names[0]}.weight" in adapted:
        return None
    return FrozenHead(f"{names[0]}.weight", head, batch["labels"] if gathers else None)
