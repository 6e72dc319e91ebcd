"""ADALORA: a LoRA with trained singular values, at the ranks that a budget has left.

Files. ``lora_A`` (k, in), ``lora_B`` (out, k), ``lora_E`` (k, 1). The scale is that of the start,
lora_alpha / (init_r + 1e-5), also where ``rank_pattern``, {module.lora_E: which of the init_r
triplets are kept}, says that fewer are left. Written with one rank for all modules, filled up with
triplets that are zero, and the scales in E, so that no pattern is needed. The schedule is not a
part of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...methods.adalora import OFFSET, AdaLoRA
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, majority, strength, wide
from ..places import CONV1D, LINEAR, QUANTIZED, Place


class AdaLoRAFormat(Format):
    """AdaLoRA, before and after its triplets were cut."""

    peft_type = "ADALORA"
    methods = (AdaLoRA,)
    suffixes = ("lora_A", "lora_B", "lora_E")
    layers = frozenset({LINEAR, CONV1D, QUANTIZED})
    fields = frozenset(
        "r init_r target_r lora_alpha lora_dropout fan_in_fan_out init_lora_weights rank_pattern "
        "tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step use_rslora lora_bias "
        "megatron_config megatron_core runtime_config qalora_group_size loftq_config eva_config "
        "corda_config lora_ga_config velora_config ensure_weight_tying".split()
    )
    refused: ClassVar[Mapping[str, str]] = {
        "use_dora": "AdaLoRA has no magnitudes",
        "alpha_pattern": "AdaLoRA has one alpha",
        "layer_replication": "it repeats layers of the model",
        "target_parameters": "AdaLoRA adapts modules alone",
        "trainable_token_indices": "it replaces rows of the embedding",
    }
    dropout = "lora_dropout"
    bias_only = "lora_only"

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        start = settings.integer("init_r", 12)
        alpha = settings.number("lora_alpha", 8)
        if alpha <= 0:
            raise settings.fail(f"lora_alpha is {alpha}, not positive")
        r = self._rank(settings, place, start)
        d_out, d_in = place.site.matrix_shape
        a, b = tensors.take("lora_A", r, d_in), tensors.take("lora_B", d_out, r)
        e = tensors.take("lora_E", r, 1).flatten()
        if r != start:
            alpha = alpha / (start + OFFSET) * (max(r, 1) + OFFSET)
        if not r:  # nothing is left: one triplet that is zero
            a, b, e = (F.pad(t, pad) for t, pad in ((a, (0, 0, 0, 1)), (b, (0, 1)), (e, (0, 1))))
        return Read(AdaLoRA(r=max(r, 1), alpha=alpha), {"A": a, "B": b, "E": e}, {})

    def _rank(self, settings: Settings, place: Place, start: int) -> int:
        kept = settings.patterns("rank_pattern").get(f"{place.key}.lora_E")
        if kept is None:
            return start
        is_mask = isinstance(kept, list) and all(isinstance(k, bool) for k in kept)
        if not is_mask or len(kept) != start:
            raise settings.fail(
                f"rank_pattern of {place.key} is not {start} times true or false: {str(kept)[:80]}"
            )
        return sum(kept)

    def finish(self, settings: Settings) -> None:
        """The patterns are exact names, which :meth:`read` has looked up."""

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        r = max(len(adapter.leaves["E"]) for adapter in adapters.values())
        alpha, _ = majority({p: _scale(a) * (r + OFFSET) for p, a in adapters.items()})
        return {
            "init_r": r,
            "target_r": r,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "init_lora_weights": True,
            "fan_in_fan_out": all(place.layer == CONV1D for place in adapters),
            # PEFT refuses a config without a schedule.
            "total_step": 1,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        p, r = adapter.leaves, settings["init_r"]
        common = settings["lora_alpha"] / (r + OFFSET)
        factor = strength(adapter) * _scale(adapter) / common
        e = p["E"] if abs(factor - 1) < 1e-12 else factor * wide(p["E"])
        missing = r - len(e)
        e = F.pad(e, (0, missing)).unsqueeze(1)
        return {
            "lora_A": F.pad(p["A"], (0, 0, 0, missing)),
            "lora_B": F.pad(p["B"], (0, missing)),
            "lora_E": e.to(torch.promote_types(e.dtype, torch.float32)),
        }


def _scale(adapter: Adapter) -> float:
    method: Any = adapter.method
    return float(method.s(adapter.leaves))
