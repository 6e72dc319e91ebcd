"""summary: a table of what is adapted, and how it was chosen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapted_map import adapt
from ..base.checks import check_model
from ..base.linear_map import DenseMap
from ..base.weights import Kind
from ..errors import ConfigError
from ..method import Method
from ..site import Site
from ..targeting import Coverage, LeftOut, check_fits, coverage_of
from .adapter import Adapter
from .params import Params
from .stack import Stack, unstack

HEADER = ("site", "method", "out x in", "role", "trainable")


def summary(params: Params | Stack, model: nn.Module | None = None) -> str:
    """A table of site, method, shape, role and trainable count; and what is left out.

    Sites that differ only in their numbers (the layers of a stack) share a line, with the numbers
    as {0..27} and the count of the sites. Roles that the shape alone does not tell, and tied
    weights, are explained below the table. It ends with the share of the base's values that lie in
    adapted weights, the trainable values as a share of the base, and the weights of two axes or
    more that are not adapted, with the reason: each that a rule meant and could not have, and of
    the others those that hold a hundredth of the base or more, the largest first. Layers without a
    bias that a method gives one are named. A stack has a
    table for each adapter, where those that are alike share one.

    Args:
        params: from :func:`fadapt.init` or :func:`fadapt.load`, which record what they leave out,
            or others; or a stack.
        model: the base, for params that have no such record, or another base.

    Raises:
        TargetError: params with a site that ``model`` does not have.
        ConfigError: something else than params, or the rest of a split, a group of a stack, or rows
            that :func:`fadapt.select` chose.

    Example:
        >>> import torch
        >>> import fadapt
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 4))
        >>> print(fadapt.summary(fadapt.init(model, fadapt.LoRA(r=2))))
        site      method                 out x in  role    trainable
        ------------------------------------------------------------
        1.weight  LoRA(r=2, alpha=16.0)  4 x 8     reader         24
        1 sites, 24 trainable and 0 fixed values
        adapted: 7.3% of the base's 436 values; trainable: 5.5% of that number
        left out: 0.weight, 50 x 8 (91.7%): an embedding; a rule may name it
    """
    if isinstance(params, Stack):
        return _of_stack(params, model)
    if not isinstance(params, Params):
        raise ConfigError(
            f"summary takes Params or a Stack, got {type(params).__name__}: write "
            "fadapt.summary(params), with what fadapt.init, load, stack or join returned"
        )
    params.check_one()
    rows = [Row(a.site, repr(a.method), _count(a)) for _, a in params.items()]
    lines, notes = site_table(rows)
    total = sum(row.trainable for row in rows)
    fixed = sum(t.numel() for _, a in params.items() for t in a.fixed.values())
    lines.append(f"{len(params.at_sites())} sites, {total:,} trainable and {fixed:,} fixed values")
    notes += _new_biases(params)
    covered = params.coverage
    if model is not None:
        check_model(model)
        check_fits(model, [a.site for a in params.at_sites().values()])
        covered = coverage_of(model, params.at_sites(), params.config)
    return "\n".join([*lines, *notes, *(_left_out(covered, total) if covered else ())])


def _new_biases(params: Params) -> list[str]:
    """Says which layers without a bias are given one: merge then has a new name."""
    found: dict[tuple[str, str], list[str]] = {}
    known: dict[tuple[Method, Site], bool] = {}
    for name in sorted(params.at_sites(), key=_natural):
        adapter = params[name]
        site, method = adapter.site, adapter.method
        if site.bias is not None or not method.acts_on_bias or site.kind is Kind.VECTOR:
            continue
        key = method, replace(site, name="", tied=(), fingerprint="")
        if key not in known:
            known[key] = _adds_bias(adapter)
        if known[key]:
            found.setdefault((re.sub(r"\d+", "\0", name), repr(method)), []).append(name)
    return [
        f"+ {_pattern(names)}: {method} gives the layer, which has none, a bias"
        for (_, method), names in found.items()
    ]


def _adds_bias(adapter: Adapter) -> bool:
    """Whether the adapted map of a layer without a bias moves zero, whatever its values are now."""
    site = adapter.site
    one = adapter.expert(0) if site.experts else adapter
    rng = torch.Generator("cpu").manual_seed(0)

    def drawn(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return torch.zeros(leaf.shape, dtype=leaf.dtype, device="cpu")
        return torch.rand(leaf.shape, generator=rng, device="cpu")

    with torch.no_grad():
        base = DenseMap(torch.ones((), device="cpu").expand(site.matrix_shape), None)
        p = {k: drawn(leaf) for k, leaf in one.leaves.items()}
        moved = adapt(one.method, p, torch.zeros(1, site.in_features, device="cpu"), base)
    return bool(moved.any())


def _of_stack(stack: Stack, model: nn.Module | None) -> str:
    if stack.per_row:
        raise ConfigError(
            "summary takes the resident stack, not the rows that select chose from it: write "
            "fadapt.summary(stack)"
        )
    numbers: dict[str, list[int]] = {}
    for i, member in enumerate(unstack(stack)):
        numbers.setdefault(summary(member, model), []).append(i)
    return "\n\n".join(f"{_numbered(like)}\n{text}" for text, like in numbers.items())


def _numbered(numbers: Sequence[int]) -> str:
    """Such as "adapter 3", "adapters 0 to 4" or "adapters 0, 2, 5"."""
    if len(numbers) == 1:
        return f"adapter {numbers[0]}"
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"adapters {numbers[0]} to {numbers[-1]}"
    return f"adapters {', '.join(map(str, numbers))}"


@dataclass(frozen=True)
class Row:
    """One site of a table: where, what, and how many trainable values."""

    site: Site
    method: str
    trainable: int


def site_table(rows: Iterable[Row]) -> tuple[list[str], list[str]]:
    """The lines of a table, in which like sites share a line; and notes on roles and ties."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    listed = sorted(rows, key=lambda row: _natural(row.site.name))
    names = {row.site.name for row in listed}
    for row in listed:
        site = row.site
        key = (
            re.sub(r"\d+", "\0", site.name),
            row.method,
            "" if site.is_shared else f"{site.out_features} x {site.in_features}",
            site.role + ("*" if site.note else ""),
        )
        groups.setdefault(key, []).append(row)
    cells = [
        (
            _pattern([row.site.name for row in members]) + _times(len(members)),
            *key[1:],
            f"{sum(row.trainable for row in members):,}",
        )
        for key, members in groups.items()
    ]
    notes: dict[str, str] = {}
    for members in groups.values():
        site = members[0].site
        where = _pattern([row.site.name for row in members])
        if site.note:
            notes[f"* {where}: {site.role} ({site.note})"] = ""
        if apart := [name for name in site.tied if name not in names]:
            notes[f"! {where} is tied to {', '.join(apart)}, which is not adapted by it"] = ""
    return _table([HEADER, *cells]), list(notes)


LARGE = 0.01
"""The share of the base from which a weight that is left out is named."""


def _left_out(covered: Coverage, trainable: int) -> list[str]:
    size = max(covered.size, 1)
    adapted = _percent(covered.adapted / size)
    share = f"{_percent(trainable / size)} of that number"
    lines = [f"adapted: {adapted} of the base's {covered.size:,} values; trainable: {share}"]
    groups: dict[tuple[str, tuple[int, ...], str], list[LeftOut]] = {}
    for part in covered.left_out:
        key = re.sub(r"\d+", "\0", part.name), part.shape, re.sub(r"\d+", "\0", part.reason)
        groups.setdefault(key, []).append(part)
    total = {key: sum(part.size for part in parts) for key, parts in groups.items()}
    for key in sorted(groups, key=lambda k: -total[k]):
        parts = groups[key]
        if total[key] < LARGE * size and not any(part.notable for part in parts):
            continue
        shape = " x ".join(map(str, parts[0].shape))
        lines.append(
            f"left out: {_pattern([part.name for part in parts])}{_times(len(parts))}, {shape} "
            f"({_percent(total[key] / size)}): {parts[0].reason}"
        )
    return lines


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or not share else f"{100 * share:.2g}%"


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
