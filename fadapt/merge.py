"""merge: the adapted weights as new tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapted_map import adapt
from .base.bound import refuse_adapted
from .base.checks import check_model
from .base.linear_map import DenseMap
from .base.sharded import full, like, local_of
from .base.weights import BaseWeight, weights_by_name
from .errors import ConfigError, FadaptWarning, TargetError
from .method import Leaves
from .params.adapter import Adapter
from .params.params import Params
from .params.stack import Stack


def merge(
    model: nn.Module, params: Params, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """New weights, and biases where a method acts on them, for the adapted names.

    Computed in float64 (float32 where the device has none) and cast once to ``dtype``. One random
    row is run through the adapted map and compared with the merged one, so a method that is not
    affine is refused. Nothing of the model changes; load the result with
    ``model.load_state_dict(merged, strict=False)``, or call it without loading through
    ``torch.func.functional_call(model, merged, (inputs,), tie_weights=False)``. A weight that is
    tied to another use has to be untied before it is loaded, and a bias that is new to its layer
    has to be made; a warning says how.

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
        ConfigError: a dtype that is not floating, a stack, or a method whose map no weight and bias
            can stand for.

    Warns:
        FadaptWarning: a site whose tensor is tied to another use, which the merged value is not
            meant for; a bias that ``load_state_dict`` would leave out.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Linear(4, 3)
        >>> params = fadapt.init(model, fadapt.LoRA(r=2))
        >>> torch.equal(fadapt.merge(model, params)["weight"], model.weight)
        True
    """
    check_model(model)
    if isinstance(params, Stack):
        raise ConfigError(
            f"merge makes the weights of one adapter, and this is a stack of {len(params)}: write "
            "[fadapt.merge(model, p) for p in fadapt.unstack(stack)]"
        )
    if not isinstance(params, Params):
        raise ConfigError(f"params must come from fadapt.init, load or join; got {type(params)}")
    params.check_one()
    _check_dtype(dtype)
    merged: dict[str, Tensor] = {}
    refuse_adapted(model, "fadapt.merge")
    with torch.no_grad():
        weights = weights_by_name(model)
        for name, adapter in params.at_sites().items():
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
            held = weights[adapter.site.bias].parameter if adapter.site.bias else None
            bias = None if held is None else full(held)
            new_weight, new_bias = _merge_site(adapter, weight, bias)
            merged[name] = _own(new_weight.to(dtype or weight.dtype), weight.parameter)
            if new_bias is None:
                continue
            if held is not None:
                assert adapter.site.bias is not None
                merged[adapter.site.bias] = _own(new_bias.to(dtype or held.dtype), held)
            else:
                key = _new_bias(adapter, weight)
                merged[key] = new_bias.to(dtype or weight.dtype)
                _say_new_bias(key, weight)
        _say_tied(model, params, merged)
    return merged


def _check_dtype(dtype: Any) -> None:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in floats):
        raise ConfigError(
            f"dtype of merged weights must be one of {', '.join(map(str, floats))}; got "
            f"{dtype!r:.80}"
        )


def _merge_site(
    adapter: Adapter, weight: BaseWeight, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The new parameter, and the bias where it is another than before."""
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    frozen = weight.dense().to(wide)
    wide_bias = None if bias is None else bias.to(wide)
    new_weight, new_bias = adapter.dense(frozen, wide_bias)
    pairs = zip(
        *(_matrices(adapter, parameter) for parameter in (frozen, new_weight)),
        _members(adapter),
        strict=True,
    )
    for old, new, member in pairs:
        p = {k: t.to(wide) if t.is_floating_point() else t for k, t in member.leaves.items()}
        base = DenseMap(old, wide_bias)
        zero = adapt(member.method, p, old.new_zeros(1, old.shape[1]), base)[0]
        _check_affine(member, p, base, new, zero)
        moved = (zero if wide_bias is None else zero - wide_bias).nan_to_num(0, 0, 0)
        size: Tensor | float = 0.0
        if wide_bias is not None and wide_bias.numel():
            size = 1e-9 * wide_bias.abs().max()
        if adapter.method.acts_on_bias and bias is not None:
            new_bias = zero
        else:
            # What a method declares does not matter: f(0) is the bias.
            new_bias = zero if bool((moved.abs() > size).any()) else None
    return new_weight, new_bias


def _members(adapter: Adapter) -> list[Adapter]:
    if not adapter.site.experts:
        return [adapter]
    return [adapter.expert(e) for e in range(adapter.site.experts)]


def _matrices(adapter: Adapter, parameter: Tensor) -> list[Tensor]:
    matrix = adapter.site.matrix(parameter)
    return list(matrix) if adapter.site.experts else [matrix]


def _check_affine(adapter: Adapter, p: Leaves, base: DenseMap, new: Tensor, zero: Tensor) -> None:
    """Compares the adapted map with the merged one at a random row."""
    if not new.numel():
        return
    row = torch.randn(
        1,
        new.shape[1],
        generator=torch.Generator("cpu").manual_seed(0),
        dtype=new.dtype,
        device="cpu",
    )
    row = row.to(new.device)
    got, want = (row @ new.mT + zero)[0], adapt(adapter.method, p, row, base)[0]
    size = (row.abs() @ new.abs().mT)[0] + zero.abs()
    bound = 1e-3 if new.dtype == torch.float32 else 1e-7
    gap = ((got - want).abs() / size.clamp(min=torch.finfo(new.dtype).tiny)).nan_to_num(0).max()
    if gap > bound:
        raise ConfigError(
            f"{adapter.method!r} at {adapter.site.name} is not affine in its input: at a random "
            f"row it differs by {float(gap):.2g} from every weight and bias that could stand for "
            "it, so it cannot be merged; use it through run, apply or bound"
        )


def _new_bias(adapter: Adapter, weight: BaseWeight) -> str:
    """The name of the bias of a layer that has none."""
    key = "in_proj_bias" if weight.key == "in_proj_weight" else "bias"
    registered = getattr(weight.module, "_parameters", {})
    if adapter.site.experts or key not in registered or registered[key] is not None:
        raise ConfigError(
            f"{adapter.method!r} adds a bias at {weight.name}, and this "
            f"{type(weight.module).__name__} ({weight.kind}) cannot have one: the merged weight "
            "would leave it out. Use it through run, apply or bound"
        )
    return weight.name.removesuffix(weight.key) + key


def _say_new_bias(key: str, weight: BaseWeight) -> None:
    path, _, name = key.rpartition(".")
    warnings.warn(
        f"{key} is new: its layer has no bias, and load_state_dict(merged, strict=False) would "
        f"leave it out. Make it first: model.get_submodule({path!r}).{name} = "
        f"torch.nn.Parameter(merged[{key!r}]); {type(weight.module).__name__} then adds it",
        FadaptWarning,
        stacklevel=4,
    )


def _say_tied(model: nn.Module, params: Params, merged: Mapping[str, Tensor]) -> None:
    """Warns of values that would reach another use of a tied tensor when they are loaded."""
    for name, adapter in params.items():
        others = [n for n in adapter.site.tied if n not in merged or not _same(merged, n, name)]
        if not others:
            continue
        path, _, key = name.rpartition(".")
        untie = f"m = model.get_submodule({path!r}); m.{key} = torch.nn.Parameter(m.{key}.detach()"
        config = getattr(model, "config", None)
        flag = "; model.config.tie_word_embeddings = False" if config is not None else ""
        warnings.warn(
            f"{name} is tied to {', '.join(others)}: the merged value is for {name} alone, and "
            f"load_state_dict would give it to both. Untie before loading it: {untie}.clone())"
            f"{flag}",
            FadaptWarning,
            stacklevel=3,
        )


def _same(merged: Mapping[str, Tensor], one: str, other: str) -> bool:
    a, b = full(merged[one]), full(merged[other])
    return a.shape == b.shape and torch.equal(a, b)


def _own(value: Tensor, frozen: Tensor) -> Tensor:
    # A method's own dense may return the frozen tensor itself.
    value = like(value.contiguous(), frozen)
    storages = [local_of(t).untyped_storage().data_ptr() for t in (value, frozen)]
    shared = storages[0] == storages[1]
    return value.clone() if shared else value
