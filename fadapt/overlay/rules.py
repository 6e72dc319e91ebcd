"""The rules: what a linear product, an embedding or an expert's matrix means for an overlay."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.linear_map import DenseMap
from ..base.scope import PARAMETERS, OnRead, View, open_view
from ..base.torch_private import GROUPED_MM, SAME_KIND_OF_TENSOR, grouped_mm, known_values
from ..errors import DenseFallbackWarning, FadaptError, TargetError
from ..params.adapter import Adapter
from . import experts
from .checkpointing import refuse_checkpoint
from .embedding import adapt_embedding
from .exact import WeightFirstMap, layer_map
from .tensor import Overlay, implements, materialize, overlay, trains


@implements(F.linear)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Overlay) or isinstance(x, Overlay):
        return NotImplemented
    return _product(x, weight, bias, rows_out=True)


@implements(torch.addmm, Tensor.addmm)
def _addmm(
    bias: Tensor,
    x: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype | None = None,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Any:
    if not isinstance(weight, Overlay) or beta != 1 or alpha != 1 or bias.dim() != 1 or out_dtype:
        return NotImplemented
    return _product(x, weight, bias, rows_out=False)


@implements(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _matmul(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Any:
    if out_dtype is not None:
        return NotImplemented
    if isinstance(x, Overlay) and not isinstance(weight, Overlay):
        return _weight_first(x, weight)
    if not isinstance(weight, Overlay) or isinstance(x, Overlay):
        return NotImplemented
    return _product(x, weight, None, rows_out=False)


def _product(x: Tensor, weight: Overlay, bias: Tensor | None, rows_out: bool) -> Any:
    """The rule behind all products; ``rows_out``: the weight is used as (out, in)."""
    if not _is_product(weight, bias, rows_out):
        return NotImplemented
    transposed, grad = weight.adapter.site.transposed, weight.required_grad
    return weight.adapter(x, layer_map(x, weight.frozen, bias, transposed, grad))


def _weight_first(weight: Overlay, x: Tensor) -> Any:
    """``weight @ x``, as in Mamba's dt_proj."""
    if x.dim() < 2 or not _is_product(weight, None, True):
        return NotImplemented
    rows = x.mT
    transposed, grad = weight.adapter.site.transposed, weight.required_grad
    return weight.adapter(rows, WeightFirstMap(rows, weight.frozen, None, transposed, grad)).mT


def _is_product(weight: Overlay, bias: Tensor | None, rows_out: bool) -> bool:
    """Whether the weight is used as the adapter's own matrix; or an error."""
    site = weight.adapter.site
    if weight.dim() != 2 or site.flat or (site.transposed == weight.flipped) != rows_out:
        return False  # the transposed map, as in a tied decoder
    if weight.adapter.acts_on_bias and bias is None and site.bias is not None:
        raise TargetError(
            f"{site.name}: the layer adds {site.bias} apart from its product, and "
            f"{weight.adapter} acts on the bias; use another method there"
        )
    refuse_checkpoint(weight.adapter)
    return True


@implements(Tensor.T.__get__, Tensor.t, torch.t, Tensor.transpose, torch.transpose)  # type: ignore[attr-defined]
def _transpose(weight: Tensor, *dims: int) -> Any:
    if not isinstance(weight, Overlay):
        return NotImplemented
    n = weight.dim()
    if n > 3 or (n == 3 and not dims) or (dims and {d % n for d in dims} != {n - 2, n - 1}):
        return NotImplemented
    return overlay(weight.frozen, weight.adapter, not weight.flipped, weight.required_grad)


@implements(Tensor.requires_grad.__get__)  # type: ignore[attr-defined]
def _requires_grad(weight: Overlay) -> bool:
    """As of a weight that follows from the adapter's leaves; of a frozen base, too."""
    return weight.required_grad or trains(weight.adapter)


@implements(Tensor.mT.__get__)  # type: ignore[attr-defined]
def _flip(weight: Overlay) -> Any:
    return _transpose(weight, -2, -1)


@implements(F.embedding)
def _embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(weight, Overlay) or weight.flipped or not weight.adapter.site.transposed:
        return NotImplemented
    name = weight.adapter.site.name
    if max_norm is not None:
        raise TargetError(
            f"{name}: an embedding with max_norm writes to its weight, which is frozen"
        )
    refuse_checkpoint(weight.adapter)
    base = DenseMap(weight.frozen, None, transposed=True)
    return adapt_embedding(ids, weight.frozen, weight.adapter, base, padding_idx)


@implements(Tensor.__getitem__)
def _getitem(weight: Tensor, index: Any) -> Any:
    """One expert's matrix, or those of some experts, gathered."""
    if not isinstance(weight, Overlay) or weight.flipped or not weight.adapter.site.experts:
        return NotImplemented
    if weight.adapter.site.flat:  # its rows, not its experts
        return NotImplemented
    if not isinstance(index, (int, Tensor)) or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, Tensor) and (index.dim() > 1 or index.is_floating_point()):
        return NotImplemented
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
        return NotImplemented
    count = len(index) if isinstance(index, Tensor) and index.dim() else 0
    adapter = experts.at(weight.adapter, index, count)
    return overlay(weight.frozen[index], adapter)


def _cast(cast: Callable[..., Any], weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """No use of the weight yet, as in ``F.linear(x.float(), router.weight.float())``."""
    if not isinstance(weight, Overlay):
        return NotImplemented
    moved = cast(weight.frozen, *args, **kwargs)
    if moved is weight.frozen or isinstance(moved, str):
        return moved if isinstance(moved, str) else weight
    if not moved.is_floating_point() or moved.device != weight.frozen.device:
        return NotImplemented
    return overlay(moved, weight.adapter, weight.flipped, weight.required_grad)


for _function in (
    *(Tensor.to, Tensor.type, Tensor.type_as),
    *(Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
):
    implements(_function)(partial(_cast, _function))


@implements(SAME_KIND_OF_TENSOR)
def _same_kind(weight: Tensor, new: Tensor) -> Any:
    """``module.to(dtype)`` in a forward asks, and writes then to ``weight.data``."""
    return True if isinstance(weight, Overlay) and isinstance(new, Overlay) else NotImplemented


@implements(Tensor.data.__get__)  # type: ignore[attr-defined]
def _data(weight: Overlay) -> Any:
    view = open_view()
    if view is None or view.owner is None or torch.compiler.is_compiling() or view.runs():
        return NotImplemented
    raise FadaptError(
        f"{weight.adapter.site.name}.data inside fadapt.bound(model, params), where the weight is "
        "computed when it is read, and what is written to it would be lost: read it by .detach(), "
        "or leave the block first"
    )


@implements(Tensor.data_ptr)
def _data_ptr(weight: Overlay) -> int:
    """Of a copy that lives as long as the call: whoever asks will read there, or compares."""
    view, name = open_view(), weight.adapter.site.name
    if view is None:
        raise TargetError(
            f"{name} is adapted, so its values are computed when they are read and have no "
            f"address; leave this weight out: {{{name!r}: None, ...}}"
        )
    new = materialize(weight).detach()
    new = new.mT if weight.flipped else new
    kept = view.copies.get(name)
    if kept is None or kept.dtype != new.dtype or kept.stride() != new.stride():
        view.copies[name] = kept = new
    else:
        kept.copy_(new)
    warnings.warn(
        f"{name} is asked for its address (data_ptr): that of a copy with the adapted values, "
        "which lives until the call ends. What is written there is lost, and what is computed from "
        "it has no gradient",
        DenseFallbackWarning,
        stacklevel=3,
    )
    return kept.data_ptr()


@implements(Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(weight: Tensor, new: Tensor) -> Any:
    """What the call sees of the weight from now on; the base's own has not changed."""
    if not isinstance(weight, Overlay):
        return NotImplemented
    cast = isinstance(new, Overlay) and new.adapter is weight.adapter
    if not isinstance(new, Overlay) or not cast or new.flipped != weight.flipped:
        name = weight.adapter.site.name
        raise FadaptError(f"the model's forward writes to {name} (.data = ...); it is frozen")
    view, dtype = open_view(), new.frozen.dtype
    if view is not None and dtype != weight.frozen.dtype:
        _cast_in(view, weight.adapter, dtype)
    weight.frozen = new.frozen
    return None


def _cast_in(view: View, adapter: Any, dtype: torch.dtype) -> None:
    """The view sees the site of an adapter cast; it makes the overlay anew for each reading."""

    def cast(own: Tensor) -> Tensor:
        return overlay(own.detach().to(dtype), adapter, required_grad=own.requires_grad)

    for (module, attribute), seen in [*view.seen.items()]:
        if attribute != PARAMETERS:
            continue
        for key, value in seen.items():
            if getattr(value, "adapter", None) is adapter:
                seen[key] = OnRead(cast)
                view.seen.pop((module, "forward"), None)


@implements(Tensor.view, Tensor.reshape, torch.reshape)
def _reshape(weight: Tensor, *shape: Any) -> Any:
    """A stack that is stored as one matrix, seen as a stack."""
    if not isinstance(weight, Overlay) or weight.flipped or not weight.adapter.site.flat:
        return NotImplemented
    stack = weight.frozen.reshape(*shape)
    site = replace(weight.adapter.site, flat=False)
    if tuple(stack.shape) != site.stored_shape:
        return NotImplemented
    return overlay(stack, replace(cast("Adapter", weight.adapter), site=site))


@implements(torch.bmm, Tensor.bmm)
def _bmm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Any:
    if out_dtype is not None:
        return NotImplemented
    weight, x, rows_out = (a, b.mT, True) if isinstance(a, Overlay) else (b, a, False)
    if not isinstance(weight, Overlay) or isinstance(x, Overlay):
        return NotImplemented
    site = weight.adapter.site
    if not site.experts or (site.transposed == weight.flipped) != rows_out:
        return NotImplemented
    refuse_checkpoint(weight.adapter)
    frozen = weight.frozen.mT if weight.flipped else weight.frozen

    def product(x: Tensor) -> Tensor:
        return torch.bmm(frozen, x.mT).mT if rows_out else torch.bmm(x, frozen)

    adapter = experts.at(weight.adapter, slice(None), site.experts)
    y = experts.batched(adapter, x, weight.frozen, product)
    return y.mT if rows_out else y


@implements(GROUPED_MM)
def _grouped_mm(
    x: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if not isinstance(weight, Overlay) or isinstance(x, Overlay) or x.dim() != 2 or offs is None:
        return NotImplemented
    if bias is not None or out_dtype not in (None, weight.dtype):
        return NotImplemented
    site = weight.adapter.site
    if not site.experts or site.transposed == weight.flipped:
        return NotImplemented
    ends = known_values(offs)
    if ends is None:
        return NotImplemented
    refuse_checkpoint(weight.adapter)
    frozen = weight.frozen.mT if weight.flipped else weight.frozen
    adapter = experts.at(weight.adapter, slice(None), site.experts)
    return experts.grouped(
        adapter,
        x,
        weight.frozen,
        ends,
        lambda x: grouped_mm(x, frozen, offs),
    )
