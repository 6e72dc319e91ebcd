"""Reader, writer or inner: the role of a linear map relative to the residual stream."""

from __future__ import annotations

import re
from collections import Counter

from .weights import LINEAR, QUANTIZED, Slot


def find_roles(slots: list[Slot]) -> dict[str, tuple[str, str]]:
    """The role of every linear map relative to the residual width, with a note where it is a guess.

    The width of a tower (the layers under one prefix) is the dimension that most of its maps have
    on either side; at a tie, the first map's input. A square map reads, unless it is the last
    linear map of a sublayer with several (the output projection of an attention).
    """
    slots = [s for s in slots if s.kind in (LINEAR, QUANTIZED)]
    towers: dict[str, list[Slot]] = {}
    for slot in slots:
        towers.setdefault(_tower(slot.name), []).append(slot)
    main = max(towers.values(), key=len, default=[])
    roles: dict[str, tuple[str, str]] = {}
    for name, members in towers.items():
        width = _width(members if name else main)
        sublayers: dict[str, list[Slot]] = {}
        for slot in members:
            sublayers.setdefault(_sublayer(slot.name), []).append(slot)
        for slot in members:
            d_out, d_in = slot.shape
            group = sublayers[_sublayer(slot.name)]
            if d_in == d_out == width:
                if len(group) == 1:
                    roles[slot.name] = "reader", f"square {width}, alone: taken as reader"
                else:
                    last = slot is group[-1]
                    role = "writer" if last else "reader"
                    where = _sublayer(slot.name).rsplit(".", 1)[-1]
                    roles[slot.name] = (
                        role,
                        f"square {width}, {'last' if last else 'not last'} of {where}",
                    )
            elif d_in == width:
                roles[slot.name] = "reader", ""
            elif d_out == width:
                roles[slot.name] = "writer", ""
            else:
                roles[slot.name] = "inner", ""
    return roles


def _tower(name: str) -> str:
    parts = name.split(".")
    return next((".".join(parts[:i]) or "." for i, p in enumerate(parts) if p.isdigit()), "")


def _sublayer(name: str) -> str:
    match = re.match(r"(.*\.|^)\d+\.[^.]+", name)
    return match.group() if match else name.rsplit(".", 2)[0]


def _width(slots: list[Slot]) -> int:
    votes = Counter(d for s in slots for d in s.shape)
    most = max(votes.values(), default=0)
    best = [d for d, n in votes.items() if n == most]
    return slots[0].shape[1] if slots and slots[0].shape[1] in best else max(best, default=0)
