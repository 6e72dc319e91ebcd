"""What a bare method, a broad rule and layers mean on many models, and what they leave out."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fadapt
from fadapt import Config, ConfigError, LoRA, PiSSA, TargetError
from tests.models import mlp, qwen3, qwen3_tied, seeded

L2 = LoRA(r=2)
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip
BLOCKS: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip
XLNET: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48,
}  # fmt: skip


def make(model: str, config: str, **kwargs: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**kwargs))


HEADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cls.predictions.decoder": ("BertForMaskedLM", "BertConfig", SMALL),
    "decoder": ("ModernBertForMaskedLM", "ModernBertConfig", {**SMALL, "pad_token_id": 0}),
    "lm_loss": ("XLNetLMHeadModel", "XLNetConfig", XLNET),
    "proj_out": ("WhisperForConditionalGeneration", "WhisperConfig", BLOCKS),
    "output_projection": ("BioGptForCausalLM", "BioGptConfig", SMALL),
    "head": (
        "RwkvForCausalLM",
        "RwkvConfig",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("head", HEADS)
def test_the_output_head_is_left_alone_whatever_its_name(head: str, tie: bool) -> None:
    cls, config, kwargs = HEADS[head]
    model = make(cls, config, **kwargs, tie_word_embeddings=tie)
    assert model.get_submodule(head) is model.get_output_embeddings()
    for broad in (L2, {".": L2}, {"weight": L2}):
        params = fadapt.init(model, broad)
        assert f"{head}.weight" not in params
        assert not any(a.site.tied for _, a in params.items())
    assert f"left out: {head}.weight" in fadapt.summary(params)
    named = fadapt.init(model, {rf"(^|\.){head.split('.')[-1]}\.weight$": L2})
    assert f"{head}.weight" in named
    if not tie:
        assert f"{head}.weight" in fadapt.init(model, Config(L2, exclude=()))


def test_a_head_tied_by_hand_and_one_within_a_part() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
            self.scores = nn.Linear(8, 11, bias=False)
            self.scores.weight = self.table.weight

    assert list(fadapt.init(Tied(), L2)) == ["inner.weight"]
    assert list(fadapt.init(Tied(), {"scores": L2})) == ["scores.weight"]

    class Captioner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eye = nn.Linear(8, 32)
            self.text = make("BertForMaskedLM", "BertConfig", **SMALL)

    found = fadapt.init(Captioner(), L2)
    assert "eye.weight" in found
    assert "text.cls.predictions.decoder.weight" not in found


# ---- layers of several towers


def clip() -> nn.Module:
    part = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {**part, "vocab_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 16}
    vision = {**part, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8}
    return make("CLIPModel", "CLIPConfig", text_config=text, vision_config=vision)


def t5() -> nn.Module:
    return make(
        "T5ForConditionalGeneration", "T5Config", vocab_size=64, d_model=32, d_kv=8, d_ff=48,
        num_layers=2, num_decoder_layers=4, num_heads=4, decoder_start_token_id=0,
    )  # fmt: skip


def depths(model: nn.Module, layers: list[int], rule: Any = L2) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for name in fadapt.init(model, Config(rule, layers=layers)):
        tower, _, rest = name.partition(".layers." if ".layers." in name else ".block.")
        found.setdefault(tower, set()).add(int(rest.split(".")[0]))
    return found


def test_negative_layers_count_from_the_end_of_each_tower() -> None:
    text, vision = "text_model.encoder", "vision_model.encoder"
    assert depths(clip(), [-1]) == {text: {1}, vision: {2}}
    assert depths(clip(), [-2]) == {text: {0}, vision: {1}}
    assert depths(clip(), [0, -1]) == {text: {0, 1}, vision: {0, 2}}
    assert depths(t5(), [-1]) == {"encoder": {1}, "decoder": {3}}
    # An index from the front means what it says; a tower that is too short has no such layer.
    assert depths(t5(), [3]) == {"decoder": {3}}
    assert depths(clip(), [-3], {"vision.*_proj": L2}) == {vision: {0}}


def test_a_tower_without_such_a_layer() -> None:
    for model in (clip(), t5()):
        with pytest.raises(TargetError, match=r"layers \[-3\] do not exist.*0 to 1.*one tower"):
            fadapt.init(model, Config(L2, layers=[-3]))
    with pytest.raises(TargetError, match=r"layers \[7\] do not exist.*0 to 1.*0 to 3"):
        fadapt.init(t5(), Config(L2, layers=[7]))


def test_a_plain_sequence_beside_a_tower_is_none() -> None:
    model = nn.ModuleDict({"body": qwen3(), "out": nn.Sequential(*[nn.Linear(4, 4)] * 1)})
    found = fadapt.init(model, Config(L2, layers=[-2]))
    assert {n.split(".")[3] for n in found} == {"0"}
    assert list(fadapt.init(mlp(), Config(L2, layers=[-1]))) == ["2.weight"]


# ---- narrow layers


def classifier() -> nn.Module:
    return make("BertForSequenceClassification", "BertConfig", **SMALL)


@pytest.mark.parametrize("method", [PiSSA(r=8), fadapt.AntiPaSTO(r=8), fadapt.SSVD(k=8)], ids=repr)
def test_one_narrow_layer_is_left_out_and_named(method: fadapt.Method) -> None:
    model = classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = fadapt.init(model, method)
    assert set(params) == set(fadapt.init(model, L2)) - {"classifier.weight"}
    assert "left out: classifier.weight, 2 x 32" in fadapt.summary(params)
    assert "too narrow" in fadapt.summary(params)
    # Named, it is an error; and so are hyper-parameters that fit nowhere.
    with pytest.raises(ConfigError, match=r"classifier.weight \(2 x 32\)"):
        fadapt.init(model, {"classifier": method, "": L2})


def test_too_large_for_many_is_an_error_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"0\.weight") as error:
        fadapt.init(mlp(), PiSSA(r=64))
    assert "None" not in str(error.value).replace("niter=None", "")
    wide = seeded(nn.Sequential(nn.Linear(32, 4), nn.Tanh(), nn.Linear(4, 32), nn.Linear(32, 32)))
    with pytest.raises(ConfigError, match=r"0\.weight") as error:
        fadapt.init(wide, PiSSA(r=8))
    rules = eval(str(error.value).split("leave it alone: ")[1], {"PiSSA": PiSSA})
    assert list(fadapt.init(wide, rules)) == ["3.weight"]


def test_the_way_out_that_a_refusal_names() -> None:
    model = classifier()
    with pytest.raises(ConfigError) as error:
        fadapt.init(model, fadapt.RoAd(group_size=16))
    advice = str(error.value).split("leave it alone: ")[1]
    rules = eval(advice, {k: getattr(fadapt, k) for k in ("RoAd",)})
    assert list(rules) == ["classifier", ""]
    assert "classifier.weight" not in fadapt.init(model, rules)


# ---- summary


def test_summary_ends_with_the_share_of_the_base() -> None:
    model = qwen3_tied()
    params = fadapt.init(model, {"q_proj": L2})
    size = sum(p.numel() for p in model.parameters())
    adapted = sum(model.get_parameter(n).numel() for n in params)
    trained = sum(t.numel() for t in fadapt.trainable(params))
    text = fadapt.summary(params)
    assert f"adapted: {adapted / size:.1%} of the base's {size:,} values" in text
    assert f"trainable: {trained / size:.1%}" in text
    share = model.get_parameter("model.embed_tokens.weight").numel() / size
    line = f"left out: model.embed_tokens.weight, 64 x 32 ({share:.1%}): excluded by 'embed_tokens'"
    assert line in text
    assert "mlp.gate_proj.weight  x 2, 48 x 32" in text
    assert "no rule means it" in text
    assert "norm" not in text.split("left out", 1)[1]


def test_summary_of_loaded_params(tmp_path: Any) -> None:
    model = qwen3()
    params = fadapt.init(model, Config({"k_proj": None, "": L2}, layers=[0]))
    fadapt.save(params, tmp_path / "a.safetensors")
    loaded = fadapt.load(tmp_path / "a.safetensors", model)
    assert fadapt.summary(loaded) == fadapt.summary(loaded, model) == fadapt.summary(params)
    assert "adapted:" not in fadapt.summary(fadapt.Params(dict(params)))
    assert "no rule means it" in fadapt.summary(fadapt.Params(dict(params)), model)
    for word in ("layers and roles", "rule 'k_proj': None", "excluded by 'lm_head'"):
        assert word in fadapt.summary(params)
    with pytest.raises(TargetError, match="which does not exist in this"):
        fadapt.summary(loaded, mlp())
    for same in (params.to(dtype=torch.float64), fadapt.unstack(fadapt.stack([params]))[0]):
        assert fadapt.summary(same) == fadapt.summary(params)


def test_sites_that_a_plan_drops_are_named() -> None:
    model = seeded(nn.ModuleDict({"sharp": nn.Linear(8, 4), "flat": nn.Linear(8, 4)}))
    model.forward = lambda a, b: model.sharp(a) + model.flat(b)  # type: ignore[method-assign]
    flat = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    sharp = flat * 0.6 ** torch.arange(8)  # each of its two best directions beats the flat ones
    with pytest.warns(fadapt.FadaptWarning, match="rank 0"):
        params = fadapt.init(model, fadapt.EVA(r=1, rho=2.0), [(sharp, flat)])
    assert list(params) == ["sharp.weight"]
    assert "left out: flat.weight, 4 x 8 (44.4%): rank 0 of the plan" in fadapt.summary(params)
    assert "adapted: 44.4%" in fadapt.summary(params)


# ---- 1-D parameters and patterns


def test_vectors_are_called_what_they_are() -> None:
    with pytest.raises(TargetError, match=r"only vectors, such as model.*norm.*\(8,\)"):
        fadapt.init(qwen3(), {"norm": L2})


@pytest.mark.parametrize("pattern", ["a{99999999999999}", "(" * 5000 + ")" * 5000], ids=["a", "b"])
def test_patterns_that_re_chokes_on(pattern: str) -> None:
    for make in (lambda: Config({pattern: L2}), lambda: Config(L2, exclude=(pattern,))):
        with pytest.raises(ConfigError, match="not a regular expression") as error:
            make()
        assert len(str(error.value)) < 300


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"^(\w+\.?)*$", r"([a-z]*)*q!", r"(.*)*x$"])
def test_patterns_that_take_for_ever(pattern: str) -> None:
    with pytest.raises(ConfigError, match="takes for ever"):
        Config({pattern: L2})


def test_patterns_with_groups_that_repeat_are_taken() -> None:
    config = {r"^(model\.|layers\.)+\d+\..*(q|k)_(proj)+\.weight$": L2}
    assert len(fadapt.init(qwen3(), config)) == 4
