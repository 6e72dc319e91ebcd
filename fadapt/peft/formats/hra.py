"""HRA: Householder reflections of the input.

Files. ``hra_u`` (in, r), whose *columns* are the vectors; PEFT has one r for all modules. A pair of
equal vectors is the identity, so fewer reflections are filled up with such pairs; an odd one out is
read with a zero vector, which reflects nothing. ``apply_GS`` orthogonalises the vectors first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...methods.hra import HRA
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, common, refuse_strength, wide
from ..places import CONVOLUTION, LINEAR, Place

SHORT = 1e-12
"""What HRA takes for no vector."""


class HRAFormat(Format):
    """HRA, with and without orthogonal vectors."""

    peft_type = "HRA"
    methods = (HRA,)
    suffixes = ("hra_u",)
    layers = frozenset({LINEAR, CONVOLUTION})
    fields = frozenset("r apply_GS".split())
    bias_only = "hra_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        r = settings.integer("r", 8)
        if place.layer == CONVOLUTION and len(set(place.site.kernel[1:])) > 1:
            raise settings.fail(f"{place.key}: PEFT's HRA has square kernels alone")
        u = wide(tensors.take("hra_u", place.site.in_features, r)).mT
        if settings.flag("apply_GS", False):
            u = _orthonormal(u)
        if r % 2:
            u = torch.cat([u, torch.zeros_like(u[:1])])
        pairs = u.unflatten(0, (-1, 2))
        # The start is the first of each pair, unless it is the one that is nothing.
        start = pairs[:, 0].contiguous()
        moved = u - start.repeat_interleave(2, 0)
        return Read(HRA(r=r + r % 2), {"dU": moved}, {"U0": start})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        counts = {place: len(_vectors(adapter)) for place, adapter in adapters.items()}
        # Pairs fill up; one vector alone cannot.
        common([(place, n % 2) for place, n in counts.items()], "parity of the reflections")
        r = max(1, *counts.values())
        # PEFT warns of a start in pairs that an odd r does not have.
        return {"r": r, "apply_GS": False, "init_weights": r % 2 == 0}

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        refuse_strength(place, adapter)
        u = _vectors(adapter)
        missing = settings["r"] - len(u)
        if missing:
            pair = u[:1] if len(u) else torch.ones_like(adapter.leaves["dU"][:1])
            u = torch.cat([u, pair.expand(missing, -1)])
        return {"hra_u": u.mT}


def _vectors(adapter: Adapter) -> Tensor:
    """The rows (k, in) that reflect; PEFT would divide by the length of a zero one."""
    p = adapter.leaves
    u = p["U0"].repeat_interleave(2, 0) + p["dU"]
    return u[torch.linalg.vector_norm(u, dim=1) >= SHORT]


def _orthonormal(u: Tensor) -> Tensor:
    """The rows one after the other, each without its part along those before it."""
    rows: list[Tensor] = []
    for row in u:
        for other in rows:
            row = row - (other @ row) * other
        rows.append(row / row.norm())
    return torch.stack(rows)
