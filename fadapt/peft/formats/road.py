"""ROAD: RoAd 1, 2 and 4.

Files. ``road_theta`` and ``road_alpha`` = 1 + a, out / 2, out or 2 out of them by ``variant``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...methods.road import RoAd
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, common, refuse_strength
from ..places import LINEAR, QUANTIZED, Place

VARIANTS: dict[str, Literal[1, 2, 4]] = {"road_1": 1, "road_2": 2, "road_4": 4}


class RoAdFormat(Format):
    """RoAd 1, 2 and 4."""

    peft_type = "ROAD"
    methods = (RoAd,)
    suffixes = ("road_theta", "road_alpha")
    layers = frozenset({LINEAR, QUANTIZED})
    fields = frozenset("variant group_size".split())

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        name = settings.text("variant", "road_1")
        if name not in VARIANTS:
            raise settings.fail(f"variant is {name[:40]!r}; PEFT has {list(VARIANTS)}")
        method = RoAd(VARIANTS[name], settings.integer("group_size", 64, 2))
        count = place.site.out_features * method.variant // 2
        theta, alpha = (tensors.take(suffix, count) for suffix in self.suffixes)
        return Read(method, {"theta": theta, "a": alpha - 1}, {})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        variants = [(p, a.method.variant) for p, a in adapters.items()]  # type: ignore[attr-defined]
        groups = [(p, a.method.group_size) for p, a in adapters.items()]  # type: ignore[attr-defined]
        return {
            "variant": f"road_{common(variants, 'variant')}",
            "group_size": common(groups, "group_size"),
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        refuse_strength(place, adapter)
        p = adapter.leaves
        return {"road_theta": p["theta"], "road_alpha": 1 + p["a"]}
