"""Which parameters a config means, or why it means none."""

from __future__ import annotations

import difflib
import re

from torch import nn

from .base.checks import check_model, check_weight
from .base.roles import find_roles
from .base.weights import (
    CONVOLUTION,
    EMBEDDING,
    EXPERTS,
    LINEAR_KINDS,
    PARAMETRISED,
    TENSOR,
    Slot,
    find_slots,
)
from .config import DEFAULT_EXCLUDE, Config
from .errors import ConfigError, TargetError
from .method import Method
from .site import Site


def resolve(model: nn.Module, config: Config) -> list[tuple[Slot, Site, Method]]:
    """The sites that a config means, in the model's order. See :class:`Config` for the rules.

    Raises:
        TargetError: a rule, exclude pattern, layer or role that matches nothing; a tied weight
            named without its use; a parameter that cannot be adapted.
        ConfigError: a shape that the method cannot take.
    """
    check_model(model)
    slots = find_slots(model)
    excluded = _excluded(slots, config)
    chosen, taken = _apply_rules(slots, config, excluded)
    roles = find_roles(slots)
    chosen = _filter(chosen, slots, config, roles)
    _check_ties(chosen, slots, excluded, taken, config)
    found = []
    for slot, _, method in chosen:
        role, note = roles.get(slot.name, ("", ""))
        d_out, d_in = slot.shape
        tied = tuple(n for s in slots if s is not slot and s.weight is slot.weight for n in s.names)
        site = Site(
            name=slot.name,
            out_features=d_out,
            in_features=d_in,
            transposed=slot.transposed,
            bias=slot.bias,
            kind=slot.kind,
            role=role,
            note=note,
            tied=tied,
            experts=len(slot.weight) if slot.kind == EXPERTS else 0,
            kernel=tuple(slot.weight.shape[1:]) if slot.kind == CONVOLUTION else (),
        )
        _check_weight(slot)
        if slot.kind in (EXPERTS, EMBEDDING, CONVOLUTION) and _is_calibrated(method):
            raise TargetError(
                f"{site.name} ({slot.kind}): no statistics are collected there, and {method!r} "
                "starts from them; use a method without calibration"
            )
        try:
            method.check(site)
        except ConfigError as error:
            raise ConfigError(f"{site.name} ({d_out} x {d_in}): {error}") from None
        found.append((slot, site, method))
    return found


Chosen = list[tuple[Slot, str, Method]]


def _excluded(slots: list[Slot], config: Config) -> set[str]:
    names = [n for s in slots for n in s.names]
    for pattern in config.exclude:
        if pattern not in DEFAULT_EXCLUDE and not any(re.search(pattern, n) for n in names):
            raise TargetError(f"exclude {pattern!r} matches no parameter; {_near(pattern, names)}")
    return {s.name for s in slots for p in config.exclude for n in s.names if re.search(p, n)}


def _apply_rules(
    slots: list[Slot], config: Config, excluded: set[str]
) -> tuple[Chosen, dict[str, int]]:
    taken: dict[str, int] = {}
    for i, (pattern, _) in enumerate(config.rule_list):
        for slot in slots:
            hits = [n for n in slot.names if re.search(pattern, n)]
            if hits and len(hits) < len(slot.names):
                raise TargetError(
                    f"rule {pattern!r} matches {hits} but not {sorted(set(slot.names) - set(hits))}"
                    ", which is the same module used again: an adapter there changes every use. "
                    f"Match them all: {'|'.join(map(re.escape, slot.names))!r}"
                )
            if hits:
                taken.setdefault(slot.name, i)
    chosen: Chosen = []
    for i, (pattern, method) in enumerate(config.rule_list):
        mine = [s for s in slots if taken.get(s.name) == i and s.name not in excluded]
        if not mine:
            raise TargetError(_nothing(pattern, i, slots, taken, excluded, config))
        if method is None:
            continue
        # A broad pattern means the linear maps; other parameters are adapted when they are named.
        linear = [
            s
            for s in mine
            if s.kind in (*LINEAR_KINDS, PARAMETRISED) or (pattern and _is_named(pattern, s))
        ]
        if not linear and not pattern:
            raise TargetError(
                f"{type(method).__name__} for all linear maps, but the model has none; its other "
                f"parameters are {[s.name for s in mine][:8]}: name one in a rule"
            )
        for slot in linear or mine:
            if slot.kind == PARAMETRISED:
                raise TargetError(
                    f"{slot.name} belongs to a parametrised layer, whose weight is computed from "
                    "it: call torch.nn.utils.parametrize.remove_parametrizations, or put "
                    "{pattern: None} for it before this rule"
                )
            if slot.kind == TENSOR:
                raise TargetError(
                    f"rule {pattern!r} matches {slot.name} of shape {tuple(slot.weight.shape)}; "
                    "adapters need a matrix (2-D), a stack of expert matrices (3-D) or a "
                    "convolution kernel. Put {pattern: None} for it before this rule"
                )
        chosen += [(s, pattern, method) for s in linear or mine]
    order = {s.name: k for k, s in enumerate(slots)}
    return sorted(chosen, key=lambda c: order[c[0].name]), taken


def _is_named(pattern: str, slot: Slot) -> bool:
    """Whether the pattern needs the module's own name to match, not its path or ".weight"."""
    parts = slot.name.split(".")
    parts[-2 if len(parts) > 1 and parts[-1].endswith("weight") else -1] = "module"
    return not re.search(pattern, ".".join(parts))


def _filter(
    chosen: Chosen, slots: list[Slot], config: Config, roles: dict[str, tuple[str, str]]
) -> Chosen:
    if config.layers is not None:
        present = sorted({s.layer for s in slots if s.layer is not None})
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
    chosen: Chosen, slots: list[Slot], excluded: set[str], taken: dict[str, int], config: Config
) -> None:
    patterns = [pattern for pattern, _ in config.rule_list]
    for slot, pattern, method in chosen:
        uses = [s for s in slots if s.weight is slot.weight and s.name not in excluded]
        named = [s.name for s in uses if taken.get(s.name) == patterns.index(pattern)]
        if len(named) > 1:
            one, other = (re.escape(n) for n in named[:2])
            raise TargetError(
                f"{' and '.join(named)} are one tied tensor, and rule {pattern!r} means both. "
                f"Say which use: {{{one!r}: {method!r}}}, or give each its own rule "
                f"({one!r} and {other!r}), or exclude them"
            )


def _is_calibrated(method: Method) -> bool:
    return any(part.statistic is not None for part in getattr(method, "methods", (method,)))


def _check_weight(slot: Slot) -> None:
    if slot.quantized is not None:
        slot.quantized.check(slot.name)
    else:
        check_weight(slot.name, slot.module, slot.weight)


def _nothing(
    pattern: str,
    i: int,
    slots: list[Slot],
    taken: dict[str, int],
    excluded: set[str],
    config: Config,
) -> str:
    names = [n for s in slots for n in s.names]
    hits = [s.name for s in slots if any(re.search(pattern, n) for n in s.names)]
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
