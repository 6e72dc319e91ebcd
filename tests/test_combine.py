"""combine: the increments add up as those of the merged weights do, whatever the methods."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import Chain, ConfigError, LoRA, Params, RsLoRA, Sum
from fadapt.testing import check_method
from tests.models import gpt2, mlp, perturb, qwen3, reals, tokens

W = [0.7, -1.3, 0.4]
MIXES = {
    "LoRA": (LoRA(r=2), LoRA(r=3, alpha=5.0), RsLoRA(r=1)),
    "output sides": (LoRA(r=2), fadapt.DoRA(r=2), fadapt.IA3()),
    "input sides": (fadapt.HRA(r=2), fadapt.IA3FF(), LoRA(r=1)),
    "turns": (fadapt.RoAd(group_size=4), fadapt.OFT(block_size=4), fadapt.SSVD(k=2)),
    "spectral": (fadapt.PiSSA(r=2), fadapt.AntiPaSTO(r=4), fadapt.DeLoRA(r=2)),
    "chains": (Chain((LoRA(r=2), fadapt.HRA(r=2), fadapt.IA3())), LoRA(r=1), fadapt.IA3FF()),
}


def members(model: nn.Module, mix: str) -> list[Params]:
    found = [perturb(fadapt.init(model, m), seed=i) for i, m in enumerate(MIXES[mix])]
    found[1] = fadapt.scale(found[1], 0.6)
    return found


def summed(model: nn.Module, parts: list[Params], weights=W) -> dict[str, Tensor]:
    """base + Σ w (merged - base), of weights and biases."""
    base = {k: v.detach().double() for k, v in model.named_parameters()}
    total = dict(base)
    for part, w in zip(parts, weights, strict=True):
        for name, merged in fadapt.merge(model, part, dtype=torch.float64).items():
            total[name] = total[name] + w * (merged - base[name])
    return total


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("make", [mlp, gpt2], ids=["mlp", "gpt2"])
def test_equal_to_summed_merged_weights(make, mix) -> None:
    model = make().double()
    parts = members(model, mix)
    both = fadapt.combine(parts, W)
    want = summed(model, parts)
    for name, merged in fadapt.merge(model, both).items():
        torch.testing.assert_close(merged, want[name], rtol=1e-6, atol=1e-7)
    if mix == "LoRA":
        assert {type(a.method) for a in both.values()} == {LoRA}


@pytest.mark.parametrize("mix", MIXES)
def test_run_stack_save_and_gradients(mix, tmp_path) -> None:
    model = mlp()
    parts, x = members(model, mix), reals(6, 8)
    both = fadapt.combine(parts, W)
    with torch.no_grad():
        want = torch.func.functional_call(
            model, {k: v.float() for k, v in summed(model, parts).items()}, (x,)
        )
        got = fadapt.apply(model, both, x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    stack = fadapt.stack([both, parts[0], fadapt.combine(parts, W[::-1]), both])
    torch.testing.assert_close(fadapt.apply(model, stack, x)[0], got)
    torch.testing.assert_close(fadapt.apply(model, fadapt.unstack(stack)[3], x), got)
    fadapt.save(both, tmp_path / "a")
    assert torch.equal(fadapt.apply(model, fadapt.load(tmp_path / "a", model), x), got)
    half = fadapt.apply(model, fadapt.scale(both, 0.0), x)
    assert torch.equal(half, model(x))
    fadapt.run(model, both, x, lambda y, _: y.square().mean()).backward()
    assert all(t.grad is not None for t in fadapt.trainable(both))
    assert not any(t.grad is not None for p in parts for t in fadapt.trainable(p))


def test_other_sites_and_experts_keep_their_own() -> None:
    model = mlp()
    a = perturb(fadapt.init(model, {"0": LoRA(r=2)}))
    b = perturb(fadapt.init(model, {"2": fadapt.IA3()}))
    both = fadapt.combine([a, b], [2.0, 3.0])
    want = summed(model, [a, b], [2.0, 3.0])
    for name, merged in fadapt.merge(model, both).items():
        torch.testing.assert_close(merged.double(), want[name], rtol=1e-5, atol=1e-6)


def test_weights_can_be_learned() -> None:
    model, ids = qwen3(), tokens()
    parts = [perturb(fadapt.init(model, LoRA(r=2)), seed=i) for i in range(2)]
    for second in (parts[1], perturb(fadapt.init(model, fadapt.DoRA(r=2)))):
        w = torch.tensor([0.5, 0.5], requires_grad=True)

        def value(w: Tensor, second: Params = second) -> Tensor:
            both = fadapt.combine([parts[0], second], w)
            return fadapt.run(model, both, {"input_ids": ids, "labels": ids})

        (grad,) = torch.autograd.grad(value(w), w)
        with torch.no_grad():
            for i in range(2):
                step = torch.zeros(2)
                step[i] = 1e-2
                slope = (value(w + step) - value(w - step)) / 2e-2
                torch.testing.assert_close(grad[i], slope, rtol=3e-2, atol=2e-3)


def test_a_sum_passes_the_laws() -> None:
    check_method(Sum((LoRA(r=2), fadapt.HRA(r=2), fadapt.IA3())))


def test_bad_input() -> None:
    model = mlp()
    p = perturb(fadapt.init(model, LoRA(r=2)))
    other = perturb(
        fadapt.init(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)), LoRA())
    )
    for parts, weights in (
        ([], []),
        (p, [1.0]),
        ([p, p], [1.0]),
        ([p], 1.0),
        ([p], ["x"]),
        ([p], [float("nan")]),
        ([p, None], [1.0, 1.0]),
        (fadapt.stack([p, p]), [1.0, 1.0]),
        ([p, other], [1.0, 1.0]),
        ([fadapt.split(p)[1]], [1.0]),
    ):
        with pytest.raises(ConfigError):
            fadapt.combine(parts, weights)  # type: ignore[arg-type]
