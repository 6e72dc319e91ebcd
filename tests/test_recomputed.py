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


@pytest.mark.parametrize(
    "method", [fadapt.DoRA(r=2), fadapt.IA3(), fadapt.BOFT(block_size=4)], ids=repr
)
def test_training_keeps_a_layers_output_in_the_bases_dtype(method: fadapt.Method) -> None:
    model = seeded(nn.Sequential(nn.Linear(64, 48))).bfloat16()
    params = fadapt.init(model, method)
    kept = []

    def note(t: Tensor) -> Tensor:
        kept.append((tuple(t.shape), t.dtype))
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = fadapt.apply(model, params, reals(200, 64).bfloat16())
    outputs = {dtype for shape, dtype in kept if shape == (200, 48)}
    assert outputs == {torch.bfloat16}
    # And the gain's gradient is that of float32, but for the roundings of the output.
    out.float().square().sum().backward()
    out = out.detach()
    leaf = params["0.weight"].train["mu" if isinstance(method, fadapt.DoRA) else "d"]
    ref = 2 * out.float().square().sum(0)
    if not isinstance(method, fadapt.IA3):
        ref = (2 * out.float() * (out.float() - model[0].bias.float())).sum(0)
    torch.testing.assert_close(
        leaf.grad.flatten(), ref, rtol=0.02, atol=0.02 * float(ref.detach().max())
    )


@pytest.mark.parametrize(("size", "factors"), [(4, 1), (4, 2), (2, 4), (4, 5)])
@pytest.mark.parametrize("members", [1, 3])
def test_boft_of_many_tokens_is_that_of_few(size: int, factors: int, members: int) -> None:
    """Many meet one product of all factors, few (and wide mixes) one factor after the other."""
    model, x = seeded(nn.Sequential(nn.Linear(64, 48))).double(), reals(members, 50, 64).double()
    method = fadapt.BOFT(block_size=size, n_butterfly_factor=factors)
    params = [fadapt.init(model, fadapt.Config(method, seed=i)) for i in range(members)]
    with torch.no_grad():
        for one in params:
            for leaf in fadapt.trainable(one):
                leaf.copy_(0.3 * reals(*leaf.shape, seed=leaf.numel()))
    few = torch.stack([
        torch.cat([fadapt.apply(model, one, row.unsqueeze(0)) for row in rows])
        for one, rows in zip(params, x, strict=True)
    ])  # fmt: skip
    leaves = [leaf for one in params for leaf in fadapt.trainable(one)]
    if members == 1:
        many = fadapt.apply(model, params[0], x[0]).unsqueeze(0)
        found = torch.autograd.grad(many.sin().sum(), leaves)
    else:
        stack = fadapt.stack(params)
        many = fadapt.apply(model, stack, x, per_adapter=True)
        stacked = torch.autograd.grad(many.sin().sum(), fadapt.trainable(stack))
        found = [t[i] for i in range(members) for t in stacked]
    torch.testing.assert_close(many, few)
    for one, other in zip(found, torch.autograd.grad(few.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


DENSE = {
    "HiRA": fadapt.HiRA(r=4),
    "MiSS bat": fadapt.MiSS(r=8, mode="bat"),
    "LoHa": fadapt.LoHa(r=8),
    "Full": fadapt.Full(),
    "SHiRA": fadapt.SHiRA(r=8),
    "RandLoRA": fadapt.RandLoRA(r=8),
    "FourierFT": fadapt.FourierFT(n_frequency=99),
    "C3A": fadapt.C3A(block_size=8),
}


def trained(method: fadapt.Method, dtype: torch.dtype, size: float = 0.3) -> tuple:
    model = seeded(nn.Sequential(nn.Linear(64, 48))).to(dtype)
    params = fadapt.init(model, method)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf.copy_(size * reals(*leaf.shape, seed=leaf.numel()))
    return model, params


@pytest.mark.parametrize("part", [1, 2**9, 2**20])
@pytest.mark.parametrize("name", DENSE)
def test_one_product_with_the_sum_of_weight_and_increment(
    name: str, part: int, monkeypatch
) -> None:
    """Alone and in float64 it is taken, and equals the increment's own product, part by part."""
    monkeypatch.setattr("fadapt.recomputed.PART", part)
    model, params = trained(DENSE[name], torch.float64)
    params = fadapt.scale(params, 0.5)
    x = reals(2, 150, 64).double().requires_grad_()
    leaves = [x, *fadapt.trainable(params)]
    one = fadapt.apply(model, params, x)
    found = torch.autograd.grad(one.sin().sum(), leaves)
    monkeypatch.setattr("fadapt.dense_increment.DenseIncrement.whole", lambda *_: None)
    other = fadapt.apply(model, params, x)
    torch.testing.assert_close(one, other)
    for a, b in zip(found, torch.autograd.grad(other.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
    if name != "C3A":
        assert not torch.equal(one, other)  # it was another product


@pytest.mark.parametrize("name", DENSE)
def test_over_bfloat16_small_increments_stay(name: str) -> None:
    """Products in bfloat16 of the increment alone: of 1e-4 of the weight it keeps its digits."""
    size = 2.0 if name == "FourierFT" else 3e-4
    model, params = trained(DENSE[name], torch.bfloat16, size)
    x = reals(300, 64).bfloat16()
    a = params["0.weight"]
    bank = next((params[k].leaves for k in params if k.startswith("shared:")), {})
    wide = {k: t.detach().double() if t.is_floating_point() else t
            for k, t in {**bank, **a.leaves}.items()}  # fmt: skip
    weight = model[0].weight.detach().double()
    change = a.method.increment(wide, lambda: weight, 48, 64)
    p = {**bank, **a.leaves}
    base = fadapt.base.linear_map.DenseMap(model[0].weight.detach())
    delta = a.method.delta(p, x.float(), base(x), base)
    ref = x.double() @ change.mT
    assert float((delta.detach().double() - ref).abs().max() / ref.abs().max()) < 0.01
    weights = reals(300, 48, seed=3).bfloat16()
    found = torch.autograd.grad((delta * weights).sum(), [*a.train.values()])
    leaves = {k: t.requires_grad_() for k, t in wide.items() if k in a.train}
    out = x.double() @ a.method.increment({**wide, **leaves}, lambda: weight, 48, 64).mT
    refs = torch.autograd.grad((out * weights.double()).sum(), [*leaves.values()])
    for one, other in zip(found, refs, strict=True):
        assert one.dtype == torch.float32
        assert float((one.double() - other).norm() / other.norm()) < 0.01


def test_the_sum_is_left_to_those_whose_map_it_is() -> None:
    """A subclass's own delta, a bias that trains, dropout: nothing is bypassed."""

    class Half(fadapt.Full):
        def delta(self, p, x, y, base):
            return super().delta(p, x, y, base) / 2

    x = reals(30, 64)
    model, params = trained(fadapt.Full(), torch.float32)
    half = fadapt.init(model, Half())
    with torch.no_grad():
        half["0.weight"].train["D"].copy_(params["0.weight"].train["D"])
    torch.testing.assert_close(
        fadapt.apply(model, half, x), fadapt.apply(model, fadapt.scale(params, 0.5), x)
    )
    both = fadapt.init(model, {"0.weight": fadapt.HiRA(r=2), "0.bias": fadapt.Full()})
    fadapt.apply(model, both, x).sum().backward()
    torch.testing.assert_close(both["0.bias"].train["D"].grad, torch.full((48, 1), 30.0))
    model.train()
    dropped = fadapt.init(model, fadapt.Full(dropout=0.5))
    with torch.no_grad():
        dropped["0.weight"].train["D"].add_(1.0)
    assert not torch.equal(fadapt.apply(model, dropped, x), fadapt.apply(model, dropped, x))
