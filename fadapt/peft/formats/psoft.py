"""PSOFT: an orthogonal map with scales between singular vectors that no file holds.

Files. ``psoft_R.weight`` (r (r - 1) / 2,), or (r, r) with ``psoft_orth: false``; with psoft_mag_a
and psoft_mag_b ``psoft_R.vector_a`` and ``psoft_R.vector_b`` (r,). PEFT computes the singular
vectors from W again when it loads a file, and so does fadapt, in the same way. Their signs are
arbitrary; what is written is turned to those that PEFT will find, and refused where it would find
other vectors. psoft_alpha / r cancels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...methods.psoft import PSOFT
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, common, refuse_strength, wide
from ..places import LINEAR, Place

TERMS = 5
WEIGHT, SCALES = "psoft_R.weight", {"a": "psoft_R.vector_a", "b": "psoft_R.vector_b"}


class PSOFTFormat(Format):
    """PSOFT over an exact SVD."""

    peft_type = "PSOFT"
    methods = (PSOFT,)
    suffixes = (WEIGHT, *SCALES.values())
    layers = frozenset({LINEAR})
    fields = frozenset(
        "r psoft_alpha psoft_dropout fan_in_fan_out ab_svd_init psoft_svd psoft_svd_lowrank_niter "
        "random_seed psoft_orth psoft_mag_a psoft_mag_b use_cayley_neumann "
        "num_cayley_neumann_terms cayley_neumann_eps init_weights".split()
    )

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        r = settings.integer("r", 32)
        if settings.text("psoft_svd", "full") != "full":
            raise settings.fail(
                f"{place.key}: psoft_svd={settings.text('psoft_svd', '')[:40]!r} projects W at "
                "random, and the file does not hold what that gave"
            )
        start = settings.text("ab_svd_init", "psoft_init")
        if start not in ("psoft_init", "pissa_init"):
            raise settings.fail(f"ab_svd_init={start[:40]!r} is not psoft_init or pissa_init")
        orth, series = settings.flag("psoft_orth", True), settings.flag("use_cayley_neumann", False)
        if orth and series:
            if settings.integer("num_cayley_neumann_terms", TERMS) != TERMS:
                raise settings.fail(f"num_cayley_neumann_terms: fadapt's series has {TERMS}")
            if settings.config.get("cayley_neumann_eps") is not None:
                raise settings.fail("cayley_neumann_eps rescales Q, which fadapt does not")
        method = PSOFT(
            r=r,
            orth=orth,
            mag_a=settings.flag("psoft_mag_a", True),
            mag_b=settings.flag("psoft_mag_b", True),
            exact=not series,
            ab_svd_init="psoft_init" if start == "psoft_init" else "pissa_init",
        )
        if r > min(place.site.matrix_shape):
            raise settings.fail(f"{place.key}: r={r} is more than {place.site.matrix_shape} has")
        scales = {k: name for k, name in SCALES.items() if getattr(method, f"mag_{k}")}
        train = {k: wide(tensors.take(name, r)) - 1 for k, name in scales.items()}
        if not orth:
            free = wide(tensors.take(WEIGHT, r, r))
            train["dR"] = free - torch.eye(r, dtype=free.dtype, device=free.device)
        else:
            q = tensors.take(WEIGHT, r * (r - 1) // 2)
            if r > 1:
                train["q"] = q
        a, b = _factors(method, place)
        return Read(method, train, {"A": a, "B": b})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {p: a.method for p, a in adapters.items()}

        def one(field: str) -> Any:
            return common([(p, getattr(m, field)) for p, m in methods.items()], field)

        r = one("r")
        return {
            "r": r,
            "psoft_alpha": r,
            "psoft_dropout": 0.0,
            "fan_in_fan_out": False,
            "ab_svd_init": one("ab_svd_init"),
            "psoft_svd": "full",
            "psoft_orth": one("orth"),
            "psoft_mag_a": one("mag_a"),
            "psoft_mag_b": one("mag_b"),
            "use_cayley_neumann": not one("exact"),
            "num_cayley_neumann_terms": TERMS,
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        refuse_strength(place, adapter)
        method: Any = adapter.method
        p, r = adapter.leaves, method.r
        sign = _signs(method, place, p)
        if method.orth:
            i, j = torch.triu_indices(r, r, 1, device=sign.device)
            turn = wide(p["q"]) * (sign[i] * sign[j]) if "q" in p else sign.new_zeros(0)
        else:
            eye = torch.eye(r, dtype=sign.dtype, device=sign.device)
            turn = eye + wide(p["dR"]) * sign * sign.unsqueeze(1)
        scales = {name: 1 + wide(p[k]) for k, name in SCALES.items() if k in p}
        return {WEIGHT: turn, **scales}


def _factors(method: PSOFT, place: Place) -> tuple[Tensor, Tensor]:
    """A and B as PEFT makes them, with the signs that the SVD happens to give."""
    u, s, vh = torch.linalg.svd(place.weight.map.weight().to(torch.float32), full_matrices=False)
    left, right = method.singular_shares(s[: method.r])
    return right.unsqueeze(1) * vh[: method.r], u[:, : method.r] * left


def _signs(method: PSOFT, place: Place, p: Mapping[str, Tensor]) -> Tensor:
    """The signs (r,) of PEFT's singular vectors to those of an adapter."""
    a, b = _factors(method, place)
    own_a, own_b = wide(p["A"]).to(a), wide(p["B"]).to(b)
    sign = torch.where((a * own_a).sum(1) < 0, -1, 1).to(a)
    loose = max(1e-4, 8 * torch.finfo(p["A"].dtype).eps)
    pairs = ((a * sign.unsqueeze(1), own_a), (b * sign, own_b))
    if any(bool((x - y).abs().max() > loose * x.abs().max()) for x, y in pairs):
        raise CheckpointError(
            f"{place.site.name}: PEFT computes PSOFT's singular vectors from the weight again, and "
            "would find others than the adapter was trained with (singular values that nearly "
            "coincide, or another base). Save fadapt.as_lora(model, params), which is exact"
        )
    return sign
