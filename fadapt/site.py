"""Site: the saved address of one adapted parameter; SiteView: what a method sees of it."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base.linear_map import LinearMap
from .base.weights import BaseWeight, Kind


@dataclass(frozen=True)
class Site:
    """What is static about one adapted parameter; part of the treespec, saved with the params.

    Attributes:
        name: the parameter's name in ``model.named_parameters(remove_duplicate=False)``.
        out_features, in_features: of the linear map, whatever the storage.
        transposed: whether the weight is stored (in, out), as in GPT-2's Conv1D.
        bias: the name of the layer's bias parameter, or None.
        role: "reader", "writer" or "inner" relative to the residual width; "" if not a layer.
        note: how the role was chosen where the shape alone does not tell.
        tied: the other names under which the same tensor is used, unadapted.
        fingerprint: of the frozen weight that the adapter was made for.
        experts: the number of matrices in a stack (the first axis of the parameter and of the
            leaves), or 0 for a single matrix.
        kernel: of a convolution or of heads, the axes of the parameter after the first, which are
            flattened.
        flat: whether a stack is stored as one matrix, the rows of one expert after the other's.
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool = False
    bias: str | None = None
    kind: Kind = Kind.LINEAR
    role: str = ""
    note: str = ""
    tied: tuple[str, ...] = ()
    fingerprint: str = ""
    experts: int = 0
    kernel: tuple[int, ...] = ()
    flat: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether this is no parameter's place, but that of leaves which several sites share."""
        return self.kind is Kind.SHARED

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the parameter itself, except in a quantised layer."""
        rows, columns = self.matrix_shape[::-1] if self.transposed else self.matrix_shape
        if self.kernel:
            return rows, *self.kernel
        if self.kind is Kind.VECTOR:
            return (rows,)
        if self.flat:
            return self.experts * rows, columns
        return (self.experts, rows, columns) if self.experts else (rows, columns)

    def matrix(self, parameter: Tensor) -> Tensor:
        """The stored parameter as (out_features, in_features), or (experts, out, in): a view."""
        if self.kind is Kind.VECTOR:
            return parameter.unsqueeze(1)
        if self.kernel:
            parameter = parameter.flatten(1)
        if self.flat:
            parameter = parameter.unflatten(0, (self.experts, -1))
        return parameter.mT if self.transposed else parameter

    def parameter(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`: the matrix in the shape in which it is stored."""
        if self.kind is Kind.VECTOR:
            return matrix.squeeze(1)
        stored = matrix.mT if self.transposed else matrix
        return stored.reshape(self.stored_shape) if self.kernel or self.flat else stored

    def mismatch(self, weight: BaseWeight) -> str | None:
        """In what the model's weight is unlike the one that the adapter was made for, or None.

        The values are not compared: see ``fingerprint``.
        """
        if weight.stored_shape != self.stored_shape:
            return f"has shape {weight.stored_shape}, not {self.stored_shape}"
        if weight.bias != self.bias:
            return f"has the bias {weight.bias}, not {self.bias}"
        if weight.transposed != self.transposed:
            order = "(in, out), not (out, in)" if weight.transposed else "(out, in), not (in, out)"
            return f"is stored {order}"
        if (weight.shape, weight.experts) != (self.matrix_shape, self.experts):
            return f"has {weight.experts} experts of {weight.shape}, not {self.experts}"
        if weight.kernel != self.kernel:
            return f"has the kernel {weight.kernel}, not {self.kernel}"
        kinds = {Kind.LINEAR if k is Kind.QUANTIZED else k for k in (weight.kind, self.kind)}
        return None if len(kinds) == 1 else f"is {weight.kind}, not {self.kind}"


def shared_site(method: object, taken: Container[str]) -> Site:
    """The place of the leaves that a method's sites share, under a name that is not taken."""
    name = f"shared:{type(method).__name__}"
    names = (f"{name}#{i}" if i else name for i in itertools.count())
    return Site(next(n for n in names if n not in taken), 0, 0, kind=Kind.SHARED)


@dataclass(frozen=True)
class SiteView:
    """What :meth:`Method.init` sees of a site: its shape, its frozen map, and tensor factories.

    All factories make tensors in ``dtype`` on the site's device; random ones are drawn on the CPU,
    so that values do not depend on the device.

    Attributes:
        site: the address: name, shape, role.
        base: the frozen map, whose ``weight()`` is dense.
        device: of the site's weight.
        dtype: of what the factories make: float32 or better.
        sites: all sites that this ``fadapt.init`` adapts by the same method, this one among them.
        model_config: the model's own config (Hugging Face's), or None.

    Example:
        >>> class Bias(fadapt.Method):
        ...     acts_on_bias = True
        ...     def init(self, site, rng):  # site is a SiteView
        ...         print(site.name, site.in_features, site.out_features)
        ...         return {"d": site.zeros(site.out_features)}, {}
        ...     def delta(self, p, x, y, base):
        ...         return p["d"].expand_as(y)
        >>> params = fadapt.init(model, {"0.weight": Bias()})
        0.weight 8 16
    """

    site: Site
    base: LinearMap
    device: torch.device
    dtype: torch.dtype
    sites: tuple[Site, ...] = ()
    model_config: Any = None

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def out_features(self) -> int:
        return self.site.out_features

    @property
    def in_features(self) -> int:
        return self.site.in_features

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The frozen matrix (out_features, in_features), in float32 or better."""
        return self.base.weight().detach().to(dtype or self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def uniform(self, rng: torch.Generator, shape: Sequence[int], bound: float) -> Tensor:
        """Uniform on [-bound, bound)."""
        if self.device.type == "meta":  # nothing to draw
            return self.zeros(*shape)
        unit = torch.rand(*shape, generator=rng, dtype=self.dtype, device="cpu")
        return self._place(unit * 2 - 1) * bound

    def normal(self, rng: torch.Generator, shape: Sequence[int], std: float = 1.0) -> Tensor:
        if self.device.type == "meta":
            return self.zeros(*shape)
        unit = torch.randn(*shape, generator=rng, dtype=self.dtype, device="cpu")
        return self._place(unit) * std

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)
