"""What a method costs on this model: time, memory, added arithmetic, and where it can go."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import fadapt


def _flops(_: Any, left: Any, right: Any, **__: Any) -> int:
    """Of the product of matrices of these shapes."""
    return 2 * math.prod(left) * right[-1]


IN_PLACE: dict[Any, Any] = {torch.ops.aten.addmm_: _flops, torch.ops.aten.baddbmm_: _flops}
"""Products that add to what is there, which torch's counter leaves out."""


@dataclass
class Cost:
    """One method's costs, each measured alone.

    Attributes:
        parameters: trainable values.
        macs: multiply-adds of products that the adapter adds to a token's forward pass.
        forward_ms: of one training batch.
        backward_ms: of the same.
        init_s: seconds of fadapt.init without the calibration pass.
        calibration_s: seconds of the calibration pass, 0 where the method needs none.
        peak_mb: of one step on a GPU, else None.
        quantized: of "4", "8" what the method ran over, or "" where bitsandbytes is missing.
        lora_rank: of the exact LoRA that equals it, or "no".
        file_bytes: of the saved adapter's tensors.
    """

    parameters: int
    macs: float
    forward_ms: float
    backward_ms: float
    init_s: float
    calibration_s: float
    peak_mb: float | None
    quantized: str
    lora_rank: str
    file_bytes: int


def measure(
    model: Any, config: Any, batch: dict, loss_fn: Any, calib: list, rounds: int = 3
) -> Cost:
    """The costs of one method."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    try:
        params, calibrated = fadapt.init(model, config), 0.0
    except fadapt.CalibrationError:
        stats = fadapt.observe(model, config, calib, loss_fn=loss_fn)
        calibrated = now() - start
        start = now()
        params = fadapt.init(model, config, stats)
    seconds = now() - start

    batch = {k: v.to(device) for k, v in batch.items()}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    forward, backward = [], []
    for i in range(rounds + 1):
        begin = now()
        loss = fadapt.run(model, params, batch, loss_fn)
        middle = now()
        loss.backward()
        end = now()
        if i:
            forward.append(1e3 * (middle - begin))
            backward.append(1e3 * (end - middle))
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None

    def flops(run: Any) -> int:
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter, torch.no_grad():
            run()
        return counter.get_total_flops()

    inputs = {k: v for k, v in batch.items() if k != "labels"}
    added = flops(lambda: fadapt.apply(model, params, **inputs)) - flops(lambda: model(**inputs))
    tokens = batch["input_ids"].numel()
    leaves = [t for a in params.values() for t in a.leaves.values()]
    return Cost(
        parameters=sum(t.numel() for t in fadapt.trainable(params)),
        macs=max(added, 0) / 2 / tokens,
        forward_ms=median(forward),
        backward_ms=median(backward),
        init_s=seconds,
        calibration_s=calibrated,
        peak_mb=peak,
        quantized=_quantized(config),
        lora_rank=_lora_rank(model, params),
        file_bytes=sum(t.numel() * t.element_size() for t in leaves),
    )


def _quantized(config: Any) -> str:
    """Over which layers of bitsandbytes the method runs, beside an embedding and a norm."""
    try:
        import bitsandbytes as bnb  # type: ignore[import-untyped]
    except ImportError:
        return ""
    method = (
        config.rules
        if isinstance(config.rules, fadapt.Method)
        else next(iter(config.rules.values()))
    )
    device, found = "cuda" if torch.cuda.is_available() else "cpu", ""
    for bits, make in (
        ("4", lambda: bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)),
        ("8", lambda: bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)),
    ):
        torch.manual_seed(0)
        around = torch.nn.Embedding(256, 64), make(), torch.nn.LayerNorm(64)
        model = torch.nn.Sequential(*around).requires_grad_(False).to(device).eval()
        ids = torch.arange(256, device=device)
        calib: Any = [ids] if method.statistic is not None else None
        try:
            # A gradient to start from: a loss that is at no extremum.
            def loss(y: Any, _: Any) -> Any:
                return (y * torch.linspace(-1, 1, 64, device=device)).square().mean()

            params = fadapt.init(model, method, calib, loss_fn=loss)
            fadapt.run(model, params, ids, loss).backward()
            found += bits
        except fadapt.FadaptError:
            pass
        except Exception as error:  # for which the rest of the table is not given up
            print(f"{method} over {bits} bits: {error!r}", file=sys.stderr)
    return found or "no"


def _lora_rank(model: Any, params: Any) -> str:
    """The rank of the LoRA that is exactly this adapter."""
    try:
        low = fadapt.as_lora(model, params)
    except fadapt.FadaptError:
        return "no"
    return str(max(a.method.r for a in low.values()))  # type: ignore[attr-defined]
