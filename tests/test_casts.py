"""A weight that a forward casts before it uses it, as routers do: fast, in stacks, and exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fadapt

pytestmark = pytest.mark.filterwarnings("error::fadapt.DenseFallbackWarning")


class Cast(nn.Module):
    """As DeepSeek's router."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.p.weight.float())


class Typed(Cast):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.p.weight.type(torch.float32))


class Moved(Cast):
    """As SwitchTransformers' router: the module itself is cast, in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.p = self.p.to(torch.float32)
        return self.p(x.float())


class Kept(Cast):
    """A cast to what the weight is already."""

    def forward(self, x: Tensor) -> Tensor:
        self.p = self.p.to(x.dtype)
        return x @ self.p.weight.to(x.dtype).T


def trained(model: nn.Module, method: fadapt.Method, seed: int = 0) -> fadapt.Params:
    generator = torch.Generator().manual_seed(seed)
    params = fadapt.init(model, {"p.weight": method})
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf.add_(0.1 * torch.randn(leaf.shape, generator=generator).to(leaf.dtype))
    return params


@pytest.mark.parametrize("method", [fadapt.LoRA(r=2), fadapt.DoRA(r=2)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [Cast, Typed, Moved, Kept])
def test_casts(cls: Any, dtype: torch.dtype, method: fadapt.Method) -> None:
    torch.manual_seed(0)
    model, twin = cls().to(dtype), cls().to(dtype)
    twin.load_state_dict(model.state_dict())
    model.requires_grad_(False)
    x = torch.randn(5, 12).to(dtype)
    started = fadapt.init(model, {"p.weight": method})
    assert torch.equal(fadapt.apply(model, started, x), twin(x))
    assert {p.dtype for p in model.parameters()} == {dtype}, "a call changes nothing of the base"

    members = [trained(model, method, seed=seed) for seed in (0, 1)]
    alone = [fadapt.apply(model, member, x) for member in members]
    for member, out in zip(members, alone, strict=True):
        merged = cls().double()
        merged.load_state_dict(model.state_dict())
        merged.load_state_dict(fadapt.merge(model, member), strict=False)
        wide = F.linear(x.double(), merged.p.weight)
        rounding = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.double(), wide, rtol=rounding, atol=rounding)
    stacked = fadapt.apply(model, fadapt.stack(members), x)
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    for one, out in zip(stacked, alone, strict=True):
        torch.testing.assert_close(one, out, rtol=rounding, atol=rounding)

    fadapt.apply(model, members[0], x).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in fadapt.trainable(members[0]))
    with fadapt.bound(model, members[1]):
        for _ in range(2):
            assert torch.equal(model(x), alone[1])
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.filterwarnings("default::fadapt.DenseFallbackWarning")
def test_a_cast_to_integers_is_a_use() -> None:
    class Rounded(Cast):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.p.weight.to(torch.int32).to(x.dtype).T

    model = Rounded()
    with torch.no_grad():
        model.p.weight.mul_(10)
    with pytest.warns(fadapt.DenseFallbackWarning):
        out = fadapt.apply(model, fadapt.init(model, {"p.weight": fadapt.LoRA(r=2)}), torch.eye(12))
    assert torch.equal(out, model.p.weight.int().float().T)
