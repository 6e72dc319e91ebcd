"""bfloat16 adapters learn as float32 ones do: no method's updates round away.

Parameters stored near 1 (gates, magnitudes, directions) lose steps of 1e-3 in bfloat16, whose
spacing there is 2^-8. Increments that start at 0 do not.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fadapt

from .test_laws import CALIB, NAMED, NORMS, ROWS

STEPS, LR = 200, 1e-3
TOLERANCE = 0.15  # of the float32 improvement


def improvement(row: str, dtype: torch.dtype, calib) -> float:
    """How far 200 AdamW steps lower the loss, as a part of the loss at the start."""
    rng = torch.Generator().manual_seed(0)
    act = nn.Sequential(nn.LayerNorm(24), nn.Tanh()) if row in NORMS else nn.Tanh()
    model = nn.Sequential(nn.Linear(16, 24), act, nn.Linear(24, 16))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=rng)
    x = torch.randn(64, 16, generator=rng)
    with torch.no_grad():
        # A teacher that every method can approach: turned and rescaled hidden units.
        gain = 1 + 0.5 * torch.randn(24, generator=rng)
        target = model[2](gain * model[1](model[0](x * 1.5))) * 0.7
    config = fadapt.Config({NAMED.get(row, ""): ROWS[row]}, dtype=dtype)
    params = fadapt.init(model, config, calib, loss_fn=lambda out, _: out.square().mean())
    assert all(t.dtype == dtype for t in fadapt.trainable(params))
    optimiser = torch.optim.AdamW(fadapt.trainable(params), lr=LR)
    losses = []
    for _ in range(STEPS + 1):
        optimiser.zero_grad()
        loss = fadapt.run(model, params, x, lambda out, _: (out - target).square().mean())
        loss.backward()
        losses.append(loss.item())
        optimiser.step()
        fadapt.project(params)
    return 1 - losses[-1] / losses[0]


@pytest.mark.parametrize("row", [r for r in ROWS if r != "SSteer"])
def test_bf16_adapters_learn_like_fp32(row) -> None:
    torch.manual_seed(0)
    calib = CALIB.get(row)
    calib = [torch.randn(64, 16)] if calib else None
    wide = improvement(row, torch.float32, calib)
    narrow = improvement(row, torch.bfloat16, calib)
    assert wide > 1e-4, f"{row} does not learn in float32: {wide}"
    assert abs(narrow - wide) <= TOLERANCE * wide, f"bf16 {narrow:.4f} against fp32 {wide:.4f}"
