"""bound: the model is the adapted one in the block, and itself outside."""

from __future__ import annotations

import sys
import weakref

import pytest
import torch

import fadapt
from tests.helpers import make, make_batch, trained


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
