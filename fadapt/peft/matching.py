"""PEFT's rules for names: which modules and parameters a config means.

As PEFT applies them: ``target_modules`` is a list of suffixes or one regular expression for the
whole name; keys of ``rank_pattern`` and the like are regular expressions for the end of a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..patterns import PROBES, check_speed

ALL_LINEAR = "all-linear"
LONGEST = 20_000


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether ``target_modules`` and its filters mean the module of this name."""
    if _ends(config.get("exclude_modules"), module):
        return False
    for saved in _list(config.get("modules_to_save")):
        if re.match(rf"(^|.*\.){saved}($|\..*)", module):
            return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if not targets:
        return False
    if module in targets:
        return True
    return _ends(targets, module) and _in_layers(config, module)


def is_parameter_targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether ``target_parameters`` means the parameter of this name."""
    return _ends(_list(config.get("target_parameters")), name)


def pattern_value(patterns: Mapping[str, Any], name: str) -> tuple[str, Any] | None:
    """(pattern, value) of the first pattern that matches a name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return pattern, value
    return None


def value_after_dot(patterns: Mapping[str, Any], name: str) -> tuple[str, Any] | None:
    """As C3A and FourierFT match: the first pattern after a dot of the name, else the whole name.

    ``a|b`` is one expression there, of which the dot is a part of a alone.
    """
    for pattern, value in patterns.items():
        if re.match(rf".*\.{pattern}$", name):
            return pattern, value
    return (name, patterns[name]) if name in patterns else None


def patterns_after_dot(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Patterns with which :func:`value_after_dot` finds these values by their names."""

    def patterns(names: Iterable[str]) -> dict[str, Any]:
        # A name without a dot is found as it is, when no pattern before it matches.
        ordered = sorted(names, key=lambda name: "." not in name)
        return {_after_dot(name): values[name] for name in ordered}

    few = patterns(name for name, value in values.items() if value != default)
    found = {name: value_after_dot(few, name) for name in values}
    right = all((default if f is None else f[1]) == values[n] for n, f in found.items())
    return few if right else patterns(values)


def _after_dot(name: str) -> str:
    head, dot, tail = name.partition(".")
    return f"(?<=^{re.escape(head)}\\.){re.escape(tail)}" if dot else name


def exact_pattern(name: str) -> str:
    """A pattern that matches this name and no other."""
    return f"^{re.escape(name)}"


def targets_for(wanted: Iterable[str], names: Sequence[str]) -> list[str] | str:
    """``target_modules`` for exactly the wanted modules: suffixes, else names, else an expression.

    Args:
        wanted: names of modules.
        names: of all modules of the model.
    """
    wanted = set(wanted)
    for targets in (sorted({n.rpartition(".")[2] for n in wanted}), sorted(wanted)):
        if {n for n in names if is_targeted({"target_modules": targets}, n)} == wanted:
            return targets
    return one_of(wanted)


def one_of(names: Iterable[str]) -> str:
    """An expression for whole names."""
    return "|".join(re.escape(n) for n in sorted(names))


def check_patterns(config: Mapping[str, Any], fields: Iterable[str], where: str) -> None:
    """Refuses fields of names that are of another type or do not compile."""
    for field in fields:
        value = config.get(field)
        if isinstance(value, (list, tuple)) and None in value:
            raise CheckpointError(f"{where}: {field} holds None, not a name")
        texts = list(value) if isinstance(value, (list, tuple, dict)) else [value]
        for text in texts:
            if text is not None and not isinstance(text, str):
                raise CheckpointError(f"{where}: {field} holds {text!r}, not a name")
            if text and (len(text) > LONGEST or _repeats_a_repetition(text)):
                raise CheckpointError(
                    f"{where}: {field}: {text[:80]!r} may take forever to match: it repeats what "
                    f"repeats, as (a+)+ does, or is longer than {LONGEST} characters"
                )
            try:
                re.compile(text or "")
                check_speed(text or "", "pattern", PROBES)
                # As the functions above search it.
                check_speed(rf"(.*\.)?({text})$" if text else "", "pattern", PROBES)
            except (re.error, RecursionError, OverflowError, ConfigError) as error:
                raise CheckpointError(
                    f"{where}: {field}: {text!r:.200} is no pattern: {error!s:.400}"
                ) from None


def _repeats_a_repetition(text: str) -> bool:
    """Whether an expression repeats a group that repeats something, without a bound on either."""
    # Words with dots between them, in whose repetition no match can begin in two ways.
    text = re.sub(r"\((?:\?:)?(?:\\w|\\d|\[\^\\?\.\])[*+]\\\.\)", "x", text)
    text = re.sub(r"\\.", "x", text)  # escaped characters
    text = re.sub(r"\[\^?\]?[^\]]*\]", "x", text)  # sets of characters
    inner = [False]
    for match in re.finditer(r"\(|\)([*+]|\{\d*,\d*\})?|[*+]|\{\d*,\}", text):
        if match[0] == "(":
            inner.append(False)
        elif match[0].startswith(")"):
            repeats = inner.pop() if len(inner) > 1 else False
            if repeats and match[1]:
                return True
            inner[-1] |= repeats or bool(match[1])
        else:
            inner[-1] = True
    return False


def _ends(targets: Any, name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    # One look-up for each dot of the name instead of one comparison for each target.
    ends = set(targets or ())
    parts = name.split(".")
    return any(".".join(parts[i:]) in ends for i in range(len(parts)))


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = _list(config.get("layers_pattern"))
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", module)
    else:
        tries = (re.match(rf"(?:^|.*?\.){p}\.(?P<index>\d+)\.", module) for p in patterns)
        match = next((m for m in tries if m), None)
    return match is not None and int(match["index"]) in (
        [layers] if isinstance(layers, int) else layers
    )


def _list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value or ())
