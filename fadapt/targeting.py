"""Which parameters a config means, or why it means none."""

from __future__ import annotations

import difflib
import re

from torch import nn

from .adapted_map import check_site
from .base.checks import check_model
from .base.roles import find_roles
from .base.weights import LINEAR_KINDS, BaseWeight, Kind, find_weights
from .config import DEFAULT_EXCLUDE, Config
from .errors import ConfigError, TargetError
from .method import Method
from .site import Site


def resolve(model: nn.Module, config: Config) -> list[tuple[BaseWeight, Site, Method]]:
    """The sites that a config means, in the model's order. See :class:`Config` for the rules.

    Raises:
        TargetError: a rule, exclude pattern, layer or role that matches nothing; a tied weight
            named without its use; a parameter that cannot be adapted.
        ConfigError: a shape that the method cannot take.
    """
    check_model(model)
    weights = [w for w in find_weights(model) if w.kind is not Kind.VECTOR]
    excluded = _excluded(weights, config)
    chosen, taken = _apply_rules(weights, config, excluded)
    roles = find_roles(weights)
    chosen = _filter(chosen, weights, config, roles)
    _check_ties(chosen, weights, excluded, taken, config)
    found = []
    for weight, _, method in chosen:
        site = site_of(weight, weights, roles)
        weight.check()
        if weight.kind in (Kind.EXPERTS, Kind.EMBEDDING, Kind.CONVOLUTION) and _is_calibrated(
            method
        ):
            raise TargetError(
                f"{site.name} ({weight.kind}): no statistics are collected there, and {method!r} "
                "starts from them; use a method without calibration"
            )
        try:
            check_site(method, site)
        except ConfigError as error:
            shape = f"{site.out_features} x {site.in_features}"
            raise ConfigError(f"{site.name} ({shape}): {error}") from None
        found.append((weight, site, method))
    return found


def site_of(
    weight: BaseWeight, weights: list[BaseWeight], roles: dict[str, tuple[str, str]]
) -> Site:
    """The address of a weight among those of its model; no fingerprint yet.

    Args:
        weight: one of ``weights``.
        weights: all that have rows and columns.
        roles: from :func:`fadapt.base.roles.find_roles`.
    """
    role, note = roles.get(weight.name, ("", ""))
    d_out, d_in = weight.shape
    tied = tuple(
        n for w in weights if w is not weight and w.parameter is weight.parameter for n in w.names
    )
    return Site(
        name=weight.name,
        out_features=d_out,
        in_features=d_in,
        transposed=weight.transposed,
        bias=weight.bias,
        kind=weight.kind,
        role=role,
        note=note,
        tied=tied,
        experts=weight.experts,
        kernel=weight.kernel,
    )


Chosen = list[tuple[BaseWeight, str, Method]]


def _excluded(weights: list[BaseWeight], config: Config) -> set[str]:
    names = [n for w in weights for n in w.names]
    for pattern in config.exclude:
        if pattern not in DEFAULT_EXCLUDE and not any(re.search(pattern, n) for n in names):
            raise TargetError(f"exclude {pattern!r} matches no parameter; {_near(pattern, names)}")
    return {w.name for w in weights for p in config.exclude for n in w.names if re.search(p, n)}


def _apply_rules(
    weights: list[BaseWeight], config: Config, excluded: set[str]
) -> tuple[Chosen, dict[str, int]]:
    taken: dict[str, int] = {}
    for i, (pattern, _) in enumerate(config.rule_list):
        for weight in weights:
            hits = [n for n in weight.names if re.search(pattern, n)]
            if hits and len(hits) < len(weight.names):
                raise TargetError(
                    f"rule {pattern!r} matches {hits} but not "
                    f"{sorted(set(weight.names) - set(hits))}, which is the same module used "
                    "again: an adapter there changes every use. "
                    f"Match them all: {'|'.join(map(re.escape, weight.names))!r}"
                )
            if hits:
                taken.setdefault(weight.name, i)
    chosen: Chosen = []
    for i, (pattern, method) in enumerate(config.rule_list):
        mine = [w for w in weights if taken.get(w.name) == i and w.name not in excluded]
        if not mine:
            raise TargetError(_nothing(pattern, i, weights, taken, excluded, config))
        if method is None:
            continue
        # A broad pattern means the linear maps; other parameters are adapted when they are named.
        linear = [
            w
            for w in mine
            if w.kind in (*LINEAR_KINDS, Kind.PARAMETRIZED) or (pattern and _is_named(pattern, w))
        ]
        if not linear and not pattern:
            raise TargetError(
                f"{type(method).__name__} for all linear maps, but the model has none; its other "
                f"parameters are {[w.name for w in mine][:8]}: name one in a rule"
            )
        for weight in linear or mine:
            if weight.kind is Kind.PARAMETRIZED:
                raise TargetError(
                    f"{weight.name} belongs to a parametrized layer, whose weight is computed from "
                    "it: call torch.nn.utils.parametrize.remove_parametrizations, or put "
                    "{pattern: None} for it before this rule"
                )
            if weight.kind is Kind.TENSOR:
                raise TargetError(
                    f"rule {pattern!r} matches {weight.name} of shape {weight.stored_shape}; "
                    "adapters need a matrix (2-D), a stack of expert matrices (3-D) or a "
                    "convolution kernel. Put {pattern: None} for it before this rule"
                )
        chosen += [(s, pattern, method) for s in linear or mine]
    order = {w.name: k for k, w in enumerate(weights)}
    return sorted(chosen, key=lambda c: order[c[0].name]), taken


def _is_named(pattern: str, weight: BaseWeight) -> bool:
    """Whether the pattern needs the module's own name to match, not its path or ".weight"."""
    parts = weight.name.split(".")
    parts[-2 if len(parts) > 1 and parts[-1].endswith("weight") else -1] = "module"
    return not re.search(pattern, ".".join(parts))


def _filter(
    chosen: Chosen, weights: list[BaseWeight], config: Config, roles: dict[str, tuple[str, str]]
) -> Chosen:
    if config.layers is not None:
        present = sorted({w.layer for w in weights if w.layer is not None})
        count = present[-1] + 1 if present else 0
        wanted = {i + count if i < 0 else i for i in config.layers}
        if absent := [i for i in config.layers if (i + count if i < 0 else i) not in present]:
            raise TargetError(
                f"layers {absent} do not exist; the model has "
                f"{f'layers 0 to {count - 1}' if count else 'no numbered layers'}"
            )
        chosen = [c for c in chosen if c[0].layer in wanted]
    if config.roles:
        before = chosen
        chosen = [c for c in chosen if roles.get(c[0].name, ("",))[0] in config.roles]
        if before and not chosen:
            table = {c[0].name: roles.get(c[0].name, ("none",))[0] for c in before[:6]}
            raise TargetError(f"no rule matches a weight in the roles {config.roles}; {table}")
    for pattern, method in config.rule_list:
        if method is not None and not any(c[1] == pattern for c in chosen):
            raise TargetError(
                f"rule {pattern!r} matches weights, but none in layers={config.layers}, "
                f"roles={config.roles}; widen them or drop the rule"
            )
    return chosen


def _check_ties(
    chosen: Chosen,
    weights: list[BaseWeight],
    excluded: set[str],
    taken: dict[str, int],
    config: Config,
) -> None:
    patterns = [pattern for pattern, _ in config.rule_list]
    for weight, pattern, method in chosen:
        uses = [w for w in weights if w.parameter is weight.parameter and w.name not in excluded]
        named = [w.name for w in uses if taken.get(w.name) == patterns.index(pattern)]
        if len(named) > 1:
            one, other = (re.escape(n) for n in named[:2])
            raise TargetError(
                f"{' and '.join(named)} are one tied tensor, and rule {pattern!r} means both. "
                f"Say which use: {{{one!r}: {method!r}}}, or give each its own rule "
                f"({one!r} and {other!r}), or exclude them"
            )


def _is_calibrated(method: Method) -> bool:
    return any(part.statistic is not None for part in getattr(method, "methods", (method,)))


def _nothing(
    pattern: str,
    i: int,
    weights: list[BaseWeight],
    taken: dict[str, int],
    excluded: set[str],
    config: Config,
) -> str:
    names = [n for w in weights for n in w.names]
    hits = [w.name for w in weights if any(re.search(pattern, n) for n in w.names)]
    if not hits:
        return f"rule {pattern!r} matches no weight; {_near(pattern, names)}"
    if earlier := [n for n in hits if taken[n] < i]:
        by = config.rule_list[taken[earlier[0]]][0]
        return (
            f"rule {pattern!r} is never used: {earlier[0]} and all else that it matches is taken "
            f"by the earlier rule {by!r}; put the narrower rule first"
        )
    return (
        f"rule {pattern!r} matches only excluded weights, such as {hits[0]}; "
        f"exclude is {config.exclude}: pass exclude=() or a narrower one"
    )


def _near(pattern: str, names: list[str]) -> str:
    words = [w for w in re.split(r"[^A-Za-z0-9_]+", pattern) if len(w) > 2]
    parts = {part for n in names for part in n.split(".")}
    close: dict[str, float] = {}
    for word in words:
        for part in difflib.get_close_matches(word, parts, 2, 0.5):
            ratio = difflib.SequenceMatcher(None, part, word).ratio()
            close[part] = max(close.get(part, 0), ratio)
    best = {n: max(close.get(part, 0) for part in n.split(".")) for n in names}
    near = sorted((n for n in names if best[n]), key=lambda n: -best[n]) or names
    return f"near names are {near[:5]}" if names else "the model has no 2-D parameter"
