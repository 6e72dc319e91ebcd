"""FOURIERFT: a few coefficients of the Fourier transform of the increment.

Files. ``fourierft_spectrum`` (n,). Its places are no part of a file: PEFT draws them again from
``random_loc_seed``, for all modules the same. ``n_frequency_pattern`` is matched in a way of its
own, :func:`~fadapt.peft.matching.value_after_dot`. There is one scaling; where they differ, the
difference is in the spectrum.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...methods.fourierft import FourierFT
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, common, majority, strength, wide
from ..matching import patterns_after_dot, value_after_dot
from ..places import CONV1D, LINEAR, Place


class FourierFTFormat(Format):
    """FourierFT of linear layers."""

    peft_type = "FOURIERFT"
    methods = (FourierFT,)
    suffixes = ("fourierft_spectrum",)
    layers = frozenset({LINEAR, CONV1D})
    fields = frozenset(
        "n_frequency n_frequency_pattern scaling random_loc_seed fan_in_fan_out".split()
    )
    patterns = ("n_frequency_pattern",)
    bias_only = "fourier_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        name = "n_frequency_pattern"
        n = settings.integer_at(place, "n_frequency", 1000, name, value_after_dot)
        seed = settings.integer("random_loc_seed", 777, 0)
        scaling = settings.number("scaling", 150)
        method = FourierFT(n_frequency=n, scaling=scaling, random_loc_seed=seed)
        method.check(place.site)
        spectrum = tensors.take("fourierft_spectrum", n)
        return Read(method, {"spectrum": spectrum}, {"indices": _indices(place, n, seed)})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {place: a.method for place, a in adapters.items()}
        counts = {place: m.n_frequency for place, m in methods.items()}
        seeds = [(place, m.random_loc_seed) for place, m in methods.items()]
        n, _ = majority(counts)
        return {
            "n_frequency": n,
            "n_frequency_pattern": patterns_after_dot({p.name: k for p, k in counts.items()}, n),
            "random_loc_seed": common(seeds, "random_loc_seed"),
            "scaling": max((m.scaling for m in methods.values()), key=abs),
            "fan_in_fan_out": all(place.layer == CONV1D for place in adapters),
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        method: Any = adapter.method
        p = adapter.leaves
        drawn = _indices(place, method.n_frequency, method.random_loc_seed)
        if not torch.equal(drawn.to(p["indices"]), p["indices"]):
            raise CheckpointError(
                f"{place.site.name}: its coefficients are at other places than those that PEFT "
                f"draws from random_loc_seed={method.random_loc_seed}; save "
                "fadapt.as_lora(model, params, r=...)"
            )
        c, most = strength(adapter), settings["scaling"]
        c = c if method.scaling == most else c * method.scaling / most
        return {"fourierft_spectrum": p["spectrum"] if c == 1 else c * wide(p["spectrum"])}


def _indices(place: Place, n: int, seed: int) -> Tensor:
    """The places (2, n) of the coefficients, rows first."""
    drawn = _drawn(*place.site.matrix_shape, n, seed)
    return drawn.to(place.weight.device)


@lru_cache(maxsize=8)
def _drawn(d_out: int, d_in: int, n: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    # A copy, so that the whole permutation is not kept.
    chosen = torch.randperm(d_out * d_in, generator=rng, device="cpu")[:n].clone()
    return torch.stack([chosen // d_in, chosen % d_in])
