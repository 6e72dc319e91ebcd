"""SHIRA: entries of the weight at places that the file names.

Files. ``shira_weight`` (n,) and ``shira_indices`` (2, n), rows above columns, n = r (in + out);
int32, on Windows as float32. PEFT adds values at the same place up, and so few of them mean fewer
places than were trained: they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...methods.shira import SHiRA
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, common, strength, wide
from ..places import LINEAR, QUANTIZED, Place

VALUES, PLACES = "shira_weight", "shira_indices"


class SHiRAFormat(Format):
    """SHiRA with whatever mask chose the places."""

    peft_type = "SHIRA"
    methods = (SHiRA,)
    suffixes = (VALUES, PLACES)
    layers = frozenset({LINEAR, QUANTIZED})
    fields = frozenset("r mask_type random_seed fan_in_fan_out init_weights".split())

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        r, (d_out, d_in) = settings.integer("r", 32), place.site.matrix_shape
        n = r * (d_in + d_out)
        values, found = tensors.take(VALUES, n), tensors.take(PLACES, 2, n)
        indices = found.to(torch.int32)
        row, column = indices.long()
        inside = (row >= 0) & (row < d_out) & (column >= 0) & (column < d_in)
        if not inside.all() or (indices != found).any():
            raise settings.fail(
                f"{place.key}.{PLACES} names places outside of a {d_out} x {d_in} weight"
            )
        if len((row * d_in + column).unique()) < n:
            raise settings.fail(f"{place.key}.{PLACES} names a place twice")
        own = settings.text("mask_type", "random") == "random"
        seeded = own and settings.config.get("random_seed") is not None
        seed = settings.integer("random_seed", 0, 0) if seeded else None
        return Read(SHiRA(r=r, random_seed=seed), {"v": values}, {"indices": indices})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {p: a.method for p, a in adapters.items()}
        seeds = {m.random_seed for m in methods.values()}
        return {
            "r": common([(p, m.r) for p, m in methods.items()], "r"),
            "mask_type": "random",
            "random_seed": next(iter(seeds)) if len(seeds) == 1 else None,
            "fan_in_fan_out": False,
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        p, c = adapter.leaves, strength(adapter)
        return {VALUES: p["v"] if c == 1 else c * wide(p["v"]), PLACES: p["indices"]}
