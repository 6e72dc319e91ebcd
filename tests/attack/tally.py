"""How an attempt ended, and a table of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import fadapt

CLEAR, RIGHT, FOREIGN, SILENT = "clear", "right", "foreign", "silent"
KINDS = (CLEAR, RIGHT, FOREIGN, SILENT)


def attempt(call: Callable[[], Any], right: Callable[[Any], bool] | None = None) -> tuple[str, str]:
    """How a call ends, and what it says.

    Args:
        call: what is tried.
        right: whether its result is the right one; None where there is none.

    Returns:
        "clear" for a FadaptError, "foreign" for another exception, "right" for a result that
        ``right`` accepts, "silent" for any other.
    """
    try:
        result = call()
    except fadapt.FadaptError as error:
        return CLEAR, str(error)
    except Exception as error:
        return FOREIGN, f"{type(error).__name__}: {error}"
    if right is not None and right(result):
        return RIGHT, ""
    return SILENT, f"returned {result!r:.100}"


@dataclass
class Tally:
    """The counts of each area, and the attempts that ended badly."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def add(self, area: str, name: str, end: str, said: str) -> None:
        """Counts one attempt."""
        self.counts.setdefault(area, Counter())[end] += 1
        if end in (FOREIGN, SILENT):
            self.bad.append(
                f"{end}: {area}: {name}: {said[:300]}".encode(errors="replace").decode()
            )

    def table(self) -> str:
        """One line for each area, and the sum."""
        total: Counter[str] = sum(self.counts.values(), Counter())
        rows: Iterable[tuple[str, Counter[str]]] = [*self.counts.items(), ("sum", total)]
        width = max(len(area) for area, _ in rows)
        lines = [f"{'area':{width}}  tries  " + "  ".join(f"{k:>7}" for k in KINDS)]
        for area, count in rows:
            cells = "  ".join(f"{count[k]:7}" for k in KINDS)
            lines.append(f"{area:{width}}  {sum(count.values()):5}  {cells}")
        return "\n".join([*lines, *self.bad])
