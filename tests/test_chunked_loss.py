"""Cross-entropy in chunks from hidden states: values, gradients, and its place in a stack's run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fadapt
from fadapt.fold import chunked_loss as losses
from fadapt.fold.chunked_loss import chunked_cross_entropy

from .models import gpt2, perturb, qwen3, tokens


def plain(hidden, labels, weight, bias, adapters):
    """The definition, adapter by adapter, with all logits at once."""
    result = []
    for h, t in zip(hidden.chunk(adapters), labels.chunk(adapters), strict=True):
        logits = h @ weight.T + (0 if bias is None else bias)
        result.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), t[:, 1:].flatten()))
    return torch.stack(result)


def case(dtype=torch.float64, bias=True):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, 8, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.randn(11, 8, generator=rng, dtype=torch.float64).to(dtype)
    shift = torch.randn(11, generator=rng, dtype=torch.float64).to(dtype) if bias else None
    labels = torch.randint(11, (6, 5), generator=rng)
    labels[0, 1:3] = labels[4, :] = -100
    return hidden.requires_grad_(), labels, weight, shift


@pytest.mark.parametrize("chunk", [1, 4, 7, 30, 1024])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_the_definitions(chunk, bias):
    hidden, labels, weight, shift = case(bias=bias)
    seeds = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    found = chunked_cross_entropy(hidden, labels, weight, shift, adapters=3, chunk=chunk)
    expected = plain(hidden, labels, weight, shift, 3)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    a, b = (torch.autograd.grad(x, hidden, seeds)[0] for x in (found, expected))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(
        lambda h: chunked_cross_entropy(h, labels, weight, shift, adapters=3, chunk=chunk), hidden
    )


def test_torch_func_and_compile():
    hidden, labels, weight, shift = case()

    def total(h, loss):
        return (loss(h) * torch.arange(1, 4)).sum()

    def chunked(h):
        return chunked_cross_entropy(h, labels, weight, shift, adapters=3, chunk=4)

    expected = torch.func.grad(total)(hidden, lambda h: plain(h, labels, weight, shift, 3))
    torch.testing.assert_close(torch.func.grad(total)(hidden, chunked), expected)
    compiled = torch.compile(chunked, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(total(hidden, compiled), hidden)
    torch.testing.assert_close(found, expected)


def test_an_adapter_without_labels_is_nan_and_alone():
    hidden, labels, weight, shift = case()
    labels[:2] = -100
    found = chunked_cross_entropy(hidden, labels, weight, shift, adapters=3)
    assert found.isnan().tolist() == [True, False, False]
    torch.testing.assert_close(found[1:], plain(hidden, labels, weight, shift, 3)[1:])


def test_the_logits_of_all_tokens_never_exist():
    """No tensor of the pass, forward or backward, is larger than a chunk's logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, Tensor):
                    self.size = max(self.size, t.numel())
            return out

    hidden = torch.randn(8, 16, 4, requires_grad=True)
    labels, weight = torch.randint(500, (8, 16)), torch.randn(500, 4)
    with Largest() as seen:
        chunked_cross_entropy(hidden, labels, weight, adapters=4, chunk=10).sum().backward()
    assert seen.size == 10 * 500


def test_bf16_is_the_plain_loss_in_bf16():
    hidden, labels, weight, _ = case(torch.bfloat16, bias=False)
    found = chunked_cross_entropy(hidden, labels, weight, adapters=3, chunk=4)
    assert found.dtype == torch.float32
    logits = (hidden @ weight.T).float()
    expected = torch.stack([
        F.cross_entropy(part[:, :-1].flatten(0, 1), t[:, 1:].flatten())
        for part, t in zip(logits.chunk(3), labels.chunk(3), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(found, expected)
    a, b = (torch.autograd.grad(x.sum(), hidden)[0] for x in (found, expected))
    torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-2)


def three(model):
    methods = fadapt.LoRA(r=2), fadapt.DoRA(r=3), fadapt.LoRA(r=4)
    members = [fadapt.init(model, fadapt.Config(m, seed=i)) for i, m in enumerate(methods)]
    return fadapt.stack([perturb(p, seed=i, std=0.05) for i, p in enumerate(members)])


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "tied"])
@pytest.mark.parametrize("per_adapter", [True, False])
def test_a_stack_of_a_causal_lm_takes_it_and_agrees(monkeypatch, name, per_adapter):
    models = {"qwen3": qwen3, "gpt2": gpt2, "tied": lambda: qwen3(tied=True)}
    model = models[name]().requires_grad_(False)
    ids = tokens(6, 7).reshape(3, 2, 7) if per_adapter else tokens(2, 7)
    labels = ids.clone()
    labels[..., :3] = -100
    batch = {"input_ids": ids, "labels": labels}
    stack, taken = three(model), []
    leaves = fadapt.trainable(stack)
    expected = fadapt.run(model, stack, batch, per_adapter=per_adapter)
    before = torch.autograd.grad(expected.sum(), leaves)
    monkeypatch.setattr(losses, "CHUNKED_FROM", 0)
    real = losses.chunked_cross_entropy
    monkeypatch.setattr(
        losses, "chunked_cross_entropy", lambda *a, **k: taken.append(1) or real(*a, **k, chunk=5)
    )
    found = fadapt.run(model, stack, batch, per_adapter=per_adapter)
    assert taken
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found.sum(), leaves), before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_head_that_is_adapted_or_followed_by_more_is_not_bypassed(monkeypatch):
    model = qwen3().requires_grad_(False)
    batch = {"input_ids": tokens(2, 5), "labels": tokens(2, 5)}
    config = fadapt.Config({"lm_head": fadapt.LoRA(r=2), "q_proj": fadapt.LoRA(r=2)}, exclude=())
    adapted = fadapt.stack([perturb(fadapt.init(model, config))] * 2)
    stack = three(model)

    class Capped(type(model)):
        def forward(self, labels, **kwargs):
            out = super().forward(**kwargs)
            out.logits = torch.tanh(out.logits / 3) * 3
            out.loss = self.loss_function(
                logits=out.logits, labels=labels, vocab_size=self.config.vocab_size
            )
            return out

    capped = qwen3().requires_grad_(False)
    capped.__class__ = Capped
    expected = fadapt.run(model, adapted, batch), fadapt.run(capped, stack, batch)
    monkeypatch.setattr(losses, "CHUNKED_FROM", 0)
    assert torch.equal(fadapt.run(model, adapted, batch), expected[0])
    assert torch.equal(fadapt.run(capped, stack, batch), expected[1])
