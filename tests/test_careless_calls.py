"""Kinds of careless calls, one example each; tests/attack/arguments has the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fadapt
from fadapt.calibration import PCA, Sketch, SumSq, combine_all, text_batches
from fadapt.distributed import all_reduce_gradients
from fadapt.patterns import check_pattern


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


MODEL, X = net(), torch.ones(4, 8)
P = fadapt.init(MODEL, fadapt.LoRA(r=2))
ADA = fadapt.init(MODEL, fadapt.AdaLoRA(r=2))
BUDGET = fadapt.RankBudget(4)
SERVED = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
CONFIG, TENSORS = fadapt.peft.peft_dict(SERVED, fadapt.init(SERVED, fadapt.LoRA(r=2)))


def loss(out: Any, _: Any) -> Any:
    return out.square().mean()


def fit(**options: Any) -> Any:
    model, batches = options.pop("model", MODEL), options.pop("batches", [X])
    return fadapt.fit(model, P, batches, progress=False, **{"loss_fn": loss, **options})


def peft(**fields: Any) -> Any:
    return fadapt.peft.from_peft_dict(SERVED, {**CONFIG, **fields}, TENSORS)


def calls() -> Iterator[tuple[str, Callable[[], Any], str]]:
    f: Any = fadapt
    # A word in the place of a flag counts as True.
    yield "run(verify)", lambda: f.run(MODEL, P, X, loss, verify="no"), "verify must be True or F"
    yield "load", lambda: f.load("a", MODEL, allow_other_base="no"), "allow_other_base must be True"
    yield "observe(share)", lambda: f.observe(MODEL, f.EVA(r=1), [X], share=0), "share must be True"
    yield "fit", lambda: fit(return_report=1), "return_report must be True or False"
    yield "peft_dict", lambda: f.peft.peft_dict(SERVED, P, serving="yes"), "serving must be True"
    # What is called later, or not at all.
    yield "run(loss_fn)", lambda: f.run(MODEL, P, X, "mse"), "loss_fn must be a function"
    yield "init(loss_fn)", lambda: f.init(MODEL, f.LoRA(r=2), loss_fn=5), "loss_fn must be a func"
    yield "map", lambda: P.map(lambda a: None), "must return an Adapter"
    yield "Stack.map", lambda: f.stack([P]).map(lambda p: 5), "returned 5"
    # Compared with words or dtypes before its type is known.
    yield "merge(dtype)", lambda: f.merge(MODEL, P, dtype=np.ones(2)), "dtype of merged weights"
    yield "goal", lambda: fit(goal=np.ones(2)), "goal must be 'min' or 'max'"
    yield "rule", lambda: f.merge_many(MODEL, [P], [1.0], rule=np.ones(2)), "rule must be one of"
    # Numbers that no float holds, and tensors without values.
    yield "lr", lambda: fit(lr=10**400), "lr must be a finite number"
    yield "warmup", lambda: fit(warmup=10**400), "warmup must be an int"
    yield "scale", lambda: f.scale(P, torch.tensor(1.0, device="meta")), "has no value"
    yield "meta batch", lambda: fit(batches=[X.to("meta")]), "meta tensor of shape"
    yield "seed", lambda: f.Config(f.LoRA(), seed=True), "seed must be an int"
    # One thing for a list of them; lists that cannot be read.
    yield "batches", lambda: fit(batches=X), r"write \[batch\] for one batch"
    yield "batches 0-d", lambda: fit(batches=np.float64(1)), "batches must be iterable"
    yield "layers", lambda: f.Config(f.LoRA(), layers=torch.tensor(1)), "layers must be a list"
    yield "select", lambda: f.select(f.stack([P, P]), {1, 0}), "ids must be a list"
    yield "gradients", lambda: all_reduce_gradients(P), "no process group"
    yield "combine_all", lambda: combine_all([]), "list of Stats, got none"
    yield "combine_all 1", lambda: combine_all([5]), "got 5 among them"
    # Models that are none, or another.
    yield "sweep(model)", lambda: fit(model=None), "expected a torch.nn.Module"
    yield "summary(model)", lambda: f.summary(P, 5), "expected a torch.nn.Module"
    other = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    yield "summary", lambda: f.summary(P, other), "pass the base that they were made for"
    yield "as_module", lambda: f.as_module(other, P), r"0.weight, which has shape \(6, 6\)"
    # Leaves of another method, into whole params.
    train, _ = f.split(P)
    yield "join", lambda: f.join(train, f.init(MODEL, f.IA3())), "lacks the leaves"
    yield "Params", lambda: f.Params({"a": 5}), "Params takes"
    yield "Trial", lambda: f.Trial({"a": 1}), "expected a method or None"
    # A budget's state, from elsewhere.
    state = BUDGET.update(None, ADA, 1, {n: dict(a.train) for n, a in ADA.items()})
    more = f.init(MODEL, f.AdaLoRA(r=3))
    yield "update", lambda: BUDGET.update({"a": 1}, ADA, 2), "what RankBudget.update returned"
    yield "cut", lambda: BUDGET.cut(more, state, 2), "state is of other params"
    yield "step", lambda: BUDGET.kept(state, "2"), "step must be an int"
    yield "grads", lambda: BUDGET.update(None, ADA, 1, {"x": 1}), "has no gradient"
    # Statistics.
    yield "PCA", lambda: PCA(k=0), "k must be an int from 1"
    yield "Sketch", lambda: Sketch(k="2"), "Sketch.k must be an int"
    yield "Statistic", lambda: f.Statistic(5), "instance of Reduction"
    yield "at_least", lambda: f.Statistic(SumSq(), at_least=math.nan), "at_least must be an int"
    yield "texts", lambda: text_batches(["a"], len, batch_size=0), "batch_size must be an int"
    # PEFT.
    yield "config", lambda: f.peft.from_peft_dict(SERVED, None, TENSORS), "must be the content of"
    yield "tensors", lambda: f.peft.from_peft_dict(SERVED, CONFIG, {1: X}), "must be {key: tensor}"
    yield "field", lambda: peft(bias=np.ones(2)), "which JSON cannot hold"
    yield "lora_bias", lambda: peft(lora_bias=True), "lora_B.bias is missing"
    yield "served", lambda: f.peft.served_by({**CONFIG, "rank_pattern": 5}, TENSORS), "rank_pattern"
    yield "folder", lambda: f.peft.adapters_in(None), "expected a path"
    yield "name", lambda: f.peft.save_peft(SERVED, {"\ud800": P}, "a"), "."


CALLS = {name: (call, message) for name, call, message in calls()}


@pytest.mark.parametrize("name", CALLS)
def test_refused_with_what_to_write(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, message = CALLS[name]
    with pytest.raises(fadapt.FadaptError, match=message):
        call()
    assert not list(tmp_path.iterdir())


BOMBS = (
    "(.|.)*!", r"(?:.|..)+$!", "(.{1,9}){1,9}!", "(.?){30}.{30}!", ".*.*.*.*.*.*.*.*.*.*=",
    "(.|.)" * 30 + "!", ".?" * 35 + ".{35}!",
)  # fmt: skip


@pytest.mark.parametrize("pattern", BOMBS)
def test_patterns_that_take_for_ever(pattern: str) -> None:
    with pytest.raises(fadapt.ConfigError, match="for ever"):
        check_pattern(pattern, "rule")
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        with pytest.raises(fadapt.CheckpointError, match=field):
            peft(**{field: [pattern]})
    with pytest.raises(fadapt.CheckpointError, match="rank_pattern"):
        fadapt.peft.served_by({**CONFIG, "rank_pattern": {pattern: 2}}, TENSORS)


@pytest.mark.parametrize("pattern", [r"layers\.(1|2|3)\.", r"(?:\w+\.)*(q|k|v|o)_proj", r"\d{1,3}"])
def test_plain_patterns_are_taken(pattern: str) -> None:
    check_pattern(pattern, "rule")
    assert re.compile(pattern)


def test_a_set_of_targets_is_a_list() -> None:
    """As PEFT's own configs have them."""
    assert peft(target_modules={"q_proj"})["q_proj.weight"].method.r == 2
