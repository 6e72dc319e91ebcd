"""TINYLORA: a few numbers between frozen singular directions, for a module or for all of them.

Files. ``base_model.tinylora_v.<k>`` (u,), k counting the modules in the model's order, or 0 for all
of them; of each module ``tinylora_A`` (r, in), ``tinylora_B`` (out, r) and, with save_projection,
``tinylora_P`` (u, r, r), else drawn again from projection_seed + k. r is cut to what a weight has.
Of an embedding the matrix is (ids, width), the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...methods.tiny_lora import TinyLoRA
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Shared, Taken, Tensors, common, strength, wide
from ..places import CONV1D, EMBEDDING, LINEAR, Place

V, A, B, P = "tinylora_v", "tinylora_A", "tinylora_B", "tinylora_P"


class TinyLoRAFormat(Format):
    """TinyLoRA with numbers for each module, or for all of them."""

    peft_type = "TINYLORA"
    methods = (TinyLoRA,)
    suffixes = (A, B, P)
    shared = (V,)
    layers = frozenset({LINEAR, CONV1D, EMBEDDING})
    fields = frozenset(
        "r u weight_tying projection_seed save_projection init_v_bound tinylora_dropout "
        "fan_in_fan_out".split()
    )
    dropout = "tinylora_dropout"
    bias_only = "tinylora_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        r, u = settings.integer("r", 2), settings.integer("u", 64)
        d_out, d_in = place.site.matrix_shape
        r = min(r, d_out, d_in)
        turned = place.layer == EMBEDDING
        rows, columns = (d_in, d_out) if turned else (d_out, d_in)
        a, b = tensors.take(A, r, columns), tensors.take(B, rows, r)
        fixed = {"A": b.mT, "B": a.mT} if turned else {"A": a, "B": b}
        if P in tensors:
            cores = tensors.take(P, u, r, r)
            fixed["P"] = cores.mT if turned else cores
        elif settings.flag("save_projection", True):
            tensors.take(P, u, r, r)
        return Read(TinyLoRA(r=r, u=u), {}, fixed)

    def read_shared(
        self, settings: Settings, reads: Mapping[Place, Read], tensors: Shared
    ) -> tuple[Mapping[Place, Read], Sequence[Read]]:
        u, count = settings.integer("u", 64), len(reads)
        groups = self._groups(settings, count)
        if extra := sorted(set(tensors) - {f"{V}.{k}" for k in groups}):
            raise settings.fail(f"base_model.{extra[0]} belongs to none of its {count} modules")
        tied = len(set(groups)) < count
        if tied and len(set(groups)) > 1:
            raise settings.fail(
                f"weight_tying={settings.config.get('weight_tying')} shares numbers among some of "
                "its modules, and fadapt's TinyLoRA shares them among all or none: "
                "weight_tying=0 or 1"
            )
        found = {}
        for index, (place, read) in enumerate(reads.items()):
            fixed = dict(read.fixed)
            if "P" not in fixed:
                cores = self._draw(settings, read.method, index).to(place.weight.device)
                fixed["P"] = cores.mT if place.layer == EMBEDDING else cores
            own = {} if tied else {"v": tensors.take(f"{V}.{groups[index]}", u)}
            method = replace(read.method, weight_tying=tied)
            found[place] = Read(method, own, fixed)
        if not tied:
            return found, ()
        if len(methods := {read.method for read in found.values()}) > 1:
            raise settings.fail(
                f"its modules share numbers under {sorted(map(repr, methods))}, and fadapt's share "
                "them under one method: a module is too small for r, or has no dropout"
            )
        return found, [Read(next(iter(methods)), {"v": tensors.take(f"{V}.0", u)}, {})]

    def _groups(self, settings: Settings, count: int) -> list[int]:
        """Which numbers each of the modules uses."""
        tying = settings.number("weight_tying", 0.0)
        if not 0 <= tying <= 1:
            raise settings.fail(f"weight_tying is {tying}, not between 0 and 1")
        groups = max(1, round(count * (1 - tying)))
        return [min(i // max(1, count // groups), groups - 1) for i in range(count)]

    def _draw(self, settings: Settings, method: Any, index: int) -> Tensor:
        seed = settings.integer("projection_seed", 42, 0) + index
        shape = (method.u, method.r, method.r)
        rng = torch.Generator().manual_seed(seed)
        return torch.normal(0.0, method.r**-0.5, shape, generator=rng)

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {place: a.method for place, a in adapters.items()}
        r = max(m.r for m in methods.values())
        for place, method in methods.items():
            if method.r != min(r, *place.site.matrix_shape):
                raise CheckpointError(
                    f"{place.site.name}: PEFT's TINYLORA has one r for all modules, and this one "
                    f"has r={method.r} where another has {r}: save them apart, or convert them: "
                    "fadapt.as_lora"
                )
        tied = common([(p, m.weight_tying) for p, m in methods.items()], "weight_tying")
        if tied:
            common(list(methods.items()), "method, where weight_tying=True,")
        return {
            "r": r,
            "u": common([(p, m.u) for p, m in methods.items()], "u"),
            "weight_tying": 1.0 if tied else 0.0,
            "save_projection": True,
            "fan_in_fan_out": all(place.layer == CONV1D for place in adapters),
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        p, c = adapter.leaves, strength(adapter)
        a, b, cores = p["A"], p["B"], p["P"]
        b = b if c == 1 else c * wide(b)
        if place.layer == EMBEDDING:
            a, b, cores = b.mT, a.mT, cores.mT
        return {A: a, B: b, P: cores}

    def write_shared(
        self, adapters: Mapping[Place, Adapter], settings: Mapping[str, Any]
    ) -> Tensors:
        values = [adapter.leaves["v"] for adapter in adapters.values()]
        return {
            f"{V}.{k}": v for k, v in enumerate(values[:1] if settings["weight_tying"] else values)
        }
