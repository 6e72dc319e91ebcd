"""Small models of transformers, one or more of every family, each with a batch that has a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

V, D, H, L, FF = 96, 32, 4, 2, 48
ROWS, TIME = 2, 6
Batch = dict[str, Tensor]

STD = dict(
    vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, intermediate_size=FF,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GQA = dict(STD, num_key_value_heads=2, head_dim=8)
SIDES = dict(
    vocab_size=V, d_model=D, encoder_layers=L, decoder_layers=L, encoder_ffn_dim=FF,
    decoder_ffn_dim=FF, encoder_attention_heads=H, decoder_attention_heads=H, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, max_position_embeddings=64,
)  # fmt: skip
MOE = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
VISION = dict(
    hidden_size=D, num_hidden_layers=L, num_attention_heads=H, intermediate_size=FF, image_size=16,
    patch_size=8, num_channels=3,
)  # fmt: skip
SPEECH = dict(
    STD, conv_dim=(D, D), conv_kernel=(10, 4), conv_stride=(5, 4), num_feat_extract_layers=2,
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False,
)  # fmt: skip


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(time: int = TIME, rows: int = ROWS, seed: int = 3) -> Tensor:
    return torch.randint(5, V, (rows, time), generator=rng(seed))


def pixels(size: int = 16, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=rng())


def sound(length: int = 400) -> Tensor:
    return torch.randn(ROWS, length, generator=rng())


CLASSES = torch.tensor([0, 1])


def tokens(labels: bool = True) -> Batch:
    return {"input_ids": ids(), **({"labels": ids()} if labels else {})}


def filled() -> Batch:
    """Labels that are not the inputs."""
    return {"input_ids": ids(), "labels": ids(seed=4)}


def classes() -> Batch:
    return {"input_ids": ids(), "labels": CLASSES}


def images(size: int = 16) -> Batch:
    return {"pixel_values": pixels(size), "labels": CLASSES}


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        make: the model, with values that ``torch.manual_seed`` decides.
        batch: keyword arguments, from which the model makes a loss unless ``loss`` does.
        loss: a ``loss_fn``, for models without labels.
        wide: whether it is left to ``tox -e architectures``.
        rules: what to adapt in a stack, where a bare method adapts what a stack cannot hold.
        own_gradient: whether the model itself has a backward pass in its weights.
        refuses_run: whether a stack's losses are refused, since rows would meet.
        refuses_apply: the same of its outputs.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[Any, Any], Tensor] | None = None
    wide: bool = False
    rules: str | None = None
    own_gradient: bool = True
    refuses_run: bool = False
    refuses_apply: bool = False


def mean_square(out: Any, _: Any) -> Tensor:
    first = next(t for t in out.values() if isinstance(t, Tensor) and t.is_floating_point())
    return first.square().mean()


def image_and_text(out: Any, _: Any) -> Tensor:
    return (out.image_embeds * out.text_embeds).sum(-1).square().mean()


CASES: dict[str, Case] = {}


def case(name: str, make: Callable[[], nn.Module], batch: Callable[[], Batch], **more: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(make, batch, **more)


def model(kind: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, kind)(getattr(hf, config)(**values))


# A line a model.
# fmt: off
# Decoders.
case("GPT-2", model("GPT2LMHeadModel", "GPT2Config", vocab_size=V, n_embd=D, n_layer=L, n_head=H, n_positions=64, bos_token_id=1, eos_token_id=2), tokens)
case("Llama", model("LlamaForCausalLM", "LlamaConfig", **GQA), tokens)
case("Qwen3", model("Qwen3ForCausalLM", "Qwen3Config", **GQA), tokens)
case("Qwen3 tied", model("Qwen3ForCausalLM", "Qwen3Config", **GQA, tie_word_embeddings=True), tokens, wide=True)
case("Qwen3-Next", model("Qwen3NextForCausalLM", "Qwen3NextConfig", **GQA, **MOE, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, shared_expert_intermediate_size=16), tokens, rules="self_attn|linear_attn")
case("Gemma 2", model("Gemma2ForCausalLM", "Gemma2Config", **GQA, final_logit_softcapping=3.0), tokens)
case("Gemma 3", model("Gemma3ForCausalLM", "Gemma3TextConfig", **GQA), tokens, wide=True)
case("Mistral", model("MistralForCausalLM", "MistralConfig", **GQA), tokens, wide=True)
case("Phi-3", model("Phi3ForCausalLM", "Phi3Config", **STD), tokens, wide=True)
case("OLMo 2", model("Olmo2ForCausalLM", "Olmo2Config", **STD), tokens, wide=True)
case("Cohere", model("CohereForCausalLM", "CohereConfig", **STD), tokens)
case("Granite", model("GraniteForCausalLM", "GraniteConfig", **STD, logits_scaling=4.0), tokens)
case("OPT", model("OPTForCausalLM", "OPTConfig", vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, ffn_dim=FF, word_embed_proj_dim=D, max_position_embeddings=64), tokens)
case("Falcon", model("FalconForCausalLM", "FalconConfig", vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H), tokens, wide=True)
case("GPT-NeoX", model("GPTNeoXForCausalLM", "GPTNeoXConfig", **STD), tokens, wide=True)
case("Bloom", model("BloomForCausalLM", "BloomConfig", vocab_size=V, hidden_size=D, n_layer=L, n_head=H), tokens)
case("BioGPT", model("BioGptForCausalLM", "BioGptConfig", **STD), tokens)
case("BART decoder", model("BartForCausalLM", "BartConfig", **SIDES, is_decoder=True, is_encoder_decoder=False, use_cache=False), filled)
case("TrOCR", model("TrOCRForCausalLM", "TrOCRConfig", vocab_size=V, d_model=D, decoder_layers=L, decoder_ffn_dim=FF, decoder_attention_heads=H, max_position_embeddings=64, use_cache=False), filled)
case("XLM", model("XLMWithLMHeadModel", "XLMConfig", vocab_size=V, emb_dim=D, n_layers=L, n_heads=H, max_position_embeddings=64), filled)
case("XLNet", model("XLNetForSequenceClassification", "XLNetConfig", vocab_size=V, d_model=D, n_layer=L, n_head=H, d_inner=FF), classes, rules="layer_1|layer_2", refuses_apply=True)
case("XLNet LM", model("XLNetLMHeadModel", "XLNetConfig", vocab_size=V, d_model=D, n_layer=L, n_head=H, d_inner=FF), filled, rules="layer_1|layer_2", refuses_apply=True)

case("DeepSeek-V3", model("DeepseekV3ForCausalLM", "DeepseekV3Config", **STD, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1), tokens, rules="self_attn", wide=True)
case("GLM-4", model("Glm4ForCausalLM", "Glm4Config", **GQA), tokens, wide=True)
case("BitNet", model("BitNetForCausalLM", "BitNetConfig", **GQA), tokens, wide=True)
case("DiffLlama", model("DiffLlamaForCausalLM", "DiffLlamaConfig", **GQA), tokens, wide=True)
case("GPT-J", model("GPTJForCausalLM", "GPTJConfig", vocab_size=V, n_embd=D, n_layer=L, n_head=H, n_positions=64, rotary_dim=4), tokens, wide=True)
case("MPT", model("MptForCausalLM", "MptConfig", vocab_size=V, d_model=D, n_heads=H, n_layers=L, max_seq_len=64), tokens, wide=True)

# Encoders.
case("BERT masked", model("BertForMaskedLM", "BertConfig", **STD), filled)
case("BERT next sentence", model("BertForNextSentencePrediction", "BertConfig", **STD), classes)
case("BERT two losses", model("BertForPreTraining", "BertConfig", **STD), lambda: {**filled(), "next_sentence_label": CLASSES}, wide=True)
case("BERT choices", model("BertForMultipleChoice", "BertConfig", **STD), lambda: {"input_ids": ids(rows=ROWS * 3).reshape(ROWS, 3, TIME), "labels": CLASSES}, refuses_apply=True)
case("BERT tokens", model("BertForTokenClassification", "BertConfig", **STD), lambda: {"input_ids": ids(), "labels": ids() % 2})
case("BERT classes", model("BertForSequenceClassification", "BertConfig", **STD), classes, wide=True)
case("DistilBERT spans", model("DistilBertForQuestionAnswering", "DistilBertConfig", vocab_size=V, dim=D, n_layers=L, n_heads=H, hidden_dim=FF, max_position_embeddings=64), lambda: {"input_ids": ids(), "start_positions": CLASSES, "end_positions": CLASSES + 3})
case("RoBERTa", model("RobertaForSequenceClassification", "RobertaConfig", **STD), classes, wide=True)
case("ALBERT", model("AlbertForMaskedLM", "AlbertConfig", **STD, embedding_size=16), filled)
case("ELECTRA", model("ElectraForPreTraining", "ElectraConfig", **STD, embedding_size=D), lambda: {"input_ids": ids(), "labels": ids() % 2})
case("DeBERTa", model("DebertaV2ForSequenceClassification", "DebertaV2Config", **STD, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4), classes, refuses_apply=True)
case("ModernBERT", model("ModernBertForMaskedLM", "ModernBertConfig", **STD, cls_token_id=1, sep_token_id=2), filled)
case("Longformer", model("LongformerForSequenceClassification", "LongformerConfig", **STD, attention_window=[4, 4]), classes, refuses_apply=True)
case("Funnel", model("FunnelForSequenceClassification", "FunnelConfig", vocab_size=V, d_model=D, n_head=H, d_head=8, d_inner=FF, block_sizes=[1, 1], num_decoder_layers=1), classes, rules="linear|ffn")

case("ConvBERT", model("ConvBertForMaskedLM", "ConvBertConfig", **STD, embedding_size=D, conv_kernel_size=3, num_groups=1, head_ratio=2), filled, wide=True)
case("SqueezeBERT", model("SqueezeBertForSequenceClassification", "SqueezeBertConfig", **STD, embedding_size=D), classes, wide=True)
case("ESM", model("EsmForMaskedLM", "EsmConfig", **STD, mask_token_id=4, position_embedding_type="rotary"), filled, wide=True)
case("CANINE", model("CanineForSequenceClassification", "CanineConfig", **STD, local_transformer_stride=2, downsampling_rate=2, num_hash_functions=2, num_hash_buckets=16), lambda: {"input_ids": ids(8), "labels": CLASSES}, wide=True)

# Encoder-decoders.
case("BART", model("BartForConditionalGeneration", "BartConfig", **SIDES), filled)
case("Pegasus", model("PegasusForConditionalGeneration", "PegasusConfig", **SIDES), filled, wide=True)
case("T5", model("T5ForConditionalGeneration", "T5Config", vocab_size=V, d_model=D, d_kv=8, d_ff=FF, num_layers=L, num_heads=H, decoder_start_token_id=0), filled)
case("LED", model("LEDForConditionalGeneration", "LEDConfig", **{k: v for k, v in SIDES.items() if k != "max_position_embeddings"}, attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64), filled, refuses_apply=True)
case("Whisper", model("WhisperForConditionalGeneration", "WhisperConfig", **{k: v for k, v in SIDES.items() if k != "max_position_embeddings"}, num_mel_bins=8, max_source_positions=12, max_target_positions=32), lambda: {"input_features": torch.randn(ROWS, 8, 24, generator=rng()), "labels": ids()})

case("M2M-100", model("M2M100ForConditionalGeneration", "M2M100Config", **SIDES), filled, wide=True)
case("ProphetNet", model("ProphetNetForConditionalGeneration", "ProphetNetConfig", vocab_size=V, hidden_size=D, encoder_ffn_dim=FF, decoder_ffn_dim=FF, num_encoder_layers=L, num_decoder_layers=L, num_encoder_attention_heads=H, num_decoder_attention_heads=H, max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=2, ngram=2, num_buckets=4, relative_max_distance=8), filled, wide=True)

# Experts.
case("Mixtral", model("MixtralForCausalLM", "MixtralConfig", **GQA, num_local_experts=4, num_experts_per_tok=2), tokens, rules="self_attn")
case("Mixtral with its routers' loss", model("MixtralForCausalLM", "MixtralConfig", **GQA, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5), tokens, rules="self_attn", refuses_apply=True)
case("Qwen3-MoE", model("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **GQA, **MOE), tokens, rules="self_attn")
case("GPT-OSS", model("GptOssForCausalLM", "GptOssConfig", **GQA, num_local_experts=4, num_experts_per_tok=2), tokens, rules="self_attn")
case("DBRX", model("DbrxForCausalLM", "DbrxConfig", vocab_size=V, d_model=D, n_heads=H, n_layers=L, max_seq_len=64, attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0), ffn_config=dict(ffn_hidden_size=FF, moe_num_experts=4, moe_top_k=2, hidden_size=D)), tokens, rules="Wqkv|out_proj")
case("Switch", model("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", vocab_size=V, d_model=D, d_kv=8, d_ff=FF, num_layers=L, num_decoder_layers=L, num_heads=H, num_experts=4, expert_capacity=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0), filled, rules="Attention")
case("NLLB-MoE", model("NllbMoeForConditionalGeneration", "NllbMoeConfig", **SIDES, num_experts=4, expert_capacity=4, encoder_sparse_step=2, decoder_sparse_step=2), filled, rules="q_proj|v_proj")

# State spaces and recurrences.
case("Mamba", model("MambaForCausalLM", "MambaConfig", vocab_size=V, hidden_size=D, state_size=4, num_hidden_layers=L, time_step_rank=2), tokens, rules="in_proj|out_proj")
case("FalconMamba", model("FalconMambaForCausalLM", "FalconMambaConfig", vocab_size=V, hidden_size=D, state_size=4, num_hidden_layers=L, time_step_rank=2), tokens, rules="in_proj|out_proj")
case("Mamba-2", model("Mamba2ForCausalLM", "Mamba2Config", vocab_size=V, hidden_size=D, state_size=4, num_hidden_layers=L, num_heads=8, head_dim=8, n_groups=1, chunk_size=4), tokens, wide=True)
case("Jamba", model("JambaForCausalLM", "JambaConfig", **STD, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=2, mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False), tokens, rules="in_proj|out_proj|q_proj|v_proj")
case("Falcon-H1", model("FalconH1ForCausalLM", "FalconH1Config", **GQA, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=4), tokens, wide=True)
case("LFM2", model("Lfm2ForCausalLM", "Lfm2Config", **GQA, layer_types=["conv", "full_attention"]), tokens, wide=True)
case("RWKV", model("RwkvForCausalLM", "RwkvConfig", vocab_size=V, hidden_size=D, num_hidden_layers=L, attention_hidden_size=D, intermediate_size=FF, rescale_every=0), tokens, own_gradient=False)
case("RecurrentGemma", model("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", **STD, block_types=["recurrent", "attention"], lru_width=D, attention_window_size=8), tokens, wide=True, rules="q_proj|v_proj|linear_x|mlp_block")

# Vision.
case("ViT", model("ViTForImageClassification", "ViTConfig", **VISION), images)
case("DeiT", model("DeiTForImageClassification", "DeiTConfig", **VISION), images, wide=True)
case("BEiT", model("BeitForImageClassification", "BeitConfig", **VISION), images)
case("DINOv2", model("Dinov2ForImageClassification", "Dinov2Config", **VISION, mlp_ratio=2), images, wide=True)
case("Swin", model("SwinForImageClassification", "SwinConfig", image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4), images, refuses_run=True, refuses_apply=True)
case("ConvNeXt", model("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16), images)
case("SegFormer", model("SegformerForSemanticSegmentation", "SegformerConfig", num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 16], num_attention_heads=[2, 2], mlp_ratios=[2, 2], patch_sizes=[3, 3], strides=[2, 2], decoder_hidden_size=16, image_size=16), lambda: {"pixel_values": pixels(), "labels": torch.randint(2, (ROWS, 16, 16), generator=rng())})
case("MobileViT", model("MobileViTForImageClassification", "MobileViTConfig", image_size=32, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 8], num_attention_heads=2), lambda: images(32), refuses_run=True, refuses_apply=True)
case("LeViT", model("LevitForImageClassification", "LevitConfig", image_size=32, hidden_sizes=[16, 16, 16], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]), lambda: images(32))
case("ResNet", model("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"), lambda: images(32), rules="classifier")

case("Hiera", model("HieraForImageClassification", "HieraConfig", image_size=[16, 16], patch_size=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], embed_dim=8, depths=[1, 1], num_heads=[1, 2], query_stride=[2, 2], masked_unit_size=[4, 4], num_query_pool=1, masked_unit_attention=[True, False]), images, wide=True)
case("PVT", model("PvtForImageClassification", "PvtConfig", image_size=32, depths=[1, 1], num_encoder_blocks=2, hidden_sizes=[16, 16], sequence_reduction_ratios=[2, 1], num_attention_heads=[2, 2], patch_sizes=[4, 2], strides=[4, 2], mlp_ratios=[2, 2]), lambda: images(32), wide=True)

# Sound.
case("Wav2Vec2", model("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **SPEECH, classifier_proj_size=16), lambda: {"input_values": sound(), "labels": CLASSES}, rules="proj")
case("Wav2Vec2 letters", model("Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH), lambda: {"input_values": sound(), "labels": ids(time=3)}, rules="proj")
case("HuBERT", model("HubertForSequenceClassification", "HubertConfig", **SPEECH, classifier_proj_size=16), lambda: {"input_values": sound(), "labels": CLASSES}, rules="proj", wide=True)
case("Conformer", model("Wav2Vec2ConformerForSequenceClassification", "Wav2Vec2ConformerConfig", **SPEECH, classifier_proj_size=16, conv_depthwise_kernel_size=3), lambda: {"input_values": sound(), "labels": CLASSES}, rules="linear_q|linear_v|ffn")
case("Audio spectrogram", model("ASTForAudioClassification", "ASTConfig", hidden_size=D, num_hidden_layers=L, num_attention_heads=H, intermediate_size=FF, patch_size=4, frequency_stride=4, time_stride=4, max_length=8, num_mel_bins=8), lambda: {"input_values": torch.randn(ROWS, 8, 8, generator=rng()), "labels": CLASSES}, wide=True)

# Several kinds of input.
TOWERS = dict(
    text_config=dict(STD, num_hidden_layers=1, eos_token_id=95),
    vision_config=dict(VISION, num_hidden_layers=2),
)


def pair() -> Batch:
    return {"input_ids": ids(), "pixel_values": pixels()}


case("CLIP", model("CLIPModel", "CLIPConfig", **TOWERS, projection_dim=16), lambda: {**pair(), "return_loss": True}, rules="q_proj|v_proj", refuses_apply=True)
case("CLIP embeddings", model("CLIPModel", "CLIPConfig", **TOWERS, projection_dim=16), pair, loss=image_and_text, rules="q_proj|v_proj", refuses_apply=True)
case("SigLIP", model("SiglipModel", "SiglipConfig", **TOWERS), pair, loss=image_and_text, rules="q_proj|v_proj", refuses_apply=True)
case("LLaVA", model("LlavaForConditionalGeneration", "LlavaConfig", vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**GQA), image_token_index=4, image_token_id=4, vision_feature_layer=-1), lambda: (lambda t: {"input_ids": torch.cat([torch.full((ROWS, 4), 4), t], 1), "pixel_values": pixels(), "labels": torch.cat([torch.full((ROWS, 4), -100), t], 1)})(ids()), refuses_apply=True)
case("BLIP", model("BlipForConditionalGeneration", "BlipConfig", text_config=dict(STD, encoder_hidden_size=D, is_decoder=True), vision_config=VISION), lambda: {**pair(), "labels": ids(seed=4)}, rules="query|value|qkv")
