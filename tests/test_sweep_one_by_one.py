"""A sweep over a model whose rows meet, or whose loss does not come apart, trains one by one."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import fadapt

from .models import reals, tokens
from .test_stack_losses import BART, IDS, LABELS, T5
from .test_stack_proof import DRAWS, MIXERS, Masking, Mixing

LORA = fadapt.LoRA(r=2)


def equal(a: fadapt.Params, b: fadapt.Params) -> bool:
    pairs = zip(fadapt.trainable(a), fadapt.trainable(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def solo(model: nn.Module, trials, batches, **options) -> dict[str, fadapt.Params]:
    """Each trial by itself, from its own start, by ``fit``."""
    found = {}
    for trial in trials:
        start = fadapt.init(model, fadapt.Config(trial.config, seed=trial.seed))
        found[trial.name] = fadapt.fit(
            model, start, batches, lr=trial.lr, progress=False, **options
        )
    return found


def trials(rules=LORA) -> list[fadapt.Trial]:
    methods = [rules, rules, fadapt.LoRA(r=4) if rules is LORA else rules]
    rates = (1e-2, 3e-2, 1e-2)
    return [
        fadapt.Trial(m, lr=lr, seed=i, name=f"t{i}")
        for i, (m, lr) in enumerate(zip(methods, rates, strict=True))
    ]


def mean_square(out: Tensor, _) -> Tensor:
    return out.square().mean()


CASES = {
    "BART": (
        lambda: hf.BartForConditionalGeneration(BART).eval(),
        {"q_proj|v_proj": LORA},
        {"input_ids": IDS, "labels": LABELS},
        None,
        "loss function",
    ),
    "T5": (
        lambda: hf.T5ForConditionalGeneration(T5).eval(),
        {r"\.q\.|\.v\.": LORA},
        {"input_ids": IDS, "labels": LABELS},
        None,
        "loss function",
    ),
    "routers": (
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
                output_router_logits=True, router_aux_loss_coef=0.5,
            )
        ).eval(),
        {"q_proj": LORA},
        {"input_ids": IDS, "labels": IDS},
        None,
        "more than the loss function's value",
    ),
    "experts": (
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(
                vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            )
        ).eval(),
        {"experts": LORA},
        {"input_ids": IDS, "labels": IDS},
        None,
        "expert",
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).train(),
        LORA,
        reals(6, 4),
        mean_square,
        "BatchNorm1d",
    ),
    "batch statistics": (
        lambda: Mixing(MIXERS["batch statistics"]),
        LORA,
        reals(6, 4),
        mean_square,
        "not independent",
    ),
}  # fmt: skip


@pytest.mark.parametrize("most", ["auto", 2, None])
@pytest.mark.parametrize("name", CASES)
def test_it_says_so_once_and_trains_as_fit_does(name: str, most) -> None:
    make, rules, batch, loss_fn, words = CASES[name]
    torch.manual_seed(0)
    model = make().requires_grad_(False)
    options = dict(steps=3, loss_fn=loss_fn)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = fadapt.sweep(
            model, trials(rules), [batch] * 3, max_adapters=most, progress=False,
            eval=None if name == "batch norm" else [batch], **options,
        )  # fmt: skip
    told = [str(w.message) for w in seen if isinstance(w.message, fadapt.OneByOneWarning)]
    assert len(told) == 1
    assert "one by one" in told[0]
    assert words in told[0]
    for key, params in solo(model, trials(rules), [batch] * 3, **options).items():
        assert equal(report.final[key], params), key


def test_where_rows_are_apart_nothing_is_said() -> None:
    model = Mixing(torch.tanh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fadapt.sweep(
            model, trials(), [reals(6, 4)] * 3, steps=3, loss_fn=mean_square, progress=False,
            eval=[reals(6, 4)],
        )  # fmt: skip
    assert report.chunk == 3


def test_a_mixed_gradient_is_found_before_the_first_step() -> None:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.mean(0, keepdim=True).expand_as(grad)

    model, data = Mixing(Backward.apply), [reals(6, 4)] * 3
    with pytest.warns(fadapt.OneByOneWarning, match="gradient"):
        report = fadapt.sweep(model, trials(), data, steps=3, loss_fn=mean_square, progress=False)
    for key, params in solo(model, trials(), data, steps=3, loss_fn=mean_square).items():
        assert equal(report.final[key], params)


def test_own_batches() -> None:
    model = hf.T5ForConditionalGeneration(T5).eval().requires_grad_(False)
    rules = {r"\.q\.|\.v\.": LORA}
    data = [
        {
            "input_ids": tokens(9, 7, seed=i).reshape(3, 3, 7),
            "labels": tokens(9, 7, seed=9 + i).reshape(3, 3, 7),
        }
        for i in range(4)
    ]
    options = dict(per_adapter=True, progress=False)
    with pytest.warns(fadapt.OneByOneWarning):
        whole = fadapt.sweep(model, trials(rules), data, steps=4, **options)
    for k, trial in enumerate(trials(rules)):
        own = [{key: v[k] for key, v in batch.items()} for batch in data]
        alone = solo(model, [trial], own, steps=4)[trial.name]
        assert equal(whole.final[trial.name], alone)


def test_losses_of_an_eval_of_another_kind_are_right() -> None:
    """The training batches fold; the evaluation's labels do not come apart."""
    config = hf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    model = hf.BertForMaskedLM(config).eval().requires_grad_(False)
    batch = {"input_ids": IDS, "labels": LABELS}

    def loss_fn(out, part):
        return F.cross_entropy(out.logits.flatten(0, 1), part["labels"].flatten())

    report = fadapt.sweep(
        model, trials({"query": LORA}), [batch] * 2, steps=2, loss_fn=loss_fn, eval=[batch],
        progress=False,
    )  # fmt: skip
    for result in report.results:
        params = report.params[result.name]
        expected = fadapt.run(model, params, batch, loss_fn).item()
        assert result.score == pytest.approx(expected, rel=1e-5)


def test_what_is_random_in_the_base_is_for_each_what_it_is_alone() -> None:
    """One by one, each member draws the masks of dropout that it draws alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    batches = [torch.randn(6, 4) for _ in range(4)]
    starts = [fadapt.init(model, fadapt.Config(fadapt.LoRA(r=2), seed=s)) for s in range(3)]

    def loss(out, _):
        return out.square().mean()

    options = {"steps": 9, "loss_fn": loss, "progress": False, "seed": 5}
    trials = [fadapt.Trial(p, lr=0.05, name=str(i)) for i, p in enumerate(starts)]
    report = fadapt.sweep(model, trials, batches, max_adapters=1, eval=batches[:1], **options)
    for i, start in enumerate(starts):
        alone = fadapt.fit(model, start, batches, lr=0.05, **options)
        pairs = zip(fadapt.trainable(alone), fadapt.trainable(report.final[str(i)]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


class Stopping:
    """The loss, until it has been taken so often in training."""

    def __init__(self, calls: int):
        self.left = calls

    def __call__(self, out: Tensor, _) -> Tensor:
        self.left -= out.requires_grad
        if self.left < 0:
            raise ZeroDivisionError
        return out.square().mean()


@pytest.mark.parametrize("name", ["torch", "Python", "numpy"])
def test_what_a_model_draws_is_for_each_trial_what_it_is_alone(name: str, tmp_path) -> None:
    """Whatever generator it asks, which is as before afterwards; and where a sweep goes on."""
    model, x = Mixing(Masking(DRAWS[name], mixes=False)).train(), reals(8, 4)

    def swept(calls: int = 99, **options) -> fadapt.Report:
        loss = Stopping(calls)
        options = {"seed": 5, "progress": False, "max_adapters": 1, **options}
        return fadapt.sweep(model, trials(), [x] * 4, loss_fn=loss, **options)

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    expected = DRAWS[name](1)
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    report = swept()
    assert DRAWS[name](1) == expected
    alone = solo(model, trials(), [x] * 4, loss_fn=Stopping(99), seed=5)
    assert all(equal(report.params[key], params) for key, params in alone.items())
    with pytest.raises(ZeroDivisionError):
        swept(7, directory=tmp_path)
    DRAWS[name](7)
    on = swept(directory=tmp_path)
    assert all(equal(report.params[key], params) for key, params in on.params.items())
