"""RankBudget: the triplets that PEFT's allocator keeps, at every step of a training."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import AdaLoRA, ConfigError, RankBudget
from tests.models import perturb, reals, seeded, tokens
from tests.test_bases import mixtral

STEPS, R, TARGET = 9, 5, 2


def net() -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)))


def loss(out: Tensor, _: object = None) -> Tensor:
    return (out - out.detach().roll(1, 0)).square().mean() + out.sin().mean()


def optimizer(leaves: list[nn.Parameter] | list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(leaves, lr=3e-2)


def train(budget: RankBudget, params: fadapt.Params, model: nn.Module, steps: int = STEPS):
    """The masks of E after every step."""
    opt, state = optimizer(fadapt.trainable(params)), None
    for step in range(1, steps + 1):
        opt.zero_grad()
        fadapt.run(model, params, reals(7, 8, seed=step), loss).backward()
        opt.step()
        state = budget.update(state, params, step)
        budget.cut(params, state, step)
        yield {name: a.train["E"] != 0 for name, a in params.items()}


@pytest.mark.parametrize(("tinit", "tfinal", "delta"), [(0, 0, 1), (2, 2, 1), (1, 3, 2)])
def test_the_choice_is_pefts(tinit: int, tfinal: int, delta: int) -> None:
    model = net()
    config = peft.AdaLoraConfig(
        target_modules=["0", "2"],
        init_r=R,
        target_r=TARGET,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=delta,
        total_step=STEPS,
        lora_alpha=5,
    )
    reference = peft.get_peft_model(copy.deepcopy(model), config)
    theirs = {n: p for n, p in reference.named_parameters() if "lora_" in n and p.requires_grad}
    params = fadapt.init(model, AdaLoRA(r=R, alpha=5))
    with torch.no_grad():
        for name, leaf in theirs.items():
            site, letter = f"{name.split('.')[2]}.weight", name.split("lora_")[1][0]
            leaf.copy_(params[site].train[letter].view_as(leaf))
    opt = optimizer(list(theirs.values()))
    budget = RankBudget(STEPS, TARGET, tinit, tfinal, delta)
    left = []
    for step, masks in enumerate(train(budget, params, model), 1):
        opt.zero_grad()
        loss(reference(reals(7, 8, seed=step))).backward()
        opt.step()
        reference.base_model.update_and_allocate(step)
        for name, leaf in theirs.items():
            if "lora_E" in name:
                site = f"{name.split('.')[2]}.weight"
                assert torch.equal((leaf != 0).flatten(), masks[site])
                assert (leaf.flatten() - params[site].train["E"]).abs().max() < 1e-5
        left.append(sum(int(m.sum()) for m in masks.values()))
    assert left[-1] == 2 * TARGET
    assert left[: tinit + 1] != left[-tinit - 1 :]


def test_update_is_pure_and_takes_a_tree_of_gradients() -> None:
    model, x = net(), reals(7, 8)
    params = perturb(fadapt.init(model, AdaLoRA(r=R)))
    budget = RankBudget(total_step=4)
    own, rest = fadapt.split(params)

    def value(leaves: object) -> Tensor:
        return fadapt.run(model, fadapt.join(leaves, rest), x, loss)  # type: ignore[arg-type]

    grads = torch.func.grad(value)(own)
    value(own).backward()
    first = budget.update(None, params, 1)
    before = copy.deepcopy(first)
    second = budget.update(first, params, 2, grads)
    for name, leaves in first.items():
        for key, tensor in leaves.items():
            assert torch.equal(tensor, before[name][key])
            assert not torch.equal(tensor, second[name][key])
    for name, leaves in budget.update(None, params, 1, grads).items():
        for key, tensor in leaves.items():
            assert torch.allclose(tensor, first[name][key])
    assert budget.update(second, params, 4) is second


def test_every_expert_has_triplets_of_its_own() -> None:
    model = mixtral().float()
    params = fadapt.init(model, {"experts": AdaLoRA(r=3)})
    fadapt.run(model, perturb(params), {"input_ids": tokens(), "labels": tokens()}).backward()
    budget = RankBudget(total_step=1, target_r=1)
    kept = budget.kept(budget.update(None, params, 1), 1)
    experts = sum(a.site.experts for a in params.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == experts
    budget.cut(params, budget.update(None, params, 1), 1)
    assert all(torch.equal(a.train["E"] != 0, kept[n]) for n, a in params.items())


def test_what_does_not_fit_is_refused() -> None:
    model = net()
    params = fadapt.init(model, AdaLoRA(r=2))
    budget = RankBudget(total_step=3)
    with pytest.raises(ConfigError, match="no gradient"):
        budget.update(None, params, 1)
    with pytest.raises(ConfigError, match="hold \\['LoRA'\\]"):
        budget.update(None, fadapt.init(model, fadapt.LoRA()), 1)
    with pytest.raises(ConfigError, match="unstack"):
        budget.update(None, fadapt.stack([params]), 1)  # type: ignore[arg-type]
    for wrong in ({"tinit": 2, "tfinal": 1}, {"target_r": 0}, {"deltaT": 0}, {"beta1": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            RankBudget(**{"total_step": 3, **wrong})
