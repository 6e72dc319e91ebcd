"""An embedding is a linear map whose input is one-hot: y = onehot(ids) W, with W (vocab, dim).

Here that input is a tensor of which only the ids exist. ``x @ M`` is M[ids], so methods that act on
the output (LoRA and its family) never see a vector of the length of the vocabulary. A method that
changes the input makes it dense, which is exact, and is warned about.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DenseFallbackWarning, FadaptError
from .fold import FoldedSite, _take
from .linear_map import LinearMap
from .method import Leaves, Method


class OneHot(Tensor):
    """One-hot rows (..., width) given by their ids (...). Made by :func:`one_hot`."""

    ids: Tensor
    name: str

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in RULES:
            result = RULES[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        x = next(a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, OneHot))
        warnings.warn(
            f"{x.name}: the adapter changes the one-hot input of an embedding "
            f"({getattr(func, '__name__', func)}), which was materialised: {x.ids.numel()} x "
            f"{x.shape[-1]} numbers (exact, but slower)",
            DenseFallbackWarning,
            stacklevel=2,
        )
        args, kwargs = torch.utils._pytree.tree_map_only(OneHot, densify, (args, kwargs))
        return func(*args, **kwargs)


def one_hot(ids: Tensor, width: int, dtype: torch.dtype, name: str) -> OneHot:
    """The rows of ``ids``. An operation that escapes the rules sees NaN."""
    nan = torch.full((), float("nan"), dtype=dtype, device=ids.device)
    result = nan.expand(*ids.shape, width).as_subclass(OneHot)
    result.ids, result.name = ids, name
    return result


def densify(x: OneHot) -> Tensor:
    """The rows as an ordinary tensor."""
    positions = torch.arange(x.shape[-1], device=x.ids.device)
    return (x.ids.unsqueeze(-1) == positions).to(x.dtype)


def adapt_embedding(
    ids: Tensor, weight: Tensor, adapter: Any, base: LinearMap, padding_idx: int | None
) -> Tensor:
    """The adapted embedding of ids (...), -> (..., dim).

    Args:
        weight: the frozen table (vocab, dim).
        padding_idx: the token that trains nothing, as in ``F.embedding``.
    """
    vocab, name = weight.shape[0], adapter.site.name
    if isinstance(adapter, FoldedSite):
        y = _folded(ids, adapter, base, vocab, weight.dtype)
    else:
        y = adapter(one_hot(ids, vocab, weight.dtype, name), base)
    if padding_idx is None:
        return y
    padding_idx = padding_idx % vocab
    return torch.where((ids == padding_idx).unsqueeze(-1), y.detach(), y)


def _folded(
    ids: Tensor, folded: FoldedSite, base: LinearMap, vocab: int, dtype: torch.dtype
) -> Tensor:
    # vmap strips a subclass that it maps over, so the one-hot rows are made inside.
    name, n = folded.site.name, folded.stack_size
    if any(adapter.method.has_shift for _, adapter in folded.pieces):
        raise FadaptError(
            f"{name}: {folded} changes the one-hot input of an embedding, which a stack cannot do; "
            "run the adapters one by one"
        )
    x = one_hot(ids, vocab, dtype, name)
    folded._check(x)
    y = base(x)
    id_rows, y_rows = ids.reshape(n, -1), y.reshape(n, -1, y.shape[-1])

    def leave(method: Method, p: Leaves, ids: Tensor, y: Tensor) -> Tensor:
        return method.leave(p, method.enter(p, one_hot(ids, vocab, dtype, name))[1], y, base)

    left = [
        torch.func.vmap(
            functools.partial(leave, adapter.method),
            in_dims=({k: None if k in adapter.shared else 0 for k in adapter.leaves}, 0, 0),
        )(adapter.leaves, _take(id_rows, index), _take(y_rows, index))
        for index, adapter in folded.pieces
    ]
    return folded._gather(left, y_rows).reshape(y.shape)


def _matmul(x: Tensor, matrix: Tensor) -> Any:
    if not isinstance(x, OneHot) or isinstance(matrix, OneHot) or matrix.dim() != 2:
        return NotImplemented
    return F.embedding(x.ids, matrix)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    y = _matmul(x, weight.mT)
    return y if y is NotImplemented or bias is None else y + bias


def _to(x: OneHot, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.empty(0, dtype=x.dtype, device=x.device).to(*args, **kwargs).dtype
    return one_hot(x.ids, x.shape[-1], dtype, x.name)


def _reshape(x: OneHot, *shape: Any) -> Any:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if sizes[-1] != x.shape[-1]:
        return NotImplemented
    return one_hot(x.ids.reshape(sizes[:-1]), x.shape[-1], x.dtype, x.name)


RULES: dict[Callable, Callable[..., Any]] = {
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    F.linear: _linear,
    Tensor.to: _to,
    Tensor.reshape: _reshape,
    Tensor.detach: lambda x: x,
}

METADATA: frozenset[Callable] = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in "shape dtype device ndim requires_grad is_leaf grad_fn layout is_cuda is_cpu "
        "is_meta".split()
    ]
    + [
        getattr(Tensor, name)
        for name in "size dim numel is_floating_point is_complex __len__ get_device".split()
    ]
)
