"""The form for servers: one LoRA that PEFT runs as the adapter, and what each server takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import CheckpointError, ConfigError, LoRA
from fadapt.peft import peft_dict, save_peft, served_by
from tests.models import (
    gpt2,
    perturb,
    qwen3,
    seeded,
    tokens,
    trained,
)
from tests.peft_table import against_peft, logits, moe

SERVERS = {"vLLM", "SGLang", "LoRAX"}
LORA_LIKE = {
    "LoRA": LoRA(r=3, alpha=5),
    "RsLoRA": fadapt.RsLoRA(r=3),
    "PiSSA": fadapt.PiSSA(r=5),
    "HRA": fadapt.HRA(r=4),
    "DeLoRA": fadapt.DeLoRA(r=2, lambda0=0.5),
    "AntiPaSTO": fadapt.AntiPaSTO(r=9),
    "SSVD": fadapt.SSVD(k=4),
    "Chain": fadapt.Chain((LoRA(r=2), fadapt.HRA(r=2))),
}


@pytest.mark.parametrize("name", LORA_LIKE)
def test_peft_runs_what_all_servers_take(name, tmp_path):
    model, ids = qwen3(), tokens()
    # One layer, and neither all of q, k, v nor of gate and up.
    params = trained(model, {"layers.1.*(q_proj|o_proj|up_proj)": LORA_LIKE[name]})
    config, tensors = peft_dict(model, params, serving=True)
    assert config["r"] == config["lora_alpha"] in (8, 16)
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    )
    assert len(tensors) == 2 * 2 * 6
    verdicts = served_by(config, tensors, layers=2)
    assert set(verdicts) == SERVERS
    assert all(verdicts.values()), verdicts
    save_peft(model, params, tmp_path / "served", serving=True)
    expected = logits(fadapt.apply(model, params, ids))
    assert (expected - logits(model(ids))).abs().max() > 1e-2
    assert against_peft(model, tmp_path / "served", ids, expected) <= 1e-5
    # And fadapt reads it as what it is.
    again = fadapt.peft.load_peft(tmp_path / "served", model)
    assert (logits(fadapt.apply(model, again, ids)) - expected).abs().max() <= 1e-5


def test_the_tensors_are_the_adapters(tmp_path):
    model = qwen3()
    params = trained(model, {"0.*q_proj": LoRA(r=3, alpha=12)})
    config, tensors = peft_dict(model, params, serving=True)
    leaves = params["model.layers.0.self_attn.q_proj.weight"].train
    key = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
    assert torch.equal(tensors[key.format("q_proj", "A")][:3], leaves["A"])
    assert torch.equal(tensors[key.format("q_proj", "B")][:, :3], 4 * leaves["B"])
    assert not tensors[key.format("q_proj", "A")][3:].any()
    assert not tensors[key.format("k_proj", "A")].any()
    assert not any(t.requires_grad for t in tensors.values())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["init_lora_weights"] is True
    assert not config["use_rslora"]


def test_rank_is_rounded_up_to_one_that_vllm_has():
    model = seeded(nn.Sequential(nn.Linear(40, 70)))
    for r, expected in ((1, 1), (2, 8), (8, 8), (17, 32), (40, 64)):
        config, _ = peft_dict(model, trained(model, LoRA(r=r)), serving=True)
        assert config["r"] == expected


def test_a_rank_above_all_is_cut_where_that_is_exact():
    model = seeded(nn.Sequential(nn.Linear(600, 601)))
    params = fadapt.init(model, LoRA(r=520))
    with torch.no_grad():
        params["0.weight"].train["B"][:, :500].normal_()
    config, tensors = peft_dict(model, params, serving=True)
    assert config["r"] == 512
    a, b = (tensors[f"base_model.model.0.lora_{x}.weight"].double() for x in "AB")
    p = params["0.weight"].train
    change = (16.0 / 520) * p["B"].detach().double() @ p["A"].detach().double()
    assert (b @ a - change).norm() <= 1e-5 * change.norm()
    with pytest.raises(CheckpointError, match=r"rank 520.*at most 512.*0\.weight"):
        peft_dict(model, perturb(params), serving=True)


def test_what_no_lora_holds_is_refused():
    model = qwen3()
    with pytest.raises(ConfigError, match="no smaller LoRA equals it"):
        peft_dict(model, trained(model, {"q_proj": fadapt.DoRA(r=2)}), serving=True)
    biased = seeded(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ConfigError, match="moves the bias"):
        peft_dict(biased, trained(biased, fadapt.IA3()), serving=True)
    cut = fadapt.as_lora(model, trained(model, {"q_proj": fadapt.DoRA(r=2)}), r=4)
    assert all(served_by(*peft_dict(model, cut, serving=True)).values())


@pytest.mark.parametrize(
    ("make", "pattern"),
    [(moe, "experts.down_proj"), (gpt2, "c_attn"), (qwen3, "embed_tokens")],
    ids=["experts", "Conv1D", "embedding"],
)
def test_weights_that_not_all_servers_know_are_refused(make, pattern):
    model = make()
    params = trained(model, fadapt.Config({pattern: LoRA(r=2)}, exclude=()))
    with pytest.raises(CheckpointError, match=f"{pattern}.*not all servers"):
        peft_dict(model, params, serving=True)


def drop(*names: str) -> Any:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if any(n in k for n in names)]:
            del tensors[key]

    return change


def put(**fields: Any) -> Any:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config.update(fields)

    return change


def rename(old: str, new: str) -> Any:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in [k for k in tensors if old in k]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def grow(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """One layer of a higher rank, with the pattern that says so."""
    config["rank_pattern"] = {"0.self_attn.q_proj": 11}
    for key, tensor in tensors.items():
        if "0.self_attn.q_proj" in key:
            a = "lora_A" in key
            shape = (11, tensor.shape[1]) if a else (tensor.shape[0], 11)
            tensors[key] = tensor.new_zeros(shape)


def mix(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    grow(config, tensors)
    config["rank_pattern"] = {}


# Each change, who refuses the result, and a word of the reason.
RULES: dict[str, tuple[Any, set[str], str]] = {
    "nothing": (put(), set(), ""),
    "another method": (put(peft_type="IA3"), SERVERS, "peft_type"),
    "no alpha": (put(lora_alpha=None), SERVERS, "lora_alpha"),
    "no targets": (put(target_modules=[]), SERVERS, "target_modules"),
    "DoRA": (put(use_dora=True), SERVERS, "DoRA"),
    "rank beside its config": (mix, SERVERS, "rank 11"),
    "unknown key": (rename("lora_B.weight", "lora_E"), SERVERS, "lora_E"),
    "rank_pattern": (grow, {"SGLang", "LoRAX"}, "rank_pattern"),
    "alpha_pattern": (put(alpha_pattern={"q_proj": 3}), {"SGLang", "LoRAX"}, "alpha_pattern"),
    "rslora": (put(use_rslora=True), {"SGLang"}, "use_rslora"),
    "pissa": (put(init_lora_weights="pissa"), SERVERS, "pissa"),
    "eva": (put(init_lora_weights="eva"), set(), ""),
    "lora_bias": (put(lora_bias=True), SERVERS, "lora_bias"),
    "bias": (put(bias="all"), SERVERS, "bias"),
    "aLoRA": (put(alora_invocation_tokens=[1]), {"vLLM"}, "alora"),
    "saved head": (put(modules_to_save=["lm_head"]), {"vLLM"}, "modules_to_save"),
    "saved score": (put(modules_to_save=["score"]), set(), ""),
    "target regex": (put(target_modules=".*q_proj"), {"SGLang", "LoRAX"}, "expression"),
    "whole names": (put(target_modules=["a.q_proj"]), {"SGLang"}, "ends of names"),
    "no v": (drop("v_proj"), {"SGLang"}, "v_proj"),
    "no q": (drop("q_proj"), {"SGLang"}, "q_proj"),
    "no gate": (drop("gate_proj"), {"SGLang"}, "gate_proj"),
    "no up": (drop("up_proj"), set(), ""),
    "no o in one layer": (drop("1.self_attn.o_proj"), {"LoRAX"}, "layer 1"),
    "embedding": (
        rename("layers.0.self_attn.o_proj.lora_A.weight", "embed_tokens.lora_embedding_A"),
        {"LoRAX"},
        "embed",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_served_by(name):
    model = qwen3()
    targets = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj"
    config, tensors = peft_dict(model, fadapt.init(model, {targets: LoRA(r=8)}), serving=True)
    change, refuse, word = RULES[name]
    change(config, tensors)
    verdicts = served_by(config, tensors)
    assert {server for server, verdict in verdicts.items() if not verdict} == refuse, verdicts
    for server in refuse:
        assert any(word in reason for reason in verdicts[server].reasons), verdicts[server]
        assert str(verdicts[server]).startswith("no: ")


def test_served_by_says_what_the_server_needs():
    model = qwen3()
    config, tensors = peft_dict(model, fadapt.init(model, {"q_proj": LoRA(r=30)}), serving=True)
    verdicts = served_by(config, tensors)
    assert verdicts["vLLM"].needs == ("--max-lora-rank 32",)
    assert str(verdicts["vLLM"]) == "yes, with --max-lora-rank 32"
    fewer = served_by(config, tensors, layers=5)
    assert not fewer["LoRAX"]
    assert fewer["vLLM"]
