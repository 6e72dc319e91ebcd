"""What a forward sees of an adapted weight beside its products: as of a plain one, or an error."""

from __future__ import annotations

import copy
import ctypes
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fadapt

from .models import perturb, reals


class Box:
    """Where a forward leaves something for a test: not in its module, where it would be named."""

    answer: Any = None


class Asking(nn.Module):
    """Looks at a weight before it computes."""

    def __init__(self, ask: Callable[[Asking, Tensor], Any]):
        super().__init__()
        self.first, self.last, self.ask = nn.Linear(4, 6), nn.Linear(6, 2), ask
        self.box = Box()

    def forward(self, x: Tensor) -> Tensor:
        self.box.answer = self.ask(self, x)
        return self.last(self.first(x))


def adapted(model: Asking) -> fadapt.Params:
    return perturb(fadapt.init(model, {"first": fadapt.LoRA(r=2)}), std=0.5)


def made(ask: Callable[[Asking, Tensor], Any], frozen: bool = False) -> Asking:
    torch.manual_seed(1)
    return Asking(ask).eval().requires_grad_(not frozen)


def read(pointer: int) -> Tensor:
    return torch.tensor((ctypes.c_float * 24).from_address(pointer)[:]).view(6, 4)


ASKED: dict[str, Callable[[Asking, Tensor], Any]] = {
    "shape": lambda m, x: m.first.weight.shape,
    "shape of the transposed": lambda m, x: m.first.weight.t().shape,
    "size of T": lambda m, x: (m.first.weight.T.size(0), m.first.weight.mT.size()),
    "length of the transposed": lambda m, x: len(m.first.weight.transpose(0, 1)),
    "strides": lambda m, x: (m.first.weight.stride(), m.first.weight.t().stride()),
    "contiguity": lambda m, x: [w.is_contiguous() for w in (m.first.weight, m.first.weight.t())],
    "type": lambda m, x: isinstance(m.first.weight, nn.Parameter),
    "bytes": lambda m, x: m.first.weight.untyped_storage().nbytes(),
    "one address": lambda m, x: m.first.weight.data_ptr() == m.first.weight.t().data_ptr(),
    "what is at the address": lambda m, x: read(m.first.weight.data_ptr()),
    "values": lambda m, x: m.first.weight.data.clone(),
    "state": lambda m, x: m.state_dict()["first.weight"].clone(),
    "copied": lambda m, x: pickle.loads(pickle.dumps(m.first.weight)).detach(),
    "torch.func": lambda m, x: torch.func.grad(lambda z: m.first(z).sum())(x),
    "vmap": lambda m, x: torch.func.vmap(m.first)(x),
}


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_as_of_a_plain_weight(name: str, grad: bool) -> None:
    model, x = made(ASKED[name]), reals(3, 4)
    params = adapted(model)
    merged = copy.deepcopy(model)
    merged.load_state_dict(fadapt.merge(model, params), strict=False)
    with torch.set_grad_enabled(grad):
        merged(x)
        for _ in range(2):  # the first is watched
            fadapt.apply(model, params, x)
            torch.testing.assert_close(model.box.answer, merged.box.answer)


def test_an_address_is_said_to_be_of_a_copy() -> None:
    model = made(ASKED["what is at the address"])
    with pytest.warns(fadapt.DenseFallbackWarning, match=r"first\.weight .*address.*is lost"):
        fadapt.apply(model, adapted(model), reals(3, 4))


def doubled(of: Callable[[Asking], Tensor]) -> Callable[[Asking, Tensor], Any]:
    return lambda m, x: of(m).mul_(2.0)


def set_data(m: Asking, x: Tensor) -> None:
    m.last.weight.data = torch.zeros(2, 6)


def set_adapted(m: Asking, x: Tensor) -> None:
    m.first.weight.data = torch.zeros(6, 4)


def assign(m: Asking, x: Tensor) -> None:
    m.load_state_dict({k: torch.zeros_like(v) for k, v in m.state_dict().items()})


WRITES: dict[str, Callable[[Asking, Tensor], Any]] = {
    "data": doubled(lambda m: m.first.weight.data),
    "a part of the data": doubled(lambda m: m.first.weight.data.chunk(2)[0]),
    "detached": doubled(lambda m: m.first.weight.detach()[0]),
    "transposed": doubled(lambda m: m.first.weight.t().data),
    "storage": lambda m, x: m.first.weight.untyped_storage().copy_(
        torch.zeros(24).untyped_storage()
    ),
    "other data": set_adapted,
    "another layer's data": doubled(lambda m: m.last.weight.data),
    "a bias": doubled(lambda m: m.first.bias.data),
    "another layer's other data": set_data,
    "a state dict": assign,
}


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_a_forward_that_writes_to_its_weights_is_refused(name: str, frozen: bool) -> None:
    """Also to those without an adapter; the base is as it was."""
    model, x = made(WRITES[name], frozen), reals(3, 4)
    params = adapted(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(fadapt.FadaptError, match=r"writes to .*frozen"):
            fadapt.apply(model, params, x)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
def test_a_write_that_changes_nothing_is_none() -> None:
    """Such as Gemma 3n's clamp of a weight that is within its bounds."""
    model = made(lambda m, _: [w.data.clamp_(-9, 9) for w in (m.first.weight, m.last.weight)])
    plain, x, params = made(lambda m, _: None), reals(3, 4), adapted(model)
    assert torch.equal(fadapt.apply(model, params, x), fadapt.apply(plain, params, x))


@pytest.mark.parametrize("by", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_layer_that_copies_itself_within_the_forward_is_refused(by: Any) -> None:
    model, x = made(lambda m, x: by(m.first)(x)), reals(3, 4)
    with pytest.raises(fadapt.FadaptError, match="a copy or a pickle of its layer"):
        fadapt.apply(model, adapted(model), x)
    other = made(lambda m, x: by(m.last).weight)
    fadapt.apply(other, adapted(other), x)  # of which it sees the base's own
    assert torch.equal(other.box.answer, other.last.weight)
