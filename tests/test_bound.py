"""bound: the model is the adapted one in the block, and itself outside."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

import fadapt
from tests.helpers import make, make_batch, trained
from tests.models import mlp, perturb, reals


class TestBound:
    def test_model_is_adapted_inside_and_itself_outside(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3")
        params = trained(model, fadapt.LoRA(r=2))
        objects = dict(model.named_parameters())
        plain = model(**batch).logits
        with fadapt.bound(model, params) as same:
            assert same is model
            inside = model(**batch).logits
            assert torch.equal(fadapt.run(model, params, batch), model(**batch).loss)
        assert torch.equal(inside, fadapt.apply(model, params, **batch).logits)
        assert torch.equal(model(**batch).logits, plain)
        assert all(p is objects[n] for n, p in model.named_parameters())

    def test_restores_after_an_exception(self) -> None:
        model = make("gpt2")
        objects = dict(model.named_parameters())
        with (
            pytest.raises(ZeroDivisionError),
            fadapt.bound(model, trained(model, fadapt.IA3())),
        ):
            raise ZeroDivisionError
        assert all(p is objects[n] for n, p in model.named_parameters())

    def test_a_block_is_counted_by_whoever_keeps_it(self) -> None:
        """Torch 2.11 gives back a reference that it did not take; the process crashed."""
        model, batch = make("gpt2"), make_batch("gpt2")
        params, blocks = trained(model, fadapt.LoRA(r=2)), []
        for _ in range(50):
            block = fadapt.bound(model, params)
            with block:
                blocks.append(weakref.ref(block.view))  # type: ignore[attr-defined]
        held = [sys.getrefcount(ref) for ref in blocks]
        assert max(held) - min(held) <= 1, "torch keeps the last one, and no reference is missing"
        with torch.no_grad(), fadapt.bound(model, params):
            model(**batch)

    def test_other_params_inside_are_refused(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3")
        params, other = (trained(model, fadapt.LoRA(r=2), seed=s) for s in (0, 1))
        with fadapt.bound(model, params):
            for call in (
                lambda: fadapt.run(model, other, batch),
                lambda: fadapt.init(model, fadapt.LoRA()),
                lambda: fadapt.bound(model, other).__enter__(),
            ):
                with pytest.raises(fadapt.FadaptError, match="bound"):
                    call()

    def test_optimiser_steps_inside_take_effect(self) -> None:
        model, batch = make("qwen3"), make_batch("qwen3")
        params = trained(model, fadapt.LoRA(r=2))
        optimiser = torch.optim.SGD(fadapt.trainable(params), lr=0.5)
        with fadapt.bound(model, params):
            loss = model(**batch).loss
            loss.backward()
            optimiser.step()
            assert model(**batch).loss < loss

    def test_generate(self) -> None:
        model = make("qwen3")
        params = trained(model, fadapt.LoRA(r=2), std=0.5)
        ids = make_batch("qwen3", padded=False)["input_ids"]
        out = fadapt.apply(
            model, params, ids, method="generate", max_new_tokens=5, do_sample=False, pad_token_id=0
        )
        with fadapt.bound(model, params):
            inside = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(out, inside)
        logits = fadapt.apply(model, params, out).logits
        assert torch.equal(out[:, 7:], logits[:, 6:-1].argmax(-1))
        with pytest.raises(fadapt.ConfigError, match="no method 'generat'"):
            fadapt.apply(model, params, ids, method="generat")


def adapted_mlp():
    model = mlp(widths=(6, 6, 6))
    params = perturb(fadapt.init(model, fadapt.LoRA(r=2)), std=0.5)
    return model, params, reals(4, 6)


def test_what_is_asked_of_the_model_beside_its_forward_is_the_bases() -> None:
    model, params, x = adapted_mlp()
    own, state = [*model.parameters()], {k: v.clone() for k, v in model.state_dict().items()}
    adapted, base = fadapt.apply(model, params, x), model(x)
    with fadapt.bound(model, params):
        assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        assert all(torch.equal(v, state[k]) for k, v in torch.load(file).items())
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(x), base)
        vector = nn.utils.parameters_to_vector(model.parameters())
        assert torch.equal(vector, nn.utils.parameters_to_vector(own))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(x).sum().backward()
        optimizer.step()  # of the base, which has no gradient
        assert torch.equal(model(x), adapted)
        assert fadapt.trainable(params)[0].grad is not None
        model.share_memory().requires_grad_(False)
        assert model(x).requires_grad
        model.to("cpu")
        model.load_state_dict(state)
        assert torch.equal(model(x), adapted)
    assert torch.equal(model(x), base)
    assert not any(p.requires_grad for p in own)
    with fadapt.bound(model, params):
        model.double()
        out = model(x.double())
        assert out.dtype == torch.float64
        torch.testing.assert_close(out.float(), adapted)
        with pytest.raises(RuntimeError, match="dtype"):
            model(x)
        model.float()
        assert torch.equal(model(x), adapted)
    assert torch.equal(model(x), base)


def test_parameters_in_the_forward_are_the_adapted_ones() -> None:
    class Penalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            return self.lin(x) + sum(p.square().sum() for p in self.parameters())

    model, x = Penalized(), reals(4, 6)
    params = perturb(fadapt.init(model, fadapt.LoRA(r=2)), std=0.5)
    merged = copy.deepcopy(model)
    merged.load_state_dict(fadapt.merge(model, params), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fadapt.DenseFallbackWarning)
        with fadapt.bound(model, params):
            torch.testing.assert_close(model(x), merged(x))
        torch.testing.assert_close(fadapt.apply(model, params, x), merged(x))


def test_what_would_be_lost_with_the_block_is_refused() -> None:
    model, params, x = adapted_mlp()
    base, adapted = model(x), fadapt.apply(model, params, x)
    with fadapt.bound(model, params):
        with pytest.raises(fadapt.FadaptError, match=r"0\.weight\.data .*lost.*leave the block"):
            model[0].weight.data.zero_()
        with pytest.raises(fadapt.FadaptError, match="weight of a layer is set inside"):
            model[0].weight = nn.Parameter(torch.zeros(6, 6))
        with pytest.raises(fadapt.FadaptError, match="functional_call"):
            torch.func.functional_call(model, dict(model.named_parameters()), (x,))
        with pytest.raises(fadapt.FadaptError, match="frozen"):
            nn.init.zeros_(model[0].weight)
        assert torch.equal(model(x), adapted)
    assert torch.equal(model(x), base)


def test_a_block_that_nobody_leaves_ends_with_its_object() -> None:
    model, params, x = adapted_mlp()
    base, adapted = model(x), fadapt.apply(model, params, x)
    blocks = [fadapt.bound(model, params)]
    blocks[0].__enter__()
    assert torch.equal(model(x), adapted)
    with pytest.warns(fadapt.FadaptWarning, match="never left"):
        blocks.clear()
    assert torch.equal(model(x), base)
    with pytest.warns(fadapt.FadaptWarning, match="never left"):
        fadapt.bound(model, params).__enter__()
    assert torch.equal(model(x), base)
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("error")
        stack.enter_context(fadapt.bound(model, params))
        gc.collect()
        assert torch.equal(model(x), adapted)
    assert torch.equal(model(x), base)
