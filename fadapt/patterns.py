"""Regular expressions as users write them: they compile, and they come to an end."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

from .errors import ConfigError

SECONDS = 0.05
"""A search of one name takes microseconds; one that takes this long will not end."""

# So often a part may be repeated or left out, each of which a search may have to try.
_COUNTED = re.compile(r"\)\{(\d*),?(\d*)\}")
MOST = 9
# And so many may have another form or be left out, one after the other.
_CHOICE = re.compile(r"\([^()]*\||(?<![\\(*+}])\?")
CHOICES = 15
PROBES = ("model.layers.0.self_attn.q_proj.weight", "a" * 40, "0" * 40)


def check_pattern(pattern: Any, what: str) -> None:
    """Refuses what is no usable regular expression.

    Args:
        pattern: searched in parameter names.
        what: its part in the config, for the message.

    Raises:
        ConfigError: no string, no regular expression, one too large, or one that takes for ever.
    """
    try:
        if not isinstance(pattern, str):
            raise TypeError("expected a str")
        re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError, MemoryError) as error:
        shown = repr(pattern) if len(repr(pattern)) < 100 else f"{repr(pattern)[:80]}..."
        why = str(error) or type(error).__name__
        raise ConfigError(f"{what} {shown} is not a regular expression: {why}") from error
    check_speed(pattern, what, PROBES)


def check_speed(pattern: str, what: str, names: Iterable[str]) -> None:
    """Refuses a pattern whose search in one of the names would not come to an end.

    Nested repetitions can take a time that doubles with each character, and Python cannot
    interrupt them. So longer and longer beginnings of a name are searched.

    Raises:
        ConfigError: naming the pattern.
    """
    # Both are quick up to the one character from which on a name is long enough.
    if len(_CHOICE.findall(pattern)) > CHOICES:
        raise ConfigError(
            f"{what} {pattern!r:.200} has more than {CHOICES} choices one after the other, which "
            "may take for ever; write several patterns"
        )
    if not _can_be_slow(pattern):
        return
    for match in _COUNTED.finditer(pattern):
        if any(len(n) > 3 or int(n or 0) > MOST for n in match.groups()):
            raise ConfigError(
                f"{what} {pattern!r:.200} repeats a group more than {MOST} times, which may take "
                f"for ever; write * or + in the place of {match[0][1:]!r}"
            )
    compiled = re.compile(pattern)
    for name in names:
        for end in range(1, len(name) + 1):
            # Also with an end that matches nothing: a search that fails tries all the ways.
            for text in (f"{name[:end]}\0", name[:end]):
                if _is_slow(compiled, text) and _is_slow(compiled, text):
                    raise ConfigError(
                        f"{what} {pattern!r} takes for ever: its repetitions can match the same "
                        f"text in many ways (already in {name[:end]!r}); write one without a "
                        "repetition within a repetition"
                    )


def _can_be_slow(pattern: str) -> bool:
    """Whether the time may be more than quadratic: a repeated group, or three repetitions."""
    groups = any(f"){repeat}" in pattern for repeat in "*+{")
    return groups or sum(map(pattern.count, "*+}")) >= 3


def _is_slow(compiled: re.Pattern[str], text: str) -> bool:
    begun = time.perf_counter()
    compiled.search(text)
    return time.perf_counter() - begun > SECONDS
