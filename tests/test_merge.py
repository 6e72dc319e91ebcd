"""merge: new weights that make the plain model the adapted one."""

from __future__ import annotations

import copy
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fadapt
from fadapt import (
    IA3,
    IA3FF,
    Chain,
    Config,
    ConfigError,
    DoRA,
    FadaptError,
    LoRA,
    RsLoRA,
    TargetError,
)
from tests.models import (
    HF,
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
    trained,
)

METHODS = [LoRA(r=2), RsLoRA(r=3), DoRA(r=2), IA3(), IA3FF(), Chain((DoRA(r=2), IA3FF(), IA3()))]
BY_NAME = [repr(m).split("(")[0] for m in METHODS]


def formula(adapter: fadapt.Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The papers' dense formulas in float64; w is (out, in)."""
    p = {k: t.detach().double() for k, t in adapter.leaves.items()}
    method, w = adapter.method, w.detach().double()
    b = None if b is None else b.detach().double()
    if isinstance(method, IA3):
        gain = 1 + p["d"]
        return gain[:, None] * w, None if b is None else gain * b
    if isinstance(method, IA3FF):
        return w * (1 + p["d"]), b
    assert isinstance(method, LoRA)
    scale = method.alpha / (method.r**0.5 if isinstance(method, RsLoRA) else method.r)
    new = w + scale * (p["B"] @ p["A"])
    if isinstance(method, DoRA):
        magnitude = w.norm(dim=1) * (1 + p["mu"])
        new = (magnitude / new.norm(dim=1))[:, None] * new
    return new, b


# ---- the merged model is the adapted one


@pytest.mark.parametrize("method", METHODS, ids=BY_NAME)
@pytest.mark.parametrize("name", HF)
def test_merged_model_is_run(name, method):
    model = HF[name]().double()
    params, batch = trained(model, method), batch_for(name)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].double()
    merged = fadapt.merge(model, params)
    with torch.no_grad():
        wanted = fadapt.apply(model, params, **batch)
        found = functional_call(model, merged, (), batch, tie_weights=False)
        base = model(**batch)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.loss, fadapt.run(model, params, batch), rtol=1e-9, atol=1e-9)
    assert (wanted.logits - base.logits).abs().max() > 1e-2


@pytest.mark.parametrize("method", METHODS, ids=BY_NAME)
@pytest.mark.parametrize("make", [llama, bert, gpt2], ids=lambda f: f.__name__)
def test_loaded_by_load_state_dict(make, method):
    model = make()
    params = trained(model, method)
    batch = batch_for(make.__name__)
    plain = copy.deepcopy(model)
    result = plain.load_state_dict(fadapt.merge(model, params), strict=False)
    assert result.unexpected_keys == []
    with torch.no_grad():
        torch.testing.assert_close(
            plain(**batch).logits,
            fadapt.apply(model, params, **batch).logits,
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("method", METHODS[:-1], ids=BY_NAME[:-1])
@pytest.mark.parametrize("make", [llama, bert, gpt2, encoder_layer, mlp], ids=lambda f: f.__name__)
def test_merged_is_the_formula_of_the_paper(make, method):
    model = make().double()
    params = trained(model, method)
    merged = fadapt.merge(model, params)
    named = dict(model.named_parameters())
    expected = {}
    for name, adapter in params.items():
        bias = adapter.site.bias
        weight = named[name].T if adapter.site.transposed else named[name]
        new, new_bias = formula(adapter, weight, named[bias] if bias else None)
        expected[name] = new.T if adapter.site.transposed else new
        if isinstance(method, IA3) and bias:
            expected[bias] = new_bias
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(r=2), IA3FF()], ids=repr)
def test_merged_torch_layer(method):
    model, x = encoder_layer().double(), reals(2, 5, 32, dtype=torch.float64)
    params = trained(model, method)
    found = functional_call(model, fadapt.merge(model, params), x)
    torch.testing.assert_close(found, fadapt.apply(model, params, x), rtol=1e-10, atol=1e-10)


def test_merged_with_strength():
    model, x = mlp().double(), reals(3, 8, dtype=torch.float64)
    params = trained(model, DoRA(r=2))
    for c in (0.0, 0.5, -1.0, 2):
        scaled = fadapt.scale(params, c)
        found = functional_call(model, fadapt.merge(model, scaled), x)
        torch.testing.assert_close(found, fadapt.apply(model, scaled, x), rtol=1e-10, atol=1e-10)
    for name, value in fadapt.merge(model, fadapt.scale(params, 0)).items():
        torch.testing.assert_close(value, model.get_parameter(name), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS, ids=BY_NAME)
def test_untrained_merge_is_the_base(dtype, method):
    # A float64 round trip of a float32 weight is exact, beside a bias of its size.
    model = mlp().to(dtype)
    for name, value in fadapt.merge(model, fadapt.init(model, method)).items():
        assert torch.equal(value, model.get_parameter(name)), name


def test_small_weights_beside_a_large_bias():
    # W' = f(I) - f(0) cancels the bias; float32 must not lose the weight in that.
    model = mlp()
    with torch.no_grad():
        model[0].bias.fill_(1000.0)
        model[0].weight.mul_(1e-3)
    params = trained(model, LoRA(r=2, alpha=1e-3))
    new, _ = formula(params["0.weight"], model[0].weight, None)
    found = fadapt.merge(model, params)["0.weight"]
    torch.testing.assert_close(found, new.float(), rtol=2**-23, atol=0)


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("method", [LoRA(r=2), RsLoRA(r=3), IA3(), IA3FF()], ids=repr)
def test_computed_in_double_and_rounded_once(dtype, adapter_dtype, method):
    model = mlp(widths=(64, 96, 32)).to(dtype)
    params = trained(model, Config(method, dtype=adapter_dtype))
    merged = fadapt.merge(model, params)
    for name, adapter in params.items():
        bias = model.get_parameter(adapter.site.bias)
        new, new_bias = formula(adapter, model.get_parameter(name), bias)
        assert merged[name].dtype is dtype
        assert torch.equal(merged[name], new.to(dtype))
        if isinstance(method, IA3):
            assert torch.equal(merged[adapter.site.bias], new_bias.to(dtype))


def test_dora_rounded_once():
    # The row norms are stored in float32, so a value within 1e-6 of a tie may round the other way.
    model = mlp(widths=(64, 96, 32)).bfloat16()
    params = trained(model, DoRA(r=2))
    for name, value in fadapt.merge(model, params).items():
        new, _ = formula(params[name], model.get_parameter(name), None)
        assert (value != new.bfloat16()).float().mean() < 1e-3
        torch.testing.assert_close(value.double(), new, rtol=2**-8, atol=0)


# ---- what comes back, and what stays


def layout(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.device, t.shape, t.stride(), t.is_contiguous(), t.requires_grad


@pytest.mark.parametrize("method", METHODS, ids=BY_NAME)
@pytest.mark.parametrize("make", [gpt2, lambda: llama().double()], ids=["gpt2", "fp64 llama"])
def test_new_tensors(make, method):
    model = make()
    params = fadapt.init(model, method)
    merged = fadapt.merge(model, params)
    taken = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    taken |= {t.untyped_storage().data_ptr() for a in params.values() for t in a.leaves.values()}
    pointers = [t.untyped_storage().data_ptr() for t in merged.values()]
    assert not taken & set(pointers)
    assert len(set(pointers)) == len(pointers)
    for name, value in merged.items():
        weight = model.get_parameter(name)
        assert layout(value) == layout(weight.detach()), name
        assert value.grad_fn is None
        assert not isinstance(value, nn.Parameter)
        assert value.untyped_storage().nbytes() == weight.untyped_storage().nbytes()


@dataclass(frozen=True)
class SameWeight(fadapt.Method):
    """A method whose own dense returns what it was given."""

    acts_on_bias = True

    def init(self, site, rng, stat=None):
        return {"a": site.zeros(1)}, {}

    def delta(self, p, x, y, base):
        return p["a"] * y

    def dense(self, p, base):
        return base.weight(), base.bias


@pytest.mark.parametrize("make", [lambda: mlp().double(), lambda: gpt2().double()])
def test_new_tensors_also_from_a_methods_own_dense(make):
    model = make()
    taken = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for name, value in fadapt.merge(model, fadapt.init(model, SameWeight())).items():
        assert torch.equal(value, model.get_parameter(name))
        assert value.untyped_storage().data_ptr() not in taken, name


@pytest.mark.parametrize("name", HF)
def test_nothing_changes(name):
    model = HF[name]()
    params = trained(model, {"": Chain((DoRA(r=2), IA3()))})
    model.train()
    state = torch.get_rng_state()
    before = {
        k: (id(t), t.requires_grad, t._version, t.detach().clone(), t.grad)
        for k, t in [*model.named_parameters(), *model.named_buffers()]
    }
    leaves = [(id(t), t._version, t.requires_grad, t.grad) for t in fadapt.trainable(params)]
    fadapt.merge(model, params)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert after.keys() == before.keys()
    for k, (ident, requires_grad, version, value, grad) in before.items():
        t = after[k]
        assert (id(t), t.requires_grad, t._version, t.grad) == (ident, requires_grad, version, grad)
        assert torch.equal(t, value)
    assert [
        (id(t), t._version, t.requires_grad, t.grad) for t in fadapt.trainable(params)
    ] == leaves
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_default_device_is_not_read():
    model = mlp()
    params = trained(model, DoRA(r=2))
    wanted = fadapt.merge(model, params)
    with torch.device("meta"):
        found = fadapt.merge(model, params)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


# ---- tied and shared weights


@pytest.mark.parametrize("make", [qwen3_tied, gpt2], ids=["qwen3", "gpt2"])
def test_tied_head(make):
    model = make()
    params = trained(model, Config({"lm_head": LoRA(r=2)}, exclude=()))
    with pytest.warns(fadapt.FadaptWarning, match="tied") as caught:
        merged = fadapt.merge(model, params)
    said = str(caught[0].message)
    for word in ("lm_head.weight", params["lm_head.weight"].site.tied[0], "ntie"):
        assert word in said
    assert caught[0].filename == __file__
    assert list(merged) == ["lm_head.weight"]
    batch = {"input_ids": tokens(), "labels": tokens()}
    with torch.no_grad():
        found = functional_call(model, merged, (), batch, tie_weights=False)
        wanted = fadapt.apply(model, params, **batch)
    torch.testing.assert_close(found.logits, wanted.logits)
    torch.testing.assert_close(found.loss, wanted.loss)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_untied_as_the_warning_says():
    model = qwen3_tied()
    params = trained(model, Config({"lm_head": LoRA(r=2), "q_proj": DoRA(r=2)}, exclude=()))
    with pytest.warns(fadapt.FadaptWarning, match="tied"):
        merged = fadapt.merge(model, params)
    plain = copy.deepcopy(model)
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.detach().clone())
    plain.config.tie_word_embeddings = False
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(
        plain(tokens()).logits, fadapt.apply(model, params, tokens()).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
def test_tied_embedding_and_head_with_their_own_rules():
    model = qwen3_tied()
    rules = {"lm_head": LoRA(r=2), "embed_tokens": LoRA(r=3)}
    params = trained(model, Config(rules, exclude=()))
    with pytest.warns(fadapt.FadaptWarning, match="tied"):
        merged = fadapt.merge(model, params)
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    found = functional_call(model, merged, (tokens(),), tie_weights=False)
    torch.testing.assert_close(found.logits, fadapt.apply(model, params, tokens()).logits)


def test_tied_linear_maps():
    model, x = seeded(TiedLinear()), reals(3, 8)
    params = trained(model, {"first": LoRA(r=2), "second": IA3()})
    with pytest.warns(fadapt.FadaptWarning, match="tied") as caught:
        merged = fadapt.merge(model, params)
    assert len(caught) == 2
    assert merged.keys() == {"first.weight", "second.weight", "second.bias"}
    found = functional_call(model, merged, x, tie_weights=False)
    torch.testing.assert_close(found, fadapt.apply(model, params, x))


def test_untied_and_shared_models_merge_without_a_warning():
    model, x = seeded(SharedModule()), reals(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = trained(model, DoRA(r=2))
        merged = fadapt.merge(model, params)
        fadapt.merge(qwen3_tied(), fadapt.init(qwen3_tied(), LoRA(r=2)))
    wanted = fadapt.apply(model, params, x)
    torch.testing.assert_close(functional_call(model, merged, x, tie_weights=False), wanted)
    plain = copy.deepcopy(model)
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(plain(x), wanted)
    assert plain.first is plain.second


# ---- refusals


def test_inside_bound():
    model = mlp()
    params = trained(model, LoRA(r=2))
    wanted = fadapt.merge(model, params)
    with fadapt.bound(model, params), pytest.raises(FadaptError, match="bound"):
        fadapt.merge(model, params)
    found = fadapt.merge(model, params)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
def test_merge_during_a_run_in_another_thread():
    # The run sees other weights, and merge must not.
    model = mlp()
    params = trained(model, LoRA(r=2))
    wanted = fadapt.merge(model, params)
    inside, go, results = threading.Event(), threading.Event(), []

    def hold(*_: Any) -> None:
        inside.set()
        go.wait(20)

    def merge() -> None:
        try:
            results.append(fadapt.merge(model, params))
        except Exception as error:
            results.append(error)

    handle = model[0].register_forward_hook(hold)
    runner = threading.Thread(target=fadapt.apply, args=(model, params, reals(1, 8)))
    other = threading.Thread(target=merge)
    runner.start()
    assert inside.wait(20)
    other.start()
    other.join(0.3)
    go.set()
    other.join(20)
    runner.join(20)
    handle.remove()
    assert isinstance(results[0], dict), results
    assert all(torch.equal(results[0][k], wanted[k]) for k in wanted)


def test_another_models_params():
    params = trained(mlp(), LoRA(r=2))
    with pytest.raises(TargetError, match=r"0\.weight.*\(16, 8\).*\(32, 8\)"):
        fadapt.merge(mlp(widths=(8, 16, 8)), params)
    with pytest.raises(TargetError, match=r"0\.weight.*missing.*Linear"):
        fadapt.merge(nn.Linear(8, 32), params)
    with pytest.raises(TargetError, match="missing"):
        fadapt.merge(bert(), trained(qwen3(), LoRA(r=2)))


def test_a_base_with_and_without_biases():
    # The bias is part of the map that IA3 scales.
    with_bias, without = mlp(), mlp(bias=False)
    with pytest.raises(TargetError, match=r"0\.bias"):
        fadapt.merge(without, trained(with_bias, IA3()))
    with pytest.raises(TargetError, match=r"0\.bias|bias"):
        fadapt.merge(with_bias, trained(without, IA3()))


def test_wrapped_models():
    params = trained(mlp(), LoRA(r=2))
    with pytest.raises(TargetError, match="_orig_mod"):
        fadapt.merge(torch.compile(mlp()), params)
    with pytest.raises(TargetError, match=r"model\.module"):
        fadapt.merge(nn.DataParallel(mlp()), params)
    with pytest.raises(TargetError, match="Module"):
        fadapt.merge(mlp().state_dict(), params)
    with pytest.raises(FadaptError, match="params"):
        fadapt.merge(mlp(), {"0.weight": torch.zeros(2)})
    with pytest.raises(FadaptError, match="params"):
        fadapt.merge(mlp(), fadapt.split(params)[0])


def test_meta_params_have_nothing_to_merge():
    # A product of a real and a meta tensor may return uninitialised memory.
    with pytest.raises(FadaptError, match="meta"):
        fadapt.merge(mlp(), fadapt.init(mlp().to("meta"), LoRA(r=2)))
    with pytest.raises(FadaptError, match="meta"):
        fadapt.merge(mlp().to("meta"), fadapt.init(mlp(), LoRA(r=2)))


# What no weight can stand for, and what load_state_dict would not do


@dataclass(frozen=True)
class AddedBias(fadapt.Method):
    """A bias for layers with and without one."""

    acts_on_bias = True

    def init(self, site, rng, stat=None):
        return {"b": site.zeros(site.out_features)}, {}

    def delta(self, p, x, y, base):
        return p["b"].expand_as(y)


@dataclass(frozen=True)
class Bent(fadapt.Method):
    """Not affine in x."""

    acts_on_bias = True

    def init(self, site, rng, stat=None):
        return {"v": site.zeros(site.out_features)}, {}

    def delta(self, p, x, y, base):
        return p["v"] * y.tanh()


def test_a_new_bias_is_returned_and_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4))
    params = perturb(fadapt.init(model, AddedBias()), std=1.0)
    x = torch.randn(3, 6)
    want = fadapt.apply(model, params, x)
    with pytest.warns(fadapt.FadaptWarning, match=r"0.bias is new.*get_submodule\('0'\)\.bias ="):
        merged = fadapt.merge(model, params)
    assert sorted(merged) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    called = torch.func.functional_call(model, merged, (x,), tie_weights=False)
    torch.testing.assert_close(called, want)
    model.get_submodule("0").bias = nn.Parameter(merged["0.bias"])
    model.load_state_dict(merged, strict=False)
    torch.testing.assert_close(model(x), want)


def test_a_bias_that_cannot_be_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 5))
    params = perturb(fadapt.init(model, {"0": AddedBias()}), std=1.0)
    with pytest.raises(ConfigError, match=r"adds a bias at 0\.weight, and this Embedding"):
        fadapt.merge(model, params)


@pytest.mark.parametrize("bias", [True, False])
def test_a_method_that_is_not_affine_is_refused(bias) -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=bias))
    params = perturb(fadapt.init(model, Bent()), std=0.5)
    with pytest.raises(ConfigError, match=r"Bent\(\) at 0\.weight is not affine"):
        fadapt.merge(model, params)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, "float16", 5])
def test_a_dtype_that_is_no_weights_is_refused(dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ConfigError, match="dtype"):
        fadapt.merge(model, fadapt.init(model, LoRA(r=1)), dtype=dtype)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def test_the_untie_step_that_the_warning_names_works() -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(9)
    params = perturb(fadapt.init(model, fadapt.Config({"head": LoRA(r=2)}, exclude=())), std=1.0)
    want = fadapt.apply(model, params, ids)
    with pytest.warns(fadapt.FadaptWarning, match="tied") as caught:
        merged = fadapt.merge(model, params)
    step = str(caught[0].message).split("before loading it: ")[1]
    exec(step, {"model": model, "torch": torch})
    model.load_state_dict(merged, strict=False)
    torch.testing.assert_close(model(ids), want)
