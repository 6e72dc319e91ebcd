"""Reader, writer or inner: the role of a linear map relative to the residual stream."""

from __future__ import annotations

import re
from collections import Counter

from .towers import split_name
from .weights import BaseWeight, Kind


def find_roles(weights: list[BaseWeight]) -> dict[str, tuple[str, str]]:
    """The role of every linear map relative to the residual width, with a note where it is a guess.

    The width of a tower (the layers under one prefix) is the dimension that most of its maps have
    on either side; at a tie, the first map's input. A square map reads, unless it is the last
    linear map of a sublayer with several (the output projection of an attention).
    """
    weights = [w for w in weights if w.kind in (Kind.LINEAR, Kind.QUANTIZED)]
    towers: dict[str, list[BaseWeight]] = {}
    for weight in weights:
        towers.setdefault(_tower(weight.name), []).append(weight)
    main = max(towers.values(), key=len, default=[])
    roles: dict[str, tuple[str, str]] = {}
    for name, members in towers.items():
        width = _width(members if name else main)
        sublayers: dict[str, list[BaseWeight]] = {}
        for weight in members:
            sublayers.setdefault(_sublayer(weight.name), []).append(weight)
        for weight in members:
            d_out, d_in = weight.shape
            group = sublayers[_sublayer(weight.name)]
            if d_in == d_out == width:
                if len(group) == 1:
                    roles[weight.name] = "reader", f"square {width}, alone: taken as reader"
                else:
                    last = weight is group[-1]
                    role = "writer" if last else "reader"
                    where = _sublayer(weight.name).rsplit(".", 1)[-1]
                    roles[weight.name] = (
                        role,
                        f"square {width}, {'last' if last else 'not last'} of {where}",
                    )
            elif d_in == width:
                roles[weight.name] = "reader", ""
            elif d_out == width:
                roles[weight.name] = "writer", ""
            else:
                roles[weight.name] = "inner", ""
    return roles


def _tower(name: str) -> str:
    tower, layer, _ = split_name(name)
    return "" if layer is None else tower or "."


def _sublayer(name: str) -> str:
    match = re.match(r"(.*\.|^)\d+\.[^.]+", name)
    return match.group() if match else name.rsplit(".", 2)[0]


def _width(weights: list[BaseWeight]) -> int:
    votes = Counter(d for w in weights for d in w.shape)
    most = max(votes.values(), default=0)
    best = [d for d, n in votes.items() if n == most]
    return weights[0].shape[1] if weights and weights[0].shape[1] in best else max(best, default=0)
