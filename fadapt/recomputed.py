"""Products with a matrix that is made of leaves, which training makes twice and does not keep.

Autograd would keep the matrix of every layer for the backward pass: as much memory as a second
copy of the weights. Where only the leaves are kept, the matrix is made again when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .base.linear_map import LinearMap
from .base.torch_private import is_transformed

Make = Callable[..., Tensor]


def product(x: Tensor, make: Make, *leaves: Tensor) -> Tensor:
    """x Mᵀ with M = ``make(*leaves)``, which is made again in the backward pass.

    Transforms of torch.func, forward-mode derivatives and torch.compile, which decides itself what
    is kept, see the plain product.

    Args:
        x: (..., tokens, in), or any (..., in) where M is (out, in).
        make: a function of the leaves; what else it reads gets no gradient.
        leaves: all that M depends on and that may have a gradient.

    Returns:
        (..., tokens, out).
    """
    plain = torch.compiler.is_compiling() or is_transformed() or not torch.is_grad_enabled()
    # The one-hot rows of an embedding are no tensor.
    if plain or not isinstance(x, Tensor) or any(_is_dual(t) for t in (x, *leaves)):
        return x @ make(*leaves).mT
    return _Product.apply(x, make, *leaves)  # type: ignore[return-value]


def frozen_weight(base: LinearMap) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The matrix of a base for ``make``: a function, and what it takes among the leaves.

    The second is empty where the matrix has no gradient; it is then dequantised anew for each use.
    """
    first = base.weight()
    if first.requires_grad:
        return (lambda weight: weight), (first,)
    once = [first]
    return (lambda: once.pop() if once else base.weight()), ()


def _is_dual(t: Tensor) -> bool:
    return unpack_dual(t).tangent is not None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Make, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(x, *leaves)
        ctx.make, kind = make, x.device.type
        mixed = kind != "meta" and torch.is_autocast_enabled(kind)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind)) if mixed else None
        matrix = make(*leaves)
        ctx.lead = matrix.shape[:-2]
        return x @ matrix.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *leaves = ctx.saved_tensors
        again = torch.is_grad_enabled()  # for second derivatives
        if not again:
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in leaves]
        with torch.autocast(*ctx.autocast) if ctx.autocast else nullcontext():
            with torch.enable_grad():
                matrix = ctx.make(*leaves)
            of_x = (
                grad @ (matrix if again else matrix.detach()) if ctx.needs_input_grad[0] else None
            )
            wanted = [t for t, wants in zip(leaves, ctx.needs_input_grad[2:], strict=True) if wants]
            if not wanted:
                return of_x, None, *(None for _ in leaves)
            rows, of_rows = (t.reshape(*ctx.lead, -1, t.shape[-1]) for t in (x, grad))
            of_matrix = (of_rows.mT @ rows).to(matrix.dtype)
        found = iter(torch.autograd.grad(matrix, wanted, of_matrix, create_graph=again))
        return of_x, None, *(next(found) if w else None for w in ctx.needs_input_grad[2:])
