"""Which parameters a config means, or the error that says what to write instead."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fadapt
from fadapt import IA3, Config, ConfigError, DoRA, FadaptError, LoRA, Method, Params, TargetError
from tests.models import (
    BARE_USES,
    HF,
    Bare,
    SharedModule,
    TiedLinear,
    batch_for,
    bert,
    encoder_layer,
    gpt2,
    llama,
    mlp,
    perturb,
    qwen3,
    qwen3_tied,
    reals,
    seeded,
    tokens,
    vit,
)

L2 = LoRA(r=2)


def names(model: nn.Module, cfg: Any) -> list[str]:
    return list(fadapt.init(model, cfg))


def refused(kind: type[FadaptError], model: nn.Module, cfg: Any, *words: str) -> None:
    with pytest.raises(kind) as error:
        fadapt.init(model, cfg)
    for word in words:
        assert word in str(error.value), f"{word!r} not in: {error.value}"


def methods(model: nn.Module, cfg: Any) -> dict[str, Method]:
    return {name: a.method for name, a in fadapt.init(model, cfg).items()}


# ---- rules


def test_a_bare_method_means_every_linear_map():
    for name, make in HF.items():
        model = make()
        linear = {
            f"{n}.weight"
            for n, m in model.named_modules()
            if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"
        }
        assert set(names(model, L2)) == linear, name


def test_first_match_wins_and_none_leaves_alone():
    a, b, c = LoRA(r=1), LoRA(r=2), LoRA(r=3)
    rules = {r"layers\.0.*q_proj": a, "q_proj": b, "k_proj": None, "self_attn": c}
    found = methods(qwen3(), rules)
    assert found["model.layers.0.self_attn.q_proj.weight"] is a
    assert found["model.layers.1.self_attn.q_proj.weight"] is b
    assert {n for n, m in found.items() if m is c} == {
        f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "vo"
    }
    assert not any("k_proj" in n or "mlp" in n for n in found)


def test_rules_are_searched_not_matched():
    assert names(qwen3(), {"q_pro": L2}) == names(qwen3(), {r"q_proj\.weight$": L2})
    assert names(qwen3(), {"(?i)Q_PROJ": L2}) == names(qwen3(), {"q_proj": L2})


def test_a_name_is_given_in_the_error_for_a_typo():
    refused(TargetError, qwen3(), {"q_porj": L2}, "'q_porj'", "q_proj")
    refused(TargetError, qwen3(), {"atention|self_atn": L2}, "self_attn")
    refused(TargetError, gpt2(), {"q_proj": L2}, "'q_proj'", "c_proj")
    refused(TargetError, bert(), {"quary": L2}, "query")
    # Nothing is near: the names that there are.
    refused(TargetError, mlp(), {"xyzzy": L2}, "0.weight", "2.weight")
    refused(TargetError, nn.Tanh(), {"q": L2}, "no 2-D parameter")
    refused(TargetError, nn.Tanh(), L2, "no 2-D parameter")


def test_dead_rules():
    refused(
        TargetError,
        qwen3(),
        {"self_attn": L2, "q_proj": IA3()},
        "'q_proj'",
        "'self_attn'",
        "first",
    )
    refused(TargetError, qwen3(), {"self_attn": L2, "q_proj": None}, "'q_proj'", "'self_attn'")
    refused(TargetError, qwen3(), {"q_proj": L2, "nope": None}, "'nope'")
    refused(TargetError, qwen3(), {"lm_head": L2}, "'lm_head'", "exclude=()")
    refused(TargetError, qwen3(), {"layernorm": L2}, "'layernorm'")  # 1-D


def test_exclude():
    every = set(names(llama(), L2))
    some = set(names(llama(), Config(L2, exclude=("mlp", "lm_head"))))
    assert some == {n for n in every if "mlp" not in n}
    assert set(names(llama(), Config(L2, exclude="mlp"))) == some | {"lm_head.weight"}
    assert "lm_head.weight" in names(llama(), Config(L2, exclude=()))
    refused(TargetError, llama(), Config(L2, exclude=("mpl",)), "'mpl'", "mlp")
    names(mlp(), Config(L2))  # the default patterns may match nothing


def test_layers():
    def layers(which: Any) -> set[int]:
        found = names(llama(), Config(L2, which))
        return {int(re.search(r"\.(\d+)\.", n).group(1)) for n in found}

    assert layers(None) == {0, 1}
    assert layers((0,)) == layers([-2]) == layers(range(1)) == layers({0}) == {0}
    assert layers([-1]) == layers(i for i in [1]) == {1}
    assert layers([0, -1, 1]) == {0, 1}
    refused(TargetError, llama(), Config(L2, layers=[0, 5]), "5", "0 to 1")
    refused(TargetError, llama(), Config(L2, layers=[-3]), "-3", "0 to 1")
    refused(TargetError, TiedLinear(), Config({"first": L2}, layers=[0]), "no numbered layers")
    rules = Config({"q_proj": L2, "lm_head": L2}, layers=[0], exclude=())
    refused(TargetError, llama(), rules, "'lm_head'", "layers")
    rules = {r"layers\.0": L2, r"layers\.1": L2}
    refused(TargetError, llama(), Config(rules, layers=[1]), "layers", r"'layers\\.0'")


# ---- roles


def roles(model: nn.Module, **config: Any) -> dict[str, str]:
    short: dict[str, str] = {}
    for name, adapter in fadapt.init(model, Config(L2, **config)).items():
        assert (
            short.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "#", name), adapter.site.role)
            == adapter.site.role
        )
    return short


DECODER = {
    "self_attn.q_proj": "reader",
    "self_attn.k_proj": "reader",
    "self_attn.v_proj": "reader",
    "self_attn.o_proj": "writer",
    "mlp.gate_proj": "reader",
    "mlp.up_proj": "reader",
    "mlp.down_proj": "writer",
}


@pytest.mark.parametrize(
    "make",
    [qwen3, llama, qwen3_tied, lambda: qwen3(head_dim=16), lambda: qwen3(head_dim=4)],
    ids=["qwen3", "llama", "tied", "wide heads", "narrow heads"],
)
def test_roles_of_decoders(make):
    assert roles(make()) == {f"model.layers.#.{k}.weight": r for k, r in DECODER.items()}


def test_roles_of_gpt2():
    assert roles(gpt2()) == {
        "transformer.h.#.attn.c_attn.weight": "reader",
        "transformer.h.#.attn.c_proj.weight": "writer",
        "transformer.h.#.mlp.c_fc.weight": "reader",
        "transformer.h.#.mlp.c_proj.weight": "writer",
    }


def test_roles_of_bert():
    layer = "bert.encoder.layer.#."
    assert roles(bert()) == {
        layer + "attention.self.query.weight": "reader",
        layer + "attention.self.key.weight": "reader",
        layer + "attention.self.value.weight": "reader",
        layer + "attention.output.dense.weight": "writer",
        layer + "intermediate.dense.weight": "reader",
        layer + "output.dense.weight": "writer",
        "bert.pooler.dense.weight": "reader",
        "classifier.weight": "reader",
    }


def test_roles_of_vit():
    found = roles(vit())
    assert {r for n, r in found.items() if re.search("q_proj|k_proj|v_proj|fc1", n)} == {"reader"}
    assert {r for n, r in found.items() if re.search("o_proj|fc2", n)} == {"writer"}


def test_roles_of_torch_layers():
    assert roles(encoder_layer()) == {
        "self_attn.in_proj_weight": "reader",
        "self_attn.out_proj.weight": "writer",
        "linear1.weight": "reader",
        "linear2.weight": "writer",
    }
    deep = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    assert set(roles(deep).values()) == {"reader", "writer"}
    assert roles(deep)["layers.#.self_attn.out_proj.weight"] == "writer"
    params = fadapt.init(mlp(widths=(8, 32, 8)), L2)
    assert [a.site.role for a in params.values()] == ["reader", "writer"]
    params = fadapt.init(mlp(widths=(8, 32, 16, 8)), L2)
    assert [a.site.role for a in params.values()] == ["reader", "inner", "writer"]
    square = fadapt.init(nn.Linear(8, 8), L2)["weight"].site
    assert (square.role, bool(square.note)) == ("reader", True)


def test_roles_filter():
    for role in ("reader", "writer"):
        found = names(qwen3(), Config(L2, roles=(role,)))
        wanted = {k.rsplit(".", 1)[1] for k, r in DECODER.items() if r == role}
        assert {n.split(".")[-2] for n in found} == wanted
    assert names(qwen3(), Config(L2, roles="writer")) == names(
        qwen3(), Config(L2, roles=["writer"])
    )
    refused(TargetError, qwen3(), Config({"q_proj": L2}, roles=("writer",)), "writer", "q_proj")
    refused(
        TargetError,
        qwen3(),
        Config({"q_proj": L2, "o_proj": L2}, roles=("writer",)),
        "'q_proj'",
        "roles",
    )


def test_square_guesses_are_in_the_summary():
    text = fadapt.summary(fadapt.init(bert(), L2))
    for line in (
        "attention.output.dense.weight: writer (square 32",
        "attention.self.query.weight: reader (square 32",
        "bert.pooler.dense.weight: reader (square 32",
    ):
        assert line in text
    assert "intermediate.dense.weight:" not in text  # no guess there
    assert "square" not in fadapt.summary(fadapt.init(mlp(), L2))


def test_summary_counts():
    params = fadapt.init(qwen3(), {"q_proj": DoRA(r=2), "down": L2})
    text = fadapt.summary(params)
    assert "model.layers.{0..1}.self_attn.q_proj.weight  x 2" in text
    # 2 layers of r (in + out) + out, and of r (in + out), by hand.
    total = 2 * (2 * (32 + 32) + 32) + 2 * (2 * (48 + 32))
    assert f"4 sites, {total:,} trainable and {2 * 32} fixed values" in text


def test_summary_of_names_that_differ_only_in_hash_signs():
    model = nn.Sequential()
    for name in ("a#", "a1", "a22"):
        model.add_module(name, nn.Linear(8, 8))
    text = fadapt.summary(fadapt.init(model, L2))
    assert "a#.weight" in text


# ---- tied and shared weights


@pytest.mark.parametrize("make", [qwen3_tied, gpt2], ids=["qwen3", "gpt2"])
def test_tied_head_by_name(make):
    model = make()
    params = perturb(fadapt.init(model, Config({"lm_head": L2}, exclude=())))
    assert list(params) == ["lm_head.weight"]
    tied = params["lm_head.weight"].site.tied
    assert len(tied) == 1
    assert "tied to " + tied[0] in fadapt.summary(params)
    # The embedding is unadapted: the hidden states are the base's.
    with torch.no_grad():
        out = fadapt.apply(model, params, tokens(), output_hidden_states=True)
        base = model(tokens(), output_hidden_states=True)
    assert all(map(torch.equal, out.hidden_states, base.hidden_states))
    assert not torch.allclose(out.logits, base.logits)


@pytest.mark.parametrize(
    ("make", "name"),
    [(qwen3_tied, "model.embed_tokens.weight"), (gpt2, "transformer.wte.weight")],
    ids=["qwen3", "gpt2"],
)
def test_tied_embedding_by_name(make, name):
    model = make()
    params = perturb(fadapt.init(model, Config({name: L2}, exclude=())))
    assert list(params) == [name]
    site = params[name].site
    assert (site.in_features, site.out_features, site.tied) == (64, 32, ("lm_head.weight",))
    out = fadapt.apply(model, params, tokens(), output_hidden_states=True)
    # The head is unadapted: logits are the frozen weight's product with the last hidden state.
    head = out.hidden_states[-1] @ model.lm_head.weight.T
    torch.testing.assert_close(out.logits, head)
    a, b = params[name].train["A"], params[name].train["B"]
    adapted = model.get_parameter(name) + params[name].method.scaling * (b @ a).T
    embedded = adapted[tokens()]
    if make is gpt2:
        embedded = embedded + model.transformer.wpe.weight[: tokens().shape[1]]
    torch.testing.assert_close(out.hidden_states[0], embedded)


def test_tied_uses_need_to_be_told_apart():
    for pattern in ("embed_tokens|lm_head", "weight", ""):
        refused(
            TargetError,
            qwen3_tied(),
            Config({pattern: L2}, exclude=()),
            "model.embed_tokens.weight",
            "lm_head.weight",
            "tied",
            "exclude",
        )
    refused(TargetError, qwen3_tied(), Config(L2, exclude=()), "tied", "lm_head", "exclude")
    found = names(qwen3_tied(), Config(L2, exclude=("embed_tokens",)))
    assert "lm_head.weight" in found
    assert names(qwen3_tied(), Config(L2, exclude=("lm_head",))) == names(qwen3_tied(), L2)


def test_tied_uses_with_their_own_rules():
    model = seeded(TiedLinear())
    params = perturb(fadapt.init(model, {"first": L2, "second": LoRA(r=3)}))
    assert {n: a.method.r for n, a in params.items()} == {"first.weight": 2, "second.weight": 3}
    assert params["first.weight"].site.tied == ("second.weight",)
    x = reals(4, 8)

    def by_hand(name: str, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        a, b = params[name].train["A"], params[name].train["B"]
        return x @ (model.first.weight + params[name].method.scaling * b @ a).T + bias

    wanted = by_hand("first.weight", model.first.bias, x)
    wanted = by_hand("second.weight", model.second.bias, wanted.tanh())
    torch.testing.assert_close(fadapt.apply(model, params, x), wanted)
    refused(TargetError, model, L2, "first.weight", "second.weight", "tied")
    both = "first|second"
    refused(TargetError, model, {both: L2}, repr(both), "first.weight", "second.weight")
    one = perturb(fadapt.init(model, {"second": L2}))
    torch.testing.assert_close(
        fadapt.apply(model, one, x),
        functional_call(
            model,
            {
                "second.weight": model.first.weight
                + one["second.weight"].method.scaling
                * (one["second.weight"].train["B"] @ one["second.weight"].train["A"])
            },
            x,
            tie_weights=False,
        ),
    )
    # "Drop it here" is a rule of its own.
    assert names(model, {"second": None, "first|second": L2}) == ["first.weight"]


def test_shared_module():
    model = seeded(SharedModule())
    refused(TargetError, model, {"first": L2}, "first.weight", "second.weight", "same module")
    refused(TargetError, model, {"second": L2}, "first.weight", "second.weight")
    x = reals(4, 8)
    for cfg in (L2, {"first|second": L2}, {r"first\.weight|second\.weight": L2}):
        params = perturb(fadapt.init(model, cfg))
        assert list(params) == ["first.weight"]
        a, b = params["first.weight"].train["A"], params["first.weight"].train["B"]
        w = model.first.weight + L2.scaling * b @ a
        wanted = (x @ w.T + model.first.bias).tanh() @ w.T + model.first.bias
        torch.testing.assert_close(fadapt.apply(model, params, x), wanted)
    assert model.first is model.second


def test_the_advice_for_a_shared_module_works():
    model = seeded(SharedModule())
    with pytest.raises(TargetError) as error:
        fadapt.init(model, {"first": L2})
    advice = re.search(r"Match them all: '(.*)'", str(error.value)).group(1)
    assert names(model, {advice.encode().decode("unicode_escape"): L2}) == ["first.weight"]


# ---- kinds of parameters


@pytest.mark.parametrize("use", BARE_USES)
@pytest.mark.parametrize("method", [L2, DoRA(r=2), IA3(), fadapt.IA3FF()], ids=repr)
def test_bare_parameter(use, method):
    model = seeded(Bare(BARE_USES[use], 8, 8))
    refused(TargetError, model, L2, "W", "name one")
    params = perturb(fadapt.init(model, {"W": method}))
    x = reals(2, 3, 8)
    wanted = functional_call(model, fadapt.merge(model, params), x)
    if use in ("F.linear", "x @ W.T"):
        found = fadapt.apply(model, params, x)
    else:
        with pytest.warns(fadapt.DenseFallbackWarning, match="W"):
            found = fadapt.apply(model, params, x)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, model(x))


def test_embedding_is_adapted_when_named_only():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    assert names(model, L2) == ["1.weight"]
    assert names(model, {"^0": L2, "^1": L2}) == ["0.weight", "1.weight"]
    site = fadapt.init(model, {"^0": L2})["0.weight"].site
    assert (site.in_features, site.out_features, site.kind) == (10, 8, "embedding")


def test_an_alternative_that_names_an_embedding_is_not_dropped():
    cfg = Config({r"q_proj|embed_tokens\.weight": L2}, exclude=())
    assert "model.embed_tokens.weight" in names(qwen3(), cfg)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(3, 8, 8))
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(torch.einsum("bi,eoi->bo", x, self.experts))


def test_3d_parameters():
    model = seeded(Experts())
    assert names(model, L2) == ["experts", "out.weight"]
    assert names(model, {"experts": L2}) == ["experts"]
    assert names(model, {"out": L2}) == ["out.weight"]
    assert names(model, {"experts": None, "": L2}) == ["out.weight"]
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 8))
    assert names(conv, L2) == ["2.weight"]
    assert names(conv, {"^0": L2}) == ["0.weight"]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_are_really_adapted(kind):
    # These modules keep their weights in a list besides.
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(8, 8)

        def forward(self, x):
            return self.rnn(x)[0]

    model, x = seeded(Net()), reals(3, 2, 8)
    params = perturb(fadapt.init(model, {"weight": L2}))
    assert list(params) == ["rnn.weight_hh_l0", "rnn.weight_ih_l0"]
    before = model(x)
    with pytest.warns(fadapt.DenseFallbackWarning):
        found = fadapt.apply(model, params, x)
    with torch.no_grad():
        plain = seeded(Net())
        plain.load_state_dict(fadapt.merge(model, params), strict=False)
        torch.testing.assert_close(found, plain(x))
    assert not torch.allclose(found, before)
    assert torch.equal(model(x), before)


def parametrised(kind: str) -> nn.Module:
    layer = nn.Linear(8, 8)
    if kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(layer)
    elif kind == "spectral_norm":
        nn.utils.parametrizations.spectral_norm(layer)
    else:
        nn.utils.parametrizations.orthogonal(layer)
    return nn.Sequential(layer, nn.Linear(8, 8))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("cfg", [L2, {"^0": L2}], ids=["all", "named"])
def test_parametrised_layers_are_refused(kind, cfg):
    # The weight is computed from other parameters: neither they nor the layer can be adapted.
    refused(TargetError, parametrised(kind), cfg, "parametri", "remove_parametrizations")
    assert names(parametrised(kind), {"^0": None, "^1": L2}) == ["1.weight"]


def test_uninitialised_modules():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    refused(TargetError, model, L2, "0.weight", "lazy", "run the model once")
    model(reals(2, 4))
    assert names(model, L2) == ["0.weight", "1.weight"]


def test_weights_that_are_not_floating():
    model = mlp()
    model[0].weight = nn.Parameter(torch.ones(32, 8, dtype=torch.int8), requires_grad=False)
    refused(TargetError, model, L2, "0.weight", "int8")
    assert names(model, {"^2": L2}) == ["2.weight"]
    model[0].weight = nn.Parameter(torch.ones(32, 8, dtype=torch.complex64))
    refused(TargetError, model, L2, "0.weight", "complex64")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_in_a_base_weight(value):
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 2] = value
        model[2].weight[3, 4] = -value
    refused(TargetError, model, L2, "2.weight", "2 NaN or Inf")
    assert names(model, {"^0": L2}) == ["0.weight"]
    huge = mlp().double()
    with torch.no_grad():
        huge[0].weight.fill_(1e300)  # finite, though not in float32
    names(huge, L2)


def test_half_precision_sums_do_not_overflow():
    model = nn.Linear(256, 256).half()
    with torch.no_grad():
        model.weight.fill_(60000)
    names(model, L2)


def test_shapes_that_a_method_refuses_name_the_site():
    class OnlySquare(LoRA):
        def check(self, site):
            if site.in_features != site.out_features:
                raise ConfigError("needs a square weight")

    refused(ConfigError, mlp(), OnlySquare(r=1), "0.weight", "32 x 8", "square")


# ---- meta and wrapped models


def test_meta_model():
    with torch.device("meta"):
        meta = mlp()
    real = mlp()
    params = fadapt.init(meta, DoRA(r=2))
    assert all(t.is_meta for t in fadapt.trainable(params))
    assert fadapt.summary(params) == fadapt.summary(fadapt.init(real, DoRA(r=2)))
    with pytest.raises(TargetError, match="meta"):
        fadapt.apply(meta, params, reals(2, 8))
    with pytest.raises(FadaptError, match="meta"):
        fadapt.apply(meta, fadapt.init(real, L2), reals(2, 8))


def test_meta_params_for_a_real_model():
    # There are no values to move: params.to("cpu") would not work.
    params = fadapt.init(mlp().to("meta"), L2)
    with pytest.raises(FadaptError, match="meta") as error:
        fadapt.apply(mlp(), params, reals(2, 8))
    assert "init" in str(error.value)
    assert "params.to(" not in str(error.value)


def test_compiled_and_parallel_models():
    refused(TargetError, torch.compile(mlp()), L2, "_orig_mod", "fadapt.run")
    refused(TargetError, nn.DataParallel(mlp()), L2, "model.module")
    refused(TargetError, mlp().state_dict(), L2, "Module")  # type: ignore[arg-type]
    refused(TargetError, "gpt2", L2, "Module")  # type: ignore[arg-type]
    params = fadapt.init(mlp(), L2)
    for wrapped in (torch.compile(mlp()), nn.DataParallel(mlp())):
        with pytest.raises(TargetError):
            fadapt.apply(wrapped, params, reals(2, 8))


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="eager")
    return model


def compiled_inside() -> nn.Module:
    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")
    return model


@pytest.mark.parametrize("make", [compiled_in_place, compiled_inside])
def test_models_compiled_in_part_or_in_place(make):
    model = make()
    refused(TargetError, model, L2, "compile", "fadapt.run")
    with pytest.raises(TargetError, match="compile"):
        fadapt.apply(model, fadapt.init(mlp(), L2), reals(2, 8))
    assert torch.equal(model(reals(2, 8)), mlp()(reals(2, 8)))


def test_scripted_models():
    refused(TargetError, torch.jit.trace(mlp(), reals(2, 8)), {"^0": L2}, "cript")


def test_default_device_is_not_read():
    # As after torch.set_default_device("cuda").
    model = mlp()
    wanted = fadapt.init(model, DoRA(r=2))
    with torch.device("meta"):
        found = fadapt.init(model, DoRA(r=2))
    for a, b in zip(fadapt.trainable(found), fadapt.trainable(wanted), strict=True):
        assert torch.equal(a, b)


# ---- values of a Config


def test_a_class_instead_of_an_instance():
    refused(ConfigError, mlp(), LoRA, "LoRA()", "class")
    refused(ConfigError, mlp(), {"0": LoRA}, "'0'", "LoRA")
    refused(ConfigError, mlp(), Config, "Config")


def test_rules_of_the_wrong_type():
    refused(ConfigError, mlp(), {}, "empty")
    refused(ConfigError, mlp(), None, "None", "LoRA(r=8)")
    refused(ConfigError, mlp(), "lora", "'lora'", "LoRA(r=8)")
    refused(ConfigError, mlp(), [L2], "LoRA", "regex")
    refused(ConfigError, mlp(), {"0": "lora"}, "'0'", "'lora'")
    refused(ConfigError, mlp(), {"0": 8}, "'0'", "LoRA(r=8)")


@pytest.mark.parametrize("pattern", ["(", "*_proj", "[", r"a{2,1}", None, 3, b"0"])
def test_patterns_that_do_not_compile(pattern):
    with pytest.raises(ConfigError) as error:
        fadapt.init(mlp(), {pattern: L2})
    assert repr(pattern) in str(error.value)
    with pytest.raises(ConfigError):
        fadapt.init(mlp(), Config(L2, exclude=(pattern,)))


def test_compiled_pattern_is_refused():
    # It could be searched, but neither hashed into a treespec's config nor saved as JSON.
    refused(ConfigError, mlp(), {re.compile("^0"): L2}, "^0", "str")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dtype", "bfloat16", ["torch", "'bfloat16'"]),
        ("dtype", torch.int8, ["int8", "floating"]),
        ("dtype", float, ["float"]),
        ("layers", 0, ["layers", "0", "[0]"]),
        ("layers", "0", ["layers", "'0'"]),
        ("layers", [0.0], ["layers", "0.0"]),
        ("layers", [], ["layers", "None"]),
        ("layers", [True], ["layers", "True"]),
        ("roles", ("readers",), ["readers", "reader", "writer", "inner"]),
        ("roles", None, ["roles"]),
        ("roles", 1, ["roles"]),
        ("exclude", None, ["exclude", "()"]),
        ("exclude", 5, ["exclude"]),
        ("seed", 0.5, ["seed", "0.5"]),
        ("seed", "1", ["seed", "'1'"]),
        ("seed", None, ["seed", "None"]),
    ],
)
def test_bad_config_values(field, value, words):
    with pytest.raises(ConfigError) as error:
        Config(L2, **{field: value})
    for word in words:
        assert word in str(error.value), f"{word!r} not in: {error.value}"


@pytest.mark.parametrize("bad", [{"r": 0}, {"r": -1}, {"r": 1.5}, {"r": "8"}, {"r": None}])
@pytest.mark.parametrize("kind", [LoRA, fadapt.RsLoRA, DoRA])
def test_bad_ranks(kind, bad):
    with pytest.raises(ConfigError, match=re.escape(repr(bad["r"]))):
        kind(**bad)


def test_config_is_a_value():
    a, b = (Config({"0": L2}, layers=[0], exclude=["x"], roles="reader") for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    rules = {"^0": L2}
    config = Config(rules)
    before = hash(config)
    rules["^2"] = L2  # the caller's dict is the caller's
    assert hash(config) == before
    assert names(mlp(), config) == ["0.weight"]


# ---- init and the model's state


def test_init_inside_bound():
    model = mlp()
    params = perturb(fadapt.init(model, L2))
    with fadapt.bound(model, params), pytest.raises(FadaptError, match="bound"):
        fadapt.init(model, L2)
    names(model, L2)


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
def test_init_waits_for_a_run_in_another_thread():
    # The run sees other weights, and init must not.
    model = mlp()
    params = perturb(fadapt.init(model, L2))
    wanted = fadapt.init(model, DoRA(r=2))
    inside, go, results = threading.Event(), threading.Event(), []

    def hold(*_: Any) -> None:
        inside.set()
        go.wait(20)

    def init() -> None:
        try:
            results.append(fadapt.init(model, DoRA(r=2)))
        except Exception as error:
            results.append(error)

    handle = model[0].register_forward_hook(hold)
    runner = threading.Thread(target=fadapt.apply, args=(model, params, reals(1, 8)))
    other = threading.Thread(target=init)
    runner.start()
    assert inside.wait(20)
    other.start()
    other.join(0.3)
    go.set()
    other.join(20)
    runner.join(20)
    handle.remove()
    assert isinstance(results[0], Params), results
    for name, adapter in results[0].items():
        assert adapter.site == wanted[name].site
        assert torch.equal(adapter.fixed["w2"], wanted[name].fixed["w2"])


@pytest.mark.parametrize("name", HF)
def test_init_reads_only(name):
    model = HF[name]()
    before = {k: (id(p), p.requires_grad, p._version) for k, p in model.named_parameters()}
    values = {k: p.detach().clone() for k, p in model.named_parameters()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    params = fadapt.init(model, DoRA(r=2))
    assert torch.equal(torch.get_rng_state(), state)
    batch = batch_for(name)
    with torch.no_grad():
        assert torch.equal(fadapt.run(model, params, batch), model(**batch).loss)
    assert {k: (id(p), p.requires_grad, p._version) for k, p in model.named_parameters()} == before
    assert all(torch.equal(values[k], p) for k, p in model.named_parameters())


def test_init_of_another_models_params_is_refused_by_run():
    params = fadapt.init(qwen3(), L2)
    with pytest.raises(TargetError, match=r"model\.layers\.0\..*another model"):
        fadapt.run(bert(), params, batch_for("bert"))
    with pytest.raises(TargetError, match=r"\(32, 8\).*\(16, 8\)"):
        fadapt.apply(mlp(), fadapt.init(mlp(widths=(8, 16, 8)), L2), reals(2, 8))
    for wrong in (None, {}, L2, fadapt.split(params)[0]):
        with pytest.raises(FadaptError):
            fadapt.run(qwen3(), wrong, batch_for("qwen3"))  # type: ignore[arg-type]


def test_initial_values_are_local():
    every = fadapt.init(llama(), Config(L2, seed=5))
    one = fadapt.init(llama(), Config({"nothing|up_proj": L2}, layers=[1], seed=5))
    for name, adapter in one.items():
        assert torch.equal(adapter.train["A"], every[name].train["A"])
    other = fadapt.init(llama(), Config(L2, seed=6))
    assert not any(torch.equal(every[n].train["A"], other[n].train["A"]) for n in every)
