"""init: fresh adapters for the sites that a config means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .calibration.prepare import as_stats, prepare
from .calibration.stats import Stats
from .config import Config, Rules, as_config
from .errors import ConfigError, TargetError
from .fingerprint import fingerprint
from .guard import exclusive
from .linear_map import DenseMap, LinearMap
from .method import STRENGTH, Leaves, Method
from .seeds import generator
from .sites import Site, SiteView, resolve
from .slots import Slot, check_model
from .tree import Adapter, Params, trainable_leaves


def init(
    model: nn.Module, cfg: Config | Rules, calib: Stats | Iterable[Any] | None = None
) -> Params:
    """Makes fresh adapters; the adapted model equals the base to the last bit.

    Args:
        model: the frozen base; it is read, never changed.
        cfg: a method (for every linear map), a {regex: method or None} dict, or a
            :class:`Config`.
        calib: batches, or the :class:`Stats` of an earlier pass over this model, for the methods
            that are calibrated.

    Returns:
        Params, with trainable leaves that require grad, in the config's dtype, on the devices of
        the weights. On a meta model the leaves are meta tensors, which can be counted.

    Raises:
        TargetError: a rule that matches nothing, or a weight that cannot be adapted.
        ConfigError: hyper-parameters that do not fit a weight's shape.
        CalibrationError: a method that needs statistics, without them or with insufficient ones.
    """
    config = as_config(cfg)
    check_model(model)
    with torch.no_grad(), exclusive(model):
        found = resolve(model, config)
        _check_finite([slot for slot, _, _ in found])
    stats = as_stats(model, config, found, calib)
    with torch.no_grad(), exclusive(model):
        found, statistic = prepare(found, stats)
        adapters = {
            site.name: _init_one(slot, site, m, config, statistic(site, m))
            for slot, site, m in found
        }
    return trainable_leaves(Params(adapters, config))


def _init_one(slot: Slot, site: Site, method: Method, config: Config, stat: Any) -> Adapter:
    weight, frozen = slot.weight.detach(), slot.quantized
    at_least = torch.promote_types(frozen.dtype if frozen else weight.dtype, torch.float32)
    parts = []
    for own, base in _matrices(slot, site):
        view = SiteView(own, base, weight.device, at_least)
        parts.append(method.init(view, generator(config.seed, own.name), stat))
        _check_leaves(method, own, *parts[-1])
    train, fixed = parts[0] if not site.experts else map(_stacked, zip(*parts, strict=True))
    dtype = config.dtype or at_least
    exact = torch.promote_types(dtype, at_least)
    mark = frozen.fingerprint() if frozen else fingerprint(weight)
    return Adapter(replace(site, fingerprint=mark), method, {}, {}).replace(
        train={k: t.detach().to(dtype).contiguous() for k, t in train.items()},
        fixed={
            k: t.detach().to(exact if k in method.keep_wide else dtype).contiguous()
            for k, t in fixed.items()
        },
    )


def _matrices(slot: Slot, site: Site) -> Iterator[tuple[Site, LinearMap]]:
    """The matrix of a site, or each of a stack under its own name."""
    if not site.experts:
        yield site, slot.base
    for i in range(site.experts):
        own = replace(site, name=f"{site.name}[{i}]", experts=0)
        yield own, DenseMap(slot.weight.detach()[i], None, site.transposed)


def _stacked(leaves: tuple[Leaves, ...]) -> Leaves:
    return {k: torch.stack([part[k] for part in leaves]) for k in leaves[0]}


def _check_leaves(method: Method, site: Site, train: Leaves, fixed: Leaves) -> None:
    who = f"{type(method).__name__}.init at {site.name}"
    if shared := (train.keys() & fixed.keys()) | ({STRENGTH} & (train.keys() | fixed.keys())):
        raise ConfigError(f"{who}: leaf names must be distinct and not 'strength': {shared}")
    for name, leaf in {**train, **fixed}.items():
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            raise ConfigError(f"{who}: leaf {name!r} must be a floating tensor, got {leaf!r}")


def _check_finite(slots: list[Slot]) -> None:
    # A sum carries NaN and Inf along, without a temporary of the weight's size.
    values = [
        (s, s.quantized.scales() if s.quantized else s.weight.detach())
        for s in slots
        if not s.weight.is_meta
    ]
    sums = [(s, v, v.sum(dtype=torch.float32)) for s, v in values]
    for slot, value, total in sums:
        if not torch.isfinite(total):
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise TargetError(
                    f"{slot.name} holds {bad} NaN or Inf values; load sound weights first"
                )
