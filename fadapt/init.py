"""From calibration data to what each method's ``init`` receives."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .adapted_map import SharedLeaves, check_start, drops_input, has_shared, start, start_shared
from .arguments import check_function, is_many
from .base.bound import refuse_adapted
from .base.checks import check_model
from .base.sharded import full
from .base.torch_private import StorageWeakRef
from .base.weights import BaseWeight
from .calibration.stats import Stats
from .config import Config, Rules, as_config
from .dropout import dropout_key
from .errors import CalibrationError, ConfigError, FadaptWarning, TargetError
from .fold.losses import LossFn
from .method import DROPOUT_KEY, Leaves, Method, Planned
from .params.adapter import Adapter
from .params.params import Params, trainable_leaves
from .seeds import generator
from .site import Site, SiteView, shared_site
from .statistics.reduction import statistics_of
from .targeting import resolve_with_coverage

Found = list[tuple[BaseWeight, Site, Method]]


def as_stats(
    model: nn.Module,
    config: Config,
    found: Found,
    calib: Stats | Iterable[Any] | None,
    loss_fn: LossFn | None = None,
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
    if not (calib is None or isinstance(calib, Stats) or is_many(calib)):
        raise CalibrationError(
            f"calib must be batches (a list, a DataLoader) or fadapt.Stats, got {calib!r:.80}"
        )
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

    return observe(model, config, () if calib is None else calib, loss_fn=loss_fn)


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
    model: nn.Module,
    cfg: Config | Rules,
    calib: Stats | Iterable[Any] | None = None,
    *,
    loss_fn: LossFn | None = None,
) -> Params:
    """Makes fresh adapters; the adapted model equals the base to the last bit.

    Args:
        model: the frozen base; it is read, never changed.
        cfg: a method (for every linear map), a {regex: method or None} dict, or a
            :class:`Config`.
        calib: batches, or the :class:`Stats` of an earlier pass over this model, for the methods
            that are calibrated.
        loss_fn: ``loss_fn(output, batch)``, for batches whose gradient a method starts from
            (LoRAGA); without it the loss that the model returns.

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
    check_function("loss_fn", loss_fn, "def loss_fn(output, batch)")
    with torch.no_grad():
        found, covered = resolve_with_coverage(model, config)
        _check_finite([weight for weight, _, _ in found])
    stats = as_stats(model, config, found, calib, loss_fn)
    with torch.no_grad():
        before = {site.name: weight for weight, site, _ in found}
        found, statistic = prepare(found, stats)
        for _, site, _ in found:
            del before[site.name]
        views = _views(model, found)
        owners = _Owners()
        adapters = {
            site.name: _init_one(
                weight, site, m, config, statistic(site, m), views[site.name], owners
            )
            for weight, site, m in found
        }
        adapters = _shared(found, config, views, adapters, owners.shared())
        params = Params(adapters, config, covered.without(before, "rank 0 of the plan"))
        _check_starts(found, params)
    return trainable_leaves(params)


def _views(model: nn.Module, found: Found) -> dict[str, list[SiteView]]:
    """What ``init`` sees of every site, once for each matrix of a stack."""
    sites: dict[Method, tuple[Site, ...]] = {}
    for _, site, method in found:
        sites[method] = (*sites.get(method, ()), site)
    config = getattr(model, "config", None)
    views = {}
    for weight, site, method in found:
        at_least = torch.promote_types(weight.dtype, torch.float32)
        views[site.name] = [
            # Each matrix of a stack under its own name, from which its random values follow.
            SiteView(
                _expert(site, i) if site.experts else site,
                base,
                weight.device,
                at_least,
                sites[method],
                config,
            )
            for i, base in enumerate(weight.maps)
        ]
    return views


def _shared(
    found: Found,
    config: Config,
    views: Mapping[str, list[SiteView]],
    adapters: dict[str, Adapter],
    common: Mapping[Method, set[str]],
) -> dict[str, Adapter]:
    """All adapters, with a place for the leaves that the sites of a method share.

    Args:
        adapters: those of the sites, each with all that ``init`` returned there.
        common: the leaves among these that are one tensor at all sites.
    """
    places: dict[str, Adapter] = {}
    for method in dict.fromkeys(m for _, _, m in found):
        names = [site.name for _, site, m in found if m == method]
        at_least = functools.reduce(torch.promote_types, (views[name][0].dtype for name in names))
        place = shared_site(method, places)
        made: tuple[Leaves, Leaves] = {}, {}
        if has_shared(method):
            mine = [view for name in names for view in views[name][:1]]
            made = start_shared(method, mine, generator(config.seed, place.name.partition("#")[0]))
        holder = _adapter(place, SharedLeaves(method), made, config, at_least)
        for leaf in common.get(method, ()):
            first = adapters[names[0]]
            for own, whole in ((first.train, holder.train), (first.fixed, holder.fixed)):
                if leaf in own:
                    whole[leaf] = own[leaf][0].clone() if first.site.experts else own[leaf]
        for own_name in names:
            a = adapters[own_name]
            parts = ({k: t for k, t in p.items() if k not in common.get(method, ())}
                     for p in (a.train, a.fixed))  # fmt: skip
            adapters[own_name] = a.replace(*parts)
        if holder.leaves:
            places[place.name] = holder.replace(holder.train, holder.fixed)
    return {**adapters, **places}


@dataclass(frozen=True)
class _Leaf:
    """A tensor that ``init`` returned: where, as what, and where its values begin."""

    method: Method
    site: str
    name: str
    trains: bool
    start: int
    shape: torch.Size


class _Owners:
    """To whom each tensor belongs that a method returned."""

    def __init__(self) -> None:
        # Weak: they keep an address from being used again, without keeping the values.
        self._leaves: dict[StorageWeakRef, list[_Leaf]] = {}
        self._sites: dict[Method, set[str]] = {}

    def add(self, method: Method, site: str, made: tuple[Leaves, Leaves]) -> None:
        """Takes note of what ``init`` returned for one matrix."""
        self._sites.setdefault(method, set()).add(site)
        for trains, part in zip((True, False), made, strict=True):
            for name, t in part.items():
                if t.numel():
                    leaf = _Leaf(method, site, name, trains, t.data_ptr(), t.shape)
                    key = StorageWeakRef(t.untyped_storage())
                    self._leaves.setdefault(key, []).append(leaf)

    def shared(self) -> dict[Method, set[str]]:
        """The leaves that are one tensor at all sites of a method, by their names.

        Raises:
            ConfigError: a tensor that is at some of them only, or twice at one.
        """
        found: dict[Method, set[str]] = {}
        for leaves in self._leaves.values():
            if len({leaf.site for leaf in leaves}) == 1:
                trained = [leaf for leaf in leaves if leaf.trains]
                if len({(leaf.start, leaf.shape) for leaf in trained}) < len(trained):
                    self._refuse(trained[0], trained[1])
                continue
            for leaf in leaves:
                mine = [one for one in leaves if one.name == leaf.name]
                alike = len({(one.method, one.trains, one.start, one.shape) for one in mine}) == 1
                if not alike or {one.site for one in mine} != self._sites[leaf.method]:
                    self._refuse(leaf, next(o for o in leaves if o.site != leaf.site))
                found.setdefault(leaf.method, set()).add(leaf.name)
        return found

    def _refuse(self, one: _Leaf, other: _Leaf) -> None:
        raise ConfigError(
            f"{type(one.method).__name__}.init returned one tensor twice, as {one.name!r} of "
            f"{one.site} and {other.name!r} of {other.site}, and not at all sites alike. Return "
            "copies, tensor.clone(), for leaves of their own; what all sites have in common, "
            "return once from shared(self, sites, rng)"
        )


def _check_starts(found: Found, params: Params) -> None:
    seen: set[Method] = set()
    for weight, site, method in found:
        if method in seen:  # what holds at one site is meant to hold at all
            continue
        seen.add(method)
        adapter = params[site.name]
        if taken := adapter.bank.keys() & {*adapter.train, *adapter.fixed}:
            raise ConfigError(
                f"{type(method).__name__}: init and shared both return {sorted(taken)}; give "
                "their leaves names of their own"
            )
        one = adapter.expert(0) if site.experts else adapter
        base = next(iter(weight.maps))
        check_start(method, one.leaves, one.site, base, weight.device)


def _init_one(
    weight: BaseWeight,
    site: Site,
    method: Method,
    config: Config,
    stat: Any,
    views: list[SiteView],
    owners: _Owners,
) -> Adapter:
    parts = []
    for view in views:
        parts.append(start(method, view, generator(config.seed, view.name), stat))
        owners.add(method, view.name, parts[-1])
        if drops_input(method):
            key = dropout_key("dropout", config.seed, view.name).to(view.device)
            parts[-1] = parts[-1][0], {**parts[-1][1], DROPOUT_KEY: key}
    made = parts[0] if not site.experts else tuple(map(_stacked, zip(*parts, strict=True)))
    site = replace(site, fingerprint=weight.fingerprint())
    return _adapter(site, method, made, config, views[0].dtype)


def _adapter(
    site: Site,
    method: Method,
    made: tuple[Leaves, ...],
    config: Config,
    at_least: torch.dtype,
) -> Adapter:
    """The leaves that a method made, in the config's dtype."""
    train, fixed = made
    dtype = config.dtype or at_least
    exact = torch.promote_types(dtype, at_least)
    return Adapter(site, method, {}, {}).replace(
        # Copies: leaves may be parts of one tensor, and are optimized apart.
        train={k: t.detach().to(dtype, copy=True).contiguous() for k, t in train.items()},
        fixed={
            k: _cast(t.detach(), exact if k in method.keep_fp32 else dtype).contiguous()
            for k, t in fixed.items()
        },
    )


def _cast(leaf: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Integers and booleans stay what they are."""
    return leaf.to(dtype) if leaf.is_floating_point() else leaf


def _expert(site: Site, i: int) -> Site:
    return replace(site, name=f"{site.name}[{i}]", experts=0, flat=False)


def _stacked(leaves: tuple[Leaves, ...]) -> Leaves:
    return {k: torch.stack([part[k] for part in leaves]) for k in leaves[0]}


def _check_finite(weights: list[BaseWeight]) -> None:
    # A sum carries NaN and Inf along, without a temporary of the weight's size.
    values = [(w.name, w.scales()) for w in weights if not w.is_meta]
    sums = [(name, value, full(value.sum(dtype=torch.float32))) for name, value in values]
    for name, value, total in sums:
        if not torch.isfinite(total):
            bad = int((~torch.isfinite(full(value))).sum())
            if bad:
                raise TargetError(f"{name} holds {bad} NaN or Inf values; load sound weights first")
