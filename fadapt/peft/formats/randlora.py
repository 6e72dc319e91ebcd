"""RANDLORA: trained scales of the terms of a full-rank increment, whose factors modules share.

Files. ``randlora_lambda`` (r, N) and ``randlora_gamma`` (N, m) of each module, and with
save_projection ``randlora_A`` (r, 1, m) and ``randlora_B`` (n, N, r) for the largest module, as
``base_model.randlora_A`` and again under each module's name; else they are drawn again from
projection_prng_key. PEFT draws factors that are not sparse in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...methods.randlora import RandLoRA
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Shared, Taken, Tensors, build, common, strength, wide
from ..places import CONV1D, LINEAR, PREFIX, QUANTIZED, ROOT, Place
from .vera import one_bank

OUTER, INNER, A, B = "randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"
FIELDS = ("r", "alpha", "projection_prng_key", "sparse", "very_sparse")


class RandLoRAFormat(Format):
    """RandLoRA, with the factors or with their seed."""

    peft_type = "RANDLORA"
    methods = (RandLoRA,)
    suffixes = (OUTER, INNER, A, B)
    shared = (A, B)
    layers = frozenset({LINEAR, CONV1D, QUANTIZED})
    fields = frozenset(
        "r projection_prng_key save_projection sparse very_sparse randlora_dropout fan_in_fan_out "
        "randlora_alpha init_weights".split()
    )
    dropout = "randlora_dropout"
    bias_only = "randlora_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        method = RandLoRA(
            r=settings.integer("r", 32),
            alpha=settings.number("randlora_alpha", 640),
            projection_prng_key=settings.integer("projection_prng_key", 0, 0),
            sparse=settings.flag("sparse", False),
            very_sparse=settings.flag("very_sparse", False),
        )
        terms, m = method.terms(place.site), min(place.site.matrix_shape)
        inner = wide(tensors.take(INNER, terms, m)) - method.gamma(place.site)
        copies = {
            name: tensors.take(name, *shape)
            for name, shape in ((A, (method.r, 1, -1)), (B, (-1, -1, method.r)))
            if name in tensors
        }
        return Read(method, {"lambda": tensors.take(OUTER, method.r, terms), "g": inner}, copies)

    def read_shared(
        self, settings: Settings, reads: Mapping[Place, Read], tensors: Shared
    ) -> tuple[Mapping[Place, Read], Sequence[Read]]:
        method: Any = next(iter(reads.values())).method
        own = {
            place: replace(read, fixed={k: t for k, t in read.fixed.items() if k not in (A, B)})
            for place, read in reads.items()
        }
        if not settings.flag("save_projection", True):
            rows, columns = _largest(reads)
            bank = build(lambda: method.bank(rows, columns), settings.where)
            return own, [Read(method, {}, bank)]
        a, b = tensors.take(A, method.r, 1, -1), tensors.take(B, -1, -1, method.r)
        width = max(min(place.site.matrix_shape) for place in reads)
        height = max(max(place.site.matrix_shape) for place in reads)
        terms = max(method.terms(place.site) for place in reads)
        if a.shape[2] < width or b.shape[0] < height or b.shape[1] < terms:
            raise settings.fail(
                f"base_model.{A} {tuple(a.shape)} and {B} {tuple(b.shape)} are smaller than its "
                f"modules need, (r, 1, {width}) and ({height}, {terms}, r): the file was made for "
                "another base"
            )
        for place, read in reads.items():
            for name, whole in ((A, a), (B, b)):
                if name in read.fixed and not torch.equal(read.fixed[name], whole):
                    raise settings.fail(f"{place.key}.{name} differs from base_model.{name}")
        return own, [Read(method, {}, {"A": a.squeeze(1), "B": b})]

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {place: a.method for place, a in adapters.items()}
        found = {f: common([(p, getattr(m, f)) for p, m in methods.items()], f) for f in FIELDS}
        alpha = found.pop("alpha")
        return {
            **found,
            "randlora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "save_projection": True,
            "fan_in_fan_out": all(place.layer == CONV1D for place in adapters),
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        p, c, method = adapter.leaves, strength(adapter), adapter.method
        assert isinstance(method, RandLoRA)
        outer = p["lambda"] if c == 1 else c * wide(p["lambda"])
        inner = wide(p["g"]) + method.gamma(place.site)
        return {OUTER: outer, INNER: inner}

    def write_shared(
        self, adapters: Mapping[Place, Adapter], settings: Mapping[str, Any]
    ) -> Tensors:
        rows, columns = _largest(adapters)
        m, r = min(rows, columns), settings["r"]
        a = one_bank(adapters, "A")[:, :m].unsqueeze(1)
        b = one_bank(adapters, "B")[: max(rows, columns), : -(-m // r)]
        a, b = (t.to(torch.float32) for t in (a, b))
        # PEFT looks for them under each module's name, too.
        modules = [f"{PREFIX}{place.key}.".removeprefix(ROOT) for place in adapters]
        return {f"{of}{name}": t for of in ("", *modules) for name, t in ((A, a), (B, b))}


def _largest(places: Mapping[Place, Any]) -> tuple[int, int]:
    """The most outputs and the most inputs."""
    shapes = [place.site.matrix_shape for place in places]
    return max(d_out for d_out, _ in shapes), max(d_in for _, d_in in shapes)
