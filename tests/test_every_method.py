"""Every method through functions that a few methods would not try: one test, all methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fadapt
from fadapt.statistics.reduction import statistics_of
from tests.models import Tokens, perturb, qwen3, seeded, tokens
from tests.test_laws import ROWS

IDS = torch.randint(12, (8, 4, 5), generator=torch.Generator().manual_seed(0))
BATCHES = [{"ids": ids} for ids in IDS]
PAIRS = list(zip(BATCHES[:4], BATCHES[4:], strict=True))


def model() -> nn.Module:
    return seeded(Tokens(), std=0.5).double().requires_grad_(False)


def loss_fn(output: Tensor, _: Any) -> Tensor:
    return (output.sin() + 0.1 * output.square()).mean()


def fresh(base: nn.Module, method: fadapt.Method, rule: str = "") -> fadapt.Params:
    """Params of a method, calibrated where it asks for it."""
    paired = any(s.reduction.paired for s in statistics_of(method.statistic))
    calib = None if method.statistic is None else PAIRS if paired else BATCHES
    return fadapt.init(base, {rule: method} if rule else method, calib, loss_fn=loss_fn)


def moved(params: fadapt.Params, seed: int = 1) -> fadapt.Params:
    perturb(params, seed)
    with torch.no_grad():
        for adapter in params.values():
            if "alpha" in adapter.train:  # an ablation below 0 is none
                adapter.train["alpha"].abs_()
    return fadapt.project(params)


def equal(got: Tensor, want: Tensor, what: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


def same(got: fadapt.Params, want: fadapt.Params, what: str) -> None:
    assert list(got) == list(want), what
    for name, adapter in want.items():
        assert got[name].method == adapter.method, what
        assert got[name].leaves.keys() == adapter.leaves.keys(), what
        for leaf, tensor in adapter.leaves.items():
            assert torch.equal(got[name].leaves[leaf], tensor), (what, name, leaf)


def one_adapter(base: nn.Module, path: Path) -> dict[str, Callable[[Any], Any]]:
    """What is done with one adapter, by its name."""
    f = fadapt
    return {
        "run": lambda p: f.run(base, p, BATCHES[0], loss_fn),
        "apply": lambda p: f.apply(base, p, IDS[0]),
        "bound": lambda p: f.bound(base, p).__enter__(),
        "stack": lambda p: f.stack([p]),
        "scale": lambda p: f.scale(p, 0.5),
        "merge": lambda p: f.merge(base, p),
        "merge_many": lambda p: f.merge_many(base, [p], [1.0]),
        "combine": lambda p: f.combine([p], [1.0]),
        "as_lora": lambda p: f.as_lora(base, p),
        "as_module": lambda p: f.as_module(base, p),
        "save": lambda p: f.save(p, path / "none"),
        "save_peft": lambda p: f.peft.save_peft(base, p, path / "none"),
        "peft_dict": lambda p: f.peft.peft_dict(base, p, serving=True),
        "fit": lambda p: f.fit(base, p, BATCHES, steps=1, loss_fn=loss_fn),
        "Trial": lambda p: f.Trial(p),
        "summary": lambda p: f.summary(p),
    }


def test_a_part_of_an_adapter_and_a_part_of_a_stack_are_refused(tmp_path: Path) -> None:
    """Instead of a file that does not load, or a strength that is lost."""
    base, passed = model(), []
    calls = one_adapter(base, tmp_path)
    for row, method in ROWS.items():
        params = moved(fresh(base, method))
        group = fadapt.stack([params, params]).groups[0].params
        # SSteer's rest is all of it.
        parts = {"group of a stack": group, "rest of a split": fadapt.split(params)[1]}
        for match, part in list(parts.items())[: 1 + bool(fadapt.trainable(params))]:
            for name, call in calls.items():
                try:
                    call(part)
                except fadapt.ConfigError as error:
                    if match in str(error):
                        continue
                passed.append((row, name, match))
    assert not passed
    assert not list(tmp_path.iterdir())


def test_the_rest_of_a_stack_is_refused() -> None:
    base = model()
    params = fadapt.init(base, fadapt.LoRA(r=2))
    for members in ([params], [params, params]):
        rest = fadapt.split(fadapt.stack(members))[1]
        calls = (
            lambda rest=rest: fadapt.run(base, rest, BATCHES[0], loss_fn, verify=False),
            lambda rest=rest: fadapt.bound(base, rest).__enter__(),
            lambda rest=rest: fadapt.scale(rest, [0.5] * len(rest)),
            lambda rest=rest: fadapt.trainable(rest),
        )
        for call in calls:
            with pytest.raises(fadapt.ConfigError, match="rest of a split"):
                call()


def test_any_two_methods_make_one(tmp_path: Path) -> None:
    """A Chain and a Sum with each method: merged, in a stack, and some from a file."""
    base = model()
    plain = base(IDS[0])
    over = fadapt.IA3()  # moves the bias, too
    refused = []
    for row, method in ROWS.items():
        for kind in (fadapt.Chain, fadapt.Sum):
            try:
                both = kind((over, method))
            except fadapt.ConfigError:
                refused.append(row)
                continue
            rule = "^norm" if method.usual_kind == "norm" else "up|down"
            one = fresh(base, both, rule)
            if both.starts_at_identity:
                assert torch.equal(fadapt.apply(base, one, IDS[0]), plain), both
            one, two = moved(one), moved(copy.deepcopy(one), 2)
            wants = [fadapt.apply(base, p, IDS[0]) for p in (one, two)]
            merged = functional_call(base, fadapt.merge(base, one), (IDS[0],))
            equal(wants[0], merged, f"{both} merged")
            found = fadapt.apply(base, fadapt.stack([one, two]), IDS[0], verify=False)
            for got, want in zip(found, wants, strict=True):
                equal(got, want, f"{both} in a stack")
            # A law for the others, and slow.
            if method.usual_kind == "norm" or len(one.at_sites()) < len(one):
                fadapt.save(one, tmp_path / "both")
                same(fadapt.load(tmp_path / "both", base), one, f"{both} from a file")
    for row in refused:
        for inner in (ROWS[row], fadapt.Chain((ROWS[row],))):
            with pytest.raises(fadapt.ConfigError, match="defined by the frozen weight; put it"):
                fadapt.Chain((over, inner))
    assert {"DoRA", "SSVD free", "Sum"} <= set(refused)


def test_what_is_of_low_rank_is_served() -> None:
    base = qwen3(attention_bias=True).requires_grad_(False)
    batches = [{"input_ids": ids, "labels": ids} for ids in (tokens(8, 6, seed) for seed in (5, 6))]
    refused = {}
    for row, method in ROWS.items():
        if method.usual_kind != "linear" or isinstance(method, fadapt.SSteer):
            continue
        calib = None if method.statistic is None else batches
        params = moved(fadapt.init(base, {"q_proj|down_proj": method}, calib))
        try:
            _, served = fadapt.peft.peft_dict(base, params, serving=True)
        except fadapt.ConfigError as error:
            refused[row] = str(error)
            continue
        weights = fadapt.merge(base, params)
        assert len(weights) == 4, row  # no bias
        for name, weight in weights.items():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (served[f"{key}.lora_{side}.weight"] for side in "AB")
            change = (weight - base.get_parameter(name)).double()
            error = (b.double() @ a.double() - change).norm() / change.norm()
            assert error < 1e-4, (row, name, error)
    assert all("no smaller LoRA equals it" in e or "moves the bias" in e for e in refused.values())
    assert not {"LoRA", "VeRA", "TinyLoRA tied", "HRA", "SSVD free"} & refused.keys()
