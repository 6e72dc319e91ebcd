"""What is kept of a model between calls: nothing that outlives a change of the model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fadapt
from fadapt import TargetError
from fadapt.base import survey as surveys


class Net(nn.Module):
    """Layers in a list, a norm with buffers, a bias, and a weight that is read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6, bias=i == 0) for i in range(3)])
        self.norm = nn.BatchNorm1d(6)
        self.direct = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return F.linear(self.norm(x), self.direct.weight, self.direct.bias)


def made(grad: bool = False) -> tuple[Net, fadapt.Params, Tensor]:
    torch.manual_seed(0)
    model = Net().double().requires_grad_(grad).eval()
    params = fadapt.init(model, fadapt.Config(fadapt.LoRA(r=2), dtype=torch.float64))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf += 0.3 * torch.randn(leaf.shape, generator=rng, dtype=leaf.dtype)
    return model, params, torch.randn(5, 6, dtype=torch.float64)


def merged(model: nn.Module, params: fadapt.Params, x: Tensor) -> Tensor:
    """By ordinary means: a copy of the model with its weights replaced."""
    other = copy.deepcopy(model).requires_grad_(False)
    other.load_state_dict({**other.state_dict(), **fadapt.merge(other, params)})
    return other(x)


def replace_layer(model: Net) -> None:
    model.layers[1] = nn.Linear(6, 6, bias=False).double().requires_grad_(False)


def replace_layer_and_drop_the_old(model: Net) -> None:
    for _ in range(20):  # addresses are used again
        replace_layer(model)


def exchange_layers(model: Net) -> None:
    model.layers[1], model.layers[2] = model.layers[2], model.layers[1]


def replace_parameter(model: Net) -> None:
    model.layers[0].weight = nn.Parameter(torch.ones(6, 6).double(), requires_grad=False)


def swap_data(model: Net) -> None:
    model.layers[0].weight.data = torch.eye(6).double()


def write_in_place(model: Net) -> None:
    with torch.no_grad():
        model.layers[2].weight.mul_(2)


def unfreeze(model: Net) -> None:
    model.requires_grad_(True)


def add_a_bias(model: Net) -> None:
    model.layers[1].bias = nn.Parameter(torch.ones(6).double(), requires_grad=False)


def drop_the_bias(model: Net) -> None:
    model.layers[0].bias = None


def own_forward(model: Net) -> None:
    layer = model.layers[0]
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)


def hooks(model: Net) -> None:
    model.layers[0].register_forward_hook(lambda module, args, out: 3 * out)
    model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def subclass(model: Net) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    model.layers[1].__class__ = Doubled


CHANGES: list[Callable[[Net], None]] = [
    replace_layer, replace_layer_and_drop_the_old, exchange_layers, replace_parameter, swap_data,
    write_in_place, unfreeze, hooks, subclass,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("grad", [False, True])
def test_a_change_of_the_model_is_seen_by_the_next_call(
    change: Callable[[Net], None], grad: bool
) -> None:
    model, params, x = made(grad)
    torch.testing.assert_close(
        fadapt.apply(model, params, x), merged(model, params, x), rtol=1e-10, atol=1e-10
    )
    change(model)
    out = fadapt.apply(model, params, x)
    torch.testing.assert_close(out, merged(model, params, x), rtol=1e-10, atol=1e-10)
    out.sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(leaf.grad is not None for leaf in fadapt.trainable(params))


@pytest.mark.parametrize("change", [add_a_bias, drop_the_bias])
def test_a_change_of_a_bias_is_seen(change: Callable[[Net], None]) -> None:
    model, params, x = made()
    fadapt.apply(model, params, x)
    new = fadapt.merge(model, params)
    change(model)
    out = fadapt.apply(model, params, x)
    model.load_state_dict({**model.state_dict(), **new})
    torch.testing.assert_close(out, model(x), rtol=1e-10, atol=1e-10)


def test_a_forward_that_is_set_on_a_layer_is_called() -> None:
    model, params, x = made()
    before = fadapt.apply(model, params, x)
    own_forward(model)
    after = fadapt.apply(model, params, x)
    assert not torch.equal(before, after)
    wanted = copy.deepcopy(model)
    # The copy's function reads the layer of the model that it was made for.
    layer = wanted.layers[0]
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    torch.testing.assert_close(after, merged_in_place(wanted, params, x), rtol=1e-10, atol=1e-10)
    del model.layers[0].forward
    assert torch.equal(fadapt.apply(model, params, x), before)


def merged_in_place(model: nn.Module, params: fadapt.Params, x: Tensor) -> Tensor:
    model.load_state_dict({**model.state_dict(), **fadapt.merge(model, params)})
    return model(x)


def test_a_change_of_the_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, x = made()
    before = fadapt.apply(model, params, x)
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
    after = fadapt.apply(model, params, x)
    torch.testing.assert_close(after, merged(model, params, x), rtol=1e-10, atol=1e-10)
    monkeypatch.undo()
    assert torch.equal(fadapt.apply(model, params, x), before)


def test_train_and_eval_in_turn() -> None:
    model, params, x = made()
    model.norm.running_mean.add_(1.0)
    known = model.norm.running_mean.clone()
    for _ in range(2):
        for train in (True, False):
            model.train(train)
            other = copy.deepcopy(model)
            out = fadapt.apply(model, params, x)
            torch.testing.assert_close(out, merged(other, params, x), rtol=1e-10, atol=1e-10)
            assert torch.equal(model.norm.running_mean, known)


def test_what_is_refused_is_refused_of_a_known_model_too() -> None:
    model, params, x = made()
    fadapt.apply(model, params, x)
    model.layers[0].compile()
    with pytest.raises(TargetError, match=r"layers\.0 is compiled on its own"):
        fadapt.apply(model, params, x)
    model.layers[0]._compiled_call_impl = None
    fadapt.apply(model, params, x)
    model.layers[1] = nn.Linear(6, 7, bias=False).double()
    with pytest.raises(TargetError, match="made for"):
        fadapt.apply(model, params, x)
    model.layers[1] = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(TargetError, match=r"the params adapt layers\.1\.weight"):
        fadapt.apply(model, params, x)
    model.layers[1] = nn.LazyLinear(6)
    with pytest.raises(TargetError, match="uninitialised"):
        fadapt.apply(model, params, x)
    model.layers[1] = nn.Linear(6, 6, bias=False, device="meta")
    with pytest.raises(TargetError, match="meta tensor"):
        fadapt.apply(model, params, x)


def test_other_params_of_a_known_model() -> None:
    model, params, x = made()
    outs = [fadapt.apply(model, p, x) for p in (params, fadapt.scale(params, 0.0), params)]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], model(x))
    train, rest = fadapt.split(params)
    doubled = {site: {k: 2 * t for k, t in leaves.items()} for site, leaves in train.items()}
    for _ in range(2):
        more = fadapt.join(doubled, rest)
        torch.testing.assert_close(
            fadapt.apply(model, more, x), merged(model, more, x), rtol=1e-10, atol=1e-10
        )


def test_neither_the_model_nor_the_params_are_kept_alive() -> None:
    model, params, x = made(grad=True)
    fadapt.apply(model, params, x)
    found = surveys.survey(model)[0]
    assert len(found.kept) == 1
    leaf = weakref.ref(params["direct.weight"].train["A"])
    del params
    gc.collect()
    assert leaf() is None
    assert not found.kept
    weight = weakref.ref(model.layers[0].weight)
    del model
    gc.collect()
    assert weight() is None


def test_params_can_be_copied_and_pickled_after_a_call() -> None:
    model, params, x = made()
    out = fadapt.apply(model, params, x)
    for other in (copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert torch.equal(fadapt.apply(model, other, x), out)


def test_a_walk_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, x = made()
    fadapt.apply(model, params, x)

    def refuse(*_: object) -> None:
        raise AssertionError("walked again")

    monkeypatch.setattr(surveys, "Walk", refuse)
    model.train()
    fadapt.apply(model, params, x)
    model.eval()
    with fadapt.bound(model, params):
        model(x)
    replace_layer(model)
    with pytest.raises(AssertionError):
        fadapt.apply(model, params, x)
