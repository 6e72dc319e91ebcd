"""VERA: trained scales of random factors that all modules share.

Files. ``vera_lambda_b`` (out,) and ``vera_lambda_d`` (r,) of each module; ``base_model.vera_A``
(r, in) and ``base_model.vera_B`` (out, r) once, as large as the largest module needs, which uses
the first rows and columns; without save_projection they are drawn again from
projection_prng_key. Written for the modules that are there, with the factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import CheckpointError
from ...method import Leaves
from ...methods.vera import VeRA
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Shared, Taken, Tensors, common, strength, wide
from ..places import CONV1D, LINEAR, QUANTIZED, Place

INNER, OUTER, A, B = "vera_lambda_d", "vera_lambda_b", "vera_A", "vera_B"


class VeRAFormat(Format):
    """VeRA, with the factors or with their seed."""

    peft_type = "VERA"
    methods = (VeRA,)
    suffixes = (INNER, OUTER)
    shared = (A, B)
    layers = frozenset({LINEAR, CONV1D, QUANTIZED})
    fields = frozenset(
        "r projection_prng_key save_projection vera_dropout d_initial fan_in_fan_out "
        "init_weights".split()
    )
    dropout = "vera_dropout"
    bias_only = "vera_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        r = settings.integer("r", 256)
        inner, outer = tensors.take(INNER, r), tensors.take(OUTER, place.site.out_features)
        # 0 is no start of fadapt's, but trained values may be relative to any other.
        start = settings.number("d_initial", 0.1) or 0.1
        key = settings.integer("projection_prng_key", 0, 0)
        method = VeRA(r=r, projection_prng_key=key, d_initial=start)
        return Read(method, {"b": outer, "d": wide(inner) - start}, {})

    def read_shared(
        self, settings: Settings, reads: Mapping[Place, Read], tensors: Shared
    ) -> tuple[Mapping[Place, Read], Sequence[Read]]:
        method: Any = next(iter(reads.values())).method
        rows = max(place.site.out_features for place in reads)
        columns = max(place.site.in_features for place in reads)
        if settings.flag("save_projection", True):
            a, b = tensors.take(A, method.r, -1), tensors.take(B, -1, method.r)
            if a.shape[1] < columns or b.shape[0] < rows:
                raise settings.fail(
                    f"base_model.{A} {tuple(a.shape)} and {B} {tuple(b.shape)} are smaller than "
                    f"its modules need, ({rows}, {columns}): the file was made for another base"
                )
            return reads, [Read(method, {}, {"A": a, "B": b})]
        bank = method.bank(rows, columns)
        return reads, [Read(method, {}, bank)]

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {place: a.method for place, a in adapters.items()}
        return {
            "r": common([(p, m.r) for p, m in methods.items()], "r"),
            "projection_prng_key": common(
                [(p, m.projection_prng_key) for p, m in methods.items()], "projection_prng_key"
            ),
            "save_projection": True,
            "d_initial": next(iter(methods.values())).d_initial,
            "fan_in_fan_out": all(place.layer == CONV1D for place in adapters),
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        p, c, method = adapter.leaves, strength(adapter), adapter.method
        assert isinstance(method, VeRA)
        outer = p["b"] if c == 1 else c * wide(p["b"])
        return {INNER: method.d_initial + wide(p["d"]), OUTER: outer}

    def write_shared(
        self, adapters: Mapping[Place, Adapter], settings: Mapping[str, Any]
    ) -> Tensors:
        rows = max(place.site.out_features for place in adapters)
        columns = max(place.site.in_features for place in adapters)
        return {
            A: one_bank(adapters, "A")[:, :columns].to(torch.float32),
            B: one_bank(adapters, "B")[:rows].to(torch.float32),
        }


def one_bank(adapters: Mapping[Place, Adapter], name: str) -> torch.Tensor:
    """The largest shared leaf of this name, where all others are its first rows and columns.

    Raises:
        CheckpointError: others that are not.
    """
    leaves: list[tuple[Place, Leaves]] = [(place, a.leaves) for place, a in adapters.items()]
    first, whole = max(((p, x[name]) for p, x in leaves), key=lambda one: one[1].numel())
    for place, own in leaves:
        part = whole[tuple(slice(n) for n in own[name].shape)]
        if part is not own[name] and not torch.equal(part.to(own[name]), own[name]):
            raise CheckpointError(
                f"PEFT's format has one {name} for all modules, and {place.site.name} has another "
                f"than {first.site.name}: save them apart, or convert them: fadapt.as_lora"
            )
    return whole
