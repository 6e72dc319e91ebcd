"""HIRA: the weight times a low-rank matrix, entry by entry.

Files. ``hira_A`` (r, in) and ``hira_B`` (out, r); of an embedding ``hira_embedding_A`` and
``hira_embedding_B``; of a convolution (r, channels, kernel) and (out, r, 1, ...). PEFT itself does
not apply ``rank_pattern`` to new modules, so either rank is read; one rank is written, filled up
with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from ...methods.hira import HiRA
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, strength, wide
from ..places import CONV1D, CONVOLUTION, EMBEDDING, LINEAR, QUANTIZED, Place


class HiRAFormat(Format):
    """HiRA of linear layers, convolutions and embeddings."""

    peft_type = "HIRA"
    methods = (HiRA,)
    suffixes = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
    layers = frozenset({LINEAR, CONV1D, QUANTIZED, CONVOLUTION, EMBEDDING})
    fields = frozenset("r rank_pattern hira_dropout fan_in_fan_out".split())
    patterns = ("rank_pattern",)
    dropout = "hira_dropout"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        d_out, d_in = place.site.matrix_shape
        columns, ones = (d_in,), ()
        if place.layer == CONVOLUTION:
            columns, ones = place.site.kernel, (1,) * (len(place.site.kernel) - 1)
        a, b = _names(place)
        r = settings.integer_at(place, "r", 32, "rank_pattern")
        if tensors.take(a, -1, *columns).shape[0] != r:
            r = settings.integer("r", 32)
        factors = {"A": tensors.take(a, r, *columns), "B": tensors.take(b, d_out, r, *ones)}
        return Read(HiRA(r=r), {k: t.flatten(1) for k, t in factors.items()}, {})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        return {
            "r": max(adapter.leaves["A"].shape[-2] for adapter in adapters.values()),
            "fan_in_fan_out": all(place.layer == CONV1D for place in adapters),
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        c, a, b = strength(adapter), adapter.leaves["A"], adapter.leaves["B"]
        b = b if c == 1 else c * wide(b)
        missing = settings["r"] - b.shape[-1]
        a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        if place.layer == CONVOLUTION:
            ones = (1,) * (len(place.site.kernel) - 1)
            a, b = a.unflatten(1, place.site.kernel), b.reshape(*b.shape, *ones)
        return dict(zip(_names(place), (a, b), strict=True))


def _names(place: Place) -> tuple[str, str]:
    middle = "embedding_" if place.layer == EMBEDDING else ""
    return f"hira_{middle}A", f"hira_{middle}B"
