"""An increment that the last product of a method adds, in place of an addition after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import adapted_map

METHODS = [
    fadapt.LoRA(r=3),
    fadapt.RsLoRA(r=2, alpha=3.0),
    fadapt.PiSSA(r=2),
    fadapt.LoRA(r=2, dropout=0.25),
]


class Net(nn.Module):
    """Linear maps of inputs with two, three and four axes, of which one is no plain block."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.mid = nn.Linear(6, 8, dtype=dtype), nn.Linear(8, 8, False, dtype=dtype)
        self.out = nn.Linear(8, 5, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(x))
        x = self.mid(x.unsqueeze(1)).squeeze(1) + self.mid(x.mT.contiguous().mT)
        return self.out(x.mean(1))


def trained(model: nn.Module, method: Any, seed: int) -> fadapt.Params:
    params = fadapt.init(model, fadapt.Config(method if isinstance(method, dict) else {"": method}))
    rng = torch.Generator().manual_seed(seed)
    for leaf in fadapt.trainable(params):
        leaf.data += 0.3 * torch.randn(leaf.shape, generator=rng, dtype=leaf.dtype)
    return params


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net(dtype).eval()


def steps(model: nn.Module, params: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    out = fadapt.apply(model, params, x, verify=False)
    return out, torch.autograd.grad(out.sin().sum(), [x, *fadapt.trainable(params)])


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_it_is_what_the_increment_would_be(method: Any, count: int, monkeypatch: Any) -> None:
    model, x = net().train(), torch.randn(4, 3, 6, dtype=torch.float64)
    members = [trained(model, method, i) for i in range(count)]
    params = members[0] if count == 1 else fadapt.stack(members)
    added = 0
    add = adapted_map._add_product

    def counted(*args: Any) -> Tensor:
        nonlocal added
        added += 1
        return add(*args)

    monkeypatch.setattr(adapted_map, "_add_product", counted)
    out, grads = steps(model, params, x)
    # Of the input that is no plain block of rows, the increment is formed.
    assert added == 3
    monkeypatch.setattr(adapted_map, "says_last_product", lambda cls: False)
    plain, refs = steps(model, params, x)
    assert added == 3
    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-10)
    for a, b in zip(grads, refs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert a.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad", [False, True])
def test_an_untrained_adapter_is_the_base_to_the_last_bit(dtype: Any, grad: bool) -> None:
    model, x = net(dtype), torch.randn(4, 3, 6).to(dtype)
    params = fadapt.init(model, fadapt.LoRA(r=3))
    with torch.set_grad_enabled(grad):
        assert torch.equal(fadapt.apply(model, params, x), model(x))


def test_a_trials_bits_do_not_depend_on_the_others_methods() -> None:
    model, x = net(torch.float32), torch.randn(4, 64, 6)
    one = trained(model, fadapt.LoRA(r=5), 1)
    two = trained(model, fadapt.LoRA(r=5), 2)
    other = trained(model, fadapt.IA3(), 2)
    alike = fadapt.apply(model, fadapt.stack([one, two]), x, verify=False)[0]
    mixed = fadapt.apply(model, fadapt.stack([one, other]), x, verify=False)[0]
    assert torch.equal(alike, mixed)


def test_nothing_but_the_output_is_written_to() -> None:
    model, x = net(), torch.randn(4, 3, 6, dtype=torch.float64)
    params = trained(model, fadapt.LoRA(r=3), 1)
    before = x.clone(), {k: t.clone() for k, t in model.state_dict().items()}
    seen = []
    hook = model.up.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    first = fadapt.apply(model, params, x)
    hook.remove()
    assert torch.equal(x, before[0])
    assert all(torch.equal(t, before[1][k]) for k, t in model.state_dict().items())
    assert torch.equal(fadapt.apply(model, params, x), first)
    merged = torch.func.functional_call(model, fadapt.merge(model, params), (x,))
    torch.testing.assert_close(first, merged, rtol=1e-10, atol=1e-10)
    assert seen[0].shape == (4, 3, 8)


@dataclass(frozen=True)
class Doubled(fadapt.LoRA):
    """A subclass with another ``delta``, of which ``last_product`` of its parent says nothing."""

    def delta(self, p: Any, x: Tensor, y: Tensor, base: Any) -> Tensor:
        return 2 * super().delta(p, x, y, base)


def test_a_subclass_with_another_delta_is_computed_by_it() -> None:
    model, x = net(), torch.randn(4, 3, 6, dtype=torch.float64)
    params = trained(model, {"up": Doubled(r=2)}, 1)
    twice = fadapt.init(model, {"up": fadapt.LoRA(r=2, alpha=32.0)})
    twice = twice.map(lambda a: a.replace(params[a.site.name].train))
    torch.testing.assert_close(
        fadapt.apply(model, params, x), fadapt.apply(model, twice, x), rtol=1e-12, atol=1e-12
    )
    assert not adapted_map.says_last_product(Doubled)
