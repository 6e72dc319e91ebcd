"""However a model comes to a weight: it is adapted exactly there, or that is an error."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import fadapt

from .models import perturb, reals

pytestmark = pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
WIDTH = 6
Use = Callable[[nn.Module, Tensor], Tensor]


class Odd(nn.Module):
    """One linear layer, whose weight is used in a way of its own; and another."""

    def __init__(self, use: Use, keep: Callable[[nn.Module], object] | None = None):
        super().__init__()
        self.lin, self.head, self.use = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), use
        self.__dict__["kept"] = keep(self) if keep else None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use(self, x)))


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


@torch.jit.script
def scripted(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


def unregistered(model: nn.Module) -> list[nn.Module]:
    twin = nn.Linear(WIDTH, WIDTH)
    twin.weight = model.lin.weight
    return [twin]


def out_of_a_closure(model: nn.Module) -> Callable[[Tensor], Tensor]:
    weight = model.lin.weight
    return lambda x: F.linear(x, weight)


ELSEWHERE: dict[str, tuple[Use, Callable[[nn.Module], object] | None]] = {
    "a list": (lambda m, x: F.linear(x, m.kept[0]), lambda m: [m.lin.weight]),
    "an attribute": (lambda m, x: x @ m.kept.T, lambda m: m.lin.weight),
    "nested": (lambda m, x: m.lin(x) + x @ m.kept["a"][0], lambda m: {"a": (m.lin.weight,)}),
    "a view made before": (lambda m, x: x @ m.kept, lambda m: m.lin.weight.data.t()),
    "a part": (lambda m, x: m.lin(x) * m.kept, lambda m: m.lin.weight.data[2]),
    "a closure": (lambda m, x: m.kept(x), out_of_a_closure),
    "an unregistered module": (lambda m, x: m.kept[0](x), unregistered),
    "a copy": (lambda m, x: copy.deepcopy(m.lin)(x), None),
    "functional_call": (
        lambda m, x: torch.func.functional_call(m.lin, m.kept, (x,)),
        lambda m: {k: v.detach() for k, v in m.lin.named_parameters()},
    ),
}
UNFOLLOWED: dict[str, Use] = {
    "torch.jit.script": lambda m, x: scripted(x, m.lin.weight),
    "vmap over it": lambda m, x: torch.vmap(lambda w: x @ w, out_dims=-1)(m.lin.weight),
    "new_tensor": lambda m, x: F.linear(x, x.new_tensor(m.lin.weight)),
    "grad in it": lambda m, x: (
        x @ torch.func.grad(lambda w: F.linear(x, w).square().sum())(m.lin.weight)
    ),
}
EXACT: dict[str, Use] = {
    "F.linear by names": lambda m, x: F.linear(input=x, weight=m.lin.weight, bias=m.lin.bias),
    "matmul by names": lambda m, x: torch.matmul(
        input=x, other=m.lin.weight.transpose(dim0=0, dim1=1)
    ),
    "addmm by names": lambda m, x: torch.addmm(m.lin.bias, mat1=x, mat2=m.lin.weight.t()),
    "is it a Parameter": lambda m, x: m.lin(x) * (1 + isinstance(m.lin.weight, nn.Parameter)),
    "does it require grad": lambda m, x: m.lin(x) * (1 + m.lin.weight.requires_grad),
    "get_parameter": lambda m, x: F.linear(x, m.get_parameter("lin.weight")),
    "functional_call": lambda m, x: torch.func.functional_call(
        m.lin, {"weight": m.head.weight}, (x,)
    ),
    "a gradient in the forward": lambda m, x: torch.autograd.grad(
        m.lin(z := x.detach().requires_grad_()).square().sum(), z, create_graph=True
    )[0],
    "rows, twice": lambda m, x: m.lin(x) + x * m.lin.weight[0] + x @ m.lin.weight,
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.lin.weight),
}


def params_of(model: nn.Module, seed: int = 1) -> fadapt.Params:
    return perturb(fadapt.init(model, {"lin.weight": fadapt.LoRA(r=2)}), seed=seed, std=0.5)


@pytest.mark.parametrize("name", EXACT)
def test_uses_of_a_weight_that_are_followed(name: str) -> None:
    """The outputs and the gradients are those of the merged weight."""
    model, x = Odd(EXACT[name]), reals(3, WIDTH)
    params = params_of(model)
    new = fadapt.merge(model, params)["lin.weight"].requires_grad_()
    merged = copy.deepcopy(model)
    with torch.no_grad():
        merged.lin.weight.copy_(new)
    out, want = fadapt.apply(model, params, x), merged(x)
    torch.testing.assert_close(out, want)
    want.square().sum().backward()
    slope, leaf = merged.lin.weight.grad, params["lin.weight"].train["B"]
    if slope is None:
        assert not out.requires_grad
        return
    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    method = params["lin.weight"].method
    want_grad = method.scaling * slope @ params["lin.weight"].train["A"].detach().mT
    torch.testing.assert_close(grad, want_grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_weight_that_is_read_elsewhere_is_an_error(name: str, grad: bool) -> None:
    use, keep = ELSEWHERE[name]
    model, x = Odd(use, keep), reals(3, WIDTH)
    params = params_of(model)
    stack = fadapt.stack([params, params_of(model, 2)])
    message = r"lin\.weight is adapted, and .* reads it \(\w+, .*\).*'lin\.weight': None"
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            for call in (
                lambda: fadapt.apply(model, params, x),
                lambda: fadapt.run(model, params, x, lambda out, _: out.square().mean()),
                lambda: fadapt.apply(model, stack, x),
            ):
                with pytest.raises(fadapt.TargetError, match=message):
                    call()
            with fadapt.bound(model, params), pytest.raises(fadapt.TargetError, match=message):
                model(x)
        head = perturb(fadapt.init(model, {"head.weight": fadapt.LoRA(r=2)}), std=0.5)
        assert not torch.allclose(fadapt.apply(model, head, x), model(x))


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_uses_of_a_weight_that_cannot_be_followed_are_errors(name: str) -> None:
    model, x = Odd(UNFOLLOWED[name]), reals(3, WIDTH)
    params = params_of(model)
    for _ in range(2):
        with pytest.raises(fadapt.TargetError, match=r"lin\.weight.*cannot follow"):
            fadapt.apply(model, params, x)
    assert model(x).isfinite().all()


def test_a_function_whose_backward_does_not_know_the_adapter_is_an_error() -> None:
    model, x = Odd(lambda m, x: Product.apply(x, m.lin.weight)), reals(3, WIDTH)
    params = params_of(model)
    merged = x @ fadapt.merge(model, params)["lin.weight"].mT
    with torch.no_grad():
        want = model.head(torch.tanh(merged))
        torch.testing.assert_close(fadapt.apply(model, params, x), want)
    message = r"lin\.weight .*autograd\.Function .*lost.*'lin\.weight': None"
    for _ in range(2):
        loss = fadapt.run(model, params, x, lambda out, _: out.square().mean())
        with pytest.raises(fadapt.TargetError, match=message):
            loss.backward()
        loss = fadapt.run(model, params, x, lambda out, _: out.square().mean())
        with pytest.raises(fadapt.TargetError, match=message):
            torch.autograd.grad(loss, fadapt.trainable(params))
    trials = [fadapt.Trial(params_of(model, seed), name=str(seed)) for seed in (1, 2)]
    with pytest.raises(fadapt.TargetError, match=message):
        fadapt.sweep(
            model, trials, [x], steps=2, loss_fn=lambda out, _: out.square().mean(), progress=False
        )


def test_a_tied_weight_is_the_bases_own_at_its_other_place() -> None:
    model = Odd(lambda m, x: m.lin(x) + m.other(x))
    model.other = nn.Linear(WIDTH, WIDTH)
    model.other.weight = model.lin.weight
    x = reals(3, WIDTH)
    out = fadapt.apply(model, params_of(model), x)
    assert out.shape == (3, WIDTH)


def test_what_a_forward_keeps_of_an_adapted_call_is_said() -> None:
    def caches(model: nn.Module, x: Tensor) -> Tensor:
        model.__dict__["cache"] = [model.lin(x)]
        return model.cache[0]

    def keeps_the_weight(model: nn.Module, x: Tensor) -> Tensor:
        model.__dict__["cache"] = model.lin.weight
        return F.linear(x, model.cache)

    def counts(model: nn.Module, x: Tensor) -> Tensor:
        model.__dict__["cache"] = x.mean(), 3
        return model.lin(x)

    x = reals(3, WIDTH)
    model = Odd(caches)
    with pytest.warns(fadapt.FadaptWarning, match=r"Odd keeps .* in Odd\.cache"):
        fadapt.apply(model, params_of(model), x)
    model = Odd(keeps_the_weight)
    with pytest.raises(fadapt.TargetError, match=r"keeps lin\.weight.* in Odd\.cache"):
        fadapt.apply(model, params_of(model), x)
    model = Odd(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fadapt.apply(model, params_of(model), x)


def test_one_forward_is_watched() -> None:
    """One of each mode and of each set of sites; no later one, and none of the base."""
    seen = []

    def use(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(torch.utils._python_dispatch._get_current_dispatch_mode() is not None)
        return model.lin(x)

    model, x = Odd(use), reals(3, WIDTH)
    params = params_of(model)
    model(x)
    for _ in range(2):
        fadapt.apply(model, params, x)
    model.eval()
    for _ in range(2):
        fadapt.apply(model, params, x)
    fadapt.apply(model, fadapt.init(model, fadapt.LoRA(r=2)), x)
    assert seen == [False, True, False, True, False, True]
    with torch.no_grad():
        fadapt.apply(model, params, x)
        fadapt.apply(model, params, x)
    assert seen[6:] == [True, False]
    seen.clear()
    with fadapt.bound(model, fadapt.init(model, {"head": fadapt.LoRA(r=2)})):
        assert [*inspect.signature(model.forward).parameters] == ["x"]
        model(x)
        model(x)
    assert seen == [True, False]


def test_a_thread_of_the_forwards_own_is_the_bases() -> None:
    """As the documentation has it: adapters are seen by the thread that runs the call."""
    found = []

    def use(model: nn.Module, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: found.append(model.lin(x)))
        thread.start()
        thread.join()
        return model.lin(x)

    model, x = Odd(use), reals(3, WIDTH)
    fadapt.apply(model, params_of(model), x)
    torch.testing.assert_close(found[0], model.lin(x))
