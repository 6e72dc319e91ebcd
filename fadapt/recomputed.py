"""Products with a matrix that is made of leaves, which training makes twice and does not keep.

Autograd would keep the matrix of every layer for the backward pass: as much memory as a second
copy of the weights. Where only the leaves are kept, the matrix is made again when it is needed.
torch.utils.checkpoint does the same for functions whose transforms by torch.func are not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .base.linear_map import LinearMap
from .base.torch_private import is_transformed

Make = Callable[..., Tensor]


def product(x: Tensor, make: Make, *leaves: Tensor, way: Way | None = None) -> Tensor:
    """x Mᵀ with M = ``make(*leaves)``, which is made again in the backward pass.

    Transforms of torch.func, forward-mode derivatives, CUDA graphs and torch.compile, which decides
    itself what is kept, see the plain product.

    Args:
        x: (..., tokens, in), or any (..., in) where M is (out, in).
        make: a function of the leaves; what else it reads gets no gradient.
        leaves: all that M depends on and that may have a gradient.
        way: more about the product.

    Returns:
        (..., tokens, out), in bfloat16 where the way is narrow and the product not plain.
    """
    way = way or Way()
    if _is_plain(x, *leaves):
        matrix = make(*leaves)
        if way.added is not None:
            matrix = way.added + matrix
        return x @ matrix.mT if way.kernel is None else way.kernel(matrix)(x)
    return _Product.apply(x, make, way, *leaves)  # type: ignore[return-value]


@dataclass(frozen=True)
class Way:
    """How a product with a matrix that is made is done.

    Attributes:
        kernel: gives the function that multiplies with M, where a bias is added, or the rounding
            has to be a certain kernel's.
        added: a constant matrix (out, in): the product is with M + ``added``.
        narrow: multiply in bfloat16 what is in float32, with sums, and the gradient of M, in
            float32. For an x whose values are those of bfloat16 anyway.
        axes: for each leaf, the axis along which a part of it makes the same part of M's rows, or
            None for a leaf that every row needs. ``make`` then takes ``rows``, a slice, with parts
            of the leaves: M and its derivative are made part by part, within a CPU's cache.
    """

    kernel: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None
    added: Tensor | None = None
    narrow: bool = False
    axes: tuple[int | None, ...] = ()

    def whole(self, make: Make, leaves: Sequence[Tensor]) -> Tensor:
        """M, or M + ``added``, without a derivative."""
        parts = self.parts(leaves) if self.added is not None else []
        if len(parts) < 2:
            matrix = make(*leaves)
            return matrix if self.added is None else self.added + matrix
        assert self.added is not None
        matrix = torch.empty_like(self.added)  # in its layout
        for rows, some in parts:
            torch.add(self.added[rows], make(*some, rows=rows), out=matrix[rows])
        return matrix

    def parts(self, leaves: Sequence[Tensor]) -> list[tuple[slice, list[Tensor]]]:
        """Some rows, and what makes them; none where M is made at once."""
        sizes = [t.shape[k] for t, k in zip(leaves, self.axes, strict=False) if k is not None]
        if not sizes or self.added is None or self.added.device.type != "cpu":
            return []
        d_out, d_in = self.added.shape
        unit = d_out // min(sizes)  # rows that belong together
        step = max(1, PART // (d_in * unit)) * unit
        found = []
        for start in range(0, d_out, step):
            rows = slice(start, min(start + step, d_out))
            axes = (*self.axes, *(None for _ in leaves[len(self.axes) :]))
            found.append(
                (rows, [_part(t, k, rows, d_out) for t, k in zip(leaves, axes, strict=True)])
            )
        return found


PART = 2**18
"""The entries of a part of a matrix."""


def _part(leaf: Tensor, axis: int | None, rows: slice, d_out: int) -> Tensor:
    if axis is None:
        return leaf
    each = d_out // leaf.shape[axis]
    return leaf.narrow(axis, rows.start // each, (rows.stop - rows.start) // each)


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


def has_derivative(tensor: Tensor) -> bool:
    """Whether reverse or forward mode follows a tensor."""
    if tensor.requires_grad or torch.compiler.is_compiling():
        return tensor.requires_grad
    return unpack_dual(tensor).tangent is not None


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
    def forward(ctx: Any, x: Tensor, make: Make, way: Way, *leaves: Tensor) -> Tensor:
        matrix = way.whole(make, leaves)
        ctx.lead, ctx.way = matrix.shape[:-2], way
        if way.narrow:
            x, matrix = x.bfloat16(), matrix.bfloat16()
        _Product.keep(ctx, make, (x, *leaves))
        return x @ matrix.mT if way.kernel is None else way.kernel(matrix)(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, *leaves = _Product.inputs(ctx)
        way, (of_input, _, _, *wants) = ctx.way, ctx.needs_input_grad
        parts = [] if torch.is_grad_enabled() else way.parts(leaves)
        with _Product.precision(ctx):
            if len(parts) > 1:
                of_x, found = _by_parts(ctx, parts, x, leaves, grad)
                return of_x, None, None, *found
            with torch.enable_grad():
                matrix = ctx.make(*leaves)
            of_x = None
            if of_input:
                factor = matrix if torch.is_grad_enabled() else matrix.detach()
                factor = factor if way.added is None else way.added + factor
                of_x = grad @ (factor.bfloat16() if way.narrow else factor)
                del factor
            if not any(wants):
                return of_x, None, None, *(None for _ in wants)
            rows, of_rows = (t.reshape(*ctx.lead, -1, t.shape[-1]) for t in (x, grad))
            of_matrix = _of_matrix(of_rows, rows, way.narrow).to(matrix.dtype)
        found = _Product.gradients(ctx, matrix, leaves, wants, of_matrix)
        return of_x, None, None, *found


def _by_parts(
    ctx: Any,
    parts: Sequence[tuple[slice, list[Tensor]]],
    x: Tensor,
    leaves: Sequence[Tensor],
    grad: Tensor,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of the leaves, from some rows of the matrix at a time."""
    way, (of_input, _, _, *wants) = ctx.way, ctx.needs_input_grad
    axes = (*way.axes, *(None for _ in leaves[len(way.axes) :]))
    sums = [torch.zeros_like(t) if w else None for t, w in zip(leaves, wants, strict=True)]
    x_rows, grad_rows = (t.reshape(-1, t.shape[-1]) for t in (x, grad))
    of_x = torch.zeros_like(x_rows) if of_input else None
    for rows, some in parts:
        some = [t.detach().requires_grad_(w) for t, w in zip(some, wants, strict=True)]
        with torch.enable_grad():
            made = ctx.make(*some, rows=rows)
        of_rows = grad_rows[:, rows]
        if of_x is not None:
            of_x.addmm_(of_rows, way.added[rows] + made.detach())
        if not any(wants):
            continue
        found = _Product.gradients(ctx, made, some, wants, of_rows.mT @ x_rows)
        for total, own, axis in zip(sums, found, axes, strict=True):
            if total is not None and own is not None:
                _part(total, axis, rows, grad.shape[-1]).add_(own)
    return None if of_x is None else of_x.view(x.shape), sums


def _of_matrix(of_rows: Tensor, rows: Tensor, narrow: bool) -> Tensor:
    """Σ of the rows' outer products, (..., out, in); of bfloat16 in float32."""
    if not narrow:
        return of_rows.mT @ rows
    if torch.is_grad_enabled() or not rows.is_cuda or rows.dim() > 3:
        return of_rows.float().mT @ rows.float()
    multiply = torch.mm if rows.dim() == 2 else torch.bmm
    return multiply(of_rows.mT, rows, out_dtype=torch.float32)


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
