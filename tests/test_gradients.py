"""Statistics of gradients, and LoRA that starts at them, against autograd's own gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import CalibrationError
from fadapt.calibration import Statistic, Sum

from .models import mlp, perturb, qwen3, reals, tokens

GRADIENT = Statistic(Sum(), side="grad")


def batch(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Sequences padded to the longest, on the left; every token has a label, padding too."""
    ids = tokens(len(lengths), max(lengths), seed=seed)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids}


def reference(model: nn.Module, batches: list[dict[str, Tensor]], name: str) -> Tensor:
    """The mean gradient of a parameter, by a backward pass with the padding's labels left out."""
    total = torch.zeros(())
    for part in batches:
        labels = part["labels"].masked_fill(part["attention_mask"] == 0, -100)
        loss = model(**{**part, "labels": labels}).loss
        total = total + torch.autograd.grad(loss, model.get_parameter(name))[0]
    return total / len(batches)


BATCHES = [batch(9, 5), batch(4, 7, seed=1)]
Q, DOWN = (f"model.layers.{i}" for i in ("0.self_attn.q_proj.weight", "1.mlp.down_proj.weight"))


def test_the_gradient_is_that_of_the_loss() -> None:
    model = qwen3().double()
    methods = {"q_proj|down_proj": fadapt.LoRAGA(r=2), "v_proj": fadapt.EVA(r=2, rho=1.0)}
    stats = fadapt.observe(model, methods, BATCHES)
    for name in (Q, DOWN):
        found = stats.get(name, GRADIENT).reshape(model.get_parameter(name).shape)
        ref = reference(model, BATCHES, name)
        assert ref.abs().max() > 1e-4
        torch.testing.assert_close(found, ref, atol=1e-12, rtol=1e-9)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    # Parts combine, and files keep them.
    parts = [fadapt.observe(model, methods, [part]) for part in BATCHES]
    both = parts[0].combine(parts[1])
    torch.testing.assert_close(both.get(Q, GRADIENT), stats.get(Q, GRADIENT))


def test_files_and_passes(tmp_path) -> None:
    model, cfg = qwen3(), {"q_proj|down_proj": fadapt.LoRAGA(r=2)}
    stats = fadapt.observe(model, cfg, BATCHES)
    stats.save(tmp_path / "stats")
    read = fadapt.Stats.load(tmp_path / "stats", model)
    assert torch.equal(read.get(Q, GRADIENT), stats.get(Q, GRADIENT))
    most = max(p.numel() for p in model.parameters()) * 10
    with pytest.warns(fadapt.FadaptWarning, match="passes over the batches"):
        passes = fadapt.observe(model, cfg, BATCHES, max_memory=most)
    torch.testing.assert_close(passes.get(DOWN, GRADIENT), stats.get(DOWN, GRADIENT))
    first, again = (fadapt.init(model, cfg, data) for data in (BATCHES, read))
    assert torch.equal(first[Q].fixed["A0"], again[Q].fixed["A0"])


def test_a_prompt_whose_labels_do_not_count_still_has_a_gradient() -> None:
    model = qwen3()
    part = batch(9, 9)
    part["labels"] = part["labels"].clone()
    part["labels"][:, :5] = -100
    for label_mask in (False, True):
        stats = fadapt.observe(model, {"q_proj": fadapt.LoRAGA(r=2)}, [part], label_mask=label_mask)
        found = stats.get(Q, GRADIENT).reshape(model.get_parameter(Q).shape).float()
        torch.testing.assert_close(found, reference(model, [part], Q), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_the_start_is_the_papers(direction) -> None:
    model, x = mlp(widths=(10, 8)).double(), reals(30, 10).double()
    layer = model[0]
    loss = model(x).sin().sum()
    u, _, vh = torch.linalg.svd(torch.autograd.grad(loss, layer.weight)[0])
    first, second = torch.arange(3), torch.arange(3, 6)
    of_a, of_b = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (2 * first + 1, 2 * first),
    }[direction]
    method = fadapt.LoRAGA(r=3, alpha=6, direction=direction, stable_gamma=9.0)
    params = fadapt.init(model, {"0": method}, [x], loss_fn=lambda out, _: out.sin().sum())
    fixed = params["0.weight"].fixed
    scale = 8**0.25 / 3
    for found, wanted in ((fixed["A0"], vh[of_a]), (fixed["B0"].mT, u[:, of_b].mT)):
        sign = (found * wanted).sum(1, keepdim=True).sign()
        torch.testing.assert_close(found, scale * sign * wanted)
    assert torch.equal(fadapt.apply(model, params, x), model(x))


def test_the_first_step_follows_the_gradient() -> None:
    """The gradient that reaches the factors spans 2 r of its directions, as theorem 3.1 has it."""
    model, x = mlp(widths=(10, 8)).double(), reals(30, 10).double()
    params = fadapt.init(
        model, {"0": fadapt.LoRAGA(r=2)}, [x], loss_fn=lambda out, _: out.sin().sum()
    )
    fadapt.apply(model, params, x).sin().sum().backward()
    adapter = params["0.weight"]
    step_a, step_b = (adapter.train[k].grad for k in ("dA", "dB"))
    step = adapter.fixed["B0"] @ step_a + step_b @ adapter.fixed["A0"]
    gradient = torch.autograd.grad(model(x).sin().sum(), model[0].weight)[0]
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    best = u[:, :4] * s[:4] @ vh[:4]
    scale = (step * best).sum() / best.square().sum()
    torch.testing.assert_close(step, scale * best)


def test_a_sweep_takes_its_own_loss() -> None:
    model, x = mlp(widths=(10, 8)), reals(30, 10)
    report = fadapt.sweep(
        model,
        [fadapt.Trial(method, lr=0.1) for method in (fadapt.LoRAGA(r=2), fadapt.LoRA(r=2))],
        [x],
        loss_fn=lambda out, _: out.square().mean(),
        calib=[x],
        steps=3,
        progress=False,
    )
    assert next(iter(report.params.values()))["0.weight"].train["dA"].abs().max() > 0


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).detach())


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.first(x)
        return y + x.mul_(2)


def square(out: Tensor, _: object) -> Tensor:
    return out.square().sum()


REFUSALS = {
    "no data": (lambda: fadapt.init(mlp(), fadapt.LoRAGA(r=1)), "starts from data"),
    "no loss": (
        lambda: fadapt.init(mlp(), fadapt.LoRAGA(r=1), [reals(9, 8)]),
        r"batch 0: a method starts from the gradient of the loss.*loss_fn\(output, batch\)",
    ),
    "no graph": (
        lambda: fadapt.init(
            mlp(), fadapt.LoRAGA(r=1), [reals(9, 8)], loss_fn=lambda out, _: out.detach().sum()
        ),
        "without detaching it",
    ),
    "few tokens": (
        lambda: fadapt.init(mlp(), fadapt.LoRAGA(r=2), [reals(3, 8)], loss_fn=square),
        r"has 3 directions, fewer than the 2 r = 4",
    ),
    "unreached": (
        lambda: fadapt.init(Detached(), fadapt.LoRAGA(r=1), [reals(9, 6)], loss_fn=square),
        r"first\.weight: 0 batches were counted",
    ),
    "written": (
        lambda: fadapt.init(Overwriting(), fadapt.LoRAGA(r=1), [reals(9, 6)], loss_fn=square),
        "has written into the layer's input",
    ),
    "not finite": (
        lambda: fadapt.init(
            mlp(),
            fadapt.LoRAGA(r=1),
            [reals(9, 8)],
            loss_fn=lambda out, _: (out * 1e38).exp().sum(),
        ),
        "1 of 1 batches hold NaN or Inf",
    ),
    "other statistics": (
        lambda: fadapt.init(
            model := mlp(),
            fadapt.LoRAGA(r=1),
            fadapt.observe(model, fadapt.EVA(r=1), [reals(9, 8)]),
        ),
        "Sum.* of the gradients was not observed",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name) -> None:
    call, reason = REFUSALS[name]
    with pytest.raises(CalibrationError, match=reason):
        call()


def test_the_increment_is_a_lora_of_twice_the_rank() -> None:
    model, x = mlp(widths=(10, 8)).double(), reals(30, 10).double()
    params = perturb(fadapt.init(model, {"0": fadapt.LoRAGA(r=2)}, [x], loss_fn=square))
    lora = fadapt.as_lora(model, params)
    assert lora["0.weight"].method.r == 4
    torch.testing.assert_close(fadapt.apply(model, lora, x), fadapt.apply(model, params, x))
