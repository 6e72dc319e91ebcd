"""combine: the weighted sum of adapters, increment by increment."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .adapted_map import compute_dtype
from .errors import ConfigError
from .method import DROPOUT_KEY, STRENGTH, Method
from .methods.lora import LoRA, RsLoRA
from .methods.sum import WEIGHT, Sum
from .params.adapter import Adapter
from .params.params import Params, cut, own_leaves, strength_value


def combine(params: Sequence[Params], weights: Sequence[float | Tensor]) -> Params:
    """Σ w_i (increment of the i-th adapter), exactly, as one adapter.

    The sum is of the increments of the adapted maps, so there are no cross terms: it is what
    summing the merged weights' differences from the base gives. LoRA and RsLoRA are joined into one
    LoRA whose rank is the sum of theirs; adapters of other methods stand side by side in a
    :class:`~fadapt.methods.sum.Sum`. Sites that only some members adapt get those increments alone.
    Runtime strengths of the members stay in force.

    Args:
        params: members of one base.
        weights: a finite number, or a 0-d floating tensor, for each. ``[1/n] * n`` is the mean,
            and negative weights take an adapter's increment away (task arithmetic).

    Returns:
        Params to run, stack, merge and save as any; new leaves, except where a member's leaves or
        a weight were computed by a graph, which then goes on.

    Raises:
        ConfigError: no members, other than one weight for each, members of different bases.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Linear(4, 3)
        >>> a, b = (fadapt.init(model, fadapt.LoRA(r=r)) for r in (1, 2))
        >>> fadapt.combine([a, b], [0.5, 0.5])["weight"].method
        LoRA(r=3, ...)
    """
    members, values = check_members(params, weights, "combine([a, b], [0.5, 0.5])")
    sites: dict[str, list[tuple[Adapter, float | Tensor]]] = {}
    for member, value in zip(members, values, strict=True):
        if len(member.at_sites()) < len(member):
            raise ConfigError(
                "combine: the sites of a member share leaves, which a sum of several cannot; merge "
                "it instead: fadapt.merge_many(model, [...], weights)"
            )
        for name, adapter in member.items():
            own = sites.setdefault(name, [])
            if own and own[0][0].site.fingerprint != adapter.site.fingerprint:
                raise ConfigError(f"combine: the members adapt {name} of different base models")
            own.append((adapter, value))
    return own_leaves(Params({name: _site(parts) for name, parts in sites.items()}))


def check_members(
    params: Any, weights: Any, write: str
) -> tuple[list[Params], list[float | Tensor]]:
    """The members and a weight for each, after their checks; ``write`` is the right call."""
    listed = isinstance(params, (list, tuple)) and bool(params)
    if not listed or not all(isinstance(p, Params) for p in params):
        raise ConfigError(
            f"expected a non-empty list of Params, got {type(params).__name__}: {write}; the "
            "members of a stack are fadapt.unstack(stack)"
        )
    for member in params:
        member.check_one()
    listed = isinstance(weights, (list, tuple)) or (isinstance(weights, Tensor) and weights.dim())
    if not listed or len(weights) != len(params):
        raise ConfigError(
            f"expected a weight for each of {len(params)} params, got {weights!r:.80}: {write}"
        )
    return list(params), [strength_value(w) for w in weights]


def _site(parts: list[tuple[Adapter, float | Tensor]]) -> Adapter:
    first = parts[0][0]
    dtypes = (compute_dtype(a.method, a.leaves) for a, _ in parts)
    dtype = functools.reduce(torch.promote_types, dtypes)
    wide = torch.promote_types(dtype, torch.float32)
    device = first.device
    if all(_is_low_rank(a.method) for a, _ in parts):
        return _low_rank(parts, dtype)
    methods: list[Method] = []
    train, fixed = {}, {}
    for i, (adapter, value) in enumerate(parts):
        methods.append(adapter.method)
        train |= {f"{i}.{k}": cut(t).to(device, dtype) for k, t in adapter.train.items()}
        for k, t in adapter.fixed.items():
            if k == DROPOUT_KEY:  # each part's own follows from that of the whole
                fixed.setdefault(k, t.to(device))
            elif k != STRENGTH:
                exact = wide if k in adapter.method.keep_fp32 else dtype
                fixed[f"{i}.{k}"] = t.to(device, exact if t.is_floating_point() else None)
        strength = adapter.fixed.get(STRENGTH, 1.0)
        for k, number in ((WEIGHT, value), (STRENGTH, strength)):
            each = torch.as_tensor(number, dtype=wide, device=device)
            fixed[f"{i}.{k}"] = each.expand(first.site.experts) if first.site.experts else each
    return Adapter(first.site, Sum(tuple(methods)), {}, {}).replace(train, fixed)


def _is_low_rank(method: Method) -> bool:
    return type(method) in (LoRA, RsLoRA) and not getattr(method, "dropout", 0)


def _low_rank(parts: list[tuple[Adapter, float | Tensor]], dtype: torch.dtype) -> Adapter:
    """Factors side by side: B A = Σ w_i c_i s_i B_i A_i."""
    first = parts[0][0]
    a, b = [], []
    for adapter, value in parts:
        assert isinstance(adapter.method, LoRA)
        wide = torch.promote_types(dtype, torch.float32)
        factor = adapter.fixed.get(STRENGTH, 1.0) * value * adapter.method.scaling
        a.append(cut(adapter.train["A"]).to(first.device, dtype))
        b.append((cut(adapter.train["B"]).to(first.device, wide) * factor).to(dtype))
    r = sum(t.shape[-2] for t in a)
    method = LoRA(r=r, alpha=float(r))
    train = {"A": torch.cat(a, -2), "B": torch.cat(b, -1)}
    return Adapter(first.site, method, {}, {}).replace(train, {})
