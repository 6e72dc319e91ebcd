"""fit and sweep: equal to plain training loops, isolated, chunked, stopped, compiled, reported."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fadapt
from fadapt.params.stack import rank_axes
from fadapt.training import Halving, Trial, fit, grid, sweep
from fadapt.training.engine import optimizer as engine_optimizer
from fadapt.training.engine.flat_params import FlatParams
from fadapt.training.grid import named
from fadapt.training.loop import Loop
from fadapt.training.settings import Options, Settings

from .models import batch_for, qwen3, seeded

WIDTH, CLASSES, ROWS = 12, 3, 6


class Net(nn.Module):
    """Images to logits; remembers the rows of its calls."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.up, self.mid = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(WIDTH, CLASSES)
        self.calls: list[int] = []

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls.append(len(x))
        h = torch.tanh(self.up(x))
        return self.head(self.drop(torch.tanh(self.mid(h))))


def net(dtype=torch.float64, **kwargs):
    return seeded(Net(**kwargs), std=0.5).to(dtype).requires_grad_(False)


def loss_fn(output, batch):
    return F.cross_entropy(output, batch["labels"])


def make_batches(count=7, dtype=torch.float64, rows=ROWS):
    rng = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        x = torch.randn(rows, 8, generator=rng, dtype=torch.float64).to(dtype)
        batches.append({"x": x, "labels": (x[:, 0] > 0).long() + (x[:, 1] > 0).long()})
    return batches


TRIALS = [
    Trial(fadapt.LoRA(r=2), lr=1e-2, seed=1),
    Trial(fadapt.DoRA(r=3), lr=2e-2, weight_decay=0.1, warmup=3, schedule="cosine"),
    Trial(fadapt.LoRA(r=5), lr=3e-2, clip=0.05, schedule="linear", seed=2),
    Trial({"mid": fadapt.IA3()}, lr=5e-2, accumulate=2),
    Trial(fadapt.OFT(block_size=4, coft=0.3), lr=0.5, accumulate=3),
    Trial(fadapt.LoRA(r=3), lr=5e-3, warmup=2, accumulate=4, clip=0.1, schedule=lambda d: 1 - d**2),
]


def rate(trial: Trial, update: int, updates: int) -> float:
    """The documented schedules, written out once more."""
    if update < trial.warmup:
        return trial.lr * (update + 1) / trial.warmup
    done = (update - trial.warmup) / (updates - trial.warmup)
    if callable(trial.schedule):
        return trial.lr * trial.schedule(done)
    return (
        trial.lr
        * {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
        }[trial.schedule]
    )


def plain_training(model, trial, batches, steps, optimizer=torch.optim.AdamW, **kwargs):
    """One adapter in a loop that anyone would write."""
    if isinstance(trial.config, fadapt.Params):
        params = fadapt.stack([trial.config])
        params = fadapt.unstack(params)[0]
    else:
        params = fadapt.init(model, fadapt.Config(trial.config, seed=trial.seed or 0))
    ratios = trial.lr_ratio or {}
    leaves = [t for a in params.values() for k, t in a.train.items() if ratios.get(k, 1)]
    opt = optimizer(
        [
            {"params": [t], "ratio": ratios.get(k, 1)}
            for a in params.values() for k, t in a.train.items() if ratios.get(k, 1)
        ],
        lr=trial.lr, weight_decay=trial.weight_decay, **kwargs,
    )  # fmt: skip
    losses = []
    for step in range(steps):
        loss = fadapt.run(model, params, batches[step % len(batches)], loss_fn)
        (loss / trial.accumulate).backward()
        losses.append(loss.item())
        if (step + 1) % trial.accumulate:
            continue
        if trial.clip is not None:
            nn.utils.clip_grad_norm_(leaves, trial.clip)
        for group in opt.param_groups:
            now = rate(trial, step // trial.accumulate, steps // trial.accumulate)
            group["lr"] = now * group["ratio"]
        opt.step()
        for leaf in fadapt.trainable(params):
            leaf.grad = None
        fadapt.project(params)
    return params, losses


def settings(**options):
    """With sweep's own defaults for the rest."""
    parameters = list(inspect.signature(sweep).parameters.values())[3:]
    return Settings(**{**{p.name: p.default for p in parameters}, **options})


def equal_bits(a, b):
    pairs = list(zip(fadapt.trainable(a), fadapt.trainable(b), strict=True))
    return all(torch.equal(x, y) for x, y in pairs)


def assert_close(a, b, tol=1e-9):
    assert list(a) == list(b)
    for name in a:
        for leaf, x in a[name].train.items():
            torch.testing.assert_close(x, b[name].train[leaf], atol=tol, rtol=tol)


OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, {"betas": (0.8, 0.95)}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_sweep_is_the_plain_loops(name):
    """Each trial, with its own everything, ends where a loop over it alone ends."""
    factory, kwargs = OPTIMIZERS[name]
    model, batches = net(), make_batches()
    report = sweep(
        model,
        TRIALS,
        batches,
        steps=24,
        loss_fn=loss_fn,
        optimizer=functools.partial(factory, **kwargs),
    )  # fmt: skip
    for i, (key, trial) in enumerate(named(TRIALS).items()):
        params, losses = plain_training(model, trial, batches, 24, factory, **kwargs)
        assert_close(report.params[key], params)
        swept = [float(report.losses[s][i]) for s in range(1, 25)]
        torch.testing.assert_close(swept, losses, atol=1e-9, rtol=1e-9)
        start = fadapt.init(model, fadapt.Config(trial.config, seed=trial.seed or 0))
        assert not equal_bits(params, start)


RATIOS = [
    Trial(fadapt.LoRA(r=2), lr=1e-2, lr_ratio={"B": 16.0}, weight_decay=0.1, clip=0.05),
    Trial(fadapt.LoRA(r=4), lr=2e-2, lr_ratio={"A": 0.0}, clip=0.05, accumulate=2, seed=1),
    Trial(fadapt.LoRA(r=3), lr=1e-2, seed=2),
    Trial(fadapt.DoRA(r=2), lr=1e-2, lr_ratio={"A": 0.5, "B": 2.0}, schedule="cosine", warmup=2),
]


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
@pytest.mark.parametrize("width", ["auto", 1])
def test_learning_rates_of_single_leaves(name, width):
    """Each trial ends where a loop with a param group per leaf ends; a leaf at 0 does not move."""
    (factory, kwargs), trials = OPTIMIZERS[name], RATIOS
    model, batches = net(), make_batches()
    report = sweep(
        model, trials, batches, steps=12, loss_fn=loss_fn, max_adapters=width,
        optimizer=functools.partial(factory, **kwargs),
    )  # fmt: skip
    for key, trial in named(trials).items():
        params, _ = plain_training(model, trial, batches, 12, factory, **kwargs)
        assert_close(report.params[key], params)
    start = fadapt.init(model, fadapt.Config(RATIOS[1].config, seed=1))
    frozen = report.params[list(named(trials))[1]]
    for site, adapter in frozen.items():
        assert torch.equal(adapter.train["A"], start[site].train["A"])
        assert not torch.equal(adapter.train["B"], start[site].train["B"])


def test_a_leaf_that_nobody_trains_gets_no_gradient():
    """Nor does the pass keep its layer's input for one."""
    model, batches = net(), make_batches(1)
    trials = [Trial(fadapt.LoRA(r=2), lr_ratio={"A": 0.0}, seed=s) for s in range(2)]
    loop = Loop(model, named(trials), batches, settings(loss_fn=loss_fn))
    loop._one_step()
    (block,) = loop.flat.blocks
    for place in block.places:
        assert bool(place.view(block.grads).any()) == (place.leaf == "B")
    flags = {k: t.requires_grad for a in loop.runner.chunks[0].params.groups[0].params.values()
             for k, t in a.train.items()}  # fmt: skip
    assert flags == {"A": False, "B": True}


def test_a_loop_of_ones_own_has_the_same_rates():
    """LoRA+ by param_groups, by fit, and by PEFT's own optimiser."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model, batches = net(torch.float32), make_batches(3, torch.float32)
    params = fadapt.init(model, fadapt.LoRA(r=2, alpha=4.0))
    trained = fit(
        model, params, batches, lr=1e-2, lr_ratio={"B": 16.0}, steps=6, loss_fn=loss_fn,
        optimizer=torch.optim.Adam,
    )  # fmt: skip
    other: object = get_peft_model(
        net(torch.float32), LoraConfig(r=2, lora_alpha=4, target_modules=["up", "mid", "head"])
    )
    for name, adapter in params.items():
        module = other.base_model.model.get_submodule(name.removesuffix(".weight"))
        module.lora_A.default.weight.data.copy_(adapter.train["A"])
    plus = create_loraplus_optimizer(
        other, torch.optim.Adam, lr=1e-2, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.0
    )
    own = torch.optim.Adam(fadapt.param_groups(params, {"B": 16.0}, lr=1e-2))
    for step in range(6):
        batch = batches[step % 3]
        for optimizer, loss in (
            (own, fadapt.run(model, params, batch, loss_fn)),
            (plus, loss_fn(other(x=batch["x"]), batch)),
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_close(trained, params, 1e-5)
    for name, adapter in params.items():
        module = other.base_model.model.get_submodule(name.removesuffix(".weight"))
        for key, leaf in (("A", module.lora_A), ("B", module.lora_B)):
            torch.testing.assert_close(
                adapter.train[key], leaf.default.weight, atol=2e-5, rtol=2e-4
            )


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_param_groups_at_the_optimizers_own_rate(kind) -> None:
    params = fadapt.init(nn.Sequential(nn.Linear(4, 2)), fadapt.LoRA(r=1))
    a, b = params["0.weight"].train.values()
    for given, usual in (({"lr": 0.01}, 0.01), ({}, kind([a]).defaults["lr"])):
        optimizer = kind(fadapt.param_groups(params, {"B": 16.0}), **given)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [usual, 16 * usual]
        assert [group["params"] for group in optimizer.param_groups] == [[a], [b]]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        optimizer.step()
        schedule.step()
        assert [group["lr"] for group in optimizer.param_groups] == [usual / 2, 8 * usual]
        other = kind(fadapt.param_groups(params, {"B": 16.0}), lr=1.0)
        other.load_state_dict(copy.deepcopy(optimizer).state_dict())
        assert [group["lr"] for group in other.param_groups] == [usual / 2, 8 * usual]
    (free,) = fadapt.param_groups(params, {"A": 0.0}, weight_decay=0.1)  # LoRA-FA
    assert free["params"][0] is b
    assert free["weight_decay"] == 0.1


def test_param_groups_of_a_stack():
    model = net()
    members = [fadapt.init(model, m) for m in (fadapt.LoRA(r=2), fadapt.DoRA(r=2))]
    stack = fadapt.stack(members)
    groups = fadapt.param_groups(stack, {"A": 0.0, "B": 2.0}, lr=0.1, weight_decay=0.3)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.2, 0.3), (0.1, 0.3)]
    held = [id(t) for g in groups for t in g["params"]]
    wanted = {
        id(t) for g in stack.groups for a in g.params.values()
        for k, t in a.train.items() if k != "A"
    }  # fmt: skip
    assert set(held) == wanted
    assert len(held) == len(wanted)


SOLO = (
    fadapt.LoRA(r=2),
    fadapt.LoRA(r=4),
    fadapt.DoRA(r=3),
    fadapt.OFT(block_size=4),
    fadapt.IA3(),
)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("options", [{}, {"clip": 0.05, "accumulate": 2, "lr_ratio": None}])
def test_one_by_one_is_fit_alone_bit_for_bit(optimizer, options):
    """Mixed ranks in float32; the losses, too. Beside a trial that diverges."""
    model, batches = net(torch.float32), make_batches(dtype=torch.float32, rows=7)
    members = [fadapt.init(model, m) for m in SOLO]
    given = dict(steps=10, loss_fn=loss_fn, optimizer=optimizer)
    trials = [Trial(p, lr=1e-2, name=str(i), **options) for i, p in enumerate(members)]
    wild = Trial(fadapt.LoRA(r=3), lr=1e30, weight_decay=1e30, name="wild")
    report = sweep(model, [*trials, wild], batches, max_adapters=1, **given)
    assert report.chunk == 1
    for i, params in enumerate(members):
        alone, single = fit(model, params, batches, lr=1e-2, return_report=True, **given, **options)
        assert equal_bits(alone, report.final[str(i)])
        assert [r[i] for r in report.losses.values()] == [r[0] for r in single.losses.values()]


def test_auto_that_runs_one_by_one_is_fit_alone(monkeypatch):
    monkeypatch.setattr("fadapt.training.engine.chunks.CPU_BYTES", 1)
    model, batches = net(torch.float32), make_batches(dtype=torch.float32)
    members = [fadapt.init(model, m) for m in SOLO]
    report = sweep(model, [Trial(p, lr=1e-2, name=str(i)) for i, p in enumerate(members)],
                   batches, loss_fn=loss_fn)  # fmt: skip
    for i, params in enumerate(members):
        alone = fit(model, params, batches, lr=1e-2, loss_fn=loss_fn)
        assert equal_bits(alone, report.final[str(i)])


def test_options_are_those_of_sweep():
    """The names and types that fit checks are sweep's own."""
    own = list(inspect.signature(sweep).parameters)[3:]
    assert own == list(Options.__annotations__)
    assert len(own) <= 19


def test_a_misspelt_option_is_named():
    model, batches = net(), make_batches(1)
    params = fadapt.init(model, fadapt.LoRA(r=2))
    with pytest.raises(fadapt.ConfigError, match=r"fit has no option 'setps'.*'steps'"):
        fit(model, params, batches, setps=3)
    with pytest.raises(fadapt.ConfigError, match=r"fit has no option 'weigth_decay'.*weight_decay"):
        fit(model, params, batches, weigth_decay=3)
    with pytest.raises(fadapt.ConfigError, match=r"sweep has no option 'max_adapter'"):
        sweep(model, [Trial(params)], batches, max_adapter=3)


def test_former_names_of_options_mean_what_they_did(tmp_path):
    model, batches = net(), make_batches()
    new = sweep(
        model, TRIALS[:2], batches, loss_fn=loss_fn,
        optimizer=functools.partial(torch.optim.AdamW, betas=(0.5, 0.6)),
    )  # fmt: skip
    given = dict(optimizer_args={"betas": (0.5, 0.6)}, checkpoint_every=2, checkpoint_minutes=None)
    old = sweep(model, TRIALS[:2], batches, loss_fn=loss_fn, directory=tmp_path, **given)
    for name, params in new.params.items():
        assert equal_bits(params, old.params[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_a_mode_without_gradients(mode):
    model, batches = net(), make_batches(3)
    expected = sweep(model, TRIALS[:2], batches, loss_fn=loss_fn)
    with mode():
        pissa = fadapt.init(model, fadapt.PiSSA(r=2))
        inside = sweep(model, TRIALS[:2], make_batches(3), loss_fn=loss_fn)
        fit(model, pissa, make_batches(3), loss_fn=loss_fn)
        made = net()
    for name, params in expected.params.items():
        assert equal_bits(params, inside.params[name])
    if mode is torch.inference_mode:
        with pytest.raises(fadapt.ConfigError, match="inference_mode"):
            sweep(made, TRIALS[:2], batches, loss_fn=loss_fn)


def test_a_sweep_leaves_no_tensors_behind():
    """The pass that measures memory saves an output of its own node."""
    import gc

    model, batches = net(), make_batches(1)

    def live():
        gc.collect()
        return sum(type(o) is Tensor for o in gc.get_objects())

    trials = [Trial(fadapt.LoRA(r=2), seed=s) for s in range(2)]
    sweep(model, trials, batches, loss_fn=loss_fn)
    before = live()
    for _ in range(5):
        sweep(model, trials, batches, loss_fn=loss_fn)
    assert live() <= before  # fewer where what other tests left was collected meanwhile


def test_metrics_stay_what_they_are():
    model, batches = net(), make_batches()
    trials = [Trial(fadapt.LoRA(r=2), seed=s) for s in range(4)]

    def run(evaluate, **options):
        return sweep(model, trials, batches, loss_fn=loss_fn, eval=evaluate, **options)

    calls: list[int] = []

    def renamed(model, stack):
        calls.append(1)
        return {f"score {len(calls)}": torch.zeros(len(stack))}

    with pytest.raises(fadapt.ConfigError, match=r"'score 2'.*at step 4, but .*'score 1'"):
        run(renamed, eval_every=2)
    calls.clear()
    with pytest.raises(fadapt.ConfigError, match="for some adapters"):
        run(renamed, max_adapters=2)
    numbered = run(lambda m, s: {1: torch.zeros(len(s))})
    assert list(numbered.scores[7]) == ["1"]
    for wrong in (None, "x", torch.zeros(4) * 1j, {None: torch.zeros(4)}, {"a": None}, {}, 0.5):
        with pytest.raises(fadapt.ConfigError, match="eval"):
            run(lambda m, s, wrong=wrong: wrong)


def test_fit_is_a_plain_loop_and_leaves_its_params_alone():
    model, batches = net(), make_batches()
    params = fadapt.init(model, fadapt.DoRA(r=2))
    before = [t.detach().clone() for t in fadapt.trainable(params)]
    trained = fit(model, params, batches, steps=10, lr=0.02, clip=0.1, loss_fn=loss_fn)
    expected, _ = plain_training(model, Trial(params, lr=0.02, clip=0.1), batches, 10)
    assert_close(trained, expected)
    assert all(map(torch.equal, fadapt.trainable(params), before))
    assert all(t.requires_grad and t.is_leaf for t in fadapt.trainable(trained))


def test_fit_of_a_stack_is_fit_of_its_members():
    model, batches = net(), make_batches()
    members = [fadapt.init(model, m) for m in (fadapt.LoRA(r=2), fadapt.DoRA(r=2))]
    trained = fit(model, fadapt.stack(members), batches, lr=0.02, loss_fn=loss_fn)
    assert isinstance(trained, fadapt.Stack)
    for member, result in zip(members, trained, strict=True):
        assert_close(result, fit(model, member, batches, lr=0.02, loss_fn=loss_fn))


def with_lr(lr):
    healthy = [Trial(fadapt.LoRA(r=2 + i % 3), lr=0.01 * (i + 1), seed=i) for i in range(4)]
    return [*healthy[:2], Trial(fadapt.LoRA(r=4), lr=lr, weight_decay=0.1, name="x"), *healthy[2:]]


@pytest.mark.parametrize("lr", [3e38, 1e20])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_isolation_bit_for_bit(optimizer, lr):
    """One trial diverges; losses and weights of the others have the same bits."""
    model, batches = net(torch.float32), make_batches(dtype=torch.float32)
    options = dict(steps=15, loss_fn=loss_fn, optimizer=optimizer, eval=batches[:2], eval_every=4)
    calm = sweep(model, with_lr(0.01), batches, **options)
    wild = sweep(model, with_lr(lr), batches, **options)
    status = {r.name: r.status for r in wild.results}
    assert status.pop("x") == "diverged"
    assert set(status.values()) == {"finished"}
    for name in status:
        assert equal_bits(calm.params[name], wild.params[name])
        i = calm.names.index(name)
        for step in calm.losses:
            assert calm.losses[step][i] == wild.losses[step][i]
    assert all(t.isfinite().all() for t in fadapt.trainable(wild.params["x"]))


def test_a_diverged_trial_is_frozen_before_the_step_that_broke_it():
    """Weights that overflow in the update, with finite loss and gradient, are not kept."""
    model, batches = net(torch.float32), make_batches(dtype=torch.float32)
    start = fadapt.init(model, fadapt.LoRA(r=2))
    trial = Trial(start, lr=1e20, weight_decay=1e30, name="x")
    report = sweep(model, [trial, TRIALS[0]], batches, loss_fn=loss_fn, optimizer=torch.optim.SGD)
    worst = report.results[-1]
    assert (worst.name, worst.status, worst.step) == ("x", "diverged", 1)
    assert "weights" in worst.reason
    assert equal_bits(report.params["x"], start)


@pytest.mark.parametrize("lr", [0.01, 3e38])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_large_trials_are_updated_in_turn(optimizer, lr, monkeypatch):
    """With a copy of one trial's weights at a time, bit for bit what one call makes of all."""
    model, batches = net(torch.float32), make_batches(dtype=torch.float32)
    trials = with_lr(lr)
    trials[0] = dataclasses.replace(trials[0], accumulate=3, clip=0.05)
    trials[3] = dataclasses.replace(trials[3], lr_ratio={"A": 0.0})
    options = dict(steps=9, loss_fn=loss_fn, optimizer=optimizer, eval=batches[:2], eval_every=3)
    options["halving"] = Halving(6)
    at_once = sweep(model, trials, batches, **options)
    monkeypatch.setattr(engine_optimizer, "AT_ONCE", 0)
    copied = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, *a, **k: copied.append(t) or clone(t, *a, **k))
    loop = Loop(model, named(trials), batches, settings(**options))
    assert loop.optimizer.in_turn
    loop.optimizer.step(2, torch.ones(len(trials)))
    assert max(t.numel() for t in copied) <= max(v.numel() for r in loop.optimizer.rows
                                                 for v in r.values)  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(engine_optimizer, "AT_ONCE", 0)
    in_turn = sweep(model, trials, batches, **options)
    assert in_turn.results == at_once.results
    for name in at_once.names:
        assert equal_bits(in_turn.params[name], at_once.params[name])
        assert equal_bits(in_turn.final[name], at_once.final[name])


def test_a_nonfinite_gradient_freezes_at_once():
    """The square root's gradient at a loss of zero is infinite while the loss is finite."""
    model, batches = net(torch.float32), make_batches(dtype=torch.float32)

    def sharp(output, batch):
        return loss_fn(output, batch) + (output - output.detach()).abs().sum().sqrt()

    start = fadapt.init(model, fadapt.LoRA(r=2))
    report = sweep(model, [Trial(start, name="x")], batches, steps=3, loss_fn=sharp)
    assert report.best.status == "diverged"
    assert "gradient" in report.best.reason
    assert equal_bits(report.params["x"], start)


def test_fit_warns_of_divergence():
    model, batches = net(torch.float32), make_batches(dtype=torch.float32)
    params = fadapt.init(model, fadapt.LoRA(r=2))
    with pytest.warns(fadapt.FadaptWarning, match="diverged at step"):
        fit(model, params, batches, steps=5, lr=3e38, loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("optimizer", "groups"), [(torch.optim.AdamW, 5), (torch.optim.Adafactor, 8)]
)
def test_trials_of_one_pace_share_a_call_of_the_optimizer(optimizer, groups):
    model, batches = net(), make_batches()

    def slower(done: float) -> float:
        return 1 - done / 2

    same = [Trial(fadapt.LoRA(r=r), lr=0.02, seed=r, clip=0.1 * r) for r in (2, 3)]
    curved = [Trial(fadapt.LoRA(r=2), lr=0.02, seed=s, schedule=slower) for s in (4, 5)]
    others = [
        Trial(fadapt.LoRA(r=2), lr=0.02, weight_decay=0.1),
        Trial(fadapt.LoRA(r=2), lr=0.02, warmup=2),
        Trial(fadapt.LoRA(r=2), lr=0.02, accumulate=2),
        Trial(fadapt.IA3(), lr=0.02, clip=0.2),
    ]
    trials = named([*same, *curved, *others])
    options = settings(steps=8, loss_fn=loss_fn, optimizer=optimizer)
    loop = Loop(model, trials, batches, options)
    report = loop.run()
    assert len(loop.optimizer.optimizer.param_groups) == groups
    for name, trial in trials.items():
        params, _ = plain_training(model, trial, batches, 8, optimizer)
        assert_close(report.params[name], params, 1e-10)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor])
def test_padded_entries_stay_zero(optimizer):
    model, batches = net(), make_batches()
    trials = [Trial(fadapt.LoRA(r=r), lr=0.05, weight_decay=0.1) for r in (2, 7, 3)]
    options = settings(steps=12, loss_fn=loss_fn, optimizer=optimizer)
    loop = Loop(model, named(trials), batches, options)
    loop.run()
    (block,) = loop.flat.blocks
    seen = 0
    for place in block.places:
        leaf = place.view(block.values)
        for row, trial in enumerate(loop.flat.order):
            rank, axis = trials[trial].config.r, 0 if place.leaf == "A" else 1
            padded = leaf[row].narrow(axis, rank, 7 - rank)
            assert (padded == 0).all()
            assert (leaf[row].narrow(axis, 0, rank) != 0).any()
            seen += padded.numel()
    assert seen


MIXED_RANKS = [
    fadapt.LoRA(r=5, alpha=5.0),
    fadapt.LoRA(r=2),
    {"up": fadapt.LoRA(r=1), "mid|head": fadapt.LoRA(r=5)},
    fadapt.DoRA(r=4),
    {"up": fadapt.LoRA(r=5), "mid|head": fadapt.LoRA(r=2)},
    fadapt.LoRA(r=2, alpha=3.0),
    {"up|mid|head": fadapt.DoRA(r=1)},
    fadapt.LoRA(r=5),
]


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adafactor])
@pytest.mark.parametrize("kept", [range(8), (0, 7), (1, 5), (2, 4, 6), (4,), (5, 3, 1)])
def test_ranks_in_any_mix_and_after_stops(optimizer, kept):
    """Ranks that differ from trial to trial and from site to site; some trials stop half way."""
    model, batches = net(), make_batches()
    trials = [
        Trial(m, lr=0.02, weight_decay=0.1, clip=0.05, seed=i) for i, m in enumerate(MIXED_RANKS)
    ]
    trials[1] = dataclasses.replace(trials[1], accumulate=3)
    options = settings(steps=9, loss_fn=loss_fn, optimizer=optimizer)
    loop = Loop(model, named(trials), batches, options)
    for step in range(9):
        if step == 4:
            loop.shrink(list(kept))
        loop._one_step()
    for trial in kept:
        params, _ = plain_training(model, trials[trial], batches, 9, optimizer)
        block, row = next((b, r) for t, b, r in loop.flat.rows() if t == trial)
        assert_close(params.join(block.train(row)), params, 1e-10)


def test_own_order_is_a_permutation_of_each_epoch():
    model, batches = net(), make_batches(5)
    trials = [Trial(fadapt.LoRA(r=2), lr=0.01, seed=s) for s in (0, 1, 1)]
    seen: list[tuple] = []

    def spy(output, batch):
        if output.requires_grad:
            seen.append(tuple(batch["x"][:, 0].tolist()))
        return loss_fn(output, batch)

    report = sweep(model, trials, batches, steps=10, loss_fn=spy, order="own", verify=False)
    ids = {tuple(b["x"][:, 0].tolist()): i for i, b in enumerate(batches)}
    orders = [[ids[seen[step * 3 + t]] for step in range(10)] for t in range(3)]
    for order in orders:
        assert sorted(order[:5]) == sorted(order[5:]) == list(range(5))
    assert orders[0] != orders[1] == orders[2]
    for trial, order, name in zip(trials, orders, named(trials), strict=True):
        params, _ = plain_training(model, trial, [batches[i] for i in order], 10)
        assert_close(report.params[name], params)


@pytest.mark.parametrize("most", ["auto", 2, 1])
@pytest.mark.parametrize("kind", ["tensors", "list"])
def test_batches_of_each_adapters_own(kind, most):
    model, batches = net(), make_batches(6)
    trials = [Trial(fadapt.LoRA(r=2), lr=0.01), Trial(fadapt.DoRA(r=2), lr=0.02),
              Trial(fadapt.LoRA(r=2), lr=0.03)]  # fmt: skip
    parts = [[batches[(i + t) % 6] for t in range(3)] for i in range(6)]
    if kind == "tensors":
        given = [{k: torch.stack([p[k] for p in row]) for k in row[0]} for row in parts]
    else:
        given = parts
    report = sweep(
        model, trials, given, loss_fn=loss_fn, per_adapter=True, eval=batches[:1], max_adapters=most
    )
    for t, (name, trial) in enumerate(named(trials).items()):
        params, _ = plain_training(model, trial, [row[t] for row in parts], 6)
        assert_close(report.final[name], params)


def test_a_dataloader_is_shuffled_anew_each_epoch_and_reproducibly():
    model, data = net(), make_batches(1, rows=20)[0]
    seen: list[Tensor] = []

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x, labels):
            return self.net(x)

    def pair_loss(output, batch):
        seen.append(batch[1])
        return F.cross_entropy(output, batch[1])

    wrapped = Pairs()
    state = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        loader = DataLoader(TensorDataset(data["x"], data["labels"]), batch_size=5, shuffle=True)
        loader = _Tuples(loader)
        trial = Trial({"net": fadapt.LoRA(r=2)}, lr=0.02)
        report = sweep(wrapped, [trial], loader, steps=8, loss_fn=pair_loss, seed=seed)
        results.append(next(iter(report.params.values())))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal_bits(results[0], results[1])
    assert not equal_bits(results[0], results[2])
    epochs = [torch.cat(seen[i : i + 4]) for i in (0, 4)]
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert not torch.equal(*epochs)


class _Tuples:
    """A loader of [x, y] lists as one of (x, y) tuples, which run passes by position."""

    def __init__(self, loader):
        self.loader, self.generator, self.sampler = loader, loader.generator, loader.sampler

    def __iter__(self):
        return map(tuple, self.loader)


def out_of_memory_above(rows, limit_at_backward=False):
    """A loss that fails as CUDA does when the pass has more than so many rows."""

    class Costly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, count):
            ctx.count = count
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if ctx.count > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
            return grad, None

    return Costly


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_halves_without_losing_a_step(where):
    limit = 2 * ROWS

    class Tight(Net):
        def forward(self, x, labels=None):
            if len(x) > limit and where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
            out = super().forward(x)
            return out_of_memory_above(limit).apply(out, len(x)) if where == "backward" else out

    model = net()
    tight = seeded(Tight(), std=0.5).double()
    batches = make_batches()
    options = dict(steps=12, loss_fn=loss_fn, eval=batches[:2], eval_every=5)
    free = sweep(model, TRIALS, batches, **options)
    chunked = sweep(tight, TRIALS, batches, **options)
    assert free.chunk == len(TRIALS)
    assert chunked.chunk == 2
    for name in free.params:
        assert_close(free.params[name], chunked.params[name])
    for step in free.losses:
        torch.testing.assert_close(free.losses[step], chunked.losses[step], atol=1e-9, rtol=1e-9)
    assert max(n for n in tight.calls[6:]) <= limit or where == "backward"
    with pytest.raises(torch.OutOfMemoryError):
        sweep(tight, TRIALS, batches, max_adapters=None, **options)
    limit = ROWS - 1
    with pytest.raises(torch.OutOfMemoryError) as caught:
        sweep(tight, TRIALS, batches, **options)
    assert "1 adapter(s)" in caught.value.__notes__[0]


def test_on_a_cpu_auto_runs_what_is_fast(monkeypatch):
    """The width follows from what one adapter keeps for its gradient, and changes no result."""
    model, batches = net(), make_batches()
    options = dict(steps=12, loss_fn=loss_fn)
    trials = [Trial(fadapt.LoRA(r=2), lr=1e-2, seed=s) for s in range(6)]
    each = kept_bytes(model, batches[0])
    whole = sweep(model, trials, batches, **options)
    assert whole.chunk == 6
    for budget, width in ((each - 1, 1), (2 * each, 2), (3 * each, 3), (6 * each, 6)):
        monkeypatch.setattr("fadapt.training.engine.chunks.CPU_BYTES", budget)
        model.calls.clear()
        parts = sweep(model, trials, batches, **options)
        assert parts.chunk == max(model.calls) // ROWS == width
        for name in whole.params:
            assert_close(whole.params[name], parts.params[name])
    monkeypatch.setattr("fadapt.training.engine.chunks.CPU_BYTES", 1)
    for asked in (3, None):
        assert sweep(model, trials, batches, max_adapters=asked, **options).chunk == (asked or 6)


def kept_bytes(model, batch):
    """What a LoRA of rank 2 keeps there: the inputs of its layers and their low-rank images."""
    rows, size = batch["x"].shape[0], batch["x"].element_size()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = [m.in_features for m in layers]
    return rows * size * (sum(inputs) + 2 * len(layers))


def test_max_adapters_bounds_the_pass():
    model, batches = net(), make_batches()
    report = sweep(model, TRIALS, batches, steps=12, loss_fn=loss_fn, max_adapters=2)
    assert max(model.calls) == 2 * ROWS
    assert report.chunk == 2


def test_halving_stops_the_worse_and_runs_smaller_passes():
    model, batches = net(), make_batches()
    trials = grid([fadapt.LoRA(r=2), fadapt.DoRA(r=2)], lr=[1e-4, 1e-3, 1e-2, 3e-2])
    options = dict(steps=40, loss_fn=loss_fn, eval=batches[:3], verify=False)
    whole = sweep(model, trials, batches, eval_every=10, **options)
    model.calls.clear()
    halved = sweep(model, trials, batches, halving=Halving(first=10), **options)
    first, *train_calls = [n // ROWS for n in model.calls]
    assert first == 1  # asks how much memory one adapter needs
    assert sorted(set(train_calls), reverse=True) == [8, 4, 2]
    assert [r.status for r in halved.results] == ["finished"] * 2 + ["stopped"] * 6
    assert sorted(r.step for r in halved.results) == [10] * 4 + [20] * 2 + [40] * 2
    # The rungs judge by the scores of their step.
    for rung, kept in ((10, 4), (20, 2)):
        scores = halved.scores[rung]["loss"]
        ranked = sorted(
            (s, n) for s, n in zip(scores.tolist(), halved.names, strict=True) if s == s
        )
        later = {r.name for r in halved.results if r.step > rung}
        assert {n for _, n in ranked[:kept]} == later
    for result in halved.results:
        at = result.step
        i = halved.names.index(result.name)
        for step in range(1, at + 1):
            torch.testing.assert_close(
                halved.losses[step][i], whole.losses[step][i], atol=1e-9, rtol=1e-9
            )
    for name in (r.name for r in halved.results[:2]):
        assert_close(halved.final[name], whole.final[name])


def test_the_best_weights_are_kept():
    model, batches = net(), make_batches()
    trials = [Trial(fadapt.LoRA(r=4), lr=lr) for lr in (0.01, 0.5)]
    report = sweep(
        model, trials, batches, steps=30, loss_fn=loss_fn, eval=batches[4:], eval_every=1
    )
    for result in report.results:
        i = report.names.index(result.name)
        scores = {s: float(v["loss"][i]) for s, v in report.scores.items()}
        assert result.score == min(scores.values()) == scores[result.best_step]
        params = report.params[result.name]
        losses = [fadapt.run(model, params, b, loss_fn).item() for b in batches[4:]]
        assert sum(losses) / 3 == pytest.approx(result.score, rel=1e-10)
    wild = next(r for r in report.results if r.trial.lr == 0.5)
    assert wild.best_step < 30
    assert not equal_bits(report.params[wild.name], report.final[wild.name])


def test_eval_by_a_function_with_a_goal():
    model, batches = net(), make_batches()

    def accuracy(model, stack):
        assert not model.training
        logits = fadapt.apply(model, stack, batches[0]["x"])
        right = (logits.argmax(-1) == batches[0]["labels"]).double().mean(-1)
        return {"accuracy": right, "confidence": logits.softmax(-1).amax(-1).mean(-1)}

    trials = grid(fadapt.LoRA, r=[1, 4], lr=[1e-3, 5e-2])
    model.train()
    model.drop.eval()
    report = sweep(
        model, trials, batches, steps=20, loss_fn=loss_fn, eval=accuracy, goal="max", max_adapters=3
    )
    assert model.training
    assert not model.drop.training
    assert report.metric == "accuracy"
    assert [r.score for r in report.results] == sorted(
        (r.score for r in report.results), reverse=True
    )
    for result in report.results:
        logits = fadapt.apply(model, report.params[result.name], batches[0]["x"])
        assert (logits.argmax(-1) == batches[0]["labels"]).double().mean() == result.score
    assert report.best.trial.lr == 5e-2


class Counting:
    """A torch.compile backend that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


COMPILED = [Trial(fadapt.LoRA(r=2), lr=lr, schedule="cosine", warmup=2) for lr in (0.01, 0.02)] + [
    Trial(fadapt.LoRA(r=3), lr=lr, name=f"x{i}") for i, lr in enumerate((3e38, 1e-4))
]


@pytest.mark.parametrize(("shrink", "graphs"), [(None, 1), (True, 3)])
def test_compiled_once(shrink, graphs):
    """New learning rates, a diverged trial and stopped ones do not compile again."""
    model, batches = net(torch.float32), make_batches(dtype=torch.float32)
    options = dict(steps=16, loss_fn=loss_fn, eval=batches[:2])
    backend = Counting()
    halving = Halving(first=4, shrink=shrink)
    compiled = sweep(
        model, COMPILED, batches, compile={"backend": backend}, halving=halving, **options
    )
    assert backend.graphs == graphs
    statuses = {r.name: r.status for r in compiled.results}
    assert statuses["x0"] == "diverged"
    assert "stopped" in statuses.values()
    eager = sweep(model, COMPILED, batches, halving=halving, **options)
    assert {r.name: r.status for r in eager.results} == statuses
    for name in compiled.params:
        assert_close(compiled.params[name], eager.params[name], 1e-4)


def test_equal_chunks_compile_once():
    model, batches = net(torch.float32), make_batches(dtype=torch.float32)
    trials = [Trial(fadapt.LoRA(r=2), lr=1e-2, seed=s) for s in range(6)]
    backend = Counting()
    sweep(model, trials, batches, loss_fn=loss_fn, compile={"backend": backend}, max_adapters=2)
    assert backend.graphs == 1


class Overwriting(Counting):
    """Like a backend with CUDA graphs: a call overwrites what the one before it returned."""

    def __call__(self, graph, inputs):
        forward, last = super().__call__(graph, inputs), []

        def call(*args):
            for tensor in last:
                tensor.data.fill_(float("nan"))
            last[:] = forward(*args)
            return tuple(last)

        return call


class Reading(Counting):
    """Notes the operators of the graphs."""

    def __init__(self):
        super().__init__()
        self.operators: list[str] = []

    def __call__(self, graph, inputs):
        self.operators += [str(node.target) for node in graph.graph.nodes]
        return super().__call__(graph, inputs)


def test_a_compiled_sweep_computes_rotary_tables_once():
    model, batches = qwen3(), [batch_for("qwen3", seed=i) for i in range(3)]
    trials = [Trial(fadapt.LoRA(r=2), lr=1e-2, seed=s) for s in range(3)]
    backend = Reading()
    compiled = sweep(model, trials, batches, compile={"backend": backend})
    written = [x for x in backend.operators if "fadapt" in x and "written" in x]
    assert len(written) == 2  # a table of cosines and one of sines
    assert not any(module._forward_hooks for module in model.modules())
    plain = sweep(model, trials, batches)
    for name in plain.params:
        assert_close(compiled.params[name], plain.params[name], 1e-4)


class TurnedRotaryEmbedding(nn.Module):
    """As ESM's: returns what it has rotated, through which gradients flow."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)


class Turned(Net):
    def __init__(self):
        super().__init__()
        self.turn = TurnedRotaryEmbedding()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.mid(self.turn(torch.tanh(self.up(x))))))


def test_what_a_rotary_embedding_has_rotated_keeps_its_gradient():
    model = seeded(Turned(), std=0.5).requires_grad_(False)
    batches = make_batches(dtype=torch.float32)
    trials = [Trial({"up": fadapt.LoRA(r=2)}, lr=1e-2, seed=s) for s in range(2)]
    options = dict(loss_fn=loss_fn, eval=lambda model, stack: per_trial_vmap(model, stack, batches))
    compiled = sweep(model, trials, batches, compile={"backend": Counting()}, **options)
    plain = sweep(model, trials, batches, **options)
    for name in plain.params:
        assert_close(compiled.params[name], plain.params[name], 1e-4)


def per_trial_vmap(model, stack, batches):
    """Scores by torch.func.vmap, which the hooks of a compiled sweep must not hinder."""
    members = [fadapt.split(p) for p in fadapt.unstack(stack)]
    train = torch.utils._pytree.tree_map(lambda *t: torch.stack(t), *(m[0] for m in members))

    def loss(train):
        return fadapt.run(model, fadapt.join(train, members[0][1]), batches[0], loss_fn)

    return torch.func.vmap(loss)(train)


def test_losses_outlive_the_next_compiled_pass():
    model, batches = net(torch.float32), make_batches(dtype=torch.float32)
    trials = [Trial(fadapt.LoRA(r=2), lr=1e-2, seed=s) for s in range(6)]
    options = dict(loss_fn=loss_fn, max_adapters=2)
    compiled = sweep(model, trials, batches, compile={"backend": Overwriting()}, **options)
    plain = sweep(model, trials, batches, **options)
    assert {r.status for r in compiled.results} == {"finished"}
    for step, losses in plain.losses.items():
        torch.testing.assert_close(compiled.losses[step], losses, rtol=1e-4, atol=1e-5)


def test_dropout_is_seeded_and_the_model_untouched():
    model, batches = net(dropout=0.5).train(), make_batches()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    runs = [
        sweep(model, TRIALS, batches, loss_fn=loss_fn, steps=12, seed=s, eval=batches[:1]).final
        for s in (0, 0, 1)
    ]
    name = next(iter(runs[0]))
    assert equal_bits(runs[0][name], runs[1][name])
    assert not equal_bits(runs[0][name], runs[2][name])
    assert model.training
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_report(tmp_path):
    model, batches = net(), make_batches()
    trials = [*with_lr(1e300)[:3], Trial(fadapt.DoRA(r=2), lr=0.05)]
    report = sweep(
        model, trials, batches, steps=23, loss_fn=loss_fn, eval=batches[:2], eval_every=10,
        directory=fadapt.Checkpoints(tmp_path, every=5),
    )  # fmt: skip
    frame = report.to_pandas()
    assert list(frame.name) == [r.name for r in report.results]
    finite = frame[frame.status == "finished"]
    assert list(finite.score) == sorted(finite.score)
    assert frame.iloc[-1].status == "diverged"
    lines = str(report).splitlines()
    assert [line.split("  ")[1].strip() for line in lines[1:3]] == list(frame.name[:2])
    assert "diverged at step" in lines[4]

    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in log if "loss" in entry]
    assert steps == list(range(1, 24))
    for entry in log:
        for name, loss in entry.get("loss", {}).items():
            assert loss == float(report.losses[entry["step"]][report.names.index(name)])
    assert [e["trial"] for e in log if e.get("event") == "diverged"] == ["x"]
    assert [e["step"] for e in log if "scores" in e] == [10, 20, 23]

    curves = report.curves()
    assert set(curves.metric) == {"loss", "eval loss"}
    assert len(curves[(curves.metric == "loss") & (curves.trial == report.best.name)]) == 23
    report.plot(tmp_path / "new" / "curves.png")
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    for file in sorted((tmp_path / "adapters").iterdir()):
        name = report.names[int(file.name[:3])]
        assert equal_bits(fadapt.load(file, model), report.params[name])


def test_names_tell_what_differs():
    trials = grid([fadapt.LoRA(r=4), fadapt.IA3()], lr=[1e-3, 1e-2])
    assert list(named(trials)) == [
        "LoRA(r=4) lr=0.001", "LoRA(r=4) lr=0.01", "IA3 lr=0.001", "IA3 lr=0.01",
    ]  # fmt: skip
    assert list(named([Trial(fadapt.IA3()), Trial(fadapt.IA3())])) == ["IA3", "IA3 #2"]


def test_progress_is_quiet_unless_asked_for(capfd, monkeypatch):
    model, batches = net(), make_batches()
    sweep(model, TRIALS[:1], batches, loss_fn=loss_fn)
    assert capfd.readouterr() == ("", "")
    sweep(model, TRIALS[:1], batches, loss_fn=loss_fn, progress=True, log_every=1)
    assert "1 adapters" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(fadapt.ConfigError, match=r"fadapt\[train\]"):
        sweep(model, TRIALS[:1], batches, loss_fn=loss_fn, progress=True)


def test_missing_extras_are_named(monkeypatch, tmp_path):
    model, batches = net(), make_batches()
    report = sweep(model, TRIALS[:1], batches, loss_fn=loss_fn)
    for package, call in (
        ("pandas", report.to_pandas),
        ("pandas", report.curves),
        ("matplotlib", lambda: report.plot(tmp_path / "x.png")),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(fadapt.ConfigError, match=rf"{package}.*fadapt\[train\]"):
            call()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(fadapt.ConfigError, match=r"fadapt\[tensorboard\]"):
        sweep(model, TRIALS[:1], batches, loss_fn=loss_fn, directory=tmp_path, tensorboard=True)


def test_tensorboard_gets_losses_and_scores(monkeypatch, tmp_path):
    import types

    written = []

    class Writer:
        def __init__(self, directory, purge_step=None):
            written.append(("open", directory, purge_step))

        def add_scalar(self, tag, value, step):
            written.append((tag, value, step))

        def close(self):
            written.append(("close",))

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    model, batches = net(), make_batches()
    report = sweep(
        model, [Trial(fadapt.LoRA(r=2), name="a")], batches, loss_fn=loss_fn, steps=4,
        eval=batches[:1], eval_every=2, directory=tmp_path, tensorboard=True,
    )  # fmt: skip
    assert ("loss/a", float(report.losses[3][0]), 3) in written
    assert [w[2] for w in written if w[0] == "loss/a"] == [1, 2, 3, 4]
    assert [w[1:] for w in written if w[0] == "eval/loss/a"] == [
        (float(report.scores[s]["loss"][0]), s) for s in (2, 4)
    ]
    assert written[0] == ("open", str(tmp_path / "tensorboard"), None)
    assert written[-1] == ("close",)


def other_model_params():
    other = seeded(Net(), seed=5, std=0.5).double()
    return fadapt.init(other, fadapt.LoRA(r=2))


def bad_inputs():
    ok = [Trial(fadapt.LoRA(r=2)), Trial(fadapt.IA3())]
    batch = make_batches(1)[0]
    folded = {k: torch.stack([t, t]) for k, t in batch.items()}
    short = {k: t[:3] for k, t in batch.items()}
    yield "lr nan", lambda: Trial(fadapt.LoRA(), lr=math.nan), "lr"
    yield "lr negative", lambda: Trial(fadapt.LoRA(), lr=-1e-3), "lr"
    yield "lr inf", lambda: Trial(fadapt.LoRA(), lr=math.inf), "lr"
    yield "decay", lambda: Trial(fadapt.LoRA(), weight_decay=-1.0), "weight_decay"
    yield "clip", lambda: Trial(fadapt.LoRA(), clip=0.0), "clip"
    yield "warmup", lambda: Trial(fadapt.LoRA(), warmup=-1), "warmup"
    yield "accumulate", lambda: Trial(fadapt.LoRA(), accumulate=0), "accumulate"
    yield "schedule", lambda: Trial(fadapt.LoRA(), schedule="cosin"), "cosine"
    yield "class", lambda: Trial(fadapt.LoRA), "instance"
    yield "empty grid", lambda: grid(fadapt.LoRA(), lr=[]), "empty"
    yield "empty grid 2", lambda: grid([], lr=[1e-3]), "empty"
    yield "grid field", lambda: grid(fadapt.LoRA(), rate=[1e-3]), "rate"
    yield "grid method field", lambda: grid(fadapt.LoRA(), r=[2]), "class"
    yield "halving", lambda: Halving(first=0), "first"

    for name in (5, ("a", 1), ["a"], "", "a\nb", "a\0", "\ud800", "a" * 501):
        yield f"name {name!r:.9}", lambda name=name: Trial(fadapt.LoRA(), name=name), "name must be"
    for field, value in (
        ("clip", "a"), ("clip", True), ("lr", True), ("lr", "1"), ("warmup", True), ("seed", 1.0),
        ("accumulate", 2.0), ("schedule", 3), ("schedule", []), ("weight_decay", math.inf),
        ("lr_ratio", {"B": -1.0}), ("lr_ratio", {"B": math.nan}), ("lr_ratio", {1: 1.0}),
        ("lr_ratio", 16.0),
    ):  # fmt: skip
        yield f"{field} {value!r}", lambda f=field, v=value: Trial(fadapt.LoRA(), **{f: v}), field
    for values in (
        {"first": math.inf}, {"first": 1.5}, {"first": True}, {"first": 1, "factor": math.nan},
        {"first": 1, "factor": "2"}, {"first": 1, "least": 1.5}, {"first": 1, "shrink": 1},
    ):  # fmt: skip
        yield f"halving {values}", lambda v=values: Halving(**v), "needs first"
    yield "idle halving", lambda: Halving(1, factor=1 + 1e-9).rungs(10, 4), "1.333"

    def swept(trials=ok, batches=(), **options):
        batches = [batch] if batches == () else batches
        return lambda: sweep(net(), trials, batches, **{"loss_fn": loss_fn, **options})

    mixed = [Trial(fadapt.LoRA(r=2)), Trial(other_model_params())]
    yield "no trials", swept([]), "no trials"
    yield "not trials", swept([fadapt.LoRA()]), "Trial"
    yield "two bases", swept(mixed), "base model"
    yield "two names", swept([Trial(fadapt.IA3(), name="a")] * 2), "'a'"
    yield "steps 0", swept(steps=0), "steps"
    yield "steps float", swept(steps=2.0), "steps"
    yield "steps unknown", swept(batches=iter([batch])), "steps"
    yield "no batches", swept(batches=[]), "empty"
    yield "one batch", swept(batches=batch), "one batch"
    yield "leading axis", swept([*ok, *ok], [folded], per_adapter=True), "N = 4"
    yield "list of N", swept([*ok, *ok], [[batch, batch]], per_adapter=True), "4 trials"
    yield "unequal", swept(batches=[[batch, short]], per_adapter=True), "shapes"
    yield "unequal own", swept(batches=[batch, short], order="own"), "shapes"
    yield "own order of what", swept(batches=iter([batch]), steps=1, order="own"), "sequence"
    yield "order", swept(order="mine"), "order"
    yield "rows", swept(batches=[{**batch, "x": batch["x"][:4]}]), "rows"
    yield "halving without eval", swept(halving=Halving(1)), "eval"
    yield "empty eval", swept(eval=[]), "eval"
    yield "goal", swept(goal="best"), "goal"
    yield "max_adapters", swept(max_adapters=0), "max_adapters"
    yield "max_adapters word", swept(max_adapters="all"), "max_adapters"
    yield "accumulate steps", swept([Trial(fadapt.IA3(), accumulate=3)], steps=4), "steps=3"
    yield "tensorboard", swept(tensorboard=True), "directory"
    yield "optimizer args", swept(optimizer_args={"beta": 1}), "optimiser"
    yield "one trial", swept(ok[0]), r"\[Trial"
    yield "trials None", swept(5), "must be a list.*fadapt.Trial"
    for name, values in {
        "directory": ("", " ", 5, b"a", "a\0"), "seed": (2**70, 1.0, True),
        "halving": ({"first": 1},),
        "compile": ("yes", None), "loss_fn": (5,), "optimizer": ("adam", None), "eval": (5,),
        "log_every": (True, 0), "eval_every": (True, 1.0), "progress": ("yes",), "steps": (True,),
        "per_adapter": (1,), "tensorboard": ("yes",), "max_adapters": (True, 1.5), "goal": (None,),
    }.items():  # fmt: skip
        for value in values:
            match = "batches" if name == "eval" else name
            given = {"eval": [batch], name: value} if name != "eval" else {name: value}
            yield f"{name}={value!r:.9}", swept(**given), match
    for name in ("lr", "weight_decay"):
        yield f"{name} of the optimizer", swept(optimizer_args={name: 9.0}), "no effect"
    yield "no optimizer", swept(optimizer=lambda groups: None), "NoneType"
    yield "every", lambda: fadapt.Checkpoints("a", every=0), "every"
    yield "every float", lambda: fadapt.Checkpoints("a", every=0.5), "every"
    yield "resume", lambda: fadapt.Checkpoints("a", resume="yes"), "resume"
    yield "unknown leaf", swept([Trial(fadapt.IA3(), lr_ratio={"B": 2.0})]), r"\['B'\]"
    yield "all frozen", swept([Trial(fadapt.LoRA(r=2), lr_ratio={"A": 0, "B": 0.0})]), "nothing"
    curved = [Trial(fadapt.LoRA(r=2), schedule=lambda d: math.nan)]
    yield "schedule nan", swept(curved), "schedule.*nan"
    yield "schedule word", swept([Trial(fadapt.LoRA(r=2), schedule=lambda d: "x")]), "schedule"
    idle = dict(halving=Halving(1, factor=1.1), eval=[batch], steps=4)
    yield "halving of two", swept(**idle), "stops none of 2"
    params = fadapt.init(net(), fadapt.LoRA(r=2))
    yield "ratios", lambda: fadapt.param_groups(params, {"C": 1.0}, lr=0.1), r"\['C'\]"
    yield "ratios all 0", lambda: fadapt.param_groups(params, {"A": 0, "B": 0}, lr=0.1), "nothing"
    yield "groups lr", lambda: fadapt.param_groups(params, {}, lr=math.nan), "lr"
    yield "LBFGS", swept(optimizer=torch.optim.LBFGS), "LBFGS"
    yield "detached", swept(loss_fn=lambda o, b: o.detach().sum()), "depend"
    yield "fit", lambda: fit(net(), {}, [batch]), "Params"


BAD = {name: (call, match) for name, call, match in bad_inputs()}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_the_first_step(name, monkeypatch):
    call, match = BAD[name]
    steps = []
    monkeypatch.setattr(
        "fadapt.training.engine.optimizer.TrialOptimizer.step", lambda *a: steps.append(a)
    )
    with pytest.raises(fadapt.ConfigError, match=match):
        call()
    assert not steps


def test_an_iterator_has_one_epoch():
    model, batches = net(), make_batches()
    with pytest.raises(fadapt.ConfigError, match="ended after 7 steps") as caught:
        sweep(model, TRIALS[:2], iter(batches), steps=8, loss_fn=loss_fn)
    # What was trained is not lost.
    done = sweep(model, TRIALS[:2], batches, steps=7, loss_fn=loss_fn)
    for name, params in caught.value.report.final.items():
        assert_close(params, done.final[name], 1e-1)


class TestGradientsOfAnArena:
    """What a pass found lands at each leaf's own place, whatever its order of memory."""

    @pytest.fixture
    def arena(self):
        model = net(torch.float32)
        methods = [fadapt.LoRA(r=2), fadapt.IA3(), fadapt.LoRA(r=3), fadapt.DoRA(r=2)]
        return FlatParams(fadapt.stack([fadapt.init(model, m) for m in methods]), range(4))

    @staticmethod
    def own(stack, grads):
        """The gradients with zeros for the padding, which the arena does not take."""
        result, leaves = [], iter(zip(fadapt.trainable(stack), grads, strict=True))
        for group in stack.groups:
            for name, adapter in group.params.items():
                for key in adapter.train:
                    leaf, grad = next(leaves)
                    grad = torch.zeros_like(leaf) if grad is None else grad.clone()
                    axis = rank_axes(adapter.method).get(key)
                    for row, original in enumerate(group.originals):
                        if axis is not None:
                            rank = original[name].method.r
                            grad[row].narrow(axis, rank, leaf.shape[axis] - rank).zero_()
                    result.append(grad)
        return result

    @staticmethod
    def found(stack, missing=None):
        """Random gradients, those of matrices transposed in memory, and one that is missing."""
        rng = torch.Generator().manual_seed(5)
        grads = [torch.randn(t.mT.shape if t.dim() > 2 else t.shape, generator=rng) for t in stack]
        grads = [g.mT if g.dim() > 2 else g for g in grads]
        if missing is not None:
            grads[missing] = None
        return grads

    @staticmethod
    def at_the_leaves(arena):
        return [place.view(b.grads).clone() for b in arena.blocks for place in b.places]

    @pytest.mark.parametrize("missing", [None, 0, 3])
    def test_whole(self, arena, missing):
        stack = arena.part(0, 4)
        leaves = fadapt.trainable(stack)
        grads = self.found(leaves, missing)
        expected = self.own(stack, grads)
        arena.take_gradients(0, 4, self.found(leaves), add=False)
        arena.take_gradients(0, 4, grads, add=False)
        for got, g in zip(self.at_the_leaves(arena), expected, strict=True):
            assert torch.equal(got, g)
        arena.take_gradients(0, 4, grads, add=True)
        for got, g in zip(self.at_the_leaves(arena), expected, strict=True):
            assert torch.equal(got, 2 * g)

    def test_part(self, arena):
        """Rows 1 and 2 only; the gradients of the others stay."""
        arena.take_gradients(0, 4, self.found(fadapt.trainable(arena.part(0, 4))), add=False)
        before = [[g.clone() for g in block.grads] for block in arena.blocks]
        stack = arena.part(1, 3)
        grads = self.found(fadapt.trainable(stack))
        arena.take_gradients(1, 3, grads, add=False)
        position, found = 0, iter(self.own(stack, grads))
        for block, old in zip(arena.blocks, before, strict=True):
            rows = [r for r in range(block.size) if 1 <= position + r < 3]
            if rows:
                for place in block.places:
                    assert torch.equal(place.view(block.grads)[rows], next(found))
            for grad, was in zip(block.grads, old, strict=True):
                for r in range(block.size):
                    assert torch.equal(grad[r], was[r]) == (r not in rows)
            position += block.size
        assert next(found, None) is None

    def test_none_is_added_when_memory_runs_out(self, arena, monkeypatch):
        leaves = fadapt.trainable(arena.part(0, 4))
        arena.take_gradients(0, 4, self.found(leaves), add=False)
        before, calls, stack = self.at_the_leaves(arena), [], torch.stack

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise torch.OutOfMemoryError
            return stack(*args, **kwargs)

        monkeypatch.setattr(torch, "stack", failing)
        with pytest.raises(torch.OutOfMemoryError):
            arena.take_gradients(0, 4, self.found(leaves), add=True)
        for got, was in zip(self.at_the_leaves(arena), before, strict=True):
            assert torch.equal(got, was)


def test_ranks_that_padding_would_fill_memory_with_are_groups_of_their_own(monkeypatch, tmp_path):
    """The same training, without padding; a checkpoint of one layout goes on in the other."""
    model, batches = net(), make_batches()
    methods = [fadapt.LoRA(r=1), fadapt.LoRA(r=4), fadapt.DoRA(r=1), fadapt.DoRA(r=3)]
    trials = fadapt.grid(methods, lr=[1e-2, 1e-3])
    options = {"loss_fn": loss_fn, "directory": fadapt.Checkpoints(tmp_path / "a", every=2)}
    padded = sweep(model, trials, batches, loss_fn=loss_fn)

    def halfway(output, batch):
        halfway.calls += 1
        if halfway.calls > 3 * len(trials):
            raise ZeroDivisionError
        return loss_fn(output, batch)

    halfway.calls = 0
    with pytest.raises(ZeroDivisionError):
        sweep(model, trials, batches, **{**options, "loss_fn": halfway}, verify=False)
    monkeypatch.setattr("fadapt.training.loop.PADDING", 0)
    apart = sweep(model, trials, batches, loss_fn=loss_fn)
    options["directory"] = fadapt.Checkpoints(tmp_path / "a", resume="anyway")
    resumed = sweep(model, trials, batches, **options)
    for report in (apart, resumed):
        for name, params in padded.final.items():
            for a, b in zip(report.final[name].trainable(), params.trainable(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
