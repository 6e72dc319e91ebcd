"""Products with a matrix that is made of leaves, which training makes twice and does not keep.

Autograd would keep the matrix of every layer for the backward pass: as much memory as a second
copy of the weights. Where only the leaves are kept, the matrix is made again when it is needed.
torch.utils.checkpoint does the same for functions whose transforms by torch.func are not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .base.linear_map import LinearMap
from .base.torch_private import is_transformed

Make = Callable[..., Tensor]


def product(x: Tensor, make: Make, *leaves: Tensor) -> Tensor:
    """x Mᵀ with M = ``make(*leaves)``, which is made again in the backward pass.

    Transforms of torch.func, forward-mode derivatives, CUDA graphs and torch.compile, which decides
    itself what is kept, see the plain product.

    Args:
        x: (..., tokens, in), or any (..., in) where M is (out, in).
        make: a function of the leaves; what else it reads gets no gradient.
        leaves: all that M depends on and that may have a gradient.

    Returns:
        (..., tokens, out).
    """
    if _is_plain(x, *leaves):
        return x @ make(*leaves).mT
    return _Product.apply(x, make, *leaves)  # type: ignore[return-value]


def again(function: Make, *tensors: Tensor) -> Tensor:
    """``function(*tensors)``, of which training keeps the tensors alone and evaluates it twice.

    For what is cheap and makes large intermediates. Plain where :func:`product` is.
    """
    if _is_plain(*tensors):
        return function(*tensors)
    return _Again.apply(function, *tensors)  # type: ignore[return-value]


def frozen_weight(base: LinearMap) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The matrix of a base for ``make``: a function, and what it takes among the leaves.

    The second is empty where the matrix has no gradient; it is then dequantised anew for each use.
    """
    first = base.weight()
    if first.requires_grad:
        return (lambda weight: weight), (first,)
    once = [first]
    return (lambda: once.pop() if once else base.weight()), ()


def _is_plain(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or is_transformed() or not torch.is_grad_enabled():
        return True
    # The one-hot rows of an embedding are no tensor.
    if any(not isinstance(t, Tensor) or unpack_dual(t).tangent is not None for t in tensors):
        return True
    # A backward pass within another one is not recorded into a CUDA graph.
    return tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


class _Recomputed(torch.autograd.Function):
    """What both have: the tensors to keep, and a function of them that is evaluated again."""

    @staticmethod
    def keep(ctx: Any, make: Make, tensors: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*tensors)
        ctx.make, kind = make, tensors[0].device.type
        mixed = kind != "meta" and torch.is_autocast_enabled(kind)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind)) if mixed else None

    @staticmethod
    def precision(ctx: Any) -> AbstractContextManager:
        """That of the forward pass."""
        return torch.autocast(*ctx.autocast) if ctx.autocast else nullcontext()

    @staticmethod
    def inputs(ctx: Any) -> list[Tensor]:
        """What was kept: to differentiate, or under ``create_graph`` as it is in the graph."""
        if torch.is_grad_enabled():
            return list(ctx.saved_tensors)
        return [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]

    @staticmethod
    def gradients(
        ctx: Any, made: Tensor, inputs: Sequence[Tensor], wants: Sequence[bool], grad: Tensor
    ) -> list[Tensor | None]:
        """The gradients of the inputs that want one, from that of what was made."""
        wanted = [t for t, w in zip(inputs, wants, strict=True) if w]
        again = torch.is_grad_enabled()
        found = iter(torch.autograd.grad(made, wanted, grad, create_graph=again))
        return [next(found) if w else None for w in wants]


class _Product(_Recomputed):
    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Make, *leaves: Tensor) -> Tensor:
        _Product.keep(ctx, make, (x, *leaves))
        matrix = make(*leaves)
        ctx.lead = matrix.shape[:-2]
        return x @ matrix.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *leaves = _Product.inputs(ctx)
        of_input, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        with _Product.precision(ctx):
            with torch.enable_grad():
                matrix = ctx.make(*leaves)
            of_x = None
            if of_input:
                of_x = grad @ (matrix if torch.is_grad_enabled() else matrix.detach())
            if not any(wants):
                return of_x, None, *(None for _ in wants)
            rows, of_rows = (t.reshape(*ctx.lead, -1, t.shape[-1]) for t in (x, grad))
            of_matrix = (of_rows.mT @ rows).to(matrix.dtype)
        return of_x, None, *_Product.gradients(ctx, matrix, leaves, wants, of_matrix)


class _Again(_Recomputed):
    @staticmethod
    def forward(ctx: Any, function: Make, *tensors: Tensor) -> Tensor:
        _Again.keep(ctx, function, tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        tensors = _Again.inputs(ctx)
        with _Again.precision(ctx), torch.enable_grad():
            out = ctx.make(*tensors)
        return None, *_Again.gradients(ctx, out, tensors, ctx.needs_input_grad[1:], grad)
