"""run in a compiled step: one graph, and none anew for another adapter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fadapt
from tests.helpers import lm_loss, make, make_batch, trained


class TestCompile:
    @pytest.mark.parametrize("name", ["qwen3", "gpt2"])
    def test_fullgraph_step_without_recompilation(self, name) -> None:
        model, batch = make(name), make_batch(name, padded=False)
        labels = batch.pop("labels")
        graphs = []

        def loss_fn(output, batch):
            return lm_loss(output, {"labels": labels})

        def backend(module, inputs):
            graphs.append(module)
            return module.forward

        torch.compiler.reset()
        step = torch.compile(
            lambda p: fadapt.run(model, p, batch, loss_fn), fullgraph=True, backend=backend
        )
        for seed in (0, 1):
            params = trained(model, {"attn|mlp": fadapt.DoRA(r=2)}, seed=seed)
            loss, reference = step(params), fadapt.run(model, params, batch, loss_fn)
            torch.testing.assert_close(loss, reference)
            leaves = fadapt.trainable(params)
            for a, b in zip(
                torch.autograd.grad(loss, leaves),
                torch.autograd.grad(reference, leaves),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert len(graphs) == 1
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())

    def test_inductor(self) -> None:
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        params, x = trained(model, fadapt.DoRA(r=2)), torch.randn(5, 8)
        torch.compiler.reset()
        step = torch.compile(lambda p: fadapt.apply(model, p, x).square().sum(), fullgraph=True)
        reference = fadapt.apply(model, params, x).square().sum()
        torch.testing.assert_close(step(params), reference)
        leaves = fadapt.trainable(params)
        torch.testing.assert_close(
            torch.autograd.grad(step(params), leaves), torch.autograd.grad(reference, leaves)
        )
