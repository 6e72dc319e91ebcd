"""Methods whose increment is a matrix of the weight's size, and their cheapest products.

Their step has one product more than LoRA's, the gradient of the matrix: a base in full precision
meets the sum W + ΔW once, in place of a product with each. Over a base in bfloat16 that sum would
round small increments away, so the two products stay apart, but both are in bfloat16: a product
with ΔW then rounds no more than the base's output does, to which it is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base.linear_map import DenseMap, LinearMap
from .method import STRENGTH, Method
from .recomputed import Make, Way, frozen_weight, has_derivative, product


@dataclass(frozen=True)
class DenseIncrement(Method):
    """A method that writes ``increment``, the matrix, where others write ``delta``.

    The matrix is made in every pass and again in the backward pass, and not kept. A method that has
    a cheaper way for few tokens says so in ``prefers_matrix``, and overrides ``delta`` for them.
    """

    reads_output: ClassVar[bool] = False
    row_axes: ClassVar[Mapping[str, int]] = {}
    """{leaf: axis} along which a part of the leaf makes the same part of the matrix's rows, every
    row needing all of the other leaves."""
    stands_for_delta: ClassVar[bool] = True
    """Whether no subclass has overridden one of ``increment`` and ``delta`` without the other."""

    @property
    def reads_weight(self) -> bool:
        """True where ``increment`` reads the base's matrix (a quantized one is dequantised)."""
        return False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def increment(
        self, p: Mapping[str, Tensor], weight: Callable[[], Tensor], d_out: int, d_in: int
    ) -> Tensor:
        """ΔW (..., out, in).

        Args:
            p: the leaves.
            weight: gives the base's matrix (out, in) to a method that ``reads_weight``.
            d_out: number of outputs.
            d_in: number of inputs.
        """
        raise NotImplementedError

    def prefers_matrix(self, p: Mapping[str, Tensor], tokens: int, d_out: int, d_in: int) -> bool:
        """Whether the matrix is the cheaper way for so many tokens of an adapter."""
        return True

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        make, leaves, _ = self._making(p, base, y.shape[-1], x.shape[-1])
        narrow = y.dtype is torch.bfloat16 and x.dtype is torch.float32  # y is as the base gave it
        out = product(x, make, *leaves, way=Way(narrow=narrow and isinstance(x, Tensor)))
        # A strength is to be as exact as the leaves.
        return out.to(x.dtype) if STRENGTH in p else out

    def whole(self, p: Mapping[str, Tensor], x: Tensor, base: LinearMap) -> Tensor | None:
        """x (W + c ΔW)ᵀ + b by the base's own kernel, c the strength.

        None where ``delta`` is needed for its precision, for a base that is no plain matrix, or for
        a subclass with a map of its own; and where it is cheaper.
        """
        if not isinstance(x, Tensor) or type(base) is not DenseMap or not self.stands_for_delta:
            return None
        weight, bias, dtype = base.weight(), base.bias, x.dtype
        exact = dtype is torch.float32 or dtype is torch.float64
        same = all(
            t.dtype is dtype for k, t in p.items() if t.is_floating_point() and k != STRENGTH
        )
        if not exact or not same or weight.dtype is not dtype or weight.dim() != 2:
            return None
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            return None
        if weight.requires_grad or (bias is not None and has_derivative(bias)):
            return None
        d_out, d_in = weight.shape
        if not self.prefers_matrix(p, x.shape[:-1].numel(), d_out, d_in):
            return None
        make, leaves, axes = self._making(p, base, d_out, d_in)
        way = Way(base.with_weight, weight, axes=axes)
        if STRENGTH not in p:
            return product(x, make, *leaves, way=way)

        def scaled(*leaves: Tensor, rows: slice | None = None) -> Tensor:
            return leaves[-1].to(dtype) * make(*leaves[:-1], rows=rows)

        return product(x, scaled, *leaves, p[STRENGTH], way=way)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "increment" in vars(cls):
            cls.stands_for_delta = True
        elif vars(cls).keys() & {"delta", "shift"}:
            cls.stands_for_delta = False

    def _making(
        self, p: Mapping[str, Tensor], base: LinearMap, d_out: int, d_in: int
    ) -> tuple[Make, tuple[Tensor, ...], tuple[int | None, ...]]:
        """The matrix as a function of all that may have a gradient, and the axes of its rows."""
        names = [name for name, leaf in p.items() if leaf.is_floating_point() and name != STRENGTH]
        weight, own = frozen_weight(base) if self.reads_weight else (base.weight, ())

        def make(*leaves: Tensor, rows: slice | None = None) -> Tensor:
            given = {**p, **dict(zip(names, leaves, strict=False))}
            if rows is None:
                return self.increment(given, lambda: weight(*leaves[len(names) :]), d_out, d_in)
            return self.increment(given, lambda: base.weight()[rows], rows.stop - rows.start, d_in)

        axes = tuple(self.row_axes.get(name) for name in names)
        return make, (*(p[name] for name in names), *own), axes
