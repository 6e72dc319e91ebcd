"""What does the whole table of MetaMathQA to GSM8K cost, as one sweep and one by one with PEFT?

Qwen3-0.6B's shape with random weights, the recipe's batch (4 rows, r=32 on q_proj and v_proj),
lengths drawn like MetaMathQA's: log-normal, 210 tokens in the mean (PEFT's runs count 4,198,051
tokens in 20,000 rows), at most 768, padded to the longest row. Both sides eager, in one process, on
the same batches. PEFT's step is measured for each of its methods, fadapt's for sweeps of 16 and 48
trials of mixed methods. Printed: seconds a trial and step, and hours of 5,000 steps.

    python examples/benchmarks/table_cost.py                                    one GPU
    python examples/benchmarks/table_cost.py --device cpu --hidden 128 --layers 2 --vocab 512 \\
        --dtype float32 --steps 4 --warmup 2 --trials 4                         a rehearsal
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from common import milliseconds, qwen3, training_step
from torch import Tensor

import fadapt

TARGETS, TABLE_STEPS = ["q_proj", "v_proj"], 5000


def batches(count: int, rows: int, vocab: int, device: str) -> list[dict[str, Tensor]]:
    """Padded batches of random tokens, of MetaMathQA's lengths."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        # exp(5.24 + 0.46² / 2) = 210.
        lengths = torch.exp(5.24 + 0.46 * torch.randn(rows, generator=rng)).long().clamp(16, 768)
        longest = int(lengths.max())
        ids = torch.randint(0, vocab, (rows, longest), generator=rng)
        mask = (torch.arange(longest) < lengths[:, None]).long()
        labels = ids.masked_fill(mask == 0, -100)
        batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
        found.append({k: v.to(device) for k, v in batch.items()})
    return found


def methods(r: int, width: int) -> list[fadapt.Method]:
    """Sixteen."""
    return [
        fadapt.LoRA(r=r, alpha=2.0 * r),
        fadapt.RsLoRA(r=r, alpha=2.0 * r),
        fadapt.PiSSA(r=r),
        fadapt.DoRA(r=r, alpha=2.0 * r),
        fadapt.DeLoRA(r=r),
        fadapt.HRA(r=r),
        fadapt.IA3(),
        fadapt.IA3FF(),
        fadapt.RoAd(),
        fadapt.OFT(block_size=32),
        fadapt.SSVD(),
        fadapt.AntiPaSTO(r=width),
        fadapt.AntiPaSTOAblate(r=width),
        fadapt.AntiPaSTOArrow(r=width),
        fadapt.AntiPaSTODPLR(r=width),
        fadapt.AntiPaSTORotation(r=width),
    ]


def peers(r: int) -> dict[str, Any]:
    """PEFT's configurations of the methods that it has."""
    common: dict[str, Any] = dict(target_modules=TARGETS)
    lora: dict[str, Any] = dict(r=r, lora_alpha=2 * r, **common)
    return {
        "LoRA": peft.LoraConfig(**lora),
        "RsLoRA": peft.LoraConfig(use_rslora=True, **lora),
        "DoRA": peft.LoraConfig(use_dora=True, **lora),
        "HRA": peft.HRAConfig(r=r, **common),
        "IA3": peft.IA3Config(feedforward_modules=[], **common),
        "OFT": peft.OFTConfig(r=0, oft_block_size=32, **common),
    }


class Timed(Sequence):
    """Batches that note when each is asked for."""

    def __init__(self, batches: list[dict[str, Tensor]]):
        self.batches, self.times = batches, []

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return self.batches[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda")
    add("--dtype", type=lambda s: getattr(torch, s), default=torch.bfloat16)
    add("--hidden", type=int, default=1024)
    add("--layers", type=int, default=28)
    add("--vocab", type=int, default=151936)
    add("--rows", type=int, default=4)
    add("--r", type=int, default=32)
    add("--width", type=int, default=128, help="singular directions of AntiPaSTO's family")
    add("--steps", type=int, default=12)
    add("--warmup", type=int, default=3)
    add("--trials", default="16,48")
    args = parser.parse_args()
    data = batches(args.steps + args.warmup, args.rows, args.vocab, args.device)
    mean = statistics.mean(int(b["attention_mask"].sum()) for b in data)
    cards = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(
        f"{cards}, torch {torch.__version__}, peft {peft.__version__}, {args.hidden} wide, "
        f"{args.layers} layers, base {args.dtype}, {args.rows} rows, {mean:.0f} tokens a step",
        flush=True,
    )

    def fresh() -> Any:
        return qwen3(args.hidden, args.layers, args.vocab, args.device, args.dtype)

    low = args.dtype != torch.float32
    alone: dict[str, float] = {}
    for name, config in peers(args.r).items():
        model = peft.get_peft_model(fresh(), config)
        leaves = [p for p in model.parameters() if p.requires_grad]
        current: dict[str, Tensor] = {}

        def loss(model: Any = model, current: dict = current) -> Tensor:
            with torch.autocast(args.device, args.dtype) if low else contextlib.nullcontext():
                return model(**current).loss

        step: Callable[[], Tensor] = training_step(loss, leaves)
        times = []
        for batch in data:
            current.update(batch)
            times.append(milliseconds(step))
        alone[name] = statistics.median(times[args.warmup :]) / 1e3
        hours = alone[name] * TABLE_STEPS / 3600
        print(f"PEFT {name:10} {1e3 * alone[name]:8.1f} ms a step, {hours:5.2f} h", flush=True)
        del model, leaves, step, loss
        gc.collect()
        torch.cuda.empty_cache()
    average = statistics.mean(alone.values())

    model, known = fresh(), methods(args.r, args.width)
    for count in map(int, args.trials.split(",")):
        trials = [
            fadapt.Trial(
                fadapt.Config({"q_proj|v_proj": known[i % len(known)]}, seed=i), lr=1e-4, clip=1.0
            )
            for i in range(count)
        ]
        timed = Timed(data)
        begin = time.perf_counter()
        report = fadapt.sweep(model, trials, timed, steps=len(data), log_every=len(data))
        end = time.perf_counter()
        spans = [b - a for a, b in zip(timed.times, timed.times[1:], strict=False)]
        seconds = statistics.median(spans[args.warmup :])
        each = seconds / count
        hours, peft_hours = (s * count * TABLE_STEPS / 3600 for s in (each, average))
        print(
            f"sweep of {count}: {1e3 * seconds:8.1f} ms a step, {1e3 * each:.1f} ms a trial and "
            f"step, at most {report.chunk} to a pass, {timed.times[0] - begin:.0f} s to begin; "
            f"{TABLE_STEPS} steps: {hours:.2f} h, PEFT one by one {peft_hours:.1f} h, "
            f"{average / each:.1f}x; {end - begin:.0f} s measured",
            flush=True,
        )
        ended = {r.status for r in report.results}
        print(f"    losses {min(r.loss for r in report.results):.3f} to "
              f"{max(r.loss for r in report.results):.3f}, {ended}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
