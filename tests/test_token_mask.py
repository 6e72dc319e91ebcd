"""Calibration counts the tokens that a layer's own mask keeps, told by the layer's name.

Reference: the rows that forward pre-hooks of torch collect. Source and target have one length, so
their shapes tell nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt.statistics.reduction import Statistic
from fadapt.statistics.sums import SumSq
from tests.models import seeded

VOCAB = 64
BLOCKS: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return seeded(
        T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                decoder_start_token_id=0,
            )
        )
    )  # fmt: skip


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return seeded(BartForConditionalGeneration(BartConfig(**BLOCKS)))


def bert2bert() -> nn.Module:
    from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

    small: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "intermediate_size": 48,
    }  # fmt: skip
    decoder = BertConfig(**small, is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(
        encoder=BertModel(BertConfig(**small)), decoder=BertLMHeadModel(decoder)
    )
    return seeded(model)


# {site: whose tokens its rows are}
ROWS: dict[Any, dict[str, str]] = {
    t5: {
        "encoder.block.0.layer.0.SelfAttention.q": "source",
        "encoder.block.0.layer.1.DenseReluDense.wo": "source",
        "decoder.block.0.layer.0.SelfAttention.k": "target",
        "decoder.block.0.layer.1.EncDecAttention.k": "source",
        "decoder.block.0.layer.1.EncDecAttention.v": "source",
        "decoder.block.0.layer.1.EncDecAttention.q": "target",
        "decoder.block.0.layer.2.DenseReluDense.wi": "target",
    },
    bart: {
        "model.encoder.layers.0.fc1": "source",
        "model.decoder.layers.0.self_attn.v_proj": "target",
        "model.decoder.layers.0.encoder_attn.v_proj": "source",
        "model.decoder.layers.0.encoder_attn.q_proj": "target",
        "model.decoder.layers.0.encoder_attn.out_proj": "target",
        "model.decoder.layers.0.fc2": "target",
    },
    bert2bert: {
        "encoder.encoder.layer.0.attention.self.query": "source",
        "decoder.bert.encoder.layer.0.attention.self.key": "target",
        "decoder.bert.encoder.layer.0.crossattention.self.key": "source",
        "decoder.bert.encoder.layer.0.crossattention.self.query": "target",
        "decoder.bert.encoder.layer.0.output.dense": "target",
    },
}


def ids(seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (4, 8), generator=rng)


def padded(*lengths: int) -> Tensor:
    return (torch.arange(8) < torch.tensor(lengths)[:, None]).long()


def batches() -> dict[str, tuple[dict[str, Tensor], bool, dict[str, Tensor]]]:
    """{name: (batch, label_mask, which tokens of each side count)}."""
    source, target, every = padded(5, 3, 8, 8), padded(8, 4, 8, 2), padded(8, 8, 8, 8)
    read = {"input_ids": ids(0), "attention_mask": source}
    labels = torch.where(padded(8, 8, 6, 1).bool(), ids(2), -100)
    answer = (labels != -100).long()
    decoder = {"decoder_input_ids": ids(1)}
    both = {**decoder, "decoder_attention_mask": target}
    return {
        "source": ({**read, **decoder}, False, {"source": source, "target": every}),
        "both": ({**read, **both}, False, {"source": source, "target": target}),
        "labels": (
            {**read, **decoder, "labels": labels},
            True,
            {"source": source, "target": answer},
        ),
        "labels and both": (
            {**read, **both, "labels": labels},
            True,
            {"source": source, "target": answer * target},
        ),
    }


@pytest.mark.parametrize("case", batches())
@pytest.mark.parametrize("make", ROWS, ids=lambda make: make.__name__)
def test_each_side_of_an_encoder_decoder_has_its_own_mask(make: Any, case: str) -> None:
    model, sites = make(), ROWS[make]
    batch, label_mask, counted = batches()[case]
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(site).register_forward_pre_hook(
            lambda _, args, site=site: seen.__setitem__(site, args[0])
        )
        for site in sites
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    rules = {"|".join(f"^{site}\\.weight$" for site in sites): fadapt.LoRA(r=1)}
    stats = fadapt.observe(
        model, rules, [batch], statistics=[Statistic(SumSq())], label_mask=label_mask
    )
    for site, side in sites.items():
        keep = counted[side].bool()
        rows = seen[site][keep].double()
        name = f"{site}.weight"
        assert stats.tokens(name) == int(keep.sum()), site
        got = stats.get(name, Statistic(SumSq())) * len(rows)
        torch.testing.assert_close(got.double(), rows.square().sum(0), rtol=1e-4, atol=1e-6)


def test_a_vision_tower_has_no_text_mask() -> None:
    from transformers import CLIPConfig, CLIPModel

    part = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {**part, "vocab_size": VOCAB, "num_hidden_layers": 1, "max_position_embeddings": 16}
    vision = {**part, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    model = seeded(CLIPModel(CLIPConfig(text_config=text, vision_config=vision)))
    mask = padded(5, 3, 5, 5)[:, :5]  # as many tokens as a picture has patches and its class token
    batch = {"input_ids": ids(0)[:, :5], "attention_mask": mask,
             "pixel_values": torch.randn(4, 3, 16, 16)}  # fmt: skip
    stats = fadapt.observe(
        model, {"fc1": fadapt.LoRA(r=1)}, [batch], statistics=[Statistic(SumSq())]
    )
    assert stats.tokens("text_model.encoder.layers.0.mlp.fc1.weight") == int(mask.sum())
    assert stats.tokens("vision_model.encoder.layers.0.mlp.fc1.weight") == 4 * 5
