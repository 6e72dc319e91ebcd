"""merge: the adapted weights as new tensors."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .base.checks import check_model
from .base.lock import exclusive
from .base.weights import find_slots, quantized_at
from .errors import ConfigError, FadaptWarning, TargetError
from .overlay import experts
from .params.adapter import Adapter
from .params.params import Params


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
    if not isinstance(params, Params):
        raise ConfigError(f"params must come from fadapt.init, load or join; got {type(params)}")
    merged: dict[str, Tensor] = {}
    with torch.no_grad(), exclusive(model):
        named = dict(model.named_parameters(remove_duplicate=False))
        biases = {n: s.bias for s in find_slots(model) for n in s.names}
        for name, adapter in params.items():
            weight = named.get(name)
            frozen = quantized_at(model, name)
            shape = frozen.shape if frozen else None if weight is None else tuple(weight.shape)
            if weight is None or shape != adapter.site.stored_shape:
                found = "missing" if weight is None else f"of shape {shape}"
                raise TargetError(
                    f"{name} is {found} in this {type(model).__name__}, but the adapter was made "
                    f"for shape {adapter.site.stored_shape}; merge into the base it was made for"
                )
            if biases[name] != adapter.site.bias:
                raise TargetError(
                    f"the bias of {name} is {biases[name]} in this model, but the adapter was made "
                    f"for {adapter.site.bias}; merge into the base it was made for"
                )
            if weight.is_meta or any(t.is_meta for t in adapter.leaves.values()):
                raise TargetError(f"{name} or its adapter is a meta tensor without values")
            if frozen:
                frozen.check(name)
                weight = frozen.weight()
            own = frozen.dtype if frozen else weight.dtype
            for key, tensor in _merge_site(adapter, weight, named).items():
                other = named[key].dtype if key != name else own
                merged[key] = _own(tensor.to(dtype or other).contiguous(), named[key])
            if adapter.site.tied:
                warnings.warn(
                    f"{name} is tied to {', '.join(adapter.site.tied)}: the merged value is for "
                    f"{name} alone. Untie before loading it (give it its own nn.Parameter, and "
                    "set config.tie_word_embeddings=False), or the other use changes too",
                    FadaptWarning,
                    stacklevel=2,
                )
    return merged


def _merge_site(
    adapter: Adapter, weight: Tensor, named: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    bias = named[adapter.site.bias] if adapter.site.bias else None
    wide_bias = None if bias is None else bias.to(wide)
    new_weight, new_bias = experts.dense(adapter, weight.to(wide), wide_bias)
    merged = {adapter.site.name: new_weight}
    if adapter.site.bias and bias is not None and adapter.method.acts_on_bias:
        assert new_bias is not None
        merged[adapter.site.bias] = new_bias
    return merged


def _own(value: Tensor, frozen: Tensor) -> Tensor:
    # A method's own dense may return the frozen tensor itself.
    shared = value.untyped_storage().data_ptr() == frozen.untyped_storage().data_ptr()
    return value.clone() if shared else value
