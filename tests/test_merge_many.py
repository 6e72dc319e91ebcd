"""merge_many: against PEFT's own functions on the increments, and against combine."""

from __future__ import annotations

import pytest
import torch
from peft.utils import merge_utils

import fadapt
from fadapt import ConfigError, LoRA
from tests.models import mlp, perturb

W = [0.7, -0.4, 1.1]


def setting():
    model = mlp().double()
    methods = (LoRA(r=2), fadapt.IA3(), fadapt.HRA(r=2))
    members = [perturb(fadapt.init(model, m), seed=i) for i, m in enumerate(methods)]
    base = {k: v.detach() for k, v in model.named_parameters()}
    increments = {
        name: [fadapt.merge(model, p).get(name, v) - v for p in members] for name, v in base.items()
    }
    return model, members, base, increments


def test_sum_is_combine() -> None:
    model, members, _, _ = setting()
    want = fadapt.merge(model, fadapt.combine(members, W))
    got = fadapt.merge_many(model, members, W)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_is_pefts(density) -> None:
    model, members, base, increments = setting()
    got = fadapt.merge_many(model, members, W, rule="ties", density=density)
    for name in ("0.weight", "2.weight"):
        want = merge_utils.ties(increments[name], torch.tensor(W).double(), density, "total")
        torch.testing.assert_close(got[name] - base[name], want, rtol=1e-6, atol=1e-9)


def test_dare_is_unbiased_and_seeded() -> None:
    model, members, base, increments = setting()
    name = "0.weight"
    want = sum(w * d for w, d in zip(W, increments[name], strict=True))
    draws = [
        fadapt.merge_many(model, members, W, rule="dare", density=0.5, seed=s)[name] - base[name]
        for s in range(300)
    ]
    again = fadapt.merge_many(model, members, W, rule="dare", density=0.5, seed=7)[name]
    assert torch.equal(again - base[name], draws[7])
    assert not torch.equal(draws[0], draws[1])
    mean = torch.stack(draws).mean(0)
    # The mean of 300 draws lies within five of its own standard deviations.
    spread = torch.stack(draws).std(0) / 300**0.5
    assert ((mean - want).abs() <= 5 * spread + 1e-12).all()
    one = fadapt.merge_many(model, members[:1], [1.0], rule="dare", density=0.5)[name] - base[name]
    d = increments[name][0]
    assert ((one == 0) | torch.isclose(one, 2 * d)).all()


def test_bad_input() -> None:
    model, members, _, _ = setting()
    for options in (
        {"rule": "slerp"},
        {"rule": "ties", "density": 0.0},
        {"rule": "ties", "density": 1.5},
        {"rule": "dare", "density": float("nan")},
        {"rule": "dare", "density": True},
        {"density": 0.5},
        {"seed": "x"},
        {"dtype": torch.int8},
    ):
        with pytest.raises(ConfigError):
            fadapt.merge_many(model, members, W, **options)
    for parts, weights in (([], []), (members, [1.0]), (members, ["x"] * 3), (None, W)):
        with pytest.raises(ConfigError):
            fadapt.merge_many(model, parts, weights)  # type: ignore[arg-type]
