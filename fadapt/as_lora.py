"""as_lora: any adapter as a LoRA, exactly where its increment has low rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapted_map import adapt, dense, increment_factors
from .arguments import listed
from .base.bound import refuse_adapted
from .base.checks import check_model
from .base.linear_map import DenseMap, LinearMap
from .base.weights import BaseWeight, Kind, weights_by_name
from .errors import ConfigError, TargetError, require
from .method import STRENGTH, Factors
from .methods.lora import LoRA
from .overlay import experts
from .params.adapter import Adapter
from .params.params import Params, trainable_leaves
from .patterns import check_pattern

ROUNDING = 1e-6
"""A relative error that float32 factors have anyway."""


@dataclass(frozen=True)
class TruncatedLoRA(LoRA):
    """A LoRA that approximates another adapter.

    Args:
        r: rank.
        alpha: numerator of the scale alpha / r.
        error: |W' - W - B A| / |W' - W| (Frobenius), the smallest that any LoRA of this rank has.

    Example:
        >>> params = fadapt.init(model, {"0.weight": fadapt.DoRA(r=2)})
        >>> with torch.no_grad():
        ...     _ = params["0.weight"].train["B"].fill_(0.1)
        >>> lora = fadapt.as_lora(model, params, r=4)["0.weight"].method
        >>> type(lora).__name__, 0 < lora.error < 1
        ('TruncatedLoRA', True)
    """

    error: float = 0.0


def as_lora(
    model: nn.Module,
    params: Params,
    r: int | None = None,
    *,
    drop_bias: str | Iterable[str] = (),
) -> Params:
    """The same adapters as LoRAs with alpha = r, for servers and files that know only LoRA.

    A method that states its factors (``Method.low_rank``) is converted exactly, at its own rank: r
    for LoRA, EVA, HRA, SSVD and most of AntiPaSTO, k for AntiPaSTOAblate, 2 r for PiSSA, CorDA and
    DeLoRA. What has no such factors is measured: an increment of low rank is converted exactly
    whatever its method, one of full rank only to the ``r`` that is asked for. The strength is
    folded in. Factors depend on the frozen weight (for a quantised layer, on its dequantised one),
    so they are exact for the base that they were made from.

    Args:
        model: the base that the params were made for.
        params: from :func:`fadapt.init`, trained or not.
        r: the largest rank; an increment of more is cut to its r largest singular values. None
            means exactly or not at all.
        drop_bias: patterns, searched in site names, of adapters whose effect on the bias may be
            left out, as a LoRA has none.

    Returns:
        Params whose methods are LoRA where they are exact to float32 rounding, and
        :class:`TruncatedLoRA` with its relative ``error`` where they are not; in float32 or better.

    Raises:
        ConfigError: an increment of full rank without ``r``; a method that acts on the bias; a
            pattern that matches nothing.
        TargetError: a site that the model does not have.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Linear(8, 6)
        >>> params = fadapt.init(model, fadapt.HRA(r=2))
        >>> fadapt.as_lora(model, params)["weight"].method
        LoRA(r=2, ...)
        >>> turned = fadapt.init(model, fadapt.OFT(block_size=4))
        >>> with torch.no_grad():
        ...     _ = turned["weight"].train["q"].fill_(0.1)
        >>> 0 < fadapt.as_lora(model, turned, r=2)["weight"].method.error < 1
        True
    """
    check_model(model)
    if not isinstance(params, Params):
        raise ConfigError(
            f"as_lora takes Params from fadapt.init, load or join, got {type(params).__name__}; "
            "convert the members of a stack one by one: fadapt.unstack(stack)"
        )
    require(r is None or (type(r) is int and r >= 1), f"r must be None or an int from 1, got {r!r}")
    params.check_one()
    write = "drop_bias=['a pattern'], () for none"
    patterns = [drop_bias] if isinstance(drop_bias, str) else listed("drop_bias", drop_bias, write)
    for pattern in patterns:
        check_pattern(pattern, "drop_bias")
        if not any(re.search(pattern, name) for name in params):
            raise ConfigError(f"drop_bias {pattern!r} matches no site; they are {list(params)[:8]}")
    refuse_adapted(model, "fadapt.as_lora")
    with torch.no_grad():
        weights = weights_by_name(model)
        found = {}
        for name, adapter in params.at_sites().items():
            weight = _weight(weights, name, adapter)
            dropped = any(re.search(pattern, name) for pattern in patterns)
            found[name] = _convert(adapter, weight, r, dropped)
    return trainable_leaves(Params(found))


def _weight(weights: dict[str, BaseWeight], name: str, adapter: Adapter) -> BaseWeight:
    weight = weights.get(name)
    what = "is missing" if weight is None else adapter.site.mismatch(weight)
    if weight is None or what:
        raise TargetError(
            f"{name} {what} in this model: its adapter was made for another base; convert with the "
            "one that it was made for"
        )
    if any(t.is_meta for t in adapter.leaves.values()):
        raise TargetError(f"the adapter of {name} is a meta tensor without values")
    weight.check()
    return weight


def _convert(adapter: Adapter, weight: BaseWeight, r: int | None, drop_bias: bool) -> Adapter:
    site = adapter.site
    if site.kind is Kind.VECTOR:
        raise ConfigError(
            f"{site.name} is a vector, and a LoRA has matrices only; convert the others, "
            f"params.without({re.escape(site.name)!r}), and merge this one"
        )
    if adapter.acts_on_bias and not drop_bias:
        _refuse_bias(adapter, weight)
    parts = [_factors(one, base, r) for one, base in _matrices(adapter, weight)]
    # One rank for all experts of a stack.
    rank = max(1, *(a.shape[0] for (a, _), _ in parts))
    error = max(error for _, error in parts)
    a, b = (
        torch.stack([_padded(pair[i], rank, i) for pair, _ in parts])
        if site.experts
        else _padded(parts[0][0][i], rank, i)
        for i in (0, 1)
    )
    exact = error <= ROUNDING
    method = LoRA(rank, float(rank)) if exact else TruncatedLoRA(rank, float(rank), error)
    return Adapter(site, method, {"A": a.contiguous(), "B": b.contiguous()}, {})


def _matrices(adapter: Adapter, weight: BaseWeight) -> Iterator[tuple[Adapter, LinearMap]]:
    if not adapter.site.experts:
        yield adapter, weight.map
        return
    for e, base in enumerate(weight.maps):
        yield experts.at(adapter, e), base


def _factors(adapter: Adapter, base: LinearMap, r: int | None) -> tuple[Factors, float]:
    """(A, B) and the relative error."""
    leaves = adapter.leaves
    wide = torch.promote_types(_dtype(adapter), torch.float32)
    p = {k: t if k == STRENGTH else _as(t, wide) for k, t in leaves.items()}
    factors = increment_factors(adapter.method, p, base)
    if factors is not None:
        a, b = factors
        if r is None or a.shape[0] <= r:
            return (a.to(wide), b.to(wide)), 0.0
        # The singular values of B A from those of two triangles.
        exact = wide if a.device.type == "mps" else torch.float64
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b.to(exact)), torch.linalg.qr(a.mT.to(exact))
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
        return _cut(q_b @ u, s, vh @ q_a.mT, r, wide)
    if base.weight().is_meta:
        raise TargetError(f"{adapter.site.name} is a meta tensor without values")
    change = _increment(adapter, base)
    if r is not None:
        # Single precision does for a truncation, and takes half the time.
        u, s, vh = torch.linalg.svd(change.to(torch.float32), full_matrices=False)
        return _cut(u, s, vh, r, wide)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    rank = int((s > s[0] * max(change.shape) * 10 * torch.finfo(s.dtype).eps).sum())
    if rank * sum(change.shape) >= change.numel():
        raise ConfigError(
            f"{adapter.site.name}: the increment of {adapter.method!r} has rank {rank} of "
            f"{min(change.shape)}, so no smaller LoRA equals it. Pass the rank to cut it to, "
            "as_lora(model, params, r=...), and read the error from each method's `error`; or "
            "merge it: fadapt.merge(model, params)"
        )
    return _cut(u, s, vh, rank, wide)


def _dtype(adapter: Adapter) -> torch.dtype:
    found = (t.dtype for k, t in adapter.leaves.items() if k != STRENGTH and t.is_floating_point())
    return next(found, torch.float32)


def _as(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    return leaf.detach().to(dtype) if leaf.is_floating_point() else leaf


def _increment(adapter: Adapter, base: LinearMap) -> Tensor:
    """W' - W (out, in) in float64, by the adapter's own definition."""
    weight = base.weight()
    exact = torch.float32 if weight.device.type == "mps" else torch.float64
    weight = weight.detach().to(exact)
    bias = None if base.bias is None else base.bias.detach().to(exact)
    p = {k: _as(t, exact) for k, t in adapter.leaves.items()}
    return dense(adapter.method, p, DenseMap(weight, bias))[0] - weight


def _cut(u: Tensor, s: Tensor, vh: Tensor, r: int, dtype: torch.dtype) -> tuple[Factors, float]:
    total = torch.linalg.vector_norm(s)
    error = float(torch.linalg.vector_norm(s[r:]) / total) if total > 0 else 0.0
    root = s[:r].sqrt()
    return ((root.unsqueeze(-1) * vh[:r]).to(dtype), (u[:, :r] * root).to(dtype)), error


def _padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    missing = rank - factor.shape[axis]
    if not missing:
        return factor
    shape = (missing, factor.shape[1]) if axis == 0 else (factor.shape[0], missing)
    return torch.cat([factor, factor.new_zeros(shape)], axis)


def _refuse_bias(adapter: Adapter, weight: BaseWeight) -> None:
    site = adapter.site
    for one, base in _matrices(adapter, weight):
        p = {k: t.detach() for k, t in one.leaves.items()}
        matrix = base.weight().detach().to(_dtype(adapter))
        bias = None if base.bias is None else base.bias.detach().to(matrix.dtype)
        zero = matrix.new_zeros(1, site.in_features)
        moved = adapt(one.method, p, zero, DenseMap(matrix, bias))[0]
        start = 0 if bias is None else bias
        change = float((moved - start).abs().max())
        if change > 0:
            raise ConfigError(
                f"{site.name}: {adapter.method!r} moves the bias by up to {change:.3g}, and a LoRA "
                f"has none. Leave that effect out by name, drop_bias={re.escape(site.name)!r}, or "
                "merge the adapter: fadapt.merge(model, params)"
            )
