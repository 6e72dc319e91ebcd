"""Trainable counts on the shapes of Qwen3-0.6B: the published table, one row a method."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import fadapt
from fadapt import IA3, IA3FF, DoRA, LoRA, Method, RsLoRA
from fadapt.methods.delora import DeLoRA
from fadapt.methods.hra import HRA
from fadapt.methods.oft import OFT
from fadapt.methods.pissa import PiSSA
from fadapt.methods.road import RoAd

QV = "q_proj|v_proj"

ROWS: list[tuple[str, Method, int]] = [
    (QV, LoRA(r=32), 4_587_520),
    (QV, RsLoRA(r=32), 4_587_520),
    (QV, PiSSA(r=32), 4_587_520),
    (QV, PiSSA(r=32, niter=4), 4_587_520),
    (QV, fadapt.OLoRA(r=32), 4_587_520),
    (QV, fadapt.MiCA(r=32), 32 * 56 * 1024),
    (QV, fadapt.KaSA(r=32), 4_587_520 + 56 * 32),
    (QV, DoRA(r=32), 4_673_536),
    (QV, DeLoRA(r=32), 4_587_576),
    (QV, DeLoRA(r=32, form="peft"), 4_587_576),
    (QV, HRA(r=32), 1_835_008),
    (QV, fadapt.BOFT(block_size=4), 56 * 1024 * 3 // 2 + 28 * 3072),
    (QV, fadapt.BOFT(block_size=8, n_butterfly_factor=3), 3 * 56 * 1024 * 7 // 2 + 28 * 3072),
    (QV, fadapt.PSOFT(r=32), 56 * (32 * 31 // 2 + 64)),
    (QV, fadapt.PSOFT(r=32, orth=False), 56 * (32 * 32 + 64)),
    (QV, fadapt.SHiRA(r=32), 4_587_520),
    (QV, fadapt.RandLoRA(r=32), 56 * (32 * 32 + 32 * 1024)),
    (QV, fadapt.VeRA(r=256), 56 * 256 + 28 * 3072),
    (QV, fadapt.AdaLoRA(r=32), 4_587_520 + 56 * 32),
    ("k_proj|v_proj", IA3(), 57_344),
    ("down_proj", IA3FF(), 86_016),
    (QV, RoAd(variant=1), 86_016),
    (QV, RoAd(variant=2), 172_032),
    (QV, RoAd(variant=4), 344_064),
    (QV, OFT(block_size=32), 888_832),
    (QV, fadapt.Full(), 28 * 1024 * (2048 + 1024)),
    (QV, fadapt.ReFT(r=4), 28 * (2 * 4 * (2048 + 1024) + 2 * 4)),
    ("input_layernorm|q_norm", fadapt.LNTuning(), 28 * (1024 + 128)),
    (QV, OFT(block_size=32, exact=False), 888_832),
    # q is (2048, 1024) = (32 x 64, 32 x 32) and v is (1024, 1024) = (32 x 32, 32 x 32).
    (QV, fadapt.LoKr(r=8), 28 * (32 * 32 + 8 * (64 + 32) + 32 * 32 + 8 * (32 + 32))),
    (QV, fadapt.LoKr(r=8, decompose_both=True), 28 * 8 * (64 + 96 + 64 + 64)),
    (QV, fadapt.LoKr(r=16, decompose_factor=8), 28 * (2 * 64 + 16 * (256 + 128 + 128 + 128))),
    (QV, fadapt.LoHa(r=32), 9_175_040),
    (QV, fadapt.HiRA(r=32), 4_587_520),
    (QV, fadapt.GraLoRA(r=32), 4_587_520),
    (QV, fadapt.GraLoRA(r=32, gralora_k=4, hybrid_r=32), 9_175_040),
    (QV, fadapt.MiSS(r=64), 5_505_024),
    (QV, fadapt.MiSS(r=64, mode="bat"), 5_505_024),
    (QV, fadapt.MiSS(r=64, mode="mini", mini_r=32), 114_688),
    (QV, fadapt.C3A(block_size=256), 344_064),
    (QV, fadapt.FourierFT(), 56_000),
    (QV, fadapt.LoRAXS(r=32), 57_344),
    (QV, fadapt.TinyLoRA(), 3_584),
    (QV, fadapt.TinyLoRA(u=13, weight_tying=True), 13),
]


@pytest.fixture(scope="module")
def qwen() -> nn.Module:
    config = transformers.Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return transformers.Qwen3ForCausalLM(config)


@pytest.mark.parametrize(("pattern", "method", "count"), ROWS, ids=lambda value: str(value))
def test_trainable_count(qwen: nn.Module, pattern: str, method: Method, count: int) -> None:
    params = fadapt.init(qwen, {pattern: method})
    # Beside the sites, what they share is one entry.
    sites = [name for name in params if name.endswith(".weight")]
    assert len(sites) == 28 * len(pattern.split("|"))
    leaves = fadapt.trainable(params)
    assert all(leaf.is_meta for leaf in leaves)
    assert sum(leaf.numel() for leaf in leaves) == count


def test_tied_tokens_are_counted_once(qwen: nn.Module) -> None:
    params = fadapt.init(qwen, fadapt.TrainableTokens((5, 9, 11)))
    assert list(params.at_sites()) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert sum(leaf.numel() for leaf in fadapt.trainable(params)) == 3 * 1024
