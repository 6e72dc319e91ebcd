"""What is kept per stream, and in how many passes it fits a memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import CalibrationError
from ..statistics.moments import PCA, CenteredGram, Gram
from ..statistics.reduction import Reduction, Stream
from ..statistics.sketch import Sketch

Kinds = dict[Stream, list[Reduction]]


def minimal(wanted: Iterable[Reduction]) -> list[Reduction]:
    """The states to keep so that every wanted statistic can be read from one of them."""
    stored = list(dict.fromkeys(r.stored for r in wanted))
    return [r for r in stored if not any(s != r and s.covers(r) for s in stored)]


@dataclass(frozen=True)
class Plan:
    """The states of each pass over the batches, and a note if it is not one exact pass."""

    passes: list[Kinds]
    note: str = ""


def plan_passes(
    wanted: Mapping[Stream, list[Reduction]],
    widths: Mapping[Stream, int],
    max_memory: int | None,
    again: bool,
) -> Plan:
    """Divides the streams into passes whose states fit ``max_memory`` bytes.

    Args:
        wanted: the reductions that are asked for, before :func:`minimal`.
        widths: of the streams' rows.
        again: whether the batches can be read more than once. If not, everything must fit one
            pass, and principal components are sketched to that end.

    Raises:
        CalibrationError: a state that does not fit and cannot be sketched.
    """
    kinds = {stream: minimal(r) for stream, r in wanted.items()}
    need = {s: sum(r.nbytes(widths[s]) for r in kinds[s]) for s in kinds}
    total = sum(need.values())
    if max_memory is None or total <= max_memory:
        return Plan([kinds])
    sketched: list[Stream] = []
    # The widest first: a sketch saves most there.
    for stream in sorted(need, key=lambda s: -need[s]):
        fits = need[stream] <= max_memory if again else sum(need.values()) <= max_memory
        if fits:
            continue
        new = _sketch(wanted[stream])
        if new is not None and (size := sum(r.nbytes(widths[stream]) for r in new)) < need[stream]:
            kinds[stream], need[stream] = new, size
            sketched.append(stream)
        if need[stream] > max_memory:
            raise CalibrationError(
                f"{stream[0]}: its states {kinds[stream]} take {need[stream]:,} bytes, more than "
                f"max_memory={max_memory:,}; only principal components can be sketched"
            )
    passes: list[Kinds] = []
    room = 0
    for stream, reductions in kinds.items():
        if not passes or need[stream] > room:
            passes.append({})
            room = max_memory
        passes[-1][stream] = reductions
        room -= need[stream]
    if len(passes) > 1 and not again:
        raise CalibrationError(
            f"the states take {sum(need.values()):,} bytes, more than max_memory={max_memory:,}, "
            "and the batches are an iterator, which can be read only once; pass a list or a "
            "DataLoader, so that several passes can be made"
        )
    parts = [f"{len(passes)} passes over the batches"] if len(passes) > 1 else []
    if sketched:
        names = [name for name, _ in sketched]
        parts.append(f"Nyström sketches instead of exact moments at {names[:3]} ({len(names)})")
    note = f"the states take {total:,} bytes, over max_memory={max_memory:,}: "
    return Plan(passes, note + " and ".join(parts))


def _sketch(wanted: Iterable[Reduction]) -> list[Reduction] | None:
    """The same with sketches of four times the wanted components; None if some need more."""
    new: dict[bool, Sketch] = {}
    others = []
    for reduction in wanted:
        if isinstance(reduction, PCA):
            k = max(4 * reduction.k, new[reduction.center].k if reduction.center in new else 0)
            new[reduction.center] = Sketch(k, reduction.center)
        elif isinstance(reduction, (Gram, CenteredGram)):
            return None
        else:
            others.append(reduction)
    return [*new.values(), *minimal(others)]
