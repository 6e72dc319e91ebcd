"""Activation checkpointing, the model's own and torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import grad
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fadapt
from tests.helpers import SMALL, make, make_batch, trained


class TestCheckpointing:
    @pytest.mark.parametrize("name", ["qwen3", "gpt2", "bert", "vit"])
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_gradients_equal_those_without(self, name, reentrant) -> None:
        model, batch = make(name), make_batch(name)
        params = trained(model, fadapt.DoRA(r=2))
        leaves = fadapt.trainable(params)
        reference = torch.autograd.grad(fadapt.run(model, params, batch), leaves)
        for module in model.modules():  # dropout would differ; only the flag is wanted
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        if hasattr(model.config, "attention_probs_dropout_prob"):
            for module in model.modules():
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0
                if hasattr(module, "dropout_prob"):
                    module.dropout_prob = 0.0
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        functions = [m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()]
        calls = _count_layer_calls(model)
        loss = fadapt.run(model, params, batch)
        forward_calls = calls[0]
        loss.backward()
        assert calls[0] == 2 * forward_calls, "the layers were not recomputed"
        for leaf, ref in zip(leaves, reference, strict=True):
            torch.testing.assert_close(leaf.grad, ref, rtol=1e-5, atol=1e-6)
        assert functions == [
            m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()
        ]

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_saves_memory(self) -> None:
        torch.manual_seed(0)
        config = Qwen3Config(**{**SMALL, "num_hidden_layers": 8}, num_key_value_heads=2, head_dim=8)
        model = Qwen3ForCausalLM(config)
        params = trained(model, fadapt.LoRA(r=2))
        batch = make_batch("qwen3", rows=8, padded=False)

        def saved_bytes() -> int:
            seen: dict[int, int] = {}

            def pack(t):
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                fadapt.run(model, params, batch)
            return sum(seen.values())

        plain = saved_bytes()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        assert saved_bytes() < 0.6 * plain

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_under_torch_func_is_refused(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3", padded=False)
        params = trained(model, fadapt.LoRA(r=2))
        train, rest = fadapt.split(params)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        with pytest.raises(fadapt.FadaptError, match="gradient_checkpointing_disable"):
            grad(lambda t: fadapt.run(model, fadapt.join(t, rest), batch))(train)

    def test_a_reentrant_checkpoint_that_loses_gradients_is_refused(self) -> None:
        """The second layer has a gradient, so that torch does not notice."""

        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                x = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=True)
                return self.second(x)

        model = Own().requires_grad_(False)
        params, x = trained(model, fadapt.LoRA(r=2)), torch.randn(3, 4)
        with fadapt.bound(model, params), pytest.raises(fadapt.FadaptError, match="loses its grad"):
            model(x)
        with fadapt.bound(model, params):
            model(x.requires_grad_()).square().sum().backward()
        assert all(leaf.grad is not None for leaf in fadapt.trainable(params))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_own_checkpoint_is_refused_outside_bound(self, reentrant) -> None:
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

            def forward(self, x):
                return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

        model, x = Own(), torch.randn(3, 4, requires_grad=True)
        params = trained(model, fadapt.LoRA(r=2))
        with pytest.raises(fadapt.FadaptError, match=r"fadapt\.bound"):
            fadapt.apply(model, params, x)
        with torch.no_grad():
            fadapt.apply(model, params, x)
        with fadapt.bound(model, params):
            model(x).square().sum().backward()
        reference = torch.autograd.grad(
            functional_plain(model, params, x).square().sum(), fadapt.trainable(params)
        )
        for leaf, ref in zip(fadapt.trainable(params), reference, strict=True):
            torch.testing.assert_close(leaf.grad, ref)


def functional_plain(model, params, x):
    plain = {k: v.detach().clone() for k, v in model.named_parameters()}
    for name, adapter in params.items():
        leaves = adapter.train
        plain[name] = plain[name] + adapter.method.scaling * leaves["B"] @ leaves["A"]
    h = torch.tanh(x @ plain["inner.0.weight"].T + plain["inner.0.bias"])
    return h @ plain["inner.2.weight"].T + plain["inner.2.bias"]


def _count_layer_calls(model) -> list[int]:
    calls = [0]
    for module in model.modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and "layer" in _name(model, module):
            module.forward = _counting(module.forward, calls)
    return calls


def _name(model, module) -> str:
    name = next(n for n, m in model.named_modules() if m is module)
    return name.replace(".h.", ".layer.")


def _counting(forward, calls):
    def counted(*args, **kwargs):
        calls[0] += 1
        return forward(*args, **kwargs)

    return counted
