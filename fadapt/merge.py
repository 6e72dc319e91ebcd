"""merge: the adapted weights as new tensors."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .errors import FadaptWarning, TargetError
from .guard import refuse_bound
from .tree import Adapter, Params


def merge(model: nn.Module, params: Params) -> dict[str, Tensor]:
    """New weights, and biases where a method acts on them, for the adapted names.

    Computed in float64 (float32 where the device has none) and cast once to the weight's dtype.
    Nothing of the model changes; load the result with
    ``model.load_state_dict(merged, strict=False)``, or call it without loading through
    ``torch.func.functional_call(model, merged, ..., tie_weights=False)``.

    Args:
        model: the base that the params were made for.
        params: from :func:`fadapt.init`, trained or not.

    Returns:
        {parameter name: tensor}, without grad.

    Raises:
        TargetError: a site that the model does not have.

    Warns:
        FadaptWarning: a site whose tensor is tied to another use, which the merged value is not
            meant for.
    """
    refuse_bound(model, "fadapt.merge")
    named = dict(model.named_parameters(remove_duplicate=False))
    merged: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, adapter in params.items():
            weight = named.get(name)
            if weight is None or tuple(weight.shape) != adapter.site.stored_shape:
                found = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
                raise TargetError(
                    f"{name} is {found} in this {type(model).__name__}, but the adapter was made "
                    f"for shape {adapter.site.stored_shape}; merge into the base it was made for"
                )
            merged.update(_merge_site(adapter, weight, named))
            if adapter.site.tied:
                warnings.warn(
                    f"{name} is tied to {', '.join(adapter.site.tied)}: the merged value is for "
                    f"{name} alone. Untie before loading it (give it its own nn.Parameter, and "
                    "set config.tie_word_embeddings=False), or the other use changes too",
                    FadaptWarning,
                    stacklevel=2,
                )
    return merged


def _merge_site(adapter: Adapter, weight: Tensor, named: dict[str, nn.Parameter]) -> dict:
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    bias = named[adapter.site.bias] if adapter.site.bias else None
    new_weight, new_bias = adapter.dense(weight.to(wide), None if bias is None else bias.to(wide))
    merged = {adapter.site.name: new_weight.to(weight.dtype).contiguous()}
    if adapter.site.bias and bias is not None and adapter.method.acts_on_bias:
        assert new_bias is not None
        merged[adapter.site.bias] = new_bias.to(bias.dtype)
    return merged
