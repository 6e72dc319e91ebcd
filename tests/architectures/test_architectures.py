"""Every model of the zoo: one adapter, and a stack, against the model with merged weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fadapt

from ..models import perturb
from .zoo import CASES, Case

# What a bare method adapts of some models has no fast rule; that is said, and tested elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore::fadapt.FadaptWarning")
NAMES = [
    pytest.param(name, marks=[pytest.mark.wide] if case.wide else [])
    for name, case in CASES.items()
]


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make().eval().requires_grad_(False)


def members(model: nn.Module, case: Case) -> list[fadapt.Params]:
    rules = {case.rules: fadapt.LoRA(r=2)} if case.rules else fadapt.LoRA(r=2)
    starts = [fadapt.init(model, fadapt.Config(rules, seed=seed)) for seed in (1, 2)]
    return [perturb(p, seed=seed, std=0.1) for seed, p in enumerate(starts)]


def merged(model: nn.Module, params: fadapt.Params) -> nn.Module:
    new = copy.deepcopy(model)
    new.load_state_dict(fadapt.merge(model, params), strict=False)
    return new.eval()


def loss_of(model: nn.Module, case: Case) -> Tensor:
    batch = case.batch()
    out = model(**batch)
    return case.loss(out, batch) if case.loss else out.loss


def tensors(out: Any) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in pytree.tree_flatten_with_path(out)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield pytree.keystr(path), leaf


def assert_close(got: Any, want: Any) -> None:
    """Within 1e-4 of the largest value of each tensor."""
    found, expected = dict(tensors(got)), dict(tensors(want))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        size = tensor.abs().max().item() if tensor.numel() else 0.0
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4 * size + 1e-9, msg=name)


def inputs(model: nn.Module, case: Case) -> dict[str, Any]:
    """The batch without what only a loss needs."""
    batch = {k: v for k, v in case.batch().items() if "label" not in k and "position" not in k}
    if getattr(model.config, "is_encoder_decoder", False) and "labels" in case.batch():
        batch["decoder_input_ids"] = case.batch()["labels"]
    return {k: v for k, v in batch.items() if k != "return_loss"}


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_one_adapter(case: Case) -> None:
    """A bare method: the identity at its start, the merged model later, its gradient too."""
    model = made(case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    params, batch = fadapt.init(model, fadapt.LoRA(r=2)), case.batch()
    with torch.no_grad():
        for (name, a), (_, b) in zip(
            tensors(fadapt.apply(model, params, **batch)), tensors(model(**batch)), strict=True
        ):
            assert torch.equal(a, b), name
    perturb(params, std=0.1)
    other = merged(model, params).requires_grad_(True)
    loss = fadapt.run(model, params, batch, case.loss)
    want = loss_of(other, case)
    assert_close(loss, want)
    loss.backward()
    if case.own_gradient:
        want.backward()
    largest = max(p.grad.abs().max().item() for p in fadapt.trainable(params) if p.grad is not None)
    weights = dict(other.named_parameters(remove_duplicate=False))
    for name, adapter in params.items():
        b = adapter.train["B"].grad
        if weights[name].grad is None or adapter.site.experts or adapter.site.kernel:
            continue
        slope = weights[name].grad.float()
        slope = slope.mT if adapter.site.transposed else slope
        if slope.dim() == 2:  # dL/dB = s dL/dW A^T
            expected = adapter.method.scaling * slope @ adapter.train["A"].detach().mT
            torch.testing.assert_close(b, expected, rtol=1e-3, atol=1e-4 * largest, msg=name)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_losses_and_gradients_of_a_stack(case: Case, request: pytest.FixtureRequest) -> None:
    """Those of its members alone, or an error that says why not."""
    model = made(case)
    params, batch = members(model, case), case.batch()
    stack = fadapt.stack(params)
    if case.refuses_run:
        with pytest.raises(fadapt.FadaptError, match="unstack"):
            fadapt.run(model, stack, batch, case.loss)
        return
    expected = [loss_of(merged(model, p), case) for p in params]
    losses = fadapt.run(model, stack, batch, case.loss)
    for loss, want in zip(losses, expected, strict=True):
        assert_close(loss, want)
    losses.sum().backward()
    for p in params:
        fadapt.run(model, p, batch, case.loss).backward()

    def grad(t: Tensor) -> Tensor:
        return torch.zeros_like(t) if t.grad is None else t.grad

    grads = stack.map(
        lambda g: g.map(lambda a: a.replace({k: grad(t) for k, t in a.train.items()}))
    )
    for p, found in zip(params, fadapt.unstack(grads), strict=True):
        size = max(grad(t).abs().max().item() for t in fadapt.trainable(p))
        assert size > 0
        for a, b in zip(fadapt.trainable(found), fadapt.trainable(p), strict=True):
            torch.testing.assert_close(a.detach(), grad(b), rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_outputs_of_a_stack(case: Case) -> None:
    model = made(case)
    params, given = members(model, case), inputs(model, case)
    given.setdefault("use_cache", False) if hasattr(model.config, "use_cache") else None
    stack = fadapt.stack(params)
    with torch.no_grad():
        if case.refuses_apply:
            with pytest.raises(fadapt.FadaptError, match="unstack"):
                fadapt.apply(model, stack, **given)
            return
        together = fadapt.apply(model, stack, **given)
        for k, p in enumerate(params):
            mine = pytree.tree_map_only(Tensor, lambda t, k=k: t[k], together)
            assert_close(mine, merged(model, p)(**given))
