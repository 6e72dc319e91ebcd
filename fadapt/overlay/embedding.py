"""An embedding is a linear map whose input is one-hot: y = onehot(ids) W, with W (vocab, dim).

Here that input is an object that knows only the ids. ``x @ M`` is M[ids], so methods that act on
the output (LoRA and its family) never see a vector of the length of the vocabulary. A method that
changes the input makes it dense, which is exact, and is warned about.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.linear_map import LinearMap
from ..errors import DenseFallbackWarning
from ..params.adapter import Adapted


class OneHot:
    """One-hot rows (..., width) given by their ids (...), in the place of a tensor.

    torch.compile cannot trace it (nor a tensor subclass made inside an overlay's rule); there the
    rows are dense.

    Args:
        ids: (...).
        width: of the rows.
        dtype: of the rows.
        owner: the name of the embedding's weight, for the warning.
    """

    def __init__(self, ids: Tensor, width: int, dtype: torch.dtype, owner: str):
        self.ids, self.width, self.dtype, self.owner = ids, width, dtype, owner

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.ids.shape, self.width))

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def dim(self) -> int:
        return self.ids.dim() + 1

    def to(self, dtype: torch.dtype) -> OneHot:
        return OneHot(self.ids, self.width, dtype, self.owner)

    def reshape(self, *shape: Any) -> OneHot | Tensor:
        *rows, width = shape if isinstance(shape[0], int) else shape[0]
        if width != self.width:
            return self.dense("reshape").reshape(*rows, width)
        return OneHot(self.ids.reshape(rows), self.width, self.dtype, self.owner)

    def __getitem__(self, index: Any) -> Tensor:
        """Some columns, ``x[..., ids]``; else of the dense rows."""
        rest, columns = index if isinstance(index, tuple) and len(index) == 2 else (index, None)
        if rest is ... and isinstance(columns, Tensor) and columns.dtype == torch.int64:
            return (self.ids.unsqueeze(-1) == columns).to(self.dtype)
        return self.dense("[]")[index]

    def __matmul__(self, matrix: Tensor) -> Tensor:
        return F.embedding(self.ids, matrix)

    def __add__(self, other: Tensor) -> Tensor:
        return self.dense("+") + other

    def __mul__(self, other: Tensor) -> Tensor:
        return self.dense("*") * other

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(name), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is F.linear and len(args) == 2 and isinstance(args[0], OneHot):
            return args[0] @ args[1].mT
        name = getattr(func, "__name__", str(func))
        dense = [a.dense(name) if isinstance(a, OneHot) else a for a in args]
        return func(*dense, **(kwargs or {}))

    def dense(self, use: str) -> Tensor:
        """The rows as an ordinary tensor, with a warning that names what needs it."""
        if not torch.compiler.is_compiling():  # which cannot trace a warning
            warnings.warn(
                f"{self.owner}: the adapter changes the one-hot input of an embedding ({use}), "
                f"which was materialised: {self.ids.numel()} x {self.width} numbers (exact, but "
                "slower)",
                DenseFallbackWarning,
                stacklevel=3,
            )
        positions = torch.arange(self.width, device=self.ids.device)
        return (self.ids.unsqueeze(-1) == positions).to(self.dtype)


def adapt_embedding(
    ids: Tensor, weight: Tensor, adapter: Adapted, base: LinearMap, padding_idx: int | None
) -> Tensor:
    """The adapted embedding of ids (...), -> (..., dim).

    Args:
        weight: the frozen table (vocab, dim).
        padding_idx: the token that trains nothing, as in ``F.embedding``.
    """
    x = OneHot(ids, weight.shape[0], weight.dtype, adapter.site.name)
    if torch.compiler.is_compiling():
        y = adapter(x.dense("torch.compile"), base)
    else:
        y = adapter.embed(x, base)
    if padding_idx is None:
        return y
    is_padding = (ids == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(is_padding, y.detach(), y)
