"""A few steps that prove a method alive before hours are spent on it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import fadapt


def probe(
    name: str, model: Any, config: Any, batches: list[dict], loss_fn: Any, lr: float, steps: int = 4
) -> dict[str, float]:
    """Trains a few steps and checks what has to be true.

    Returns:
        The gradient norm of the first steps, how far the leaves moved, how much the logits of the
        first batch changed, and the difference after saving and loading (0).

    Raises:
        AssertionError: which of it is not so.
    """
    device = next(model.parameters()).device
    batches = [{k: v.to(device) for k, v in b.items()} for b in batches]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    params = fadapt.init(model, config, batches)
    leaves = fadapt.trainable(params)
    start = [t.detach().clone() for t in leaves]
    inputs = {k: v for k, v in batches[0].items() if k != "labels"}
    with torch.no_grad():
        logits = fadapt.apply(model, params, **inputs).logits
        assert torch.equal(logits, model(**inputs).logits), f"{name}: the start is not the base"
    optimizer = torch.optim.AdamW(leaves, lr)
    norm = 0.0
    for i in range(steps):
        optimizer.zero_grad()
        fadapt.run(model, params, batches[i % len(batches)], loss_fn).backward()
        norm = max(
            norm,
            float(sum(t.grad.float().square().sum() for t in leaves if t.grad is not None)) ** 0.5,
        )
        optimizer.step()
        fadapt.project(params)
    assert norm > 0, f"{name}: no gradient in {steps} steps"
    moved = (
        float(
            sum((t.detach() - s).float().square().sum() for t, s in zip(leaves, start, strict=True))
        )
        ** 0.5
    )
    assert moved > 0, f"{name}: no leaf moved"
    leaked = [n for n, p in model.named_parameters() if p.grad is not None]
    assert not leaked, f"{name}: a gradient reached the base at {leaked[:1]}"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), (
        f"{name}: base changed"
    )
    with torch.no_grad():
        trained = fadapt.apply(model, params, **inputs).logits
        changed = float((trained - logits).abs().max())
        assert changed > 0, f"{name}: training did not change the logits"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            fadapt.save(params, path)
            again = fadapt.load(path, model)
        difference = float((fadapt.apply(model, again, **inputs).logits - trained).abs().max())
        assert difference == 0, f"{name}: logits differ by {difference} after save and load"
    return {"gradient": norm, "moved": moved, "changed": changed, "reloaded": difference}
