"""Untrained is the base to the last bit, also where the input's layout decides about the kernel."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fadapt

from .models import perturb

METHODS = (fadapt.LoRA(r=2), fadapt.HRA(r=2), fadapt.DoRA(r=2), fadapt.IA3(), fadapt.OFT(4))


class TimeFirst(nn.Module):
    """Its layer gets a transposed input, as in Longformer's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(36, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.p(x.transpose(0, 1))


class Sliced(TimeFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.p(x[:, 1::2])


class Expanded(TimeFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.p(x[:1].expand(3, -1, -1))


class WeightFirst(nn.Module):
    """As Mamba's dt_proj: a column for a token."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(36, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.p.weight @ x.transpose(1, 2)


class Columns(WeightFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.p.weight @ x[0].T


@pytest.mark.filterwarnings("error::fadapt.DenseFallbackWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("cls", [TimeFirst, Sliced, Expanded, WeightFirst, Columns])
def test_identity(cls: Any, method: fadapt.Method, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = cls().to(dtype), torch.randn(3, 8, 36).to(dtype)
    for requires_grad, grad, input_grad in itertools.product((True, False), repeat=3):
        model.requires_grad_(requires_grad)
        with torch.set_grad_enabled(grad):
            inputs = x.clone().requires_grad_(input_grad)
            params = fadapt.init(model, method)
            assert torch.equal(fadapt.apply(model, params, inputs), model(inputs))


@pytest.mark.parametrize("cls", [TimeFirst, Sliced, Expanded, WeightFirst, Columns])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_values_and_gradients_are_those_of_the_merged_model(
    cls: Any, method: fadapt.Method
) -> None:
    torch.manual_seed(0)
    model, x = cls().double(), torch.randn(3, 8, 36, dtype=torch.float64)
    params = fadapt.init(model, method)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf.add_(0.1 * torch.randn_like(leaf))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    merged = cls().double()
    merged.load_state_dict(fadapt.merge(model, params), strict=False)
    with torch.no_grad():
        for key, own in merged.named_parameters():
            if key not in fadapt.merge(model, params):
                own.copy_(model.get_parameter(key))
    found, wanted = fadapt.apply(model, params, inputs[0]), merged(inputs[1])
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert all(p.grad is None for p in model.parameters())
    assert all(leaf.grad is not None for leaf in fadapt.trainable(params))
    train, rest = fadapt.split(params)

    def loss(train: Any) -> Tensor:
        out = fadapt.apply(model, fadapt.join(train, rest), x)
        return out.square().sum()

    for name, leaves in torch.func.grad(loss)(train).items():
        for key, grad in leaves.items():
            torch.testing.assert_close(grad, params[name].train[key].grad)
    if cls in (Sliced, WeightFirst):  # whose rows are the batch's
        for one in fadapt.apply(model, fadapt.stack([params, params]), x):
            torch.testing.assert_close(one, wanted)


def encoder(nested: bool = False) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=nested)
    with torch.no_grad():
        for bias in model.parameters():
            bias.add_(torch.randn(bias.shape) * 0.1)
    return model.eval()


X = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
FUSED_RULES = {
    "all": fadapt.LoRA(r=2),
    "of bias": fadapt.IA3(),
    "one": {"linear1": fadapt.DoRA(r=2)},
    "attention": {r"layers\.0\.self_attn": fadapt.IA3()},
    "norms": {"norm": fadapt.LNTuning()},
    "later": {r"layers\.2": fadapt.LoRA(r=2)},
}


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
@pytest.mark.parametrize("rules", FUSED_RULES)
def test_the_fused_kernel_of_encoders(rules: str) -> None:
    """It runs in an adapted call where the base runs it; with autograd a frozen base alone does."""
    for nested, mask, frozen, grad in itertools.product((False, True), repeat=4):
        model = encoder(nested).requires_grad_(not frozen)
        params = fadapt.init(model, FUSED_RULES[rules])
        given: dict[str, Any] = {"src_key_padding_mask": PADDING} if mask else {}
        with torch.set_grad_enabled(grad):
            adapted, base = fadapt.apply(model, params, X, **given), model(X, **given)
        if frozen and grad:
            rows = ~PADDING if mask else slice(None)
            torch.testing.assert_close(adapted[rows], base[rows], rtol=1e-4, atol=1e-5)
            adapted.sum().backward()
        else:
            assert torch.equal(adapted, base), (nested, mask, frozen, grad)
        assert adapted.requires_grad == grad


@pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")
@pytest.mark.parametrize("rules", FUSED_RULES)
def test_adapters_act_within_the_fused_kernel(rules: str) -> None:
    model = encoder(nested=True)
    params = perturb(fadapt.init(model, FUSED_RULES[rules]), std=0.3)
    merged = copy.deepcopy(model)
    merged.load_state_dict(fadapt.merge(model, params), strict=False)
    with torch.no_grad():
        adapted = fadapt.apply(model, params, X, src_key_padding_mask=PADDING)
        torch.testing.assert_close(adapted, merged(X, src_key_padding_mask=PADDING))
        assert not torch.allclose(adapted, model(X, src_key_padding_mask=PADDING))
