"""summary: a table of what is adapted, and how it was chosen."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .adapter import Adapter
from .params import Params

HEADER = ("site", "method", "out x in", "role", "trainable")


def summary(params: Params) -> str:
    """A table of site, method, shape, role and trainable count.

    Sites that differ only in their numbers (the layers of a stack) share a line, with the numbers
    as {0..27} and the count of the sites. Roles that the shape alone does not tell, and tied
    weights, are explained below the table.

    Args:
        params: from :func:`fadapt.init`.

    Example:
        >>> print(fadapt.summary(fadapt.init(model, fadapt.LoRA(r=2))))  # doctest: +ELLIPSIS
        site ...
    """
    groups: dict[tuple[str, ...], list[Adapter]] = {}
    for name in sorted(params, key=_natural):
        adapter = params[name]
        site = adapter.site
        key = (
            re.sub(r"\d+", "\0", name),
            repr(adapter.method),
            f"{site.out_features} x {site.in_features}",
            site.role + ("*" if site.note else ""),
        )
        groups.setdefault(key, []).append(adapter)
    rows = [
        (
            _pattern([a.site.name for a in members]) + _times(len(members)),
            *key[1:],
            f"{sum(_count(a) for a in members):,}",
        )
        for key, members in groups.items()
    ]
    total = sum(_count(a) for _, a in params.items())
    fixed = sum(t.numel() for _, a in params.items() for t in a.fixed.values())
    lines = _table([HEADER, *rows])
    lines.append(f"{len(params)} sites, {total:,} trainable and {fixed:,} fixed values")
    notes: dict[str, str] = {}
    for members in groups.values():
        site = members[0].site
        where = _pattern([a.site.name for a in members])
        if site.note:
            notes[f"* {where}: {site.role} ({site.note})"] = ""
        if site.tied:
            notes[f"! {where} is tied to {', '.join(site.tied)}, which is not adapted by it"] = ""
    return "\n".join([*lines, *notes])


def _count(adapter: Adapter) -> int:
    return sum(t.numel() for t in adapter.train.values())


def _times(n: int) -> str:
    return f"  x {n}" if n > 1 else ""


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def _pattern(names: Sequence[str]) -> str:
    columns = list(zip(*(re.split(r"(\d+)", n) for n in names), strict=True))
    parts = []
    for column in columns:
        values = sorted(set(column), key=_natural)
        if len(values) == 1:
            parts.append(values[0])
        elif [int(v) for v in values] == list(range(int(values[0]), int(values[-1]) + 1)):
            parts.append(f"{{{values[0]}..{values[-1]}}}")
        else:
            parts.append(f"{{{','.join(values)}}}")
    return "".join(parts)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = [c.ljust(w) for c, w in zip(row, widths, strict=True)]
        lines.append("  ".join([*cells[:last], row[last].rjust(widths[last])]))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
