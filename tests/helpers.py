"""Hugging Face models by name, padded batches and trained-like params, for tests of the runner."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import fadapt

VOCAB = 61
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
)


def _qwen3(**kwargs):
    config = Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8, **kwargs)
    return Qwen3ForCausalLM(config)


def _vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    )


MODELS = {
    "qwen3": _qwen3,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "vit": _vit,
}
METHODS = (
    fadapt.LoRA(r=3),
    fadapt.RsLoRA(r=3),
    fadapt.IA3(),
    fadapt.IA3FF(),
    fadapt.DoRA(r=2),
    fadapt.Chain((fadapt.DoRA(r=2), fadapt.IA3())),
)


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def make_batch(name: str, rows: int = 3, padded: bool = True) -> dict:
    torch.manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8), "labels": torch.arange(rows) % 3}
    ids = torch.randint(0, VOCAB, (rows, 7))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    labels = torch.arange(rows) % 3 if name == "bert" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lm_loss(output, batch):
    """Cross-entropy in the logits' own dtype; Hugging Face's casts them to float32."""
    logits = output.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())


def trained(model: nn.Module, cfg, seed: int = 0, std: float = 0.1) -> fadapt.Params:
    """As models.trained, but with moves drawn in the leaves' own dtype."""
    params = fadapt.init(model, cfg)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf += std * torch.randn(leaf.shape, generator=rng, dtype=leaf.dtype)
    return params
