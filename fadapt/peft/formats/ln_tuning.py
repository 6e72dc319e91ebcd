"""LN_TUNING: copies of whole norms.

Files. ``ln_tuning_layers.weight`` and ``ln_tuning_layers.bias`` of each norm, in place of its own.
Where fadapt adapts one of the two, the other is written as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...methods.ln_tuning import LNTuning
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Shared, Taken, Tensors, strength, wide
from ..places import VECTOR, Place, Places

COPY = "ln_tuning_layers"


class LNTuningFormat(Format):
    """Trained norms."""

    peft_type = "LN_TUNING"
    methods = (LNTuning,)
    suffixes = (f"{COPY}.weight", f"{COPY}.bias")
    layers = frozenset({VECTOR})

    def place(
        self, places: Places, path: str, suffix: str, config: Mapping[str, Any]
    ) -> Place | None:
        weight = places.by_name.get(f"{path}.{_own(suffix)}")
        if weight is None or places.layer(path, weight) != VECTOR:
            return None
        return Place(path, weight, places.site(weight), path, VECTOR)

    def modules(self, places: Places) -> Iterable[str]:
        return {n.rpartition(".")[0] for n, w in places.by_name.items() if w.parameter.dim() < 2}

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        copy = tensors.take(_suffix(place), place.site.out_features)
        own = wide(place.weight.dense())
        return Read(LNTuning(), {"d": copy.to(own) - own}, {})

    def read_shared(
        self, settings: Settings, reads: Mapping[Place, Read], tensors: Shared
    ) -> tuple[Mapping[Place, Read], Sequence[Read]]:
        names = {place.site.name for place in reads}
        for place in reads:
            for key, _ in place.weight.module.named_parameters():
                if f"{place.module}.{key}" not in names:
                    raise settings.fail(f"it lacks {place.key}.{COPY}.{key}, of the same norm")
        return reads, ()

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        for place in adapters:
            for key, _ in place.weight.module.named_parameters():
                if f"{COPY}.{key}" not in self.suffixes:
                    raise CheckpointError(
                        f"{place.site.name}: its layer holds {key!r}, and PEFT's LN_TUNING copies "
                        "norms with a weight and a bias"
                    )
        return {}

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        own = place.weight.dense()
        exact = torch.promote_types(own.dtype, torch.float32)
        return {_suffix(place): own.to(exact) + strength(adapter) * adapter.leaves["d"].to(exact)}

    def write_shared(
        self, adapters: Mapping[Place, Adapter], settings: Mapping[str, Any]
    ) -> Tensors:
        names = {place.site.name for place in adapters}
        left: dict[str, Tensor] = {}
        for place in adapters:
            for key, own in place.weight.module.named_parameters():
                if f"{place.module}.{key}" not in names:
                    left[f"model.{place.key}.{COPY}.{key}"] = own
        return left


def _suffix(place: Place) -> str:
    return f"{COPY}.{place.weight.key}"


def _own(suffix: str) -> str:
    return suffix.rpartition(".")[2]
