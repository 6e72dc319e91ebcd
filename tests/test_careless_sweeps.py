"""What a sweep refuses before its first step, and what of a loss counts when it goes on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fadapt


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def mean_square(out: Tensor, _: Any) -> Tensor:
    return out.square().mean()


def sweep(**options: Any) -> fadapt.Report:
    trials = [fadapt.Trial(fadapt.LoRA(r=2), name="a"), fadapt.Trial(fadapt.IA3(), name="b")]
    given = {"batches": [torch.ones(4, 8)] * 6, "loss_fn": mean_square, **options}
    return fadapt.sweep(net(), trials, given.pop("batches"), progress=False, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2**70}, "steps must be an int from 1 to"),
        ({"compile": {"mode": "nope"}}, "not what torch.compile takes"),
        ({"compile": {"bad": 1}}, "not what torch.compile takes"),
        ({"loss_fn": lambda out: out.mean()}, r"write def loss_fn\(output, batch\)"),
        ({"eval": lambda: 1.0}, r"write def eval\(model, stack\)"),
        ({"calib": 5}, "calib must be batches"),
        ({"calib": "text"}, "calib must be batches"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(list(value)),
)
def test_refused_before_the_first_step(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fadapt.FadaptError, match=message):
        sweep(**options)


def test_a_schedule_takes_the_fraction() -> None:
    with pytest.raises(fadapt.ConfigError, match=r"write def schedule\(fraction\)"):
        fadapt.Trial(fadapt.LoRA(), schedule=lambda: 1.0)  # type: ignore[arg-type, misc]


class Stopped(Exception):  # noqa: N818
    pass


class Batches:
    def __init__(self, most: int) -> None:
        self.most = most

    def __len__(self) -> int:
        return 6

    def __iter__(self):
        for i in range(6):
            if i == self.most:
                raise Stopped
            yield torch.ones(4, 8)


class Margin:
    """A loss with a setting, and a count that every call changes."""

    def __init__(self, margin: Any) -> None:
        self.margin, self.calls = margin, 0

    def __call__(self, out: Tensor, _: Any) -> Tensor:
        self.calls += 1
        return (out - self.margin).square().mean()

    def method(self, out: Tensor, batch: Any) -> Tensor:
        return self(out, batch)


def huber(delta: float) -> Any:
    criterion = nn.HuberLoss(delta=delta)
    return lambda out, batch: criterion(out, batch)


def weighted(weight: float) -> Any:
    weights = torch.full((8,), weight)
    return lambda out, batch: (weights * out).square().mean()


def inner(power: int) -> Any:
    chosen = (lambda t: t.abs().mean()) if power == 1 else (lambda t: t.square().mean())
    return lambda out, batch: chosen(out)


@pytest.mark.parametrize(
    "make",
    [
        Margin,
        lambda m: Margin(m).method,
        lambda m: functools.partial(Margin(m).method),
        lambda m: Margin(torch.tensor(float(m))),
        huber,
        nn.HuberLoss,
        weighted,
        inner,
    ],
    ids=["object", "method", "partial", "tensor", "closed over", "module", "weights", "function"],
)
def test_a_sweep_goes_on_with_its_own_loss_alone(make: Any, tmp_path: Any) -> None:
    takes = {"reduction": "mean"} if make is nn.HuberLoss else {}

    def loss(value: int) -> Any:
        return make(**takes, delta=value) if takes else make(value)

    for same in (True, False):
        folder = tmp_path / str(same)
        with pytest.raises(Stopped):
            sweep(batches=Batches(3), loss_fn=loss(1), directory=folder)
        if same:
            assert sweep(batches=Batches(9), loss_fn=loss(1), directory=folder).best
        else:
            with pytest.raises(fadapt.FadaptError, match="loss_fn"):
                sweep(batches=Batches(9), loss_fn=loss(2), directory=folder)


def test_a_scripted_part_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    with pytest.raises(fadapt.TargetError, match="scripted or traced from"):
        fadapt.init(model, fadapt.LoRA(r=2))


def test_a_model_of_inference_mode_has_no_gradient() -> None:
    with torch.inference_mode():
        model = net()
    params = fadapt.init(model, fadapt.LoRA(r=2))
    x = torch.ones(4, 8)
    with torch.no_grad():
        assert torch.equal(fadapt.apply(model, params, x), model(x))
    with pytest.raises(fadapt.TargetError, match="inference_mode"):
        fadapt.run(model, params, x, mean_square)


@pytest.mark.parametrize("most", [None, 1])
def test_a_loss_that_no_adapter_moves_is_refused(most: int | None) -> None:
    weight = torch.ones((), requires_grad=True)
    with pytest.raises(fadapt.ConfigError, match="not by any leaf of an adapter"):
        sweep(loss_fn=lambda out, _: weight * 2, max_adapters=most)


def test_batches_without_an_order_are_refused() -> None:
    with pytest.raises(fadapt.ConfigError, match="a set, which has no order"):
        sweep(batches={torch.ones(4, 8), torch.zeros(4, 8)})


def test_a_comparison_is_a_loss_to_look_at() -> None:
    model, x = net(), torch.ones(4, 8)
    stack = fadapt.stack([fadapt.init(model, fadapt.LoRA(r=2))] * 2)
    found = fadapt.run(model, stack, x, lambda out, _: (out > -99).all())
    assert found.tolist() == [True, True]
    with pytest.raises(fadapt.ConfigError, match="does not depend on any adapter"):
        sweep(loss_fn=lambda out, _: (out > 0).all())
