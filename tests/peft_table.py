"""Round trips with PEFT, both ways: the rows that the tests run, and the guide's table of them.

``python -m tests.peft_table`` writes ``examples/guide/peft_roundtrip.md`` anew.
"""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import Tensor, nn

import fadapt
from fadapt import LoRA
from fadapt.peft.formats import FORMATS
from fadapt.peft.places import TIED
from tests.models import gpt2, perturb, qwen3, reals, seeded, tokens

PAGE = Path(__file__).resolve().parent.parent / "examples" / "guide" / "peft_roundtrip.md"
LARGEST = 1e-5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks of two linear layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Sounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(6, 8, 3, padding=1)
        self.second = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Normed(nn.Module):
    """Layers with norms that have biases, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(12, 16), nn.LayerNorm(16)
        self.last = nn.LayerNorm(16)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.up(x)))
        return self.head(self.last(x + 1))


def moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        experts_implementation="eager",
    )
    return seeded(Qwen3MoeForCausalLM(config))


def tied() -> nn.Module:
    """A Qwen3 whose head is its embedding."""
    from transformers import Qwen3ForCausalLM

    config = qwen3().config
    config.tie_word_embeddings = True
    return seeded(Qwen3ForCausalLM(config))


BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: seeded(Net()), lambda: reals(5, 12)),
    "Conv2d": (lambda: seeded(Pictures()), lambda: reals(2, 3, 9, 9)),
    "Conv1d": (lambda: seeded(Sounds()), lambda: reals(2, 6, 9)),
    "norms": (lambda: seeded(Normed()), lambda: reals(5, 12)),
    "Conv1D": (gpt2, tokens),
    "Qwen3": (qwen3, tokens),
    "tied Qwen3": (tied, tokens),
    "experts": (moe, tokens),
}


def logits(output: Any) -> Tensor:
    return (output if isinstance(output, Tensor) else output.logits).detach()


@dataclass(frozen=True)
class In:
    """A PEFT adapter that fadapt reads.

    Attributes:
        config: of PEFT.
        before: saves the untrained adapter, for ``initial=``.
        convert: lets PEFT convert the file to a LoRA of twice the rank.
        start: what PEFT does to the model before or after it is wrapped.
        after: what PEFT does to the trained model.
    """

    config: Callable[[], peft.PeftConfig]
    base: str = "linear"
    before: bool = False
    convert: bool = False
    start: Callable[..., Any] | None = None
    after: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Out:
    """Params that PEFT reads. ``calib`` is for methods that start from data."""

    cfg: Any
    base: str = "linear"
    calib: bool = False
    strength: float | None = None


BOTH = ["up", "down"]


def lora(**options: Any) -> Callable[[], peft.PeftConfig]:
    options = {"r": 3, "lora_alpha": 5, "target_modules": BOTH, **options}
    return lambda: peft.LoraConfig(**options)


def other(kind: type, **options: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: kind(**{"target_modules": BOTH, **options})


def eva(model: Any) -> None:
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    data = [{"x": reals(40, 12, seed=s)} for s in range(2)]
    initialize_lora_eva_weights(
        model,
        data,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda rows, inputs, name: rows[0],
        show_progress_bar=False,
    )


def corda(model: nn.Module, config: Any) -> None:
    """Leaves on the layers what PEFT's preprocess_corda does, which needs a further package."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            rows = reals(64, weight.shape[1], seed=len(name))
            moment = rows.T @ rows / len(rows)
            u, s, vh = torch.linalg.svd(weight @ moment)
            v = torch.linalg.inv(moment).mT @ vh[: config.r].mT
            layer.eigens = SimpleNamespace(U_WC=u[:, : config.r], S_WC=s[: config.r], V_WC=v)


class BlockDiagonal:
    """What PEFT's CUDA extension for BOFT computes; without it PEFT falls back to one factor."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad: Tensor, blocks: Tensor) -> list[Tensor]:
        n, size = blocks.shape[1:3]
        parts = grad.unflatten(-1, (n, size)).unflatten(-3, (n, size))
        return [parts.diagonal(dim1=-4, dim2=-2).movedim(-1, 1).contiguous()]


vars(peft.tuners.boft.layer)["_FBD_CUDA"] = BlockDiagonal


def ranks_cut(model: Any) -> None:
    """As AdaLoRA's budget leaves a model: some triplets are masked, and the file has the rest."""
    config = model.peft_config["default"]
    config.rank_pattern = {
        name: [True, i % 2 == 0, i % 3 == 0]
        for i, (name, _) in enumerate(model.base_model.model.named_parameters())
        if name.endswith("lora_E.default")
    }
    model.base_model.rankallocator.mask_using_rank_pattern(
        model.base_model.model, config.rank_pattern
    )


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IN: dict[str, In] = {
    "LoRA": In(lora()),
    "rsLoRA": In(lora(use_rslora=True)),
    "LoRA, rank_pattern, alpha_pattern": In(
        lora(
            rank_pattern={r"layers\.0\.up": 2, "down": 4},
            alpha_pattern={"^layers.1.down": 7, "0.down": 2.5},
        )
    ),
    "rsLoRA, patterns": In(
        lora(use_rslora=True, rank_pattern={"up": 2}, alpha_pattern={"1.up": 3})
    ),
    "LoRA, layers_to_transform": In(lora(layers_to_transform=[1], layers_pattern="layers")),
    "LoRA, target regex": In(lora(target_modules=r".*\.1\.(up|down)")),
    "LoRA, all-linear": In(lora(target_modules="all-linear")),
    "LoRA, exclude_modules": In(lora(exclude_modules=["0.up"])),
    "LoRA, lora_bias": In(lora(lora_bias=True)),
    "LoRA, bias=lora_only": In(lora(bias="lora_only", target_modules=["up"])),
    "LoRA, bias=all": In(lora(bias="all")),
    "LoRA, bias=all, biases elsewhere": In(lora(bias="all", target_modules=["up"])),
    "OFT, bias=oft_only": In(other(peft.OFTConfig, r=0, oft_block_size=4, bias="oft_only")),
    "LoRA, gaussian": In(lora(init_lora_weights="gaussian")),
    "EVA": In(lora(init_lora_weights="eva", eva_config=peft.EvaConfig()), start=eva),
    "PiSSA": In(lora(init_lora_weights="pissa")),
    "PiSSA, rslora": In(lora(init_lora_weights="pissa", use_rslora=True)),
    "PiSSA, converted": In(lora(init_lora_weights="pissa"), convert=True),
    "PiSSA of niter, with its start": In(lora(init_lora_weights="pissa_niter_4"), before=True),
    "OLoRA": In(lora(init_lora_weights="olora")),
    "OLoRA, converted": In(lora(init_lora_weights="olora"), convert=True),
    "MiCA": In(lora(init_lora_weights="mica")),
    "MiCA, Conv1D": In(lora(target_modules=["c_attn"], init_lora_weights="mica"), "Conv1D"),
    "KaSA": In(lora(kasa_config=peft.tuners.lora.config.KasaConfig())),
    "CorDA, with its start": In(
        lora(init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig()),
        before=True,
        start=corda,
    ),
    "DoRA": In(lora(use_dora=True)),
    "DoRA, rslora, patterns": In(
        lora(use_dora=True, use_rslora=True, rank_pattern={"up": 2}, alpha_pattern={"down": 2})
    ),
    "DeLoRA": In(other(peft.DeloraConfig, r=3, rank_pattern={"0.up": 2}, lambda_pattern={"up": 4})),
    "IA3": In(other(peft.IA3Config, feedforward_modules=[])),
    "IA3, feed-forward": In(other(peft.IA3Config, feedforward_modules=["down"])),
    "IA3, feed-forward regex": In(other(peft.IA3Config, feedforward_modules=r".*\.0\.up")),
    "HRA": In(other(peft.HRAConfig, r=4)),
    "HRA, odd r": In(other(peft.HRAConfig, r=3)),
    "HRA, apply_GS": In(other(peft.HRAConfig, r=4, apply_GS=True)),
    "RoAd 1": In(other(peft.RoadConfig, variant="road_1", group_size=4)),
    "RoAd 2": In(other(peft.RoadConfig, variant="road_2", group_size=4)),
    "RoAd 4": In(other(peft.RoadConfig, variant="road_4", group_size=4)),
    "OFT, series": In(other(peft.OFTConfig, r=0, oft_block_size=4)),
    "OFT, exact": In(other(peft.OFTConfig, r=0, oft_block_size=4, use_cayley_neumann=False)),
    "OFT, r blocks": In(other(peft.OFTConfig, r=2, oft_block_size=0)),
    "OFT, block_share": In(other(peft.OFTConfig, r=0, oft_block_size=4, block_share=True)),
    "OFT, coft": In(other(peft.OFTConfig, r=0, oft_block_size=4, coft=True, eps=0.3)),
    "BOFT": In(other(peft.BOFTConfig, boft_block_size=4)),
    "BOFT, butterfly": In(other(peft.BOFTConfig, boft_block_size=2, boft_n_butterfly_factor=2)),
    "BOFT, number of blocks, bias=boft_only": In(
        other(peft.BOFTConfig, boft_block_size=0, boft_block_num=4, bias="boft_only")
    ),
    "PSOFT": In(other(peft.PsoftConfig, r=4, psoft_alpha=7)),
    "PSOFT, series, pissa_init": In(
        other(peft.PsoftConfig, r=4, ab_svd_init="pissa_init", use_cayley_neumann=True)
    ),
    "PSOFT, free, no magnitudes": In(
        other(peft.PsoftConfig, r=3, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False)
    ),
    "AdaLoRA": In(other(peft.AdaLoraConfig, init_r=3, lora_alpha=5, total_step=9)),
    "AdaLoRA, ranks cut": In(
        other(peft.AdaLoraConfig, init_r=3, lora_alpha=5, total_step=9), after=ranks_cut
    ),
    "AdaLoRA, Conv1D": In(
        lambda: peft.AdaLoraConfig(target_modules=["c_attn"], init_r=3, total_step=9), "Conv1D"
    ),
    "LoHa": In(other(peft.LoHaConfig, r=3, alpha=5)),
    "LoHa, rank_pattern, alpha_pattern": In(
        other(peft.LoHaConfig, r=3, rank_pattern={"0.up": 2}, alpha_pattern={"down": 2.5})
    ),
    "LoHa, Conv2d": In(other(peft.LoHaConfig, r=3, target_modules=["first", "second"]), "Conv2d"),
    "LoHa, Conv1d": In(other(peft.LoHaConfig, r=3, target_modules=["first", "second"]), "Conv1d"),
    "LoKr": In(other(peft.LoKrConfig, r=1, alpha=5)),
    "LoKr, whole factor": In(other(peft.LoKrConfig, r=3, alpha=5, init_weights="lycoris")),
    "LoKr, decompose_both, decompose_factor": In(
        other(peft.LoKrConfig, r=1, decompose_both=True, decompose_factor=4)
    ),
    "LoKr, rank_pattern, alpha_pattern": In(
        other(peft.LoKrConfig, r=1, rank_pattern={"0.up": 2}, alpha_pattern={"down": 2.5})
    ),
    "LoKr, Conv2d": In(other(peft.LoKrConfig, r=1, target_modules=["first"]), "Conv2d"),
    "LoKr, Conv2d, whole factor": In(
        other(peft.LoKrConfig, r=4, target_modules=["first", "second"]), "Conv2d"
    ),
    "LoKr, Conv1d": In(other(peft.LoKrConfig, r=1, target_modules=["first"]), "Conv1d"),
    "HiRA": In(other(peft.HiraConfig, r=3)),
    "HiRA, rank_pattern": In(other(peft.HiraConfig, r=3, rank_pattern={"0.up": 2})),
    "HiRA, Conv1D": In(other(peft.HiraConfig, r=3, target_modules=["c_attn"]), "Conv1D"),
    "HiRA, Conv2d": In(other(peft.HiraConfig, r=3, target_modules=["first", "second"]), "Conv2d"),
    "HiRA, embedding": In(
        other(peft.HiraConfig, r=3, target_modules=["embed_tokens", "q_proj"]), "Qwen3"
    ),
    "GraLoRA": In(other(peft.GraloraConfig, r=4, alpha=6)),
    "GraLoRA, hybrid_r, 4 blocks": In(
        other(peft.GraloraConfig, r=4, alpha=6, gralora_k=4, hybrid_r=2)
    ),
    "GraLoRA, Conv1D": In(other(peft.GraloraConfig, r=4, target_modules=["c_attn"]), "Conv1D"),
    "MiSS": In(other(peft.MissConfig, r=5, bias="MiSS_only")),
    "MiSS, bat": In(other(peft.MissConfig, r=4, init_weights="bat")),
    "MiSS, mini": In(other(peft.MissConfig, r=4, init_weights="mini", mini_r=2)),
    "C3A": In(other(peft.C3AConfig, block_size=4, bias="c3a_only")),
    "C3A, block_size_pattern": In(
        other(peft.C3AConfig, block_size=4, block_size_pattern={"0.up": 2, "layers.1.down": 1})
    ),
    "FourierFT": In(other(peft.FourierFTConfig, n_frequency=20)),
    "FourierFT, n_frequency_pattern": In(
        other(
            peft.FourierFTConfig,
            n_frequency=20,
            n_frequency_pattern={"down": 12, "layers.1.up": 9},
            scaling=50.0,
            random_loc_seed=5,
            bias="fourier_only",
        )
    ),
    "FourierFT, Conv1D": In(
        other(peft.FourierFTConfig, n_frequency=20, target_modules=["c_attn"]), "Conv1D"
    ),
    "LNTuning": In(other(peft.LNTuningConfig, target_modules=["norm", "last"]), "norms"),
    "LNTuning, RMS norms": In(
        other(peft.LNTuningConfig, target_modules=["input_layernorm", "q_norm"]), "Qwen3"
    ),
    "LNTuning, modules_to_save": In(
        other(peft.LNTuningConfig, target_modules=["norm"], modules_to_save=["up"]), "norms"
    ),
    "LoRA, modules_to_save": In(
        lora(target_modules=["up"], modules_to_save=["head", "norm"]), "norms"
    ),
    "LoRA, modules_to_save, bias=all": In(
        lora(target_modules=["up", "0.down"], modules_to_save=["1.down"], bias="all")
    ),
    "LoRA, head saved": In(lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), "Qwen3"),
    "LoRA, embedding saved": In(
        lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]), "Qwen3"
    ),
    "LoHa, modules_to_save, Conv2d": In(
        other(peft.LoHaConfig, target_modules=["first"], modules_to_save=["second"]), "Conv2d"
    ),
    "LoRA, modules_to_save, Conv1D": In(
        lora(target_modules=["c_attn"], modules_to_save=["c_fc"]), "Conv1D"
    ),
    "TrainableTokens": In(lambda: peft.TrainableTokensConfig(token_indices=[47, 5, 19]), "Qwen3"),
    "TrainableTokens, embedding and head": In(
        other(
            peft.TrainableTokensConfig,
            token_indices=[47, 5],
            target_modules=["embed_tokens", "lm_head"],
        ),
        "Qwen3",
    ),
    "TrainableTokens, tied": In(
        lambda: peft.TrainableTokensConfig(token_indices=[47, 5, 19]), "tied Qwen3"
    ),
    "LoRA, trainable_token_indices": In(
        lora(target_modules=["q_proj"], trainable_token_indices=[47, 5, 19]), "Qwen3"
    ),
    "LoRA, trainable_token_indices, tied": In(
        lora(target_modules=["q_proj"], trainable_token_indices=[47, 5, 19]), "tied Qwen3"
    ),
    "LoRA, trainable_token_indices of two": In(
        lora(
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": [47, 5], "lm_head": [2]},
        ),
        "tied Qwen3",
    ),
    "TinyLoRA": In(other(peft.TinyLoraConfig, u=5)),
    "TinyLoRA, bias=tinylora_only": In(other(peft.TinyLoraConfig, u=5, bias="tinylora_only")),
    "TinyLoRA, all tied": In(other(peft.TinyLoraConfig, r=3, u=5, weight_tying=1.0)),
    "TinyLoRA, cores from the seed": In(
        other(peft.TinyLoraConfig, u=5, save_projection=False, projection_seed=7)
    ),
    "TinyLoRA, embedding": In(
        other(peft.TinyLoraConfig, u=5, target_modules=["embed_tokens", "k_proj"]), "Qwen3"
    ),
    "TinyLoRA, Conv1D": In(other(peft.TinyLoraConfig, u=5, target_modules=["c_attn"]), "Conv1D"),
    "VeRA": In(other(peft.VeraConfig, r=3, projection_prng_key=5)),
    "VeRA, factors from the key": In(
        other(peft.VeraConfig, r=3, projection_prng_key=5, save_projection=False, d_initial=0.3)
    ),
    "VeRA, one layer": In(other(peft.VeraConfig, r=3, target_modules=r".*\.1\.up")),
    "VeRA, Conv1D": In(other(peft.VeraConfig, r=3, target_modules=["c_attn", "c_fc"]), "Conv1D"),
    "SHiRA": In(other(peft.ShiraConfig, r=2)),
    "SHiRA, seeded": In(other(peft.ShiraConfig, r=1, random_seed=3)),
    "RandLoRA": In(other(peft.RandLoraConfig, r=3, randlora_alpha=6)),
    "RandLoRA, factors from the key": In(
        other(
            peft.RandLoraConfig,
            r=5,
            randlora_alpha=6,
            projection_prng_key=5,
            save_projection=False,
        )
    ),
    "RandLoRA, very sparse, one layer": In(
        other(
            peft.RandLoraConfig,
            r=3,
            randlora_alpha=6,
            very_sparse=True,
            target_modules=r".*\.1\.up",
        )
    ),
    "RandLoRA, Conv1D": In(
        other(peft.RandLoraConfig, r=6, randlora_alpha=6, target_modules=["c_attn", "c_fc"]),
        "Conv1D",
    ),
    "LoRA, Conv1D": In(lora(target_modules=["c_attn", "c_fc"]), "Conv1D"),
    "DoRA, Conv1D": In(lora(target_modules=["c_attn"], use_dora=True), "Conv1D"),
    "PiSSA, Conv1D": In(
        lora(target_modules=["c_attn"], init_lora_weights="pissa", fan_in_fan_out=True), "Conv1D"
    ),
    "IA3, Conv1D": In(
        lambda: peft.IA3Config(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"]),
        "Conv1D",
    ),
    "LoRA, Conv2d": In(lora(target_modules=["first", "second"]), "Conv2d"),
    "DoRA, Conv2d": In(lora(target_modules=["first", "second"], use_dora=True), "Conv2d"),
    "IA3, Conv2d": In(
        lambda: peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
        "Conv2d",
    ),
    "HRA, Conv2d": In(lambda: peft.HRAConfig(r=2, target_modules=["first", "second"]), "Conv2d"),
    "LoRA, embedding and head": In(
        lora(target_modules=["embed_tokens", "lm_head", "q_proj"]), "Qwen3"
    ),
    "DoRA, embedding": In(lora(target_modules=["embed_tokens"], use_dora=True), "Qwen3"),
    "LoRA, experts": In(
        lora(
            target_modules=["q_proj"],
            target_parameters=EXPERTS,
            rank_pattern={"experts.down_proj": 2},
        ),
        "experts",
    ),
    "LoRA, bare matrix": In(
        lora(target_modules=[], target_parameters=["mlp.gate.weight", "q_proj.weight"]), "experts"
    ),
}
BIASED = fadapt.Chain((LoRA(r=2), fadapt.BitFit()))
OUT: dict[str, Out] = {
    "LoRA": Out(LoRA(r=3, alpha=5)),
    "rsLoRA": Out(fadapt.RsLoRA(r=3, alpha=5)),
    "LoRA, strength -0.5": Out(LoRA(r=3), strength=-0.5),
    "LoRA, ranks and scales": Out(
        {"0.up": LoRA(r=1, alpha=1.5), "0": LoRA(r=3), "1.up": fadapt.RsLoRA(r=2, alpha=3)}
    ),
    "LoRA, one layer": Out({"layers.1.up": LoRA(r=3)}),
    "LoRA, trained bias": Out({"up": LoRA(r=2), "down": BIASED}),
    "LoRA, trained biases elsewhere": Out({"up": BIASED, "down": fadapt.BitFit()}),
    "LoRA, trained bias, strength 0.5": Out({"up": BIASED}, strength=0.5),
    "LoRA, bias where there is none": Out({"q_proj": BIASED, "v_proj": LoRA(r=2)}, "Qwen3"),
    "HRA, trained bias": Out({"up": fadapt.Chain((fadapt.BitFit(), fadapt.HRA(r=2)))}),
    "EVA": Out(fadapt.EVA(r=3), calib=True),
    "PiSSA": Out(fadapt.PiSSA(r=3)),
    "CorDA": Out(fadapt.CorDA(r=3), calib=True),
    "OLoRA": Out(fadapt.OLoRA(r=3)),
    "MiCA": Out(fadapt.MiCA(r=3)),
    "MiCA, ranks, strength": Out({"up": fadapt.MiCA(r=2), "down": fadapt.MiCA(r=3)}, strength=0.5),
    "MiCA beside LoRA": Out({"up": fadapt.MiCA(r=2), "down": LoRA(r=3)}),
    "KaSA": Out(fadapt.KaSA(r=3)),
    "PiSSA beside LoRA": Out({"up": fadapt.PiSSA(r=2), "down": LoRA(r=3)}),
    "DoRA": Out(fadapt.DoRA(r=3)),
    "DoRA, ranks": Out({"up": fadapt.DoRA(r=3), "down": fadapt.DoRA(r=2, alpha=3)}),
    "DeLoRA": Out({"up": fadapt.DeLoRA(r=3, form="peft"), "down": fadapt.DeLoRA(r=2, form="peft")}),
    "DeLoRA, strength 0.5": Out(fadapt.DeLoRA(r=3, form="peft"), strength=0.5),
    "IA3": Out(fadapt.IA3()),
    "IA3 and IA3FF": Out({"up": fadapt.IA3(), "down": fadapt.IA3FF()}),
    "IA3FF, one layer": Out({"0": fadapt.IA3FF(), "1": fadapt.IA3()}, strength=0.5),
    "HRA": Out({"up": fadapt.HRA(r=4), "down": fadapt.HRA(r=2)}),
    "RoAd 1": Out(fadapt.RoAd(1, 4)),
    "RoAd 2": Out(fadapt.RoAd(2, 4)),
    "RoAd 4": Out(fadapt.RoAd(4, 4)),
    "OFT, series": Out(fadapt.OFT(4, exact=False)),
    "OFT, exact": Out(fadapt.OFT(4)),
    "BOFT": Out(fadapt.BOFT(block_size=4)),
    "BOFT, butterfly": Out(fadapt.BOFT(block_size=2, n_butterfly_factor=2)),
    "BOFT, number of blocks": Out(
        {"up": fadapt.BOFT(block_size=3), "down": fadapt.BOFT(block_size=4)}
    ),
    "PSOFT": Out(fadapt.PSOFT(r=4)),
    "PSOFT, series, pissa_init": Out(
        fadapt.PSOFT(r=4, exact=False, ab_svd_init="pissa_init", mag_a=False)
    ),
    "PSOFT, free": Out(fadapt.PSOFT(r=3, orth=False)),
    "PSOFT, r=1": Out(fadapt.PSOFT(r=1)),
    "AdaLoRA": Out(fadapt.AdaLoRA(r=3, alpha=5)),
    "AdaLoRA, ranks, strength": Out(
        {"up": fadapt.AdaLoRA(r=2), "down": fadapt.AdaLoRA(r=3, alpha=5)}, strength=0.5
    ),
    "LoHa": Out(fadapt.LoHa(r=3, alpha=5)),
    "LoHa, ranks, strength": Out(
        {"up": fadapt.LoHa(r=2), "down": fadapt.LoHa(r=3, alpha=2)}, strength=-0.5
    ),
    "LoHa, Conv2d": Out({"first.weight|second.weight": fadapt.LoHa(r=2)}, "Conv2d"),
    "LoHa, Conv1d": Out({"first.weight|second.weight": fadapt.LoHa(r=2)}, "Conv1d"),
    "LoKr": Out(fadapt.LoKr(r=1, alpha=5)),
    "LoKr, decompose_both, strength": Out(
        fadapt.LoKr(r=1, decompose_both=True, decompose_factor=4), strength=-0.5
    ),
    "LoKr, ranks": Out({"up": fadapt.LoKr(r=4), "0": fadapt.LoKr(r=1), "1": fadapt.LoKr(r=2)}),
    "LoKr, Conv2d": Out({"first.weight": fadapt.LoKr(r=1)}, "Conv2d"),
    "LoKr, Conv2d, whole factor": Out({"first.weight": fadapt.LoKr(r=4)}, "Conv2d"),
    "LoKr, Conv1d": Out({"first.weight": fadapt.LoKr(r=1)}, "Conv1d"),
    "HiRA": Out(fadapt.HiRA(r=3)),
    "HiRA, ranks, strength": Out({"up": fadapt.HiRA(r=3), "down": fadapt.HiRA(r=2)}, strength=-0.5),
    "HiRA, Conv1D": Out({"c_attn": fadapt.HiRA(r=3)}, "Conv1D"),
    "HiRA, Conv2d": Out({"first.weight|second.weight": fadapt.HiRA(r=3)}, "Conv2d"),
    "HiRA, embedding": Out(
        fadapt.Config({"embed_tokens|q_proj": fadapt.HiRA(r=3)}, exclude=()), "Qwen3"
    ),
    "GraLoRA": Out(fadapt.GraLoRA(r=4, alpha=6)),
    "GraLoRA, hybrid_r, alphas, strength": Out(
        {
            "up": fadapt.GraLoRA(r=4, hybrid_r=2),
            "down": fadapt.GraLoRA(r=4, hybrid_r=2, alpha=3),
        },
        strength=-0.5,
    ),
    "GraLoRA, Conv1D": Out({"c_attn": fadapt.GraLoRA(r=4)}, "Conv1D"),
    "MiSS": Out(fadapt.MiSS(r=5)),
    "MiSS, bat, strength": Out(fadapt.MiSS(r=4, mode="bat"), strength=-0.5),
    "MiSS, mini": Out(fadapt.MiSS(r=4, mode="mini", mini_r=2)),
    "C3A": Out(fadapt.C3A(block_size=4)),
    "C3A, block sizes, strength": Out(
        {"0.up": fadapt.C3A(block_size=2), "": fadapt.C3A(block_size=4)}, strength=-0.5
    ),
    "FourierFT": Out(fadapt.FourierFT(n_frequency=20)),
    "FourierFT, counts, scales, strength": Out(
        {
            "0.up": fadapt.FourierFT(n_frequency=9, random_loc_seed=5),
            "": fadapt.FourierFT(n_frequency=20, scaling=60, random_loc_seed=5),
        },
        strength=-0.5,
    ),
    "FourierFT, Conv1D": Out({"c_attn": fadapt.FourierFT(n_frequency=20)}, "Conv1D"),
    "LNTuning": Out(fadapt.LNTuning(), "norms"),
    "LNTuning, one vector, strength": Out(
        {"norm.weight": fadapt.LNTuning()}, "norms", strength=-0.5
    ),
    "LNTuning, RMS norms": Out({"q_norm|input_layernorm": fadapt.LNTuning()}, "Qwen3"),
    "LoRA beside Full": Out({"up": LoRA(r=2), "head.2.weight": fadapt.Full()}, "norms"),
    "LoRA beside Full, bias and norm, strength": Out(
        {
            "up": LoRA(r=2),
            "head.0": fadapt.Chain((fadapt.Full(), fadapt.BitFit())),
            "^norm.bias": fadapt.Full(),
        },
        "norms",
        strength=0.5,
    ),
    "LoRA beside Full, embedding and head": Out(
        fadapt.Config({"q_proj": LoRA(r=2), "embed_tokens|lm_head": fadapt.Full()}, exclude=()),
        "Qwen3",
    ),
    "LoHa beside Full, Conv2d": Out(
        {"first.weight": fadapt.LoHa(r=2), "second.weight": fadapt.Full()}, "Conv2d"
    ),
    "LoRA beside Full, Conv1D": Out({"c_attn": LoRA(r=2), "c_fc": fadapt.Full()}, "Conv1D"),
    "TrainableTokens": Out(fadapt.TrainableTokens(token_indices=(47, 19)), "Qwen3"),
    "TrainableTokens, tied, strength": Out(
        fadapt.TrainableTokens(token_indices=(47, 4)), "tied Qwen3", strength=-0.5
    ),
    "LoRA beside TrainableTokens": Out(
        {"q_proj": LoRA(r=2), "": fadapt.TrainableTokens(token_indices=(47, 19))}, "Qwen3"
    ),
    "LoRA beside TrainableTokens, tied, strength": Out(
        {"q_proj": LoRA(r=2), "": fadapt.TrainableTokens(token_indices=(47, 19))},
        "tied Qwen3",
        strength=-0.5,
    ),
    "TinyLoRA": Out(fadapt.TinyLoRA(r=3, u=5)),
    "TinyLoRA, all tied, strength 0.5": Out(fadapt.TinyLoRA(u=5, weight_tying=True), strength=0.5),
    "TinyLoRA, embedding": Out(
        fadapt.Config({"embed_tokens|k_proj": fadapt.TinyLoRA(u=5, weight_tying=True)}, exclude=()),
        "Qwen3",
    ),
    "TinyLoRA, Conv1D": Out({"c_attn": fadapt.TinyLoRA(u=5)}, "Conv1D"),
    "VeRA": Out(fadapt.VeRA(r=3)),
    "VeRA, d_initial, strength 0.5": Out(fadapt.VeRA(r=3, d_initial=0.2), strength=0.5),
    "VeRA, Conv1D": Out({"c_attn": fadapt.VeRA(r=3, projection_prng_key=7)}, "Conv1D"),
    "SHiRA": Out(fadapt.SHiRA(r=2)),
    "SHiRA, seeded, strength 0.5": Out(fadapt.SHiRA(r=1, random_seed=3), strength=0.5),
    "RandLoRA": Out(fadapt.RandLoRA(r=3, alpha=6)),
    "RandLoRA, sparse, strength 0.5": Out(
        fadapt.RandLoRA(r=3, alpha=6, projection_prng_key=7, sparse=True), strength=0.5
    ),
    "RandLoRA, Conv1D": Out({"c_attn": fadapt.RandLoRA(r=6, alpha=6)}, "Conv1D"),
    "LoRA, Conv1D": Out({"c_attn|c_fc": LoRA(r=3)}, "Conv1D"),
    "DoRA, Conv1D": Out({"c_attn": fadapt.DoRA(r=3)}, "Conv1D"),
    "IA3, Conv1D": Out({"c_attn": fadapt.IA3(), "c_fc": fadapt.IA3FF()}, "Conv1D"),
    "LoRA, Conv2d": Out({"first|second": LoRA(r=3)}, "Conv2d"),
    "DoRA, Conv2d": Out({"first|second": fadapt.DoRA(r=3)}, "Conv2d"),
    "IA3, Conv2d": Out({"first.weight": fadapt.IA3()}, "Conv2d"),
    "HRA, Conv2d": Out({"first.weight": fadapt.HRA(r=2)}, "Conv2d"),
    "LoRA, embedding and head": Out(
        fadapt.Config({"embed_tokens|lm_head|q_proj": LoRA(r=3)}, exclude=()), "Qwen3"
    ),
    "DoRA, embedding": Out(fadapt.Config({"embed_tokens": fadapt.DoRA(r=3)}, exclude=()), "Qwen3"),
    "LoRA, experts": Out(
        {"gate_up_proj": LoRA(r=2), "experts.down_proj": LoRA(r=3), "v_proj": LoRA(r=1)}, "experts"
    ),
    "PiSSA, experts": Out({"experts.down_proj": fadapt.PiSSA(r=2)}, "experts"),
    "LoRA, bare matrix": Out({"gate.weight": LoRA(r=2)}, "experts"),
}
QUIET = (
    "fan_in_fan_out is set to False but",  # PEFT sees that a layer is a Conv1D by itself
    "merging LoRA weights won't be possible",  # a bias where the layer has none
    "Could not find a config file",
    "Unsupported layer type",  # of norms, which LN tuning is for
    "no implementation exists to tie the adapters",  # trained tokens follow ties
    "Setting `save_embedding_layers`",
    "is_gradient_checkpointing",
)


class SaidError(AssertionError):
    """A warning of PEFT's, which keys that are missing or left over are to it."""


def strictly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    said = [str(w.message) for w in caught]
    if bad := [s for s in said if not any(quiet in s for quiet in QUIET)]:
        raise SaidError(bad[0])
    return result


def move(model: nn.Module) -> None:
    """Trained-like values: everything that trains moves at random."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))


def read_in(row: In, folder: Path) -> tuple[float, nn.Module, fadapt.Params]:
    """The error of what fadapt reads; the base, and the params."""
    make, batch = BASES[row.base]
    base, x, config = make(), batch(), row.config()
    own = copy.deepcopy(base)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if row.start is corda:
            corda(own, config)
        model = peft.get_peft_model(own, config)
        if row.start is eva:
            eva(model)
        if row.before or row.convert:
            model.save_pretrained(folder / "before")
        move(model)
        if row.after:
            row.after(model)
        options = {}
        if row.convert:
            # PEFT asks for a start that it does not start again when it is loaded.
            model.peft_config["default"].init_lora_weights = True
            path = folder / "before" / "adapter_config.json"
            path.write_text(re.sub(r'"(pissa|olora)"', "true", path.read_text()))
            options = {"path_initial_model_for_weight_conversion": str(folder / "before")}
        expected = logits(model.eval()(x))
        model.save_pretrained(folder / "adapter", **options)
    initial = folder / "before" if row.before else None
    params = fadapt.peft.load_peft(folder / "adapter", base, initial=initial)
    found = logits(fadapt.apply(base, params, x))
    assert (expected - logits(base(x))).abs().max() > 1e-2, "the adapter does nothing"
    return float((found - expected).abs().max()), base, params


def make_params(row: Out, base: nn.Module) -> fadapt.Params:
    calib = [reals(40, 12, seed=3)] if row.calib else None
    params = perturb(fadapt.init(base, row.cfg, calib))
    return params if row.strength is None else fadapt.scale(params, row.strength)


def read_out(row: Out, folder: Path) -> float:
    """The error of what PEFT reads; every key of the file has a place, and every place a key."""
    make, batch = BASES[row.base]
    base, x = make(), batch()
    params = make_params(row, base)
    fadapt.peft.save_peft(base, params, folder / "adapter")
    expected = logits(fadapt.apply(base, params, x))
    assert (expected - logits(base(x))).abs().max() > 1e-2, "the adapter does nothing"
    return against_peft(base, folder / "adapter", x, expected)


def against_peft(base: nn.Module, path: Path, x: Tensor, expected: Tensor) -> float:
    model = strictly(lambda: peft.PeftModel.from_pretrained(copy.deepcopy(base), str(path)))
    from safetensors.torch import load_file

    file = load_file(path / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        result = peft.set_peft_model_state_dict(model, file)
    assert not result.unexpected_keys, result.unexpected_keys
    assert own.keys() == file.keys(), own.keys() ^ file.keys()
    return float((logits(model.eval()(x)) - expected).abs().max())


def measure() -> dict[tuple[str, str], float]:
    """{(direction, row): error}."""
    found = {}
    for name, row in IN.items():
        with tempfile.TemporaryDirectory() as folder:
            found["PEFT to fadapt", name] = read_in(row, Path(folder))[0]
    for name, row in OUT.items():
        with tempfile.TemporaryDirectory() as folder:
            found["fadapt to PEFT", name] = read_out(row, Path(folder))
    return found


HEAD = f"""# Round trips with PEFT

Adapters with trained-like values on layers with biases, written by the one and read by the other:
the largest difference of an output, in float32, with PEFT {peft.__version__}. Every key of a file
has its place and every place its key. Beside the methods of the first table a file may hold trained
biases (`BitFit`), whole modules (`Full`, PEFT's `modules_to_save`) and, beside LoRA, rows of an
embedding (`TrainableTokens`). Written by `python -m tests.peft_table`, and tested.

"""


def formats() -> str:
    """What each format holds, as the code declares it."""
    lines = ["| `peft_type` | methods | layers | dropout of the input |", "|---|---|---|---|"]
    for form in FORMATS:
        names = {cls.__name__: None for known in form.methods for cls in (known, *_public(known))}
        shown = ", ".join(f"`{n}`" for n in names if hasattr(fadapt, n))
        layers = ", ".join(sorted(form.layers - {TIED}))
        field = f"`{form.dropout}`" if form.dropout else "no"
        lines.append(f"| {form.peft_type} | {shown} | {layers} | {field} |")
    return "\n".join(lines)


def _public(cls: type) -> list[type]:
    """The public methods that are written as their parent, whose increment they have."""
    own = [v for v in vars(fadapt).values() if isinstance(v, type) and issubclass(v, cls)]
    return [v for v in own if v is not cls and format_for(v) is format_for(cls)]


def format_for(cls: type) -> Any:
    """The format that writes a class of methods, at its defaults."""
    return next((form for form in FORMATS if form.writes(cls())), None)


def page(errors: dict[tuple[str, str], float]) -> str:
    lines = ["| adapter | direction | largest difference |", "|---|---|---|"]
    for (direction, name), error in errors.items():
        lines.append(f"| {name} | {direction} | {f'{error:.0e}' if error else '0'} |")
    return HEAD + formats() + "\n\n" + "\n".join(lines) + "\n"


def parse(text: str) -> dict[tuple[str, str], float]:
    """{(direction, row): error} of a written page."""
    rows = re.findall(r"^\| (.+?) \| (.+? to .+?) \| (\S+) \|$", text, re.M)
    return {(direction, name): float(error) for name, direction, error in rows}


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(measure()))
