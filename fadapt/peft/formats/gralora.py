"""GRALORA: low-rank updates of the blocks of a weight.

Files. ``gralora_A`` (k, in / k, r) and ``gralora_B`` (k, r, out / k); with hybrid_r = h
``gralora_A_general.weight`` (h, in) and ``gralora_B_general.weight`` (out, h). All modules have one
r, k, h and alpha; where alphas differ, the difference is in B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...methods.gralora import GraLoRA
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, common, strength, wide
from ..places import CONV1D, LINEAR, Place

NAMES = {
    "A": "gralora_A",
    "B": "gralora_B",
    "A_general": "gralora_A_general.weight",
    "B_general": "gralora_B_general.weight",
}


class GraLoRAFormat(Format):
    """GraLoRA, also beside a LoRA (hybrid_r)."""

    peft_type = "GRALORA"
    methods = (GraLoRA,)
    suffixes = tuple(NAMES.values())
    layers = frozenset({LINEAR, CONV1D})
    fields = frozenset("r alpha gralora_k hybrid_r gralora_dropout fan_in_fan_out".split())
    dropout = "gralora_dropout"
    bias_only = "gralora_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        r, k = settings.integer("r", 32), settings.integer("gralora_k", 2)
        h = settings.integer("hybrid_r", 0, 0)
        method = GraLoRA(r=r, alpha=settings.number("alpha", 64), gralora_k=k, hybrid_r=h)
        method.check(place.site)
        d_out, d_in = place.site.matrix_shape
        shapes: dict[str, tuple[int, ...]] = {"A": (k, d_in // k, r), "B": (k, r, d_out // k)}
        if h:
            shapes.update({"A_general": (h, d_in), "B_general": (d_out, h)})
        return Read(method, {k: tensors.take(NAMES[k], *shape) for k, shape in shapes.items()}, {})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {place: a.method for place, a in adapters.items()}

        def one(field: str) -> Any:
            return common([(p, getattr(m, field)) for p, m in methods.items()], field)

        return {
            "r": one("r"),
            "gralora_k": one("gralora_k"),
            "hybrid_r": one("hybrid_r"),
            "alpha": max((m.alpha for m in methods.values()), key=abs),
            "fan_in_fan_out": all(place.layer == CONV1D for place in adapters),
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        method: Any = adapter.method
        c, most = strength(adapter), settings["alpha"]
        c = c if method.alpha == most else c * method.alpha / most
        return {
            NAMES[k]: t if k[0] == "A" or c == 1 else c * wide(t)
            for k, t in adapter.leaves.items()
            if k in NAMES
        }
