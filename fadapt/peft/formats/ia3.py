"""IA3: the vector l = 1 + d on the output, or on the input of ``feedforward_modules``.

Files. ``ia3_l`` (out, 1), or (1, in); of a convolution (1, out, 1, 1) or (1, channels, 1, 1), which
scales all of a channel's kernel alike. ``feedforward_modules`` are plain ends of names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import CheckpointError
from ...methods.ia3 import IA3, IA3FF
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, strength
from ..matching import is_targeted, one_of
from ..places import CONV1D, CONVOLUTION, LINEAR, QUANTIZED, Place


class IA3Format(Format):
    """IA3 and IA3-FF."""

    peft_type = "IA3"
    methods = (IA3, IA3FF)
    suffixes = ("ia3_l",)
    layers = frozenset({LINEAR, CONV1D, QUANTIZED, CONVOLUTION})
    fields = frozenset("feedforward_modules fan_in_fan_out init_ia3_weights".split())

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        forward = is_feedforward(settings.config.get("feedforward_modules"), place.module)
        site = place.site
        if place.layer == CONVOLUTION:
            channels, *kernel = site.kernel
            count = channels if forward else site.out_features
            scale = tensors.take("ia3_l", 1, count, *(1 for _ in kernel)).flatten()
            if forward:
                scale = scale.repeat_interleave(site.in_features // channels)
        else:
            shape = (1, site.in_features) if forward else (site.out_features, 1)
            scale = tensors.take("ia3_l", *shape).flatten()
        return Read(IA3FF() if forward else IA3(), {"d": scale - 1}, {})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        return {
            "feedforward_modules": self._ends(adapters)[1],
            "init_ia3_weights": True,
            "fan_in_fan_out": all(place.layer == CONV1D for place in adapters),
        }

    def targets(self, adapters: Mapping[Place, Adapter], modules: Sequence[str]) -> list[str] | str:
        ends = self._ends(adapters)[0]
        wanted = {place.module for place in adapters}
        # PEFT wants every one of feedforward_modules among target_modules, word for word.
        meant = {n for n in modules if is_targeted({"target_modules": ends}, n)}
        return ends if meant == wanted else one_of(wanted)

    def _ends(self, adapters: Mapping[Place, Adapter]) -> tuple[Any, Any]:
        """Ends of names, or expressions, for all modules and for the feed-forward ones."""
        wanted = {p.module for p in adapters}
        forward = {p.module for p, a in adapters.items() if isinstance(a.method, IA3FF)}
        for name in (lambda n: n.rpartition(".")[2], lambda n: n):
            ends = sorted({name(n) for n in forward})
            if {n for n in wanted if is_feedforward(ends, n)} == forward:
                return sorted({name(n) for n in wanted}), ends
        return one_of(wanted), one_of(forward)

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        site, forward = place.site, isinstance(adapter.method, IA3FF)
        scale = 1 + strength(adapter) * adapter.leaves["d"]
        if place.layer != CONVOLUTION:
            return {"ia3_l": scale.unsqueeze(0 if forward else 1)}
        channels, *kernel = site.kernel
        if forward:
            taps = scale.unflatten(0, (channels, -1))
            scale = taps[:, 0]
            if not bool((taps == scale.unsqueeze(1)).all()):
                raise CheckpointError(
                    f"{site.name}: PEFT's IA3 scales a channel of a convolution as a whole, and "
                    "this one scales the entries of the kernel apart"
                )
        return {"ia3_l": scale.reshape(1, -1, *(1 for _ in kernel))}


def is_feedforward(modules: Any, name: str) -> bool:
    """Whether ``feedforward_modules`` means a module."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name.endswith(end) for end in modules or ())
