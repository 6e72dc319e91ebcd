"""MISS: one increment shared by all blocks of r columns.

Files. ``miss_block``, of a shape by ``init_weights``: (r, out), (r, mini_r) for "mini", or
(out / r, r, r) for "bat". PEFT drops no input of "bat".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...errors import CheckpointError
from ...methods.miss import MiSS
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, common, strength, wide
from ..places import LINEAR, QUANTIZED, Place


class MiSSFormat(Format):
    """MiSS in its three forms."""

    peft_type = "MISS"
    methods = (MiSS,)
    suffixes = ("miss_block",)
    layers = frozenset({LINEAR, QUANTIZED})
    fields = frozenset("r mini_r miss_dropout".split())
    dropout = "miss_dropout"
    bias_only = "MiSS_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        start = settings.config.get("init_weights", True)
        if start is not None and not isinstance(start, bool) and start not in ("bat", "mini"):
            raise settings.fail(f"init_weights is {start!r:.60}, and PEFT has true, 'bat', 'mini'")
        mode: Literal["miss", "bat", "mini"] = start if isinstance(start, str) else "miss"
        r = settings.integer("r", 64)
        mini = settings.integer("mini_r", 1) if mode == "mini" else 1
        method = MiSS(r=r, mode=mode, mini_r=mini)
        method.check(place.site)
        d_out = place.site.out_features
        shape = {"miss": (r, d_out), "mini": (r, mini), "bat": (d_out // r, r, r)}[mode]
        return Read(method, {"D": tensors.take("miss_block", *shape)}, {})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {place: a.method for place, a in adapters.items()}
        mode = common([(p, m.mode) for p, m in methods.items()], "mode")
        mini = 1
        if mode == "mini":
            mini = common([(p, m.mini_r) for p, m in methods.items()], "mini_r")
        return {
            "r": common([(p, m.r) for p, m in methods.items()], "r"),
            "mini_r": mini,
            "init_weights": True if mode == "miss" else mode,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        c, d = strength(adapter), adapter.leaves["D"]
        return {"miss_block": d if c == 1 else c * wide(d)}

    def with_dropout(self, settings: Settings, place: Place, read: Read) -> Read:
        method: Any = read.method
        return read if method.mode == "bat" else super().with_dropout(settings, place, read)

    def written_dropout(self, adapters: Mapping[Place, Adapter]) -> dict[str, float]:
        for place, adapter in adapters.items():
            method: Any = adapter.method
            if method.mode == "bat" and method.dropout:
                raise CheckpointError(
                    f"{place.site.name}: PEFT's MISS drops no input of mode='bat'; dropout acts in "
                    "training alone, so dropout=0.0 is the same map"
                )
        return super().written_dropout(adapters)
