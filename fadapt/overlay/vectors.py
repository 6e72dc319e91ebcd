"""Parameters of one axis in a stack: each adapter's own vector for its own rows, as one product.

A norm multiplies every row by one vector. In a stack the rows of an adapter follow each other on
the first axis, so that x (N·B, ..., n), seen as (N, B, ..., n), meets the vectors as
(N, 1, ..., 1, n). What else is done with a vector (a cast, 1 + w) is done with all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.linear_map import LinearMap
from ..params.adapter import Adapted
from ..site import Site


@dataclass(frozen=True, eq=False)
class Vectors:
    """What stands where a vector is in a stack: the adapters' vectors (N, n) (an ``Adapted``).

    Attributes:
        values: in the dtype of the vector.
        of: the fold that made them.
    """

    values: Tensor
    of: Adapted

    acts_on_bias: bool = False
    drops: bool = False

    @property
    def site(self) -> Site:
        return self.of.site

    @property
    def device(self) -> torch.device | None:
        return self.values.device

    @property
    def tensors(self) -> list[Tensor]:
        return [self.values]

    def vectors(self, own: Tensor) -> Tensor:
        return self.values

    def __call__(self, x: Tensor, base: LinearMap) -> Tensor:
        return self.of(x, base)

    def embed(self, one_hot: Any, base: LinearMap) -> Tensor:
        return self.of.embed(one_hot, base)

    def dense(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.of.dense(weight, bias)

    def within(self, module: nn.Module, draw: Tensor | None = None) -> Adapted:
        return self

    def over_mesh(self, mesh: Any) -> Adapted:
        return self.of.over_mesh(mesh)


@dataclass(frozen=True, eq=False)
class Stacked:
    """An argument that is a vector in a stack: the frozen one (n,), and the adapters' (N, n)."""

    own: Tensor
    values: Tensor
    adapter: Adapted
    required_grad: bool

    def moves(self, rows: Tensor) -> Tensor:
        """How the adapters' vectors differ from the frozen one, beside rows (N, B, ..., n)."""
        return _beside(self.values.to(rows.dtype) - self.own.to(rows.dtype), rows)


Remake = Callable[[Stacked, Tensor, Tensor], Any]
"""(a vector, its own values now, the adapters' now) -> what stands for it now."""

Call = Callable[[Callable, tuple, dict[str, Any]], Any]
"""(function, args, kwargs) -> its value."""

CASTS = frozenset(
    {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half}
    | {Tensor.bfloat16, Tensor.contiguous, Tensor.clone, Tensor.detach}
)
ELEMENTWISE = frozenset(
    {torch.mul, torch.add, torch.sub, Tensor.mul, Tensor.add, Tensor.sub, torch.neg}
    | {Tensor.__mul__, Tensor.__rmul__, Tensor.__add__, Tensor.__radd__, Tensor.__sub__}
    | {Tensor.__rsub__, Tensor.neg, Tensor.__neg__}
)


def of_members(
    func: Callable, args: list[Any], kwargs: dict[str, Any], remake: Remake, call: Call
) -> Any:
    """What a function of vectors means in a stack; NotImplemented where that is not known.

    Args:
        args, kwargs: with a :class:`Stacked` for each vector.
        remake: puts changed vectors in one's place.
        call: calls a function of which an argument may be an adapted matrix.
    """
    if func in CASTS or func in ELEMENTWISE:
        return _elementwise(func, args, kwargs, remake)
    if func is F.linear:
        return _linear(call, *args, **kwargs)
    rule = {F.layer_norm: _layer_norm, F.rms_norm: _rms_norm}.get(func)
    return NotImplemented if rule is None else rule(*args, **kwargs)


def _elementwise(func: Callable, args: list[Any], kwargs: dict[str, Any], remake: Remake) -> Any:
    found = [i for i, a in enumerate(args) if isinstance(a, Stacked)]
    others = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim()]
    if kwargs.keys() - {"dtype", "alpha", "copy", "memory_format"} or len(found) != 1:
        return NotImplemented
    at = found[0]
    one = args[at]

    def called(value: Any) -> Tensor:
        return func(*args[:at], value, *args[at + 1 :], **kwargs)

    if func in CASTS and at:  # x.type_as(w)
        return called(one.own)
    if func in CASTS or not others:
        return remake(one, called(one.own), called(one.values))
    x = _apart(args[others[0]], one.values)
    if x is None or len(others) != 1 or len(args) != 2:
        return NotImplemented
    values = _beside(one.values, x)
    return func(*((values, x) if at == 0 else (x, values)), **kwargs).flatten(0, 1)


def _apart(x: Tensor, values: Tensor) -> Tensor | None:
    """x (N·B, ..., n) as (N, B, ..., n), where it has such a shape."""
    n, width = values.shape
    fits = x.dim() > 1 and x.shape[-1] == width and x.shape[0] % n == 0
    return x.unflatten(0, (n, -1)) if fits else None


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """The vectors as (N, 1, ..., 1, n), beside x (N, B, ..., n)."""
    return values.reshape(len(values), *(1,) * (x.dim() - 2), -1)


def _plain(vector: Any) -> Any:
    """The frozen vector, or what is no vector of a stack, as it is."""
    return vector.own if isinstance(vector, Stacked) else vector


def _normed(y: Tensor, normed: Tensor, weight: Any, bias: Any = None) -> Any:
    """y, a norm's output with the frozen vectors, and what the adapters' moves add to it.

    The frozen norm runs in its own kernel, so that adapters without a move leave it to the bit.
    """
    rows = _apart(normed, next(v for v in (weight, bias) if isinstance(v, Stacked)).values)
    if rows is None:
        return NotImplemented
    moved = torch.zeros_like(rows)
    if isinstance(weight, Stacked):
        moved = rows * weight.moves(rows)
    if isinstance(bias, Stacked):
        moved = moved + bias.moves(rows)
    return y + moved.flatten(0, 1).to(y.dtype)


def _layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    if isinstance(input, Stacked) or len(normalized_shape) != 1:
        return NotImplemented
    y = F.layer_norm(input, normalized_shape, _plain(weight), _plain(bias), eps)
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    return _normed(y, F.layer_norm(wide, normalized_shape, None, None, eps), weight, bias)


def _rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Any,
    weight: Any = None,
    eps: float | None = None,
) -> Any:
    if isinstance(input, Stacked) or len(normalized_shape) != 1:
        return NotImplemented
    y = F.rms_norm(input, normalized_shape, _plain(weight), eps)
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    # By default the smallest number of the input's own dtype.
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _normed(y, F.rms_norm(wide, normalized_shape, None, eps), weight)


def _linear(call: Call, input: Tensor, weight: Any, bias: Any = None) -> Any:  # noqa: A002
    """A product with a frozen or an adapted matrix, and each adapter's bias."""
    acts_on_bias = getattr(getattr(weight, "adapter", None), "acts_on_bias", False)
    if not isinstance(bias, Stacked) or acts_on_bias:
        return NotImplemented
    if isinstance(input, Stacked) or isinstance(weight, Stacked):
        return NotImplemented
    y = call(F.linear, (input, weight, bias.own), {})
    rows = _apart(y, bias.values)
    return NotImplemented if rows is None else (rows + bias.moves(rows)).flatten(0, 1)
