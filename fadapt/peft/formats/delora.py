"""DELORA: DeLoRA in PEFT's form, one update E(A, B, λ) with B = 0 at the start.

Files. ``delora_A`` (r, in), ``delora_B`` (out, r), ``delora_lambda`` (1,), ``delora_w_norm`` (in,).
The paper's form subtracts the update at the start, which is twice the rank at another strength: no
single E holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ...methods.delora import DeLoRA
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, majority, strength
from ..places import Place


class DeLoRAFormat(Format):
    """DeLoRA with B = 0 at the start."""

    peft_type = "DELORA"
    methods = (DeLoRA,)
    suffixes = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    fields = frozenset("r delora_lambda rank_pattern lambda_pattern module_dropout".split())
    patterns = ("rank_pattern", "lambda_pattern")
    dropout = "module_dropout"
    bias_only = "delora_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        r = settings.integer_at(place, "r", 8, "rank_pattern")
        # The config's λ is where training started; the file has its own, which replaces it.
        start = settings.number_at(place, "delora_lambda", 15, "lambda_pattern")
        d_out, d_in = place.site.matrix_shape
        strength = tensors.take("delora_lambda", 1).reshape(())
        train = {
            "A": tensors.take("delora_A", r, d_in),
            "B": tensors.take("delora_B", d_out, r),
            "dlambda": strength - start,
        }
        method = DeLoRA(r=r, lambda0=start, form="peft")
        return Read(method, train, {"w": tensors.take("delora_w_norm", d_in)})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        for place, adapter in adapters.items():
            if adapter.method.form != "peft":  # type: ignore[attr-defined]
                raise CheckpointError(
                    f'{place.site.name}: PEFT has DeLoRA(form="peft") alone; the paper\'s form '
                    "subtracts its start. Convert it: fadapt.as_lora(model, params)"
                )
        r, ranks = majority({p: a.leaves["A"].shape[-2] for p, a in adapters.items()})
        return {"r": r, "rank_pattern": ranks, "init_weights": True}

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        p, method = adapter.leaves, adapter.method
        assert isinstance(method, DeLoRA)
        return {
            "delora_A": p["A"],
            "delora_B": p["B"],
            "delora_lambda": strength(adapter) * (method.lambda0 + p["dlambda"]).reshape(1),
            "delora_w_norm": p["w"],
        }
