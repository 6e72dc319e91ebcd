"""BOFT: butterfly factors of rotations, with output scales.

Files. ``boft_R`` (m, in / b, b, b), of which the skew part acts, and ``boft_s`` (out, 1). PEFT
falls back to m = 1 where its CUDA extension does not compile, so the tensors tell m and not the
config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...linalg import skew
from ...methods.boft import BOFT
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, common, refuse_strength, wide
from ..places import LINEAR, QUANTIZED, Place


class BOFTFormat(Format):
    """BOFT of linear layers."""

    peft_type = "BOFT"
    methods = (BOFT,)
    suffixes = ("boft_R", "boft_s")
    layers = frozenset({LINEAR, QUANTIZED})
    fields = frozenset(
        "boft_block_size boft_block_num boft_n_butterfly_factor boft_dropout fan_in_fan_out "
        "init_weights".split()
    )
    bias_only = "boft_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        size = tensors.take("boft_R", -1, -1, -1, -1).shape[-1]
        d_out, d_in = place.site.matrix_shape
        full = wide(tensors.take("boft_R", -1, d_in // size, size, size))
        i, j = torch.triu_indices(size, size, 1, device=full.device)
        q = (full[..., i, j] - full[..., j, i]) / 2
        scales = wide(tensors.take("boft_s", d_out, 1)).flatten()
        method = BOFT(block_size=size, n_butterfly_factor=len(full))
        return Read(method, {"q": q, "d": scales - 1}, {})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {p: a.method for p, a in adapters.items()}
        blocks = {p.site.in_features // m.block_size for p, m in methods.items()}
        # Either is common to a file: the size of the blocks, or how many there are.
        sizes = {m.block_size for m in methods.values()}
        by_size = len(sizes) == 1
        if not by_size and len(blocks) > 1:
            common([(p, m.block_size) for p, m in methods.items()], "block size")
        factors = common([(p, m.n_butterfly_factor) for p, m in methods.items()], "butterfly")
        return {
            "boft_block_size": sizes.pop() if by_size else 0,
            "boft_block_num": 0 if by_size else blocks.pop(),
            "boft_n_butterfly_factor": factors,
            "boft_dropout": 0.0,
            "fan_in_fan_out": False,
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        refuse_strength(place, adapter)
        method: Any = adapter.method
        return {
            "boft_R": skew(wide(adapter.leaves["q"]), method.block_size),
            "boft_s": 1 + wide(adapter.leaves["d"]).unsqueeze(1),
        }
