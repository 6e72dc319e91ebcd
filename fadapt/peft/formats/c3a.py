"""C3A: circulant blocks.

Files. ``c3a_kernel`` (out / b, in / b, b). ``block_size_pattern`` is matched in its own way (see
:func:`~fadapt.peft.matching.value_after_dot`). Written with the start at zero, PEFT's ``true``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...methods.c3a import C3A
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, majority, strength, wide
from ..matching import patterns_after_dot, value_after_dot
from ..places import LINEAR, Place


class C3AFormat(Format):
    """C3A of linear layers."""

    peft_type = "C3A"
    methods = (C3A,)
    suffixes = ("c3a_kernel",)
    layers = frozenset({LINEAR})
    fields = frozenset("block_size block_size_pattern".split())
    patterns = ("block_size_pattern",)
    bias_only = "c3a_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        b = settings.integer_at(place, "block_size", 256, "block_size_pattern", value_after_dot)
        method = C3A(block_size=b)
        method.check(place.site)
        d_out, d_in = place.site.matrix_shape
        return Read(method, {"w": tensors.take("c3a_kernel", d_out // b, d_in // b, b)}, {})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        sizes = {place: a.leaves["w"].shape[-1] for place, a in adapters.items()}
        b, _ = majority(sizes)
        return {
            "block_size": b,
            "block_size_pattern": patterns_after_dot({p.name: n for p, n in sizes.items()}, b),
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        c, w = strength(adapter), adapter.leaves["w"]
        return {"c3a_kernel": w if c == 1 else c * wide(w)}
