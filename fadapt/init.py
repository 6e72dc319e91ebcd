"""From calibration data to what each method's ``init`` receives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .adapted_map import check_start, start
from .base.bound import refuse_adapted
from .base.checks import check_model
from .base.weights import BaseWeight
from .calibration.stats import Stats
from .config import Config, Rules, as_config
from .errors import CalibrationError, FadaptWarning, TargetError
from .method import Leaves, Method, Planned
from .params.adapter import Adapter
from .params.params import Params, trainable_leaves
from .seeds import generator
from .site import Site, SiteView
from .statistics.reduction import statistics_of
from .targeting import resolve_with_coverage

Found = list[tuple[BaseWeight, Site, Method]]


def as_stats(
    model: nn.Module, config: Config, found: Found, calib: Stats | Iterable[Any] | None
) -> Stats | None:
    """The statistics that the methods of ``config`` need; None if they need none.

    Args:
        found: the sites that the config means.
        calib: batches, which are observed; or the Stats of an earlier pass over this model.

    Raises:
        CalibrationError: data that are missing or of another model.
        FadaptError: the model is inside ``bound``.
    """
    refuse_adapted(model, "calibrating")
    for _, site, method in found:
        if calib is None and any(True for _ in statistics_of(method.statistic)):
            raise CalibrationError(
                f"{method} at {site.name} starts from data: pass batches, "
                "fadapt.init(model, cfg, batches), or stats = fadapt.observe(model, cfg, batches) "
                "once and fadapt.init(model, cfg, stats)"
            )
    if not any(True for _, _, m in found for _ in statistics_of(m.statistic)):
        return None
    if isinstance(calib, Stats):
        calib.check_base(model)
        return calib
    from .calibration.observe import observe

    return observe(model, config, () if calib is None else calib)


def prepare(found: Found, stats: Stats | None) -> tuple[Found, Callable[[Site, Method], Any]]:
    """Lets the methods plan over all sites.

    Args:
        found: the sites and methods of a config.
        stats: from :func:`as_stats`.

    Returns:
        The sites that remain, with the methods that :meth:`Planned.plan_ranks` chose; and a
        function that gives ``init`` the statistic of a site, or None where its method asks for
        none.

    Raises:
        CalibrationError: data that are insufficient.
    """
    if stats is None:
        return found, lambda site, method: None

    def statistic(site: Site, method: Method) -> Any:
        return _read(stats, site.name, method.statistic)

    return _plan(found, statistic), statistic


def _read(stats: Stats, site: str, wanted: Any) -> Any:
    if isinstance(wanted, tuple):
        return tuple(_read(stats, site, part) for part in wanted)
    return None if wanted is None else stats.get(site, wanted)


def _plan(found: Found, statistic: Callable[[Site, Method], Any]) -> Found:
    chosen: dict[str, Method | None] = {site.name: m for _, site, m in found}
    for cls in dict.fromkeys(type(m) for _, _, m in found):
        if issubclass(cls, Planned):
            mine = {s.name: (m, statistic(s, m)) for _, s, m in found if type(m) is cls}
            chosen.update(cls.plan_ranks(mine))
    if dropped := [name for name, method in chosen.items() if method is None]:
        warnings.warn(
            f"{len(dropped)} of {len(chosen)} sites got rank 0 and are not adapted: {dropped}",
            FadaptWarning,
            stacklevel=4,
        )
    return [(weight, s, m) for weight, s, _ in found if (m := chosen[s.name]) is not None]


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
        ConfigError: hyper-parameters that do not fit a weight's shape; a method that returns other
            leaves than it may, or is not the identity at their start.
        CalibrationError: a method that needs statistics, without them or with insufficient ones.

    Example:
        >>> params = fadapt.init(model, fadapt.LoRA(r=2))
        >>> list(params)
        ['0.weight', '2.weight']
        >>> torch.equal(fadapt.apply(model, params, x), model(x))
        True
    """
    config = as_config(cfg)
    check_model(model)
    refuse_adapted(model, "fadapt.init")
    with torch.no_grad():
        found, covered = resolve_with_coverage(model, config)
        _check_finite([weight for weight, _, _ in found])
    stats = as_stats(model, config, found, calib)
    with torch.no_grad():
        before = {site.name: weight for weight, site, _ in found}
        found, statistic = prepare(found, stats)
        for _, site, _ in found:
            del before[site.name]
        adapters: dict[str, Adapter] = {}
        seen: set[Method] = set()
        for weight, site, method in found:
            adapter = _init_one(weight, site, method, config, statistic(site, method))
            if method not in seen:  # what holds at one site is meant to hold at all
                seen.add(method)
                one = adapter.expert(0) if site.experts else adapter
                base = next(iter(weight.maps))
                check_start(method, one.leaves, one.site, base, weight.device)
            adapters[site.name] = adapter
    return trainable_leaves(Params(adapters, config, covered.without(before, "rank 0 of the plan")))


def _init_one(weight: BaseWeight, site: Site, method: Method, config: Config, stat: Any) -> Adapter:
    at_least = torch.promote_types(weight.dtype, torch.float32)
    parts = []
    for i, base in enumerate(weight.maps):
        # Each matrix of a stack under its own name, from which its random values follow.
        own = replace(site, name=f"{site.name}[{i}]", experts=0) if site.experts else site
        view = SiteView(own, base, weight.device, at_least)
        parts.append(start(method, view, generator(config.seed, own.name), stat))
    train, fixed = parts[0] if not site.experts else map(_stacked, zip(*parts, strict=True))
    dtype = config.dtype or at_least
    exact = torch.promote_types(dtype, at_least)
    return Adapter(replace(site, fingerprint=weight.fingerprint()), method, {}, {}).replace(
        # Copies: a tensor that a method returns for several sites would be optimised once for each.
        train={k: t.detach().to(dtype, copy=True).contiguous() for k, t in train.items()},
        fixed={
            k: _cast(t.detach(), exact if k in method.keep_fp32 else dtype).contiguous()
            for k, t in fixed.items()
        },
    )


def _cast(leaf: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integers and booleans stay what they are."""
    return leaf.to(dtype) if leaf.is_floating_point() else leaf


def _stacked(leaves: tuple[Leaves, ...]) -> Leaves:
    return {k: torch.stack([part[k] for part in leaves]) for k in leaves[0]}


def _check_finite(weights: list[BaseWeight]) -> None:
    # A sum carries NaN and Inf along, without a temporary of the weight's size.
    values = [(w.name, w.scales()) for w in weights if not w.is_meta]
    sums = [(name, value, value.sum(dtype=torch.float32)) for name, value in values]
    for name, value, total in sums:
        if not torch.isfinite(total):
            bad = int((~torch.isfinite(value)).sum())
            if bad:
                raise TargetError(f"{name} holds {bad} NaN or Inf values; load sound weights first")
