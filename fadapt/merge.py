"""merge: the adapted weights as new tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .base.bound import refuse_adapted
from .base.checks import check_model
from .base.weights import BaseWeight, weights_by_name
from .errors import ConfigError, FadaptWarning, TargetError
from .params.adapter import Adapter
from .params.params import Params
from .params.stack import Stack


def merge(
    model: nn.Module, params: Params, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """New weights, and biases where a method acts on them, for the adapted names.

    Computed in float64 (float32 where the device has none) and cast once to ``dtype``.
    Nothing of the model changes; load the result with
    ``model.load_state_dict(merged, strict=False)``, or call it without loading through
    ``torch.func.functional_call(model, merged, ..., tie_weights=False)``.

    Args:
        model: the base that the params were made for.
        params: from :func:`fadapt.init`, trained or not.
        dtype: of the merged tensors; None means the weight's own dtype, and for a quantised layer
            its compute dtype.

    Returns:
        {parameter name: tensor}, without grad. Over a quantised base the merged weights are dense,
        for a model that is not quantised; to quantise them again is lossy, and the caller's choice.

    Raises:
        TargetError: a site that the model does not have.

    Warns:
        FadaptWarning: a site whose tensor is tied to another use, which the merged value is not
            meant for.
    """
    check_model(model)
    if isinstance(params, Stack):
        raise ConfigError(
            f"merge makes the weights of one adapter, and this is a stack of {len(params)}: write "
            "[fadapt.merge(model, p) for p in fadapt.unstack(stack)]"
        )
    if not isinstance(params, Params):
        raise ConfigError(f"params must come from fadapt.init, load or join; got {type(params)}")
    params.check_whole()
    _check_dtype(dtype)
    merged: dict[str, Tensor] = {}
    refuse_adapted(model, "fadapt.merge")
    with torch.no_grad():
        weights = weights_by_name(model)
        for name, adapter in params.items():
            weight = weights.get(name)
            what = "is missing" if weight is None else adapter.site.mismatch(weight)
            if weight is None or what:
                raise TargetError(
                    f"{name} {what} in this {type(model).__name__}: its adapter was made for "
                    "another base model; merge into that one"
                )
            if weight.is_meta or any(t.is_meta for t in adapter.leaves.values()):
                raise TargetError(f"{name} or its adapter is a meta tensor without values")
            weight.check()
            bias = weights[adapter.site.bias].parameter if adapter.site.bias else None
            new_weight, new_bias = _merge_site(adapter, weight, bias)
            merged[name] = _own(new_weight.to(dtype or weight.dtype), weight.parameter)
            if bias is not None and new_bias is not None and adapter.method.acts_on_bias:
                assert adapter.site.bias is not None
                merged[adapter.site.bias] = _own(new_bias.to(dtype or bias.dtype), bias)
            if adapter.site.tied:
                warnings.warn(
                    f"{name} is tied to {', '.join(adapter.site.tied)}: the merged value is for "
                    f"{name} alone. Untie before loading it (give it its own nn.Parameter, and "
                    "set config.tie_word_embeddings=False), or the other use changes too",
                    FadaptWarning,
                    stacklevel=2,
                )
    return merged


def _check_dtype(dtype: Any) -> None:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if dtype is not None and dtype not in floats:
        raise ConfigError(
            f"dtype of merged weights must be one of {', '.join(map(str, floats))}; got "
            f"{dtype!r:.80}"
        )


def _merge_site(
    adapter: Adapter, weight: BaseWeight, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    return adapter.dense(weight.dense().to(wide), None if bias is None else bias.to(wide))


def _own(value: Tensor, frozen: Tensor) -> Tensor:
    # A method's own dense may return the frozen tensor itself.
    value = value.contiguous()
    shared = value.untyped_storage().data_ptr() == frozen.untyped_storage().data_ptr()
    return value.clone() if shared else value
