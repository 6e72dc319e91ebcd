"""The product with a frozen matrix that torch cannot look into, under every transform.

The product, its part without the bias and that with the transposed matrix are each other's
derivatives, so one primitive has them all.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .torch_private import is_transformed

KERNEL, LINEAR, TRANSPOSE = "kernel", "linear", "transpose"


class FrozenMap(Protocol):
    """What has the three products."""

    def part(self, x: Tensor, part: str) -> Tensor:
        """One of them, without a derivative."""
        ...


def product(x: Tensor, base: FrozenMap, part: str) -> Any:
    """One of the products of ``base``, differentiable in x."""
    # Dynamo refuses a Function that has a jvp.
    if torch.compiler.is_compiling():
        return _Traced.apply(x, base, part)
    if is_transformed() or unpack_dual(x).tangent is not None:
        return _Product.apply(x, base, part)
    if not torch.is_grad_enabled():
        return base.part(x, part)
    if x.requires_grad:
        return _Recorded.apply(x, base, part)
    with torch.no_grad():
        return base.part(x, part)


def _derivative(part: str) -> str:
    return LINEAR if part == TRANSPOSE else TRANSPOSE


class _Recorded(torch.autograd.Function):
    """A product as autograd alone sees it.

    torch binds the arguments of a Function with ``setup_context`` to a signature that it looks up
    anew in every call, which takes longer than a small product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: FrozenMap, part: str) -> Tensor:  # type: ignore[override]
        ctx.base, ctx.part, ctx.dtype = base, part, x.dtype
        return base.part(x, part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None, None]:  # type: ignore[override]
        return product(grad.to(ctx.dtype), ctx.base, _derivative(ctx.part)), None, None


class _Traced(torch.autograd.Function):
    """A product with a frozen matrix, as torch.compile can trace it: first derivatives only."""

    @staticmethod
    def forward(x: Tensor, base: FrozenMap, part: str) -> Tensor:
        with torch.no_grad():
            return base.part(x, part)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.base, ctx.part = inputs
        ctx.dtypes = x.dtype, output.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None, None]:  # type: ignore[override]
        return ctx.base.part(grad.to(ctx.dtypes[0]), _derivative(ctx.part)), None, None


class _Product(_Traced):
    """The same under autograd and all torch.func transforms, to any order.

    bitsandbytes' own autograd functions have no setup_context, vmap or jvp and are refused there.
    """

    generate_vmap_rule = False

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None, None]:  # type: ignore[override]
        x = grad.to(ctx.dtypes[0])
        return _Product.apply(x, ctx.base, _derivative(ctx.part)), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:  # type: ignore[override]
        along = TRANSPOSE if ctx.part == TRANSPOSE else LINEAR
        return _Product.apply(tangent, ctx.base, along).to(ctx.dtypes[1])  # type: ignore[union-attr]

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> Any:  # type: ignore[override]
        x, base, part = args
        return _Product.apply(x.movedim(in_dims[0], 0), base, part), 0
