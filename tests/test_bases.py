"""Every kind of frozen weight that is not an nn.Linear's, and every wrapper around a model.

The reference is the plain model with the merged weights, and, for gradients, the plain model with
the dense weights of the paper's formula written here (LoRA: W + s B A).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
    DenseFallbackWarning,
    DoRA,
    FadaptError,
    LoRA,
    Params,
    TargetError,
)
from tests.models import (
    HIDDEN,
    VOCAB,
    gpt2,
    mlp,
    perturb,
    qwen3,
    qwen3_tied,
    reals,
    seeded,
    tokens,
    trained,
)

L2 = LoRA(r=2, alpha=3.0)
METHODS = [L2, DoRA(r=2), IA3(), IA3FF(), Chain((DoRA(r=2), IA3FF(), LoRA(r=1)))]
per_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)


def lora_weights(params: Params, model: nn.Module) -> dict[str, Tensor]:
    """W + s B A, in the layout of the parameter, differentiable in A and B."""
    weights = {}
    for name, adapter in params.items():
        w, site = model.get_parameter(name).detach(), adapter.site
        ba = adapter.method.scaling * adapter.train["B"] @ adapter.train["A"]
        weights[name] = w + (ba.mT if site.transposed else ba).reshape(w.shape)
    return weights


def loss(out: Any) -> Tensor:
    out = getattr(out, "logits", out)
    return (out * torch.cos(out.detach())).sum()


def check_lora(model: nn.Module, params: Params, *args: Any, tol: float = 1e-9, **kw: Any) -> None:
    """Output and gradient against W + s B A; float64 models."""
    out = fadapt.apply(model, params, *args, **kw)
    ref = functional_call(model, lora_weights(params, model), args, kw, tie_weights=False)
    leaves = fadapt.trainable(params)
    plain = loss(model(*args, **kw))
    assert abs(loss(out) - plain) > 1e-3, "the adapter changes nothing"
    torch.testing.assert_close(loss(out), loss(ref), rtol=tol, atol=tol)
    for a, b in zip(
        torch.autograd.grad(loss(out), leaves), torch.autograd.grad(loss(ref), leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def check_all(model: nn.Module, cfg: Any, *args: Any, tol: float = 1e-9, **kw: Any) -> Params:
    """Identity at the start, and overlay == merged model; float64 models."""
    fresh = fadapt.init(model, cfg)
    start = fadapt.apply(model, fresh, *args, **kw)
    assert torch.equal(_tensor(start), _tensor(model(*args, **kw)))
    params = perturb(fresh)
    out = _tensor(fadapt.apply(model, params, *args, **kw))
    merged = fadapt.merge(model, params)
    ref = _tensor(functional_call(model, merged, args, kw, tie_weights=False))
    torch.testing.assert_close(out, ref, rtol=tol, atol=tol)
    assert (out - _tensor(start)).abs().max() > 1e-4, "the adapter changes nothing"
    grads = torch.autograd.grad(loss(out), fadapt.trainable(params), allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g in grads)
    return params


def _tensor(out: Any) -> Tensor:
    return getattr(out, "logits", out)


# --- GPT-2's transposed weights, embeddings, ties -------------------------------------------------


@per_method
def test_gpt2_conv1d(method: Any) -> None:
    check_all(gpt2().double(), method, tokens(), use_cache=False)


def test_gpt2_conv1d_gradients() -> None:
    model = gpt2().double()
    params = trained(model, {"c_attn|c_proj": L2})
    assert params["transformer.h.0.attn.c_attn.weight"].site.stored_shape == (HIDDEN, 3 * HIDDEN)
    check_lora(model, params, tokens(), use_cache=False)


class Embedded(nn.Module):
    def __init__(self, padding_idx: int | None = None, vocab: int = 11):
        super().__init__()
        self.table = nn.Embedding(vocab, 8, padding_idx=padding_idx)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids)))


IDS = torch.tensor([[1, 2, 3], [10, 0, 3]])


@per_method
@pytest.mark.parametrize("padding", [None, 3])
def test_embedding(method: Any, padding: int | None) -> None:
    model = seeded(Embedded(padding)).double()
    if isinstance(method, LoRA):  # DoRA too: nothing is as long as the vocabulary
        check_all(model, {"table": method}, IDS)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DenseFallbackWarning)
        check_all(model, {"table": method}, IDS)
    changes_input = not isinstance(method, IA3)
    assert bool(caught) == changes_input
    assert all("one-hot input of an embedding" in str(w.message) for w in caught)


@pytest.mark.parametrize("padding", [None, 3, -1])
def test_embedding_gradients(padding: int | None) -> None:
    """The padding token trains nothing, as in F.embedding."""
    model = seeded(Embedded(padding)).double()
    check_lora(model, trained(model, {"table": L2}), IDS)


def test_embedding_never_holds_a_vocabulary_sized_row() -> None:
    model = seeded(Embedded())
    params = trained(model, {"table": L2})
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    with Watch():
        fadapt.apply(model, params, torch.zeros(40, 1, dtype=torch.int64))
    assert largest < 40 * 11


def test_embedding_under_torch_func_and_in_a_stack() -> None:
    model = seeded(Embedded(3)).double()
    members = [trained(model, {"table": m}, seed=s) for s, m in enumerate((L2, LoRA(r=3), IA3()))]

    def f(out: Tensor, _: Any) -> Tensor:
        return loss(out)

    stack = fadapt.stack(members)
    folded = fadapt.run(model, stack, (IDS,), f)
    grads = torch.autograd.grad(folded.sum(), fadapt.trainable(stack))
    alone = [fadapt.run(model, m, (IDS,), f) for m in members]
    torch.testing.assert_close(folded, torch.stack(alone))
    total = sum(g.square().sum() for g in grads)
    leaves = [fadapt.trainable(m) for m in members]
    refs = [torch.autograd.grad(a, own) for a, own in zip(alone, leaves, strict=True)]
    torch.testing.assert_close(total, sum(g.square().sum() for r in refs for g in r))
    train, rest = fadapt.split(members[0])

    def of(train: Any) -> Tensor:
        return fadapt.run(model, fadapt.join(train, rest), (IDS,), f)

    for key, grad in torch.func.grad(of)(train)["table.weight"].items():
        torch.testing.assert_close(grad, refs[0][sorted(train["table.weight"]).index(key)])
    twice = {n: {k: torch.stack([t, 2 * t]) for k, t in v.items()} for n, v in train.items()}
    torch.testing.assert_close(torch.func.vmap(of)(twice)[0], alone[0])
    with pytest.raises(FadaptError, match="one-hot"):
        fadapt.run(model, fadapt.stack([trained(model, {"table": IA3FF()})] * 2), (IDS,), f)


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
def test_embedding_compiled() -> None:
    model = seeded(Embedded()).double()
    params = trained(model, {"table": L2})
    torch.compiler.reset()

    def step(params: Params) -> Tensor:
        return loss(fadapt.apply(model, params, IDS))

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(params), step(params))


def test_embedding_that_renormalises_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(TargetError, match=r"0\.weight.*max_norm"):
        fadapt.apply(model, fadapt.init(model, {"0": L2}), torch.tensor([1]))


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("names", [[EMBED], [HEAD], [EMBED, HEAD]], ids=["embed", "head", "both"])
def test_tied_uses_by_name(names: list[str]) -> None:
    model = qwen3_tied().double()
    assert model.get_parameter(EMBED) is model.get_parameter(HEAD)
    params = trained(model, Config(dict.fromkeys(names, L2), exclude=()))
    assert sorted(params) == sorted(names)
    check_lora(model, params, tokens(), use_cache=False)


def test_fused_qkv() -> None:
    """One weight whose rows are q, k and v: GPT-2's c_attn, Phi-3's qkv_proj."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = seeded(Phi3ForCausalLM(config)).double()
    params = trained(model, {"qkv_proj|gate_up_proj": L2})
    assert params["model.layers.0.self_attn.qkv_proj.weight"].site.out_features == 64
    check_lora(model, params, tokens(), use_cache=False)
    for method in METHODS:
        check_all(model, {"qkv_proj": method}, tokens(), use_cache=False)


# --- Weights inside functions without a rule: the dense fallback, exact and announced -------------


@contextmanager
def fallback(what: str) -> Iterator[None]:
    with pytest.warns(DenseFallbackWarning, match=what):
        yield


class SelfAttention(nn.Module):
    def __init__(self, **kwargs: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@per_method
def test_multihead_attention(method: Any) -> None:
    model, x = seeded(SelfAttention()).double(), reals(2, 5, HIDDEN).double()
    with fallback("multi_head_attention_forward"):
        params = check_all(model, method, x)
    assert set(params) == {"attention.in_proj_weight", "attention.out_proj.weight"}


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
def test_multihead_attention_gradients() -> None:
    model, x = seeded(SelfAttention()).double(), reals(2, 5, HIDDEN).double()
    check_lora(model, trained(model, L2), x)
    apart = seeded(SelfAttention(kdim=HIDDEN, vdim=HIDDEN, bias=False)).double()
    check_lora(apart, trained(apart, L2), x)


CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 6, 6)),
    "groups": (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 6, 6)),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4, padding_mode="circular", padding=1), (2, 4, 9)),
    "conv3d": (nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
}


@per_method
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, method: Any) -> None:
    conv, shape = CONVOLUTIONS[name]
    model = seeded(nn.Sequential(copy.deepcopy(conv))).double()
    with fallback("conv"):
        params = check_all(model, {"^0": method}, reals(*shape).double())
    site = params["0.weight"].site
    assert site.stored_shape == tuple(model[0].weight.shape)
    assert site.in_features * site.out_features == model[0].weight.numel()


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_gradients(name: str) -> None:
    conv, shape = CONVOLUTIONS[name]
    model = seeded(nn.Sequential(copy.deepcopy(conv))).double()
    check_lora(model, trained(model, {"^0": L2}), reals(*shape).double())


# --- Experts --------------------------------------------------------------------------------------


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return seeded(MixtralForCausalLM(config)).double()


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return seeded(Qwen3MoeForCausalLM(config)).double()


MOE = {"mixtral": mixtral, "qwen3_moe": qwen3_moe}
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
per_moe = pytest.mark.parametrize("moe", MOE)
per_implementation = pytest.mark.parametrize(
    "implementation", ["eager", "batched_mm", "grouped_mm"]
)


def moe_model(moe: str, implementation: str) -> nn.Module:
    model = MOE[moe]()
    model.set_experts_implementation(implementation)
    if implementation == "grouped_mm":
        model = model.float()  # its kernel has no float64
    return model


@per_method
@per_implementation
@per_moe
def test_experts(moe: str, implementation: str, method: Any) -> None:
    """All experts at once, each with its own leaves; no dense fallback."""
    model = moe_model(moe, implementation)
    tol = 1e-9 if implementation != "grouped_mm" else 2e-4
    params = check_all(model, {"experts": method}, tokens(), use_cache=False, tol=tol)
    site = params[GATE_UP].site
    assert site.experts == 4
    assert all(len(t) == 4 for t in params[GATE_UP].train.values())
    assert site.stored_shape == tuple(model.get_parameter(GATE_UP).shape)


@per_implementation
@per_moe
def test_expert_gradients(moe: str, implementation: str) -> None:
    model = moe_model(moe, implementation)
    tol = 1e-9 if implementation != "grouped_mm" else 1e-3
    check_lora(
        model, trained(model, {"experts": L2, "q_proj": L2}), tokens(), use_cache=False, tol=tol
    )


def test_experts_start_apart_and_independently() -> None:
    params = fadapt.init(mixtral(), {"experts": L2})
    a = params[GATE_UP].train["A"]
    assert all(not torch.equal(a[0], a[i]) for i in range(1, 4))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_experts_under_torch_func(implementation: str) -> None:
    model = moe_model("qwen3_moe", implementation)
    model.set_attn_implementation("eager")
    error = 1e-8 if implementation == "batched_mm" else 1e-3  # float64 and float32
    tol = {"rtol": error, "atol": error}
    batch = {"input_ids": tokens(), "labels": tokens()}
    members = [trained(model, {"experts": L2}, seed=s) for s in (1, 2)]
    trains, rests = zip(*map(fadapt.split, members), strict=True)

    def f(train: Any) -> Tensor:
        return fadapt.run(model, fadapt.join(train, rests[0]), batch)

    refs = [torch.autograd.grad(fadapt.run(model, m, batch), fadapt.trainable(m)) for m in members]
    got = torch.func.grad(f)(trains[0])
    for a, b in zip(torch.utils._pytree.tree_leaves(got), refs[0], strict=True):
        torch.testing.assert_close(a, b, **tol)
    both = torch.utils._pytree.tree_map(lambda *t: torch.stack(t), *trains)
    with warnings.catch_warnings():
        # The groups differ between the mapped adapters, so Python cannot know them.
        warnings.simplefilter("ignore" if implementation == "grouped_mm" else "error")
        warnings.filterwarnings("ignore", message="There is a performance drop")
        mapped = torch.func.vmap(torch.func.grad(f))(both)
    for i in range(2):
        for a, b in zip(torch.utils._pytree.tree_leaves(mapped), refs[i], strict=True):
            torch.testing.assert_close(a[i], b, **tol)


@per_implementation
def test_a_stack_over_experts_is_refused(implementation: str) -> None:
    model = moe_model("mixtral", implementation)
    stack = fadapt.stack([trained(model, {"experts": L2}, seed=s) for s in (1, 2)])
    model.register_forward_pre_hook(lambda *_: pytest.fail("refused only after the forward began"))
    with pytest.raises(FadaptError, match=r"routing mixes the rows.*one by one"):
        fadapt.run(model, stack, {"input_ids": tokens(), "labels": tokens()})


def test_a_sweep_over_experts_runs_its_adapters_one_by_one() -> None:
    model = moe_model("mixtral", "batched_mm").requires_grad_(False)
    batch = {"input_ids": tokens(), "labels": tokens()}
    kinds = (L2, LoRA(r=3), fadapt.PiSSA(r=2), fadapt.IA3())
    trials = [fadapt.Trial({"experts": m}, lr=1e-2) for m in kinds]
    report = fadapt.sweep(model, trials, [batch], steps=3, eval=[batch])
    assert report.chunk == 1
    for result in report.results:
        assert float(fadapt.run(model, report.params[result.name], batch)) == pytest.approx(
            result.score, rel=1e-9
        )
        assert result.score < float(report.losses[1][report.names.index(result.name)])


def test_stacks_over_experts_give_their_members_back() -> None:
    """At every rank, of all experts."""
    model = moe_model("mixtral", "batched_mm")
    kinds = (L2, LoRA(r=3), fadapt.RsLoRA(r=2), fadapt.PiSSA(r=3), fadapt.PiSSA(r=2))
    members = [trained(model, {"experts": m}, seed=s) for s, m in enumerate(kinds)]
    stack = fadapt.stack(members)
    assert len(stack.groups) == 2
    for member, back in zip(members, fadapt.unstack(stack), strict=True):
        for (name, a), b in zip(member.items(), back.values(), strict=True):
            assert a.method == b.method
            assert a.leaves.keys() == b.leaves.keys()
            assert all(torch.equal(a.leaves[k], b.leaves[k]) for k in a.leaves), name
    # Padded to the larger rank, as in a stack, a member is the same map.
    batch = {"input_ids": tokens(), "labels": tokens()}
    for i, member in enumerate(members):
        (loss,) = fadapt.run(model, fadapt.Stack(fadapt.select(stack, [i]).groups), batch)
        torch.testing.assert_close(loss, fadapt.run(model, member, batch))


def test_a_stack_of_one_is_its_adapter() -> None:
    """Also where a larger one is refused."""
    model = moe_model("mixtral", "batched_mm")
    params = trained(model, {"experts": L2})
    batch = {"input_ids": tokens(), "labels": tokens()}
    (loss,) = fadapt.run(model, fadapt.stack([params]), batch)
    torch.testing.assert_close(loss, fadapt.run(model, params, batch))


def test_a_stack_over_a_convolution_is_refused() -> None:
    model = seeded(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(8, 3)))
    stack = fadapt.stack([trained(model, {"^0": L2}, seed=s) for s in (1, 2)])
    model.register_forward_pre_hook(lambda *_: pytest.fail("refused only after the forward began"))
    with pytest.raises(FadaptError, match=r"kernel of a convolution.*one by one"):
        fadapt.run(model, stack, reals(3, 4, 4), lambda out, _: out.sum())


# --- Wrapped models: works, or is refused; never silently unadapted -------------------------------


def changes(model: nn.Module, params: Params, *args: Any) -> None:
    assert (fadapt.apply(model, params, *args) - model(*args)).abs().max() > 1e-3


def test_compiled_models_are_refused() -> None:
    for compiled in (torch.compile(mlp(), backend="eager"), mlp()):
        if isinstance(compiled, nn.Sequential):
            compiled.compile(backend="eager")
        with pytest.raises(TargetError, match="compile the step"):
            fadapt.init(compiled, L2)
        params = trained(mlp(), L2)
        with pytest.raises(TargetError, match="compile the step"):
            fadapt.apply(compiled, params, reals(3, 8))
    part = nn.Sequential(torch.compile(mlp(), backend="eager"))
    with pytest.raises(TargetError, match="compile the step"):
        fadapt.init(part, L2)


def test_accelerate_offload_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    params = trained(mlp(), L2)
    for offload in (accelerate.cpu_offload, lambda m, d: accelerate.cpu_offload_with_hook(m, d)):
        model = mlp()
        offload(model, torch.device("cpu"))
        for call in (lambda m: fadapt.init(m, L2), lambda m: fadapt.apply(m, params, reals(3, 8))):
            with pytest.raises(TargetError, match="offloading hook of accelerate"):
                call(model)


def test_accelerate_dispatch_to_one_device_works() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = mlp()
    for module in model:
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    params = trained(model, L2)
    changes(model, params, reals(3, 8))
    out = fadapt.apply(model, params, reals(3, 8))
    ref = functional_call(mlp(), fadapt.merge(model, params), (reals(3, 8),))
    torch.testing.assert_close(out, ref)


def test_parametrised_layers_are_refused_or_left_alone() -> None:
    model = mlp()
    torch.nn.utils.parametrizations.orthogonal(model[0])
    with pytest.raises(TargetError, match=r"0\.parametrizations\.weight.*remove_parametrizations"):
        fadapt.init(model, L2)
    changes(model, trained(model, {"^2": L2}), reals(3, 8))
    with pytest.raises(TargetError):
        fadapt.apply(model, trained(mlp(), L2), reals(3, 8))


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
def test_old_weight_norm_is_adapted_where_it_is_stored() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = torch.nn.utils.weight_norm(nn.Linear(8, 8))
    changes(model, trained(model, {"weight_v": L2}), reals(3, 8))


def test_data_parallel_is_refused() -> None:
    for model in (nn.DataParallel(mlp()), nn.Sequential(nn.DataParallel(mlp()))):
        with pytest.raises(TargetError, match=r"pass model\.module"):
            fadapt.init(model, L2)
    with pytest.raises(TargetError, match=r"pass model\.module"):
        fadapt.apply(nn.DataParallel(mlp()), trained(mlp(), L2), reals(3, 8))


def test_peft_models_work() -> None:
    """fadapt adapts the frozen layers under PEFT's, which add their own increment as always."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(qwen3(), config).eval()
    params = trained(model, {r"q_proj\.base_layer": L2, r"v_proj\.weight": DoRA(r=2)})
    out = fadapt.apply(model, params, input_ids=tokens()).logits
    assert (out - model(input_ids=tokens()).logits).abs().max() > 1e-3
    merged = fadapt.merge(model, params)
    kwargs = {"input_ids": tokens()}
    ref = functional_call(model, merged, (), kwargs, tie_weights=False).logits
    torch.testing.assert_close(out, ref, rtol=1e-4, atol=1e-4)


# --- Mixed precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(base: torch.dtype, adapter: torch.dtype, autocast: bool) -> None:
    """Every method: the start is bit-equal, the trained output that of float32 within rounding."""
    from tests.test_quantized import METHODS

    x = reals(4, 16).to(base)
    for name, method in METHODS.items():
        if getattr(method, "statistic", None) is not None:
            continue
        model = mlp(widths=(16, 32, 16)).to(base)
        params = fadapt.init(model, Config(method, dtype=adapter))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(fadapt.apply(model, params, x), model(x)), name
        perturb(params, std=0.1)  # outside: autocast keeps its casts of leaves until its end
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = fadapt.apply(model, params, x)
            (out.float() ** 2).sum().backward()
        assert out.dtype == (torch.bfloat16 if autocast else base)
        wide = copy.deepcopy(model).float()
        ref = fadapt.apply(wide, params.to(dtype=torch.float32), x.float())
        assert (out.float() - ref).abs().max() < 0.04 * ref.abs().max(), name
        for leaf in fadapt.trainable(params):
            assert leaf.grad is not None, name
            assert leaf.grad.dtype == adapter
            assert leaf.grad.isfinite().all(), name


# --- Bad input: an error that names the parameter, before anything runs ---------------------------


def test_uninitialised_weights() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(TargetError, match=r"0\.weight is uninitialised"):
        fadapt.init(model, L2)
    params = trained(nn.Sequential(nn.Tanh(), nn.Linear(8, 8)), L2)
    with pytest.raises(TargetError, match=r"0\.weight is uninitialised"):
        fadapt.apply(model, params, reals(3, 8))


def test_meta_weights_count_but_do_not_run() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    params = fadapt.init(model, L2)
    assert sum(t.numel() for t in fadapt.trainable(params)) == 2 * 2 * (8 + 16)
    with pytest.raises(TargetError, match=r"0\.weight is a meta tensor"):
        fadapt.apply(model, params, torch.zeros(3, 8, device="meta"))
    half = nn.Sequential(nn.Linear(8, 16), model[1])
    with pytest.raises(TargetError, match=r"1\.weight is a meta tensor"):
        fadapt.apply(half, fadapt.init(half, {"^0": L2}), reals(3, 8))


def test_integer_weights_of_an_unknown_layer() -> None:
    model = mlp()
    model[0].weight = nn.Parameter(torch.zeros(32, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"0\.weight holds torch\.int8.*Linear8bitLt"):
        fadapt.init(model, L2)
    with pytest.raises(TargetError, match=r"0\.weight holds torch\.int8"):
        fadapt.apply(model, trained(mlp(), L2), reals(3, 8))


def test_unknown_tensor_classes() -> None:
    """torchao's weights are such."""

    class Codes(Tensor):
        pass

    model = mlp()
    codes = model[0].weight.detach().as_subclass(Codes)
    model[0].weight = nn.Parameter(codes, requires_grad=False)
    assert type(model[0].weight) is Codes
    with pytest.raises(TargetError, match=r"0\.weight is a Codes \(tests\.test_bases\)"):
        fadapt.init(model, L2)
    with pytest.raises(TargetError, match=r"0\.weight is a Codes"):
        fadapt.apply(model, trained(mlp(), L2), reals(3, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_weight(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = value
    with pytest.raises(TargetError, match=r"2\.weight holds 1 NaN or Inf"):
        fadapt.init(model, L2)
    conv = nn.Sequential(nn.Conv2d(2, 2, 2))
    with torch.no_grad():
        conv[0].weight[0, 0, 0, 0] = value
    with pytest.raises(TargetError, match=r"0\.weight holds 1 NaN or Inf"):
        fadapt.init(conv, {"^0": L2})


def test_weights_that_are_no_matrix() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))

    with pytest.raises(TargetError, match=r"token of shape \(1, 1, 8\).*2-D.*None"):
        fadapt.init(Token(), {"token": L2})


def test_checkpoints_of_experts_and_convolutions(tmp_path: Any) -> None:
    moe = mixtral()
    conv = seeded(nn.Sequential(nn.Conv2d(4, 6, 3))).double()
    for i, (model, rule) in enumerate([(moe, "experts"), (conv, "^0")]):
        params = trained(model, {rule: DoRA(r=2)})
        path = tmp_path / f"{i}.safetensors"
        fadapt.save(params, path)
        loaded = fadapt.load(path, model)
        for name, adapter in params.items():
            assert loaded[name].site == adapter.site
            for leaf, tensor in adapter.leaves.items():
                assert torch.equal(loaded[name].leaves[leaf], tensor)


def test_a_wrong_device_is_named() -> None:
    params = fadapt.init(mlp(), L2).to("meta")
    with pytest.raises((ConfigError, TargetError), match=r"0\.weight"):
        fadapt.apply(mlp(), params, reals(3, 8))
