"""OFT: block-diagonal rotations of the input, both of PEFT's signs.

Files. ``oft_R.weight`` (in / b, b (b - 1) / 2), or one row for all blocks (``block_share``).
``use_cayley_neumann`` is the series, whose sign is opposite to that of the solve. PEFT's own
convolutions rotate windows that overlap and add them up, which no weight does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from ...methods.oft import OFT
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, common, refuse_strength
from ..places import LINEAR, QUANTIZED, Place

TERMS = 5
SINCE = "0.18.0"
"""The version of PEFT whose series this is."""


class OFTFormat(Format):
    """OFT by the series and by the solve."""

    peft_type = "OFT"
    methods = (OFT,)
    suffixes = ("oft_R.weight",)
    layers = frozenset({LINEAR, QUANTIZED})
    fields = frozenset(
        "r oft_block_size use_cayley_neumann num_cayley_neumann_terms coft eps block_share "
        "module_dropout fan_in_fan_out".split()
    )
    bias_only = "oft_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        series = settings.flag("use_cayley_neumann", True)
        if series and not _is_current(settings.text("peft_version", "")):
            raise settings.fail(
                "OFT's series changed with PEFT 0.18, which writes peft_version, and the file "
                f"has {settings.text('peft_version', '')[:40]!r}: it means other rotations"
            )
        terms = settings.integer("num_cayley_neumann_terms", TERMS)
        if series and terms != TERMS:
            raise settings.fail(f"num_cayley_neumann_terms is {terms}; fadapt's series has {TERMS}")
        q = tensors.take("oft_R.weight", -1, -1)
        # The shape tells the block size: PEFT itself adjusts one that does not divide the inputs.
        size = (1 + math.isqrt(1 + 8 * q.shape[1])) // 2
        blocks = place.site.in_features // size
        if settings.flag("block_share", False):
            q = tensors.take("oft_R.weight", 1, size * (size - 1) // 2).expand(blocks, -1)
        else:
            q = tensors.take("oft_R.weight", blocks, size * (size - 1) // 2)
        coft = settings.number("eps", 6e-5) if settings.flag("coft", False) else None
        method = OFT(block_size=size, exact=not series, coft=coft)
        # PEFT projects at each forward what fadapt projects after each step.
        shared = len(q) ** 0.5 if settings.flag("block_share", False) else 1.0
        if coft is not None and shared != 1:
            method = OFT(block_size=size, exact=not series, coft=coft * shared)
        return Read(method, dict(method.project({"q": q.contiguous()})), {})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {p: a.method for p, a in adapters.items()}
        blocks = {p.site.in_features // m.block_size for p, m in methods.items()}
        # Either is common to a file: the size of the blocks, or how many there are.
        by_count = len(blocks) == 1
        size = 0 if by_count else common([(p, m.block_size) for p, m in methods.items()], "size")
        return {
            "peft_version": SINCE,
            "r": blocks.pop() if by_count else 0,
            "oft_block_size": size,
            "use_cayley_neumann": not common([(p, m.exact) for p, m in methods.items()], "sign"),
            "num_cayley_neumann_terms": TERMS,
            # fadapt projects after a step and writes what it runs; PEFT would project that again.
            "coft": False,
            "block_share": False,
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        refuse_strength(place, adapter)
        q = adapter.leaves["q"]
        return {"oft_R.weight": q.to(torch.promote_types(q.dtype, torch.float32))}


def _is_current(version: str) -> bool:
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version)
    return match is not None and (int(match[1]), int(match[2])) >= (0, 18)
