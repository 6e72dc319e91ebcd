"""Stacks: the fold equals a loop and vmap(run); members stay apart to the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fadapt
from fadapt.fold import fold
from tests.helpers import make, make_batch, trained

MIX = (
    fadapt.LoRA(r=2),
    fadapt.LoRA(r=5, alpha=3.0),
    fadapt.DoRA(r=2),
    fadapt.IA3(),
    fadapt.RsLoRA(r=3),
    {"attn|attention": fadapt.IA3FF()},
    fadapt.DoRA(r=3, alpha=2.0),
    {r"\.1\.": fadapt.LoRA(r=2)},
    fadapt.Chain((fadapt.LoRA(r=2), fadapt.IA3())),
)
NAMES = ("gpt2", "qwen3", "llama", "bert", "vit")


def case(name: str, mix=MIX):
    dtype = torch.float32 if name in ("qwen3", "llama") else torch.float64
    model, batch = make(name, dtype), make_batch(name)
    if name == "vit":
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    members = [trained(model, cfg, seed=i) for i, cfg in enumerate(mix)]
    return model, batch, members, (1e-5 if dtype == torch.float32 else 1e-10)


def gradients(stack: fadapt.Stack) -> list[fadapt.Params]:
    """The .grad of every stacked leaf, as the members' own trees."""
    return fadapt.unstack(
        stack.map(lambda p: p.map(lambda a: a.replace({k: t.grad for k, t in a.train.items()})))
    )


def assert_gradients(stack, members, tol) -> None:
    for member, grads in zip(members, gradients(stack), strict=True):
        for name, adapter in member.items():
            for leaf, tensor in adapter.train.items():
                torch.testing.assert_close(
                    grads[name].train[leaf], tensor.grad, rtol=tol, atol=tol, check_dtype=False
                )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_adapter", [False, True], ids=["shared", "own"])
def test_fold_equals_loop(name, per_adapter) -> None:
    model, batch, members, tol = case(name)
    members[1] = fadapt.scale(members[1], 0.5)
    n = len(members)
    if per_adapter:  # other rows and other padding for each adapter
        batch = {k: torch.stack([v.roll(i, 0) for i in range(n)]) for k, v in batch.items()}
    parts = [{k: v[i] for k, v in batch.items()} if per_adapter else batch for i in range(n)]
    stack = fadapt.stack(members)
    losses = fadapt.run(model, stack, batch, per_adapter=per_adapter)
    reference = torch.stack(
        [fadapt.run(model, p, part) for p, part in zip(members, parts, strict=True)]
    )
    assert losses.shape == (n,)
    torch.testing.assert_close(losses, reference, rtol=tol, atol=tol)
    losses.sum().backward()
    reference.sum().backward()
    assert_gradients(stack, members, tol)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_fold_equals_vmap(name) -> None:
    model, batch, members, _ = case(name, [fadapt.DoRA(r=2)] * 3)
    batch.pop("attention_mask")  # its use is data-dependent, which vmap refuses
    labels = batch.pop("labels")

    def loss_fn(out, _):
        return nn.functional.cross_entropy(out.logits.flatten(0, -2), labels.clamp(min=0).flatten())

    stack = fadapt.stack(members)
    train, rest = fadapt.split(stack)
    group = stack.groups[0]

    def one(train):
        p = members[0].map(lambda a: a.replace(train=train[a.site.name]))
        return fadapt.run(model, p, batch, loss_fn)

    losses = torch.func.vmap(one)(train["0"])
    grads = torch.func.vmap(torch.func.grad(one))(train["0"])
    folded = fadapt.run(model, fadapt.join(train, rest), batch, loss_fn)
    torch.testing.assert_close(folded, losses, rtol=1e-10, atol=1e-10)
    folded.sum().backward()
    for site, adapter in group.params.items():
        for leaf, tensor in adapter.train.items():
            torch.testing.assert_close(tensor.grad, grads[site][leaf], rtol=1e-10, atol=1e-10)


def test_stack_of_one_is_the_models_own_loss() -> None:
    for name in NAMES:
        model, batch, _, tol = case(name, [])
        stack = fadapt.stack([fadapt.init(model, fadapt.LoRA(r=2))])
        torch.testing.assert_close(
            fadapt.run(model, stack, batch)[0], model(**batch).loss, rtol=tol, atol=tol
        )


def test_unstack_gives_the_members_back() -> None:
    _model, _, members, _ = case("gpt2")
    members[2] = fadapt.scale(members[2], 0.3)
    for member, back in zip(members, fadapt.unstack(fadapt.stack(members)), strict=True):
        assert back.config == member.config
        assert back.keys() == member.keys()
        for name, adapter in member.items():
            assert back[name].method == adapter.method
            assert back[name].leaves.keys() == adapter.leaves.keys()
            for leaf, tensor in adapter.leaves.items():
                assert torch.equal(back[name].leaves[leaf], tensor), (name, leaf)


def test_unstack_drops_what_only_a_mix_of_ranks_needs() -> None:
    """The member whose method is the stack's own as well."""
    _model, _, members, _ = case("gpt2", [fadapt.LoRA(r=2), fadapt.LoRA(r=8, alpha=8.0)])
    stack = fadapt.stack(members)
    assert stack.groups[0].params[stack.sites[0]].method == members[1][stack.sites[0]].method
    for member, back in zip(members, fadapt.unstack(stack), strict=True):
        for name, adapter in member.items():
            assert back[name].leaves.keys() == adapter.leaves.keys()


def test_padding_stays_exactly_zero() -> None:
    model, batch, members, _ = case("gpt2", [fadapt.LoRA(r=1), fadapt.LoRA(r=4), fadapt.LoRA(r=2)])
    stack = fadapt.stack(members)
    assert len(stack.groups) == 1
    optimiser = torch.optim.AdamW(fadapt.trainable(stack), lr=0.05, weight_decay=0.1)
    for _ in range(10):
        optimiser.zero_grad()
        fadapt.run(model, stack, batch).sum().backward()
        optimiser.step()
    for adapter in stack.groups[0].params.values():
        for row, r in enumerate((1, 4, 2)):
            assert (adapter.train["A"][row, r:] == 0).all()
            assert (adapter.train["B"][row, :, r:] == 0).all()
            assert (adapter.train["A"][row, :r] != 0).all()


def test_equal_fixed_leaves_are_held_once() -> None:
    _model, _, members, _ = case("gpt2", [fadapt.DoRA(r=2)] * 4)
    for adapter in fadapt.stack(members).groups[0].params.values():
        assert adapter.shared == {"w2"}
        assert adapter.fixed["w2"].shape == (adapter.site.out_features,)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_diverged_member_leaves_the_others_bit_identical(poison) -> None:
    model, batch, members, _ = case("qwen3", [*MIX[:5], fadapt.LoRA(r=4)])

    def step(members):
        stack = fadapt.stack(members)
        optimiser = torch.optim.AdamW(fadapt.trainable(stack), lr=0.01)
        losses = fadapt.run(model, stack, batch)
        losses.sum().backward()
        optimiser.step()
        return losses.detach(), gradients(stack), fadapt.unstack(stack)

    losses, grads, after = step(members)
    with torch.no_grad():
        broken = members[1].map(lambda a: a.replace({k: t + poison for k, t in a.train.items()}))
    losses2, grads2, after2 = step([members[0], broken, *members[2:]])
    assert not torch.equal(losses[1], losses2[1])
    for i in (0, 2, 3, 4, 5):
        assert torch.equal(losses[i], losses2[i])
        for old, new in ((grads[i], grads2[i]), (after[i], after2[i])):
            for name, adapter in old.items():
                for leaf, tensor in adapter.train.items():
                    assert torch.equal(tensor, new[name].train[leaf]), (i, name, leaf)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_with_checkpointing() -> None:
    model, batch, members, _tol = case("qwen3", MIX[:4])
    plain, checked = fadapt.stack(members), fadapt.stack(members)
    fadapt.run(model, plain, batch).sum().backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    fadapt.run(model, checked, batch).sum().backward()
    for a, b in zip(fadapt.trainable(plain), fadapt.trainable(checked), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiled_fullgraph_without_recompilation() -> None:
    model, batch, _members, _ = case("gpt2", MIX[:5])
    batch.pop("attention_mask")
    labels = batch.pop("labels").clamp(min=0)
    graphs = []

    def loss_fn(out, _):
        return nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch.compiler.reset()
    step = torch.compile(
        lambda s: fadapt.run(model, s, batch, loss_fn), fullgraph=True, backend=backend
    )
    for offset in (0, 10):
        stack = fadapt.stack([trained(model, c, seed=i + offset) for i, c in enumerate(MIX[:5])])
        losses, reference = step(stack), fadapt.run(model, stack, batch, loss_fn)
        torch.testing.assert_close(losses, reference, rtol=1e-9, atol=1e-9)
        leaves = fadapt.trainable(stack)
        for a, b in zip(
            torch.autograd.grad(losses.sum(), leaves),
            torch.autograd.grad(reference.sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert len(graphs) == 1


class TestSelect:
    def test_one_adapter_per_row(self) -> None:
        model, batch, members, tol = case("gpt2")
        batch.pop("labels")
        stack = fadapt.stack(members)
        ids = [3, 0, 3]
        logits = fadapt.apply(model, fadapt.select(stack, ids), **batch).logits
        for row, i in enumerate(ids):
            alone = fadapt.apply(model, members[i], **batch).logits[row]
            torch.testing.assert_close(logits[row], alone, rtol=tol, atol=tol)

    def test_ids_as_a_tensor_and_gradients(self) -> None:
        model, batch, members, _tol = case("gpt2", [fadapt.LoRA(r=2)] * 4)
        stack = fadapt.stack(members)
        chosen = fadapt.select(stack, torch.tensor([2, 2, 1]))
        losses = fadapt.run(model, chosen, batch)
        losses.sum().backward()
        first = next(iter(stack.groups[0].params.values()))
        norms = first.train["B"].grad.flatten(1).norm(dim=1)
        assert (norms[[1, 2]] > 0).all()
        assert (norms[[0, 3]] == 0).all()

    def test_generate(self) -> None:
        model, _batch, _members, _ = case("qwen3", [fadapt.LoRA(r=2)] * 3)
        ids = make_batch("qwen3", padded=False)["input_ids"]
        keywords = dict(method="generate", max_new_tokens=4, do_sample=False, pad_token_id=0)
        stack = fadapt.stack([trained(model, fadapt.LoRA(r=2), seed=s, std=0.5) for s in range(3)])
        out = fadapt.apply(model, fadapt.select(stack, [2, 0, 1]), ids, **keywords)
        for row, i in enumerate((2, 0, 1)):
            alone = fadapt.apply(model, fadapt.unstack(stack)[i], ids[row : row + 1], **keywords)
            assert torch.equal(out[row], alone[0])

    def test_out_of_range(self) -> None:
        _, _, members, _ = case("gpt2", MIX[:3])
        with pytest.raises(fadapt.ConfigError, match=r"\[3\].*stack of 3"):
            fadapt.select(fadapt.stack(members), [0, 3])


class TestBadInput:
    def test_stack(self) -> None:
        model, _, members, _ = case("gpt2", MIX[:2])
        for bad in ([], [model], members[0].values()):
            with pytest.raises(fadapt.ConfigError, match="non-empty list of Params"):
                fadapt.stack(list(bad))
        torch.manual_seed(9)
        other = make("gpt2", torch.float64)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter += 0.1
        with pytest.raises(fadapt.ConfigError, match="different base models"):
            fadapt.stack([members[0], trained(other, fadapt.LoRA(r=2))])

    def test_batches(self) -> None:
        model, batch, members, _ = case("gpt2", MIX[:2])
        stack = fadapt.stack(members)
        with pytest.raises(fadapt.ConfigError, match=r"N = 2 adapters; batch.*input_ids.*shape"):
            fadapt.run(model, stack, batch, per_adapter=True)
        with pytest.raises(fadapt.ConfigError, match="batch axis first"):
            fadapt.run(model, stack, {**batch, "position_ids": torch.arange(7)})
        with pytest.raises(fadapt.ConfigError, match=r"labels.*loss_fn"):
            fadapt.run(model, stack, {"input_ids": batch["input_ids"]})

    def test_a_model_that_moves_its_batch_axis(self) -> None:
        class TimeFirst(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 4)

            def forward(self, x):
                return self.linear(x.transpose(0, 1)).transpose(0, 1)

        model = TimeFirst()
        stack = fadapt.stack([trained(model, fadapt.LoRA(r=1), seed=s) for s in range(2)])
        with pytest.raises(fadapt.FadaptError, match="batch axis"):
            fadapt.apply(model, stack, torch.randn(3, 7, 4))
        model = nn.TransformerEncoderLayer(8, 2, 16)
        stack = fadapt.stack([trained(model, {"linear": fadapt.LoRA(r=1)}, seed=s) for s in (0, 1)])
        with pytest.raises(fadapt.FadaptError, match="batch_first"):
            fadapt.apply(model, stack, torch.randn(3, 7, 8))

    def test_an_operation_without_a_rule(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 3)

            def forward(self, x):
                return torch.einsum("oi,bi->bo", self.linear.weight, x)

        model = Odd()
        stack = fadapt.stack([trained(model, fadapt.LoRA(r=1), seed=s) for s in range(2)])
        with (
            pytest.raises(fadapt.FadaptError, match=r"without a rule.*vmap"),
            pytest.warns(fadapt.DenseFallbackWarning),
        ):
            fadapt.apply(model, stack, torch.randn(3, 4))


@pytest.mark.parametrize("per_adapter", [False, True])
def test_groups_in_any_order(per_adapter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved methods: losses and gradients in the order of the stack; loss_fn called in it."""
    model = make("qwen3", torch.float64)
    kinds = [fadapt.LoRA(r=2), fadapt.IA3(), fadapt.LoRA(r=3), fadapt.DoRA(r=2), fadapt.IA3()]
    members = [trained(model, m) for m in kinds]
    stack = fadapt.stack(members)
    assert stack.order == [0, 2, 1, 4, 3]
    parts = [make_batch("qwen3") for _ in members]
    for i, part in enumerate(parts):
        part["input_ids"] = (part["input_ids"] + (i if per_adapter else 0)) % 50
    batch = {k: torch.stack([p[k] for p in parts]) for k in parts[0]} if per_adapter else parts[0]
    seen: list[torch.Tensor] = []

    def loss_fn(output, part):
        seen.append(part["input_ids"])
        return output.logits.square().mean()

    def alone(fn):
        losses = [fadapt.run(model, m, p, fn) for m, p in zip(members, parts, strict=True)]
        return torch.stack(losses)

    for fn in (None, loss_fn):
        seen.clear()
        losses = fadapt.run(model, stack, batch, fn, per_adapter=per_adapter, verify=False)
        torch.testing.assert_close(losses, alone(fn), rtol=1e-10, atol=1e-10)
    monkeypatch.setattr("fadapt.fold.chunked_loss.CHUNKED_FROM", 1)
    chunked = fadapt.run(model, stack, batch, per_adapter=per_adapter)
    # Hugging Face takes its loss in float32.
    torch.testing.assert_close(chunked.float(), alone(None), rtol=1e-6, atol=0)
    for got, part in zip(seen[: len(parts)], parts, strict=True):
        assert torch.equal(got, part["input_ids"])
    rows = fadapt.select(stack, [3, 1, 0, 1])
    ids = torch.cat([parts[i]["input_ids"][:1] for i in (0, 1, 2, 3)])
    chosen = fadapt.run(model, rows, {"input_ids": ids, "use_cache": False}, loss_fn)
    expected = [
        fadapt.run(model, members[i], {"input_ids": ids[k : k + 1], "use_cache": False}, loss_fn)
        for k, i in enumerate([3, 1, 0, 1])
    ]
    torch.testing.assert_close(chosen, torch.stack(expected), rtol=1e-10, atol=1e-10)


class NoHostData(TorchDispatchMode):
    """Refuses tensors that are made of Python's numbers, which a CUDA graph cannot record."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@given(st.data())
def test_rows_in_another_order_without_an_index_on_the_device(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 9))
    index = data.draw(st.permutations(range(size)))[: data.draw(st.integers(1, size))]
    rows = torch.randn(size, 3, requires_grad=True)
    weight = torch.randn(len(index), 3)
    with NoHostData():
        found = fold.take(rows, index)
    assert torch.equal(found, rows[index])
    (a,) = torch.autograd.grad((found * weight).sum(), rows)
    (b,) = torch.autograd.grad((rows[index] * weight).sum(), rows)
    assert torch.equal(a, b)
