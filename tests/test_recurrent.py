"""Recurrent layers, which keep a list of their own weights."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt.base.scope import open_view

pytestmark = pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layer = kind(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def prepared(kind: Any) -> tuple[Recurrent, fadapt.Params, Tensor]:
    torch.manual_seed(0)
    model = Recurrent(kind)
    params = fadapt.init(model, {"weight": fadapt.LoRA(r=2)})
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf.add_(0.3 * torch.randn_like(leaf))
    return model, params, torch.randn(3, 5, 4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_call_leaves_nothing_in_the_layer(kind: Any) -> None:
    model, params, x = prepared(kind)
    before = dict(vars(model.layer))
    plain = model(x)
    merged = copy.deepcopy(model)
    merged.load_state_dict(fadapt.merge(model, params), strict=False)
    fadapt.run(model, params, x, lambda out, _: out.square().mean()).backward()
    adapted = fadapt.apply(model, params, x)
    torch.testing.assert_close(adapted, merged(x))
    with fadapt.bound(model, params):
        assert torch.equal(model(x), adapted)
    assert all(leaf.grad is not None for leaf in fadapt.trainable(params))
    assert all(weight.grad is None for weight in model.parameters())
    assert vars(model.layer).keys() == before.keys()
    for weight, own in zip(
        vars(model.layer)["_flat_weights"], model.layer.parameters(), strict=True
    ):
        assert weight is own
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_another_thread_within_the_layers_own_forward(kind: Any) -> None:
    """Where the layer has its list of weights already, and is about to compute with it."""
    model, params, x = prepared(kind)
    plain, adapted = model(x).detach(), fadapt.apply(model, params, x).detach()
    seen: list[Tensor] = []

    class Between(kind):
        def check_forward_args(self, *args: Any) -> None:
            super().check_forward_args(*args)
            if open_view() is not None and not seen:
                thread = threading.Thread(target=lambda: seen.append(model(x).detach()))
                thread.start()
                thread.join()

    model.layer.__class__ = Between
    assert torch.equal(fadapt.apply(model, params, x), adapted)
    assert torch.equal(seen[0], plain)


def test_a_forward_of_the_layers_own_is_called() -> None:
    model, params, x = prepared(nn.GRU)
    inner, calls = model.layer.forward, []

    def forward(*args: Any) -> Any:
        calls.append(1)
        return inner(*args)

    model.layer.forward = forward
    fadapt.apply(model, params, x)
    assert calls == [1]
