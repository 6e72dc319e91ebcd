"""as_module: what is a parameter, what is state, what a trainer sees, and what the base keeps."""

from __future__ import annotations

import copy
import inspect
import io
import re
from typing import Any

import pytest
import torch
from torch import nn

import fadapt

from . import models
from .test_shared import Bank

METHODS: dict[str, fadapt.Method] = {
    "LoRA": fadapt.LoRA(r=2),
    "DoRA": fadapt.DoRA(r=2),  # with a fixed leaf
    "Chain": fadapt.Chain((fadapt.LoRA(r=2), fadapt.IA3())),  # leaves with dots in their names
    "AntiPaSTO": fadapt.AntiPaSTO(r=4),
    "Bank": Bank(r=4),  # leaves that its sites share
}


def made(method: fadapt.Method, model: nn.Module | None = None) -> Any:
    model = model or models.mlp()
    params = models.perturb(fadapt.init(model, method))
    return model, params, fadapt.as_module(model, params)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_adapted_model_and_holds_the_leaves_alone(name: str) -> None:
    model, params, module = made(METHODS[name])
    x = models.reals(3, 8)
    assert torch.equal(module(x), fadapt.apply(model, params, x))
    assert [p.shape for p in module.parameters()] == [t.shape for t in fadapt.trainable(params)]
    fixed = [t for a in params.values() for t in a.fixed.values()]
    assert sorted(t.numel() for t in module.buffers()) == sorted(t.numel() for t in fixed)
    assert not list(module.children())
    assert all("." not in key for key in module.state_dict())
    back = module.params
    assert back.config == params.config
    for site, adapter in params.items():
        assert back[site].method == adapter.method
        for leaf, tensor in adapter.leaves.items():
            assert torch.equal(back[site].leaves[leaf], tensor)


def test_its_gradients_are_those_of_run_and_the_params_given_stay() -> None:
    model, params, module = made(fadapt.DoRA(r=2))
    before = [t.detach().clone() for t in fadapt.trainable(params)]
    x = models.reals(3, 8)
    module(x).square().mean().backward()
    fadapt.run(model, params, x, lambda out, _: out.square().mean()).backward()
    for own, leaf in zip(module.parameters(), fadapt.trainable(params), strict=True):
        assert torch.equal(own.grad, leaf.grad)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert all(map(torch.equal, before, fadapt.trainable(params)))
    assert not all(map(torch.equal, before, fadapt.trainable(module.params)))
    assert all(p.grad is None for p in model.parameters())


def test_params_are_one_object_that_bound_knows() -> None:
    model, _, module = made(fadapt.LoRA(r=2))
    x = models.reals(3, 8)
    wanted = module(x)
    assert module.params is module.params
    with fadapt.bound(model, module.params):
        assert torch.equal(module(x), wanted)
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("leaf", ["A", "a.b", "a|b", "a/b", "%2F", "a%", "%", "|"])
@pytest.mark.parametrize("site", ["w", "layers.0.q.weight", "a/b.c|d%7C.w"])
def test_names_can_be_read_back(site: str, leaf: str) -> None:
    from fadapt.module import _key

    key = _key(site, leaf)
    assert "." not in key

    def read(part: str) -> str:
        return re.sub("%(..)", lambda m: chr(int(m[1], 16)), part.replace("/", "."))

    assert tuple(map(read, key.split("|"))) == (site, leaf)


def test_state_goes_to_another_module_and_back() -> None:
    model, params, module = made(fadapt.Chain((fadapt.DoRA(r=2), fadapt.IA3())))
    other = fadapt.as_module(model, fadapt.init(model, params.config))
    x = models.reals(3, 8)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def broken(change: str, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    first = next(iter(state))
    if change == "missing":
        del state[first]
    elif change == "unknown":
        state["0.weight"] = state[first]
    elif change == "shape":
        state[first] = state[first][:1]
    elif change == "dtype":
        state[first] = state[first].double()
    elif change == "not a tensor":
        return {**state, first: 1.0}
    return state


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype", "not a tensor"])
def test_half_a_state_is_refused_and_nothing_is_loaded(change: str, strict: bool) -> None:
    _, _, module = made(fadapt.LoRA(r=2))
    before = copy.deepcopy(module.state_dict())
    state = broken(change, {k: t + 1 for k, t in module.state_dict().items()})
    with pytest.raises(fadapt.CheckpointError, match="load_state_dict: "):
        module.load_state_dict(state, strict=strict)
    assert all(torch.equal(t, before[k]) for k, t in module.state_dict().items())


def test_half_a_state_is_refused_within_another_module_too() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.adapted = nn.Linear(2, 2), made(fadapt.LoRA(r=2))[2]

    outer = Outer()
    outer.load_state_dict(outer.state_dict())
    state = {k: t for k, t in outer.state_dict().items() if not k.endswith("0/weight|A")}
    with pytest.raises(fadapt.CheckpointError, match="lacks the keys"):
        outer.load_state_dict(state, strict=False)


def test_a_shared_leaf_is_one_parameter() -> None:
    model = models.mlp(widths=(8, 8, 8))
    params = fadapt.init(model, fadapt.LoRA(r=2))
    train, rest = fadapt.split(params)
    first, second = train
    train[second]["A"] = train[first]["A"]
    shared = models.perturb(fadapt.join(train, rest))
    module = fadapt.as_module(model, shared)
    assert len(list(module.parameters())) == 3 == len(module.state_dict())
    assert module.params[first].train["A"] is module.params[second].train["A"]
    x = models.reals(3, 8)
    module(x).square().mean().backward()
    fadapt.run(model, shared, x, lambda out, _: out.square().mean()).backward()
    assert torch.equal(module.params[first].train["A"].grad, train[first]["A"].grad)
    again = copy.deepcopy(module)
    assert again.params[first].train["A"] is again.params[second].train["A"]


def test_a_deep_copy_shares_the_base_and_nothing_else() -> None:
    model, _, module = made(fadapt.LoRA(r=2))
    module.eval()
    next(module.parameters()).requires_grad_(False)
    x = models.reals(3, 8)
    wanted = module(x)
    again = copy.deepcopy(module)
    assert again.model is model
    assert not again.training
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in module.parameters()
    ]
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    assert torch.equal(again(x), wanted)
    with pytest.raises(fadapt.CheckpointError):
        again.load_state_dict({})


def test_a_copy_of_what_holds_the_base_too_has_one_base() -> None:
    model, _, module = made(fadapt.LoRA(r=2))
    both = nn.ModuleDict({"base": model, "adapted": module})
    again = copy.deepcopy(both)
    assert again["base"] is not model
    assert again["adapted"].model is again["base"]


def test_it_can_be_pickled_with_its_base() -> None:
    _, _, module = made(fadapt.LoRA(r=2))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again) is type(module)
    x = models.reals(3, 8)
    assert torch.equal(again(x), module(x))


class Dropping(nn.Module):
    """Tells whether it trains; with a part that stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)
        self.seen: list[tuple[bool, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((self.training, self.drop.training))
        return self.second(self.drop(self.first(x)))


def test_modes_are_the_modules_own_and_the_base_takes_them_for_a_call() -> None:
    model = Dropping().eval()
    module = fadapt.as_module(model, fadapt.init(model, fadapt.LoRA(r=2)))
    assert not module.training
    x = models.reals(3, 8)
    module(x)
    module.train()
    module(x)
    assert model.seen == [(False, False), (True, True)]
    assert not any(m.training for m in model.modules())
    model.train()
    model.drop.eval()  # as its owner wants it: the modes agree, so nothing is set
    module(x)
    module.eval()
    module(x)
    assert model.seen[2:] == [(True, False), (False, False)]
    assert (model.training, model.drop.training) == (True, False)
    module.train()
    with pytest.raises(RuntimeError):
        module(x[:, :3])
    assert (model.training, model.drop.training) == (True, False)


def test_dropout_of_the_method_follows_the_mode() -> None:
    model = models.mlp()
    params = models.perturb(fadapt.init(model, fadapt.LoRA(r=2, dropout=0.5)))
    module, x = fadapt.as_module(model, params), models.reals(3, 8)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_dtypes_are_the_adapters_alone() -> None:
    model, params, module = made(fadapt.DoRA(r=2))
    scaled = fadapt.as_module(model, fadapt.scale(params, 0.5)).bfloat16()
    wanted = fadapt.scale(params, 0.5).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for site, adapter in wanted.items():
        own = scaled.params[site]
        assert {k: t.dtype for k, t in own.leaves.items()} == {
            k: t.dtype for k, t in adapter.leaves.items()
        }
        assert all(torch.equal(t, own.leaves[k]) for k, t in adapter.leaves.items())
    x = models.reals(3, 8)
    assert torch.equal(scaled(x), fadapt.apply(model, wanted, x))
    assert module.to("cpu") is module


def test_a_trainer_sees_the_bases_signature_and_facts() -> None:
    from transformers.utils.generic import find_labels

    for name in ("qwen3", "bert"):
        model = models.HF[name]()
        module = fadapt.as_module(model, fadapt.init(model, fadapt.LoRA(r=2)))
        cls = type(module)
        assert inspect.signature(module.forward) == inspect.signature(model.forward)
        assert inspect.signature(cls.forward) == inspect.signature(type(model).forward)
        assert find_labels(cls) == find_labels(type(model)) == ["labels"]
        assert cls.__name__ == f"Adapted{type(model).__name__}"
        assert module.config is model.config
        for fact in ("main_input_name", "loss_type", "accepts_loss_kwargs", "generation_config"):
            assert hasattr(module, fact) == hasattr(model, fact)
            assert getattr(module, fact, None) is getattr(model, fact, None)
        assert hasattr(module, "generate") == (name == "qwen3")
    assert cls is type(fadapt.as_module(models.bert(), fadapt.init(models.bert(), fadapt.IA3())))


def test_what_would_run_without_the_adapter_is_not_there() -> None:
    model = models.qwen3()
    module = fadapt.as_module(model, fadapt.init(model, fadapt.LoRA(r=2)))
    with pytest.raises(AttributeError, match="the base's own, without the adapter"):
        module.get_input_embeddings()
    with pytest.raises(AttributeError, match="nonsense"):
        module.nonsense  # noqa: B018


def test_generation_is_adapted() -> None:
    model = models.qwen3()
    params = models.perturb(fadapt.init(model, fadapt.LoRA(r=2)))
    module, ids = fadapt.as_module(model, params), models.tokens()
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    made = module.generate(ids, **options)
    assert torch.equal(made, fadapt.apply(model, params, ids, method="generate", **options))
    assert not torch.equal(made, model.generate(ids, **options))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_has_the_same_gradients_or_is_refused() -> None:
    model = models.qwen3(attn_implementation="eager")
    batch = models.batch_for("qwen3")
    module = fadapt.as_module(model, models.perturb(fadapt.init(model, fadapt.LoRA(r=2)))).train()
    module(**batch).loss.backward()
    wanted = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module.gradient_checkpointing_enable()
    with pytest.raises(fadapt.FadaptError, match=r"module\.model\.train\(\)"):
        module(**batch)
    model.train()
    module(**batch).loss.backward()
    for p, grad in zip(module.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, grad)
    module.eval()
    with torch.no_grad():
        module(**batch)
    module.gradient_checkpointing_disable()


def test_torch_func_and_compile_take_it() -> None:
    _, _, module = made(fadapt.LoRA(r=2))
    x = models.reals(3, 8)
    doubled = {k: 2 * p for k, p in module.named_parameters()}
    with torch.no_grad():
        swapped = torch.func.functional_call(module, doubled, (x,))
        for p in module.parameters():
            p.mul_(2)
    assert torch.equal(swapped, module(x))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_what_is_refused() -> None:
    model, params, _ = made(fadapt.LoRA(r=2))
    with pytest.raises(fadapt.ConfigError, match="stack of 2"):
        fadapt.as_module(model, fadapt.stack([params, params]))
    with pytest.raises(fadapt.ConfigError, match=r"fadapt\.init"):
        fadapt.as_module(model, {"0.weight": 1})
    with pytest.raises(fadapt.ConfigError, match="rest of a split"):
        fadapt.as_module(model, fadapt.split(params)[1])
    with pytest.raises(fadapt.TargetError):
        fadapt.as_module(lambda x: x, params)
    train, rest = fadapt.split(params)
    made_by_graph = {s: {k: t * 2 for k, t in leaves.items()} for s, leaves in train.items()}
    with pytest.raises(fadapt.ConfigError, match="computed from other tensors"):
        fadapt.as_module(model, fadapt.join(made_by_graph, rest))
    other = models.mlp(widths=(8, 16, 8))
    with pytest.raises(fadapt.TargetError):
        fadapt.as_module(other, params)(models.reals(3, 8))
