"""The frozen affine map y = x Wᵀ + b that a method sees as ``base``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class LinearMap(Protocol):
    """A frozen affine map from ``in_features`` to ``out_features``.

    Anything with these members can be adapted: a dense weight, a quantised module, or an
    already adapted map (which is how methods compose).

    Example:
        >>> class Doubled(fadapt.Method):
        ...     def init(self, site, rng):
        ...         return {"s": site.zeros(1)}, {}
        ...     def delta(self, p, x, y, base):  # base is a LinearMap
        ...         return p["s"] * base.linear(x)
        >>> params = fadapt.init(model, Doubled())
        >>> torch.equal(fadapt.apply(model, params, x), model(x))
        True
    """

    @property
    def bias(self) -> Tensor | None:
        """The bias (out_features,), or None."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """The untouched layer, bias included: (..., in_features) -> (..., out_features)."""
        ...

    def linear(self, z: Tensor) -> Tensor:
        """The product without the bias, in the dtype of ``z``."""
        ...

    def weight(self) -> Tensor:
        """The dense matrix (out_features, in_features); dequantised on demand."""
        ...


class DenseMap:
    """A plain weight in either memory layout, applied with the kernel its own layer uses.

    Args:
        weight: (out, in), or (in, out) when ``transposed`` (GPT-2's Conv1D).
        bias: (out,) or None.
        transposed: whether the weight is stored (in, out).
    """

    __slots__ = ("_bias", "_transposed", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, transposed: bool = False):
        self._weight, self._bias, self._transposed = weight, bias, transposed

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    def __call__(self, x: Tensor) -> Tensor:
        if not self._transposed:
            return F.linear(x, self._weight, self._bias)
        if self._bias is not None and x.dim() == 2:
            return torch.addmm(self._bias, x, self._weight)
        y = x @ self._weight
        return y if self._bias is None else y + self._bias

    def with_weight(self, weight: Tensor) -> DenseMap:
        """The same map with another matrix (out, in)."""
        return DenseMap(weight.mT if self._transposed else weight, self._bias, self._transposed)

    def linear(self, z: Tensor) -> Tensor:
        z_base = z.to(self._weight.dtype)
        y = z_base @ self._weight if self._transposed else F.linear(z_base, self._weight)
        return y.to(z.dtype)

    def weight(self) -> Tensor:
        return self._weight.mT if self._transposed else self._weight


class GatheredMap:
    """A map whose weight is spread over processes: gathered at each use, and let go after it.

    All processes have to use it alike, in the same order.

    Args:
        gather: gives the map of the whole weight with this bias.
        bias: gives the whole bias; None for a layer without one.
    """

    __slots__ = ("_bias", "_gather")

    def __init__(
        self, gather: Callable[[Tensor | None], LinearMap], bias: Callable[[], Tensor] | None = None
    ):
        self._gather, self._bias = gather, bias

    @property
    def bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias()

    def __call__(self, x: Tensor) -> Tensor:
        return self._gather(self.bias)(x)

    def linear(self, z: Tensor) -> Tensor:
        return self._gather(None).linear(z)

    def weight(self) -> Tensor:
        return self._gather(None).weight()


def without_bias(base: LinearMap, y: Tensor) -> Tensor:
    """The part of a layer's output that comes from its weight.

    Equal to ``base.linear(x)`` up to one rounding, so use it only inside a term that an exact zero
    multiplies at the start.
    """
    return y if base.bias is None else y - base.bias.to(y.dtype)
