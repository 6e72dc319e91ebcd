"""Small models with seeded random weights, and batches for them; no network."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, LAYERS, VOCAB = 32, 2, 64


def seeded(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """The model in eval mode with every parameter redrawn: norms near 1, biases not zero."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng).to(parameter.dtype) * std
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + noise if is_norm else noise)
    return model.eval()


def qwen3(seed: int = 0, tied: bool = False, head_dim: int = 8, **config: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_dropout=0.0,
        **config,
    )
    return seeded(Qwen3ForCausalLM(config), seed)


def qwen3_tied(seed: int = 0) -> nn.Module:
    return qwen3(seed, tied=True)


def llama(seed: int = 0, **config: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        **config,
    )
    return seeded(LlamaForCausalLM(config), seed)


def bert(seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=3,
    )
    return seeded(BertForSequenceClassification(config), seed)


def gpt2(seed: int = 0) -> nn.Module:
    """Conv1D weights are stored (in, out); lm_head is tied to wte."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_inner=48,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return seeded(GPT2LMHeadModel(config), seed)


def vit(seed: int = 0) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    return seeded(ViTForImageClassification(config), seed)


def mlp(seed: int = 0, widths: tuple[int, ...] = (8, 32, 8), bias: bool = True) -> nn.Module:
    """nn.Sequential of Linear and Tanh."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias), nn.Tanh()]
    return seeded(nn.Sequential(*layers[:-1]), seed)


def encoder_layer(seed: int = 0) -> nn.Module:
    return seeded(nn.TransformerEncoderLayer(HIDDEN, 4, 48, dropout=0.0, batch_first=True), seed)


class Tokens(nn.Module):
    """Something for each kind of weight that a method may be meant for."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(self.embed(ids))))).mean(1)


class TiedLinear(nn.Module):
    """Two linear layers over one weight, each with its own bias."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class SharedModule(nn.Module):
    """One linear layer under two names."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Bare(nn.Module):
    """A bare 2-D parameter, used as the given product."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], d_in: int = 8, d_out: int = 8):
        super().__init__()
        self.use = use
        self.W = nn.Parameter(torch.zeros(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.W)


BARE_USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x @ W": lambda x, w: x @ w,
    "F.linear": lambda x, w: F.linear(x, w),
    "x @ W.T": lambda x, w: x @ w.T,
    "einsum": lambda x, w: torch.einsum("...i,oi->...o", x, w),
}


def tokens(batch: int = 2, length: int = 5, seed: int = 7) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def reals(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def batch_for(name: str, seed: int = 7) -> dict[str, Tensor]:
    """Keyword arguments, labels included, for the model ``HF[name]``."""
    if name == "vit":
        return {"pixel_values": reals(2, 1, 8, 8, seed=seed), "labels": torch.tensor([0, 2])}
    ids = tokens(seed=seed)
    return {"input_ids": ids, "labels": torch.tensor([0, 2]) if name == "bert" else ids}


HF: dict[str, Callable[..., nn.Module]] = {
    "qwen3": qwen3,
    "qwen3_tied": qwen3_tied,
    "llama": llama,
    "bert": bert,
    "gpt2": gpt2,
    "vit": vit,
}


def perturb(params: Any, seed: int = 1, std: float = 0.2) -> Any:
    """Params as training leaves them: every trainable entry moved at random, in place."""
    from fadapt import trainable

    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in trainable(params):
            leaf.add_(torch.randn(leaf.shape, generator=rng).to(leaf.dtype) * std)
    return params


def trained(model: nn.Module, cfg: Any, calib: Any = None, seed: int = 1, std: float = 0.2) -> Any:
    """Fresh params with every trainable entry moved at random."""
    from fadapt import init

    return perturb(init(model, cfg, calib), seed, std)
