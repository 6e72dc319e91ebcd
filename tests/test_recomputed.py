"""Products whose matrix is made again in the backward pass, against autograd's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt.recomputed import again, product

from .models import reals, seeded

METHODS = {
    "SHiRA": fadapt.SHiRA(r=2),
    "RandLoRA": fadapt.RandLoRA(r=8),
    "HiRA": fadapt.HiRA(r=4),
    "MiSS bat": fadapt.MiSS(r=8, mode="bat"),
    "LoHa": fadapt.LoHa(r=3),
    "LoHa, whole": fadapt.LoHa(r=8),
    "LoKr": fadapt.LoKr(r=2),
    "FourierFT": fadapt.FourierFT(n_frequency=99),
}


def leaves(*lead: int) -> list[Tensor]:
    shapes = ((*lead, 5, 8), (*lead, 7, 2), (*lead, 2, 8))
    return [reals(*s, seed=i).double().requires_grad_() for i, s in enumerate(shapes)]


def make(b: Tensor, a: Tensor) -> Tensor:
    return (b @ a).sin()


@pytest.mark.parametrize("lead", [(), (3,)])
def test_derivatives_of_both_orders(lead: tuple[int, ...]) -> None:
    x, b, a = leaves(*lead)
    ours, plain = product(x, make, b, a), x @ make(b, a).mT
    assert torch.equal(ours, plain)
    weight = reals(*plain.shape, seed=9).double()
    first = [torch.autograd.grad((out * weight).sum().square(), (x, b, a), create_graph=True)
             for out in (ours, plain)]  # fmt: skip
    for one, other in zip(*first, strict=True):
        torch.testing.assert_close(one, other)
    second = [torch.autograd.grad(sum(g.square().sum() for g in part), (x, b, a)) for part in first]
    for one, other in zip(*second, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_of_any_shape_over_one_matrix() -> None:
    x, b, a = reals(2, 3, 4, 8).double().requires_grad_(), *leaves()[1:]
    found, ref = (torch.autograd.grad(out.sin().sum(), (x, b, a))
                  for out in (product(x, make, b, a), x @ make(b, a).mT))  # fmt: skip
    for one, other in zip(found, ref, strict=True):
        torch.testing.assert_close(one, other)


def test_forward_mode_and_autocast() -> None:
    x, b, a = leaves()
    tangent = torch.ones_like(b)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(b, tangent)
        moved = torch.autograd.forward_ad.unpack_dual(product(x, make, dual, a)).tangent
    torch.testing.assert_close(moved, x @ ((b @ a).cos() * (tangent @ a)).mT)
    x, b, a = (t.detach().float().requires_grad_() for t in (x, b, a))
    found = []
    for function in (product, lambda x, make, *p: x @ make(*p).mT):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(x, make, b, a)
        assert out.dtype == torch.bfloat16
        found.append(torch.autograd.grad(out.float().sum(), (x, b, a)))
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("tokens", [40, 200])
@pytest.mark.parametrize("name", METHODS)
def test_training_keeps_no_matrix_of_the_weights_size(name: str, tokens: int) -> None:
    model = seeded(nn.Sequential(nn.Linear(64, 48)))
    params = fadapt.init(model, METHODS[name])
    kept = {}

    def note(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = tuple(t.shape)
        return t

    x = reals(tokens, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        fadapt.apply(model, params, x)
    for own in (x, model[0].weight, *(t for a in params.values() for t in a.leaves.values())):
        kept.pop(own.data_ptr(), None)
    # A product of the inputs with a frozen factor may be.
    assert not [s for s in kept.values() if len(s) < 2 or s[-2] != tokens], kept


def test_a_function_that_is_evaluated_again() -> None:
    x, b, a = leaves(3)

    def function(x: Tensor, b: Tensor) -> Tensor:
        return (x @ a.detach().mT).exp() @ b.mT

    weight = reals(3, 5, 7, seed=9).double()
    parts = []
    for out in (again(function, x, b), function(x, b)):
        first = torch.autograd.grad((out * weight).sum().square(), (x, b), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, b))
        parts.append((*first, *second))
    for one, other in zip(*parts, strict=True):
        torch.testing.assert_close(one, other)


def test_a_matrix_over_another_adapter_has_its_gradient() -> None:
    """What a method reads of its base may itself train: HiRA over LoRA."""
    model, x = seeded(nn.Sequential(nn.Linear(8, 6))).double(), reals(5, 8).double()
    chain = fadapt.Chain((fadapt.LoRA(r=2), fadapt.HiRA(r=2)))
    params = fadapt.init(model, chain)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf.copy_(reals(*leaf.shape, seed=leaf.numel()))
    p = {k: t.detach().requires_grad_() for k, t in params["0.weight"].train.items()}
    lora = 8.0 * p["0.B"] @ p["0.A"]
    whole = model[0].weight.detach() + lora
    ref = x @ (whole + whole * (p["1.B"] @ p["1.A"])).mT + model[0].bias.detach()
    out = fadapt.apply(model, params, x)
    torch.testing.assert_close(out, ref)
    expected = torch.autograd.grad(ref.sin().sum(), [p[k] for k in sorted(p)])
    found = torch.autograd.grad(out.sin().sum(), [params["0.weight"].train[k] for k in sorted(p)])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
