"""The base's own product, to the last bit, on inputs whose layout decides about the kernel.

``torch.matmul`` of three or more axes with a matrix folds them into rows, or runs a batch of small
products; the two round differently. Which one it takes depends on the strides of the input and on
whether the *weight* requires grad (``should_fold`` in ATen, 2.11 to 2.13), even under no_grad. The
base's parameter does, in a model as it is loaded; the frozen one here does not.

Where the identity of an untrained adapter does not hold to the last bit, and why:

- ``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` in eval mode, while autograd records and
  the base is frozen: torch runs the base as one fused kernel, which has no gradient; see
  :mod:`.fused`.
- While autograd records, operations without a rule (attention's packed projections, which warn),
  and layers without an adapter that get strided inputs: the base's weights require grad, or do not,
  other than the adapted ones. Without autograd they agree.
- Compiled code, which rounds where it fuses; and stacks, whose products have N times the rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.frozen_product import KERNEL, TRANSPOSE, product
from ..base.linear_map import DenseMap
from ..base.torch_private import is_transformed, is_wrapped


def layer_map(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, required_grad: bool
) -> DenseMap:
    """The frozen map of a layer that was called with ``x``.

    Args:
        x: (..., in_features), as the layer got it.
        weight: frozen, as stored.
        bias: (out_features,) or None.
        transposed: whether the weight is stored (in, out).
        required_grad: whether the base's own parameter requires grad.
    """
    if x.dim() < 3 or torch.compiler.is_compiling() or x.is_contiguous():
        return DenseMap(weight, bias, transposed)
    return StridedMap(x, weight, bias, transposed, required_grad)


class StridedMap(DenseMap):
    """A frozen map for an input that is no plain block of rows; arguments as of ``layer_map``."""

    __slots__ = ("_required_grad", "_x")

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        required_grad: bool,
    ):
        super().__init__(weight, bias, transposed)
        self._x, self._required_grad = x, required_grad

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.kernel(x)
        x = laid_out_like(x, self._x)
        return product(x, self, KERNEL) if self._required_grad and x.dim() > 2 else self.kernel(x)

    def kernel(self, x: Tensor) -> Tensor:
        """The layer's own product."""
        return super().__call__(x)

    def part(self, x: Tensor, part: str) -> Tensor:
        """One of the products, with a weight that says what the base's parameter says."""
        if part == TRANSPOSE:
            return x @ self.weight()
        if part != KERNEL:
            return F.linear(x, self.weight())
        weight = self._weight.detach().requires_grad_()
        return type(self)(self._x, weight, self._bias, self._transposed, False).kernel(x)


class WeightFirstMap(StridedMap):
    """The map of a layer that computes ``weight @ x`` with one column for a token.

    To the adapter it is a map of rows; the product is the layer's own.
    """

    __slots__ = ()

    def kernel(self, x: Tensor) -> Tensor:
        weight = self._weight.mT if self._transposed else self._weight
        return (weight @ x.mT).mT


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` in the memory layout of a tensor of its shape, where that can be had."""
    if x is other or x.shape != other.shape or x.stride() == other.stride():
        return x
    if is_wrapped(x) or is_wrapped(other):
        return x
    for axis, stride in enumerate(other.stride()):
        if stride == 0:  # expanded: its rows are equal, and so are those made of them
            x = x.narrow(axis, 0, 1)
    new: Any = torch.empty_strided(x.shape, other.stride(), dtype=x.dtype, device=x.device)
    return new.copy_(x).expand(other.shape)


def marked_like(tensor: Tensor, required_grad: bool) -> Tensor:
    """A frozen tensor that asks for the kernel which the base's parameter asks for.

    Without autograd alone, where the mark costs nothing; else torch would compute its gradient.
    """
    if required_grad and not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_transformed()
        or tensor.is_inference()
    ):
        return tensor.detach().requires_grad_()
    return tensor
