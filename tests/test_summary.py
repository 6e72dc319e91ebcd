"""summary beyond one adapter of plain layers: stacks, new biases, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fadapt
from tests.models import mlp, qwen3


def test_a_stack_has_a_table_for_each_adapter_and_like_ones_share_it() -> None:
    model = qwen3()
    members = [fadapt.init(model, {"q_proj": fadapt.LoRA(r=r)}) for r in (2, 2, 4)]
    members.append(fadapt.init(model, {"v_proj": fadapt.DoRA(r=2)}))
    text = fadapt.summary(fadapt.stack(members))
    headings = ["adapters 0, 1", "adapter 2", "adapter 3"]
    tables = [fadapt.summary(members[i]) for i in (0, 2, 3)]
    assert text == "\n\n".join(f"{h}\n{t}" for h, t in zip(headings, tables, strict=True))
    assert fadapt.summary(fadapt.stack(members[:2] * 2)).startswith("adapters 0 to 3\n")


def test_what_is_no_params_is_refused_in_words() -> None:
    model = mlp()
    stack = fadapt.stack([fadapt.init(model, fadapt.LoRA(r=2))] * 2)
    with pytest.raises(fadapt.ConfigError, match="resident stack"):
        fadapt.summary(fadapt.select(stack, [0, 1, 0]))
    for wrong in (None, model, {}):
        with pytest.raises(fadapt.ConfigError, match=r"write fadapt\.summary\(params\)"):
            fadapt.summary(wrong)  # type: ignore[arg-type]


class _Two(nn.Module):
    def __init__(self, out: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, out, bias=False), nn.Linear(8, out, bias=True)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x) + self.layers[1](x)


NEW = {
    "BitFit": (fadapt.BitFit(), True),
    "ReFT": (fadapt.ReFT(r=2), True),
    "Chain": (fadapt.Chain((fadapt.LoRA(r=2), fadapt.BitFit())), True),
    "IA3": (fadapt.IA3(), False),
    "RoAd": (fadapt.RoAd(group_size=2), False),
    "LoRA": (fadapt.LoRA(r=2), False),
}


@pytest.mark.parametrize("name", NEW)
def test_biases_that_a_method_adds_are_named_and_merge_has_them(name: str) -> None:
    method, adds = NEW[name]
    model = _Two()
    params = fadapt.init(model, {"layers": method})
    with torch.no_grad():
        for t in fadapt.trainable(params):
            t.normal_()
    line = f"+ layers.0.weight: {method!r} gives the layer, which has none, a bias"
    text = fadapt.summary(params)
    assert (line in text) == adds
    assert "+ layers.1" not in text  # it has one
    if adds:
        with pytest.warns(fadapt.FadaptWarning, match=r"layers\.0\.bias is new"):
            merged = fadapt.merge(model, params)
    else:
        merged = fadapt.merge(model, params)
    assert ("layers.0.bias" in merged) == adds


def test_the_layers_of_a_model_share_the_note() -> None:
    model = qwen3()
    params = fadapt.init(model, {"o_proj": fadapt.BitFit()})
    assert "+ model.layers.{0..1}.self_attn.o_proj.weight: BitFit()" in fadapt.summary(params)
