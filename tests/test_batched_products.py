"""Methods whose stacks run as batched products: each member as alone, whatever its strength."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import Method

METHODS = [
    fadapt.DeLoRA(r=3, lambda0=2.0),
    fadapt.DeLoRA(r=3, lambda0=2.0, form="peft"),
    *(fadapt.RoAd(variant=v, group_size=4) for v in (1, 2, 4)),
    *(fadapt.SSVD(k=3, kind=kind) for kind in ("strict", "first_order", "free")),
    *(fadapt.AntiPaSTORotation(r=4, block_size=2, basis=b) for b in ("V", "U", "both")),
    fadapt.AntiPaSTOAblate(r=4, k=2),
    fadapt.AntiPaSTOAblate(r=4, k=1, floor=0.0),
    fadapt.AntiPaSTOArrow(r=4, b=2),
    fadapt.AntiPaSTODPLR(r=4, k=2),
]


def made(method: Method, seeds: tuple[int, ...]) -> tuple[nn.Module, list[fadapt.Params], Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8, bias=False)).double()
    rng = torch.Generator().manual_seed(1)
    params = []
    for seed in seeds:
        params.append(fadapt.init(model, fadapt.Config(method, seed=seed, dtype=torch.float64)))
        with torch.no_grad():
            for leaf in fadapt.trainable(params[-1]):
                leaf += 0.3 * torch.randn(leaf.shape, generator=rng, dtype=leaf.dtype)
    return model, params, torch.randn(5, 3, 8, dtype=torch.float64)


def square(out: Tensor, batch: Tensor) -> Tensor:
    return out.square().mean()


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 2)], ids=["shared", "own"])
@pytest.mark.parametrize("scaled", [False, True])
def test_members_are_as_alone(method: Method, seeds: tuple[int, ...], scaled: bool) -> None:
    assert method.supports_batch_dims
    model, params, x = made(method, seeds)
    stack, strengths = fadapt.stack(params), [0.5, -1.0, 2.0]
    if scaled:
        stack = fadapt.scale(stack, strengths)
        params = [fadapt.scale(p, c) for p, c in zip(params, strengths, strict=True)]
    losses = fadapt.run(model, stack, x, square)
    grads = torch.autograd.grad(losses.sum(), fadapt.trainable(stack))
    alone = [fadapt.run(model, p, x, square) for p in params]
    each = [
        torch.autograd.grad(loss, fadapt.trainable(p))
        for loss, p in zip(alone, params, strict=True)
    ]
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-10, atol=1e-10)
    for grad, *own in zip(grads, *each, strict=True):
        torch.testing.assert_close(grad, torch.stack(own), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_members_do_not_see_each_other(method: Method) -> None:
    model, params, x = made(method, (0, 1, 2))
    stack = fadapt.stack(params)
    with torch.no_grad():
        before = fadapt.apply(model, stack, x)
        for leaf in fadapt.trainable(stack):
            leaf[1] += 0.1
        after = fadapt.apply(model, stack, x)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_row_of_the_batch_for_each_adapter(method: Method) -> None:
    model, params, x = made(method, (0, 1, 2))
    chosen = fadapt.select(fadapt.stack(params), [2, 0, None, 1, 0])
    out = fadapt.apply(model, chosen, x)
    for row, who in enumerate((2, 0, None, 1, 0)):
        one = x[row : row + 1]
        wanted = model(one) if who is None else fadapt.apply(model, params[who], one)
        torch.testing.assert_close(out[row : row + 1], wanted, rtol=1e-10, atol=1e-10)
