"""run and apply on real architectures: the start, merged weights, a loop, inputs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fadapt
from tests.helpers import METHODS, MODELS, VOCAB, make, make_batch, trained


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_identity_at_start(name, method, dtype) -> None:
    model, batch = make(name, dtype), make_batch(name)
    if name == "vit":
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    params = fadapt.init(model, method)
    reference = model(**batch)
    assert torch.equal(fadapt.run(model, params, batch), reference.loss)
    assert torch.equal(fadapt.apply(model, params, **batch).logits, reference.logits)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", MODELS)
def test_run_equals_merged(name, method) -> None:
    model, batch = make(name, torch.float64), make_batch(name)
    if name == "vit":
        batch["pixel_values"] = batch["pixel_values"].double()
    params = trained(model, method)
    merged = fadapt.merge(model, params)
    reference = functional_call(model, merged, (), batch, tie_weights=False)
    out = fadapt.apply(model, params, **batch)
    torch.testing.assert_close(out.logits, reference.logits, rtol=1e-9, atol=1e-9)
    assert (out.logits - model(**batch).logits).abs().max() > 1e-4


def test_training_loop_lowers_the_loss_and_leaves_the_base_alone() -> None:
    model, batch = make("qwen3"), make_batch("qwen3")
    before = copy.deepcopy(model.state_dict())
    params = fadapt.init(model, {"q_proj|v_proj": fadapt.LoRA(r=4), "down_proj": fadapt.DoRA(r=2)})
    optimiser = torch.optim.AdamW(fadapt.trainable(params), lr=3e-2)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = fadapt.run(model, params, batch)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.92 * losses[0]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class TestInputs:
    def test_batches_as_dict_tuple_tensor(self) -> None:
        model = nn.Linear(4, 3)
        params = trained(model, fadapt.LoRA(r=2))
        x, y = torch.randn(5, 4), torch.randn(5, 3)

        def mse(out, batch):
            return (out - y).square().mean()

        one = fadapt.run(model, params, x, mse)
        assert torch.equal(one, fadapt.run(model, params, (x,), mse))
        assert torch.equal(one, fadapt.run(model, params, {"input": x}, mse))
        with pytest.raises(fadapt.ConfigError, match="list"):
            fadapt.run(model, params, [x], mse)

    def test_no_scalar_loss_is_an_error(self) -> None:
        model = nn.Linear(4, 3)
        params = trained(model, fadapt.LoRA(r=2))
        with pytest.raises(fadapt.ConfigError, match=r"shape \(5, 3\).*loss_fn"):
            fadapt.run(model, params, torch.randn(5, 4))
        model, batch = make("qwen3"), make_batch("qwen3")
        del batch["labels"]
        with pytest.raises(fadapt.ConfigError, match="labels"):
            fadapt.run(model, trained(model, fadapt.LoRA(r=2)), batch)

    def test_params_of_another_model(self) -> None:
        params = trained(nn.Sequential(nn.Linear(4, 3)), fadapt.LoRA(r=2))
        with pytest.raises(fadapt.TargetError, match="another base model"):
            fadapt.apply(nn.Sequential(nn.Linear(5, 3)), params, torch.randn(2, 5))
        with pytest.raises(fadapt.TargetError, match="another model"):
            fadapt.apply(nn.Linear(4, 3), params, torch.randn(2, 4))
        with pytest.raises(fadapt.ConfigError, match=r"fadapt\.init"):
            fadapt.apply(nn.Linear(4, 3), {}, torch.randn(2, 4))

    def test_escaped_operations_fall_back_with_a_warning(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 3)

            def forward(self, x):
                return torch.einsum("oi,bi->bo", self.linear.weight, x)

        model, x = Odd(), torch.randn(2, 4)
        params = trained(model, fadapt.LoRA(r=2))
        with pytest.warns(fadapt.DenseFallbackWarning, match=r"linear\.weight.*einsum"):
            out = fadapt.apply(model, params, x)
        expected = x @ fadapt.merge(model, params)["linear.weight"].T
        torch.testing.assert_close(out, expected)
        with pytest.raises(fadapt.TargetError, match="acts on the bias"):
            fadapt.apply(model, trained(model, fadapt.IA3()), x)

    def test_writing_to_an_adapted_weight_is_an_error(self) -> None:
        class Writer(nn.Linear):
            def forward(self, x):
                self.weight.mul_(2)
                return super().forward(x)

        model = Writer(4, 3)
        before = model.weight.clone()
        with pytest.raises(fadapt.FadaptError, match=r"writes to weight"):
            fadapt.apply(model, trained(model, fadapt.LoRA(r=2)), torch.randn(2, 4))
        assert torch.equal(model.weight, before)

    def test_metadata_of_the_overlay_is_the_weights_own(self) -> None:
        seen = {}

        class Curious(nn.Linear):
            def forward(self, x):
                w = self.weight
                seen.update(
                    shape=w.shape, dtype=w.dtype, device=w.device, ndim=w.ndim, size=w.size(0),
                    stride=w.stride(), numel=w.numel(), grad=w.requires_grad, n=len(w),
                )  # fmt: skip
                return super().forward(x.to(self.weight.dtype))

        model = Curious(4, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fadapt.apply(model, trained(model, fadapt.LoRA(r=2)), torch.randn(2, 4).double())
        assert seen == dict(
            shape=(3, 4), dtype=torch.float32, device=torch.device("cpu"), ndim=2, size=3,
            stride=(4, 1), numel=12, grad=True, n=3,
        )  # fmt: skip


def test_run_and_apply_take_the_same_batches() -> None:
    model = MODELS["qwen3"]().eval()
    params = fadapt.init(model, fadapt.LoRA(r=2))
    ids = torch.randint(VOCAB, (2, 5))
    mask = torch.ones_like(ids)
    wanted = fadapt.apply(model, params, input_ids=ids, attention_mask=mask).logits

    def loss_fn(output, batch):
        return output.logits.square().mean()

    loss = fadapt.run(model, params, (ids, mask), loss_fn)
    for batch in ({"input_ids": ids, "attention_mask": mask}, (ids, mask), ids):
        assert torch.equal(fadapt.apply(model, params, batch).logits, wanted)
        assert torch.equal(fadapt.run(model, params, batch, loss_fn), loss)
        stacked = fadapt.apply(model, fadapt.stack([params] * 2), batch).logits
        assert stacked.shape == (2, *wanted.shape)
        torch.testing.assert_close(stacked[1], wanted)
    more = fadapt.apply(model, params, {"input_ids": ids}, output_hidden_states=True)
    assert len(more.hidden_states) == 3
    made = fadapt.apply(model, params, {"input_ids": ids}, method="generate", max_new_tokens=2)
    assert made.shape == (2, 7)
    with pytest.raises(fadapt.ConfigError, match="given in the batch and"):
        fadapt.apply(model, params, {"input_ids": ids}, input_ids=ids)
    with pytest.raises(fadapt.ConfigError, match="the key 0"):
        fadapt.apply(model, params, {0: ids})


def test_a_model_of_one_dict_or_tuple_gets_it_in_a_tuple() -> None:
    class Takes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)

        def forward(self, inputs):
            return self.linear(inputs["x"] if isinstance(inputs, dict) else inputs[0])

    model, x = Takes(), torch.randn(2, 4)
    params = fadapt.init(model, fadapt.LoRA(r=2))
    for inputs in ({"x": x}, (x,)):
        wanted = model(inputs)
        assert torch.equal(fadapt.apply(model, params, (inputs,)), wanted)
        loss = fadapt.run(model, params, (inputs,), lambda out, _: out.sum())
        assert torch.equal(loss, wanted.sum())
