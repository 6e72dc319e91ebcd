"""What does the whole table of MetaMathQA to GSM8K cost, as one sweep and one by one with PEFT?

Qwen3-0.6B's shape with random weights, the recipe's batch (4 rows, r=32 on q_proj and v_proj),
lengths drawn like MetaMathQA's: log-normal, 210 tokens in the mean (PEFT's runs count 4,198,051
tokens in 20,000 rows), at most 768, padded to the longest row. In one process, on the same batches.
PEFT's step is measured for each of its methods, as its users run it (eager, autocast) and with
--compile-peft compiled, fadapt's for sweeps of 16 and 48 trials of mixed methods. Printed: seconds
a trial and step, in the mean over the batches, and hours of 5,000 steps.

    python examples/benchmarks/table_cost.py                                    eager, one GPU
    python examples/benchmarks/table_cost.py --multiple 128 \\
        --compile '{"regional": true, "mode": "reduce-overhead"}'               layers compiled once
    python examples/benchmarks/table_cost.py --launches --device cpu --hidden 128 \\
        --vocab 512 --dtype float32                                             why eager is slow
    python examples/benchmarks/table_cost.py --device cpu --hidden 128 --layers 2 --vocab 512 \\
        --dtype float32 --steps 4 --warmup 2 --trials 4                         a rehearsal

A sweep's methods share the base and its kernels, but each method launches its own small ones, at
every site, forward and backward: --launches counts them. Eagerly, a mixed sweep waits for the host
that launches them, whatever the number of trials. Compiled, they are fused, and a recorded step
launches nothing. Each length that is compiled and recorded takes memory and time, so there the
sweep's batches are padded to a --multiple; PEFT's are not.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
import torch.nn.functional as F
from common import milliseconds, qwen3, training_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fadapt

TARGETS, TABLE_STEPS = ["q_proj", "v_proj"], 5000


Batch = dict[str, Tensor]


def batches(count: int, rows: int, vocab: int, device: str) -> list[Batch]:
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


def padded(batch: Batch, multiple: int) -> Batch:
    """The batch with a length that the number divides."""
    more = -batch["input_ids"].shape[1] % multiple
    fill = {"labels": -100}
    return {k: F.pad(v, (0, more), value=fill.get(k, 0)) for k, v in batch.items()}


def with_warmup(data: list[Batch], rounds: int) -> list[Batch]:
    """The batches after so many rounds over one batch of each length."""
    lengths = {b["input_ids"].shape[1]: b for b in data}
    return [*list(lengths.values()) * rounds, *data]


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


class Launches(TorchDispatchMode):
    """Counts the operations that compute something, each about one kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches(model: Any, data: Batch, known: list[fadapt.Method]) -> None:
    """Prints the operations of a step: of stacks of one method, and of all of them."""

    def count(methods: list[fadapt.Method]) -> tuple[int, int]:
        members = [fadapt.init(model, {"q_proj|v_proj": m}) for m in methods]
        stack = fadapt.stack(members)
        loss = fadapt.run(model, stack, data, verify=False)
        torch.autograd.grad(loss.sum(), stack.trainable(), allow_unused=True)
        with Launches() as seen:
            loss = fadapt.run(model, stack, data, verify=False)
            torch.autograd.grad(loss.sum(), stack.trainable(), allow_unused=True)
        return seen.count, len(stack.groups)

    def line(name: str, methods: list[fadapt.Method]) -> None:
        operations, groups = count(methods)
        print(f"{name:20} {groups:3} groups {operations:7,} operations a step")

    for method in known:
        line(f"2 {type(method).__name__}", [method] * 2)
    line("16 mixed", known)
    line("48 mixed", known * 3)


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
    add("--warmup", type=int, default=4, help="steps; compiled, of each length")
    add("--trials", default="16,48")
    add("--compile", type=json.loads, default=False, help="of the sweep, JSON: true or options")
    add("--multiple", type=int, default=1, help="which divides the lengths of the sweep's batches")
    add("--compile-peft", action="store_true", help="PEFT's steps compiled, too")
    add("--no-peft", action="store_true", help="measure sweeps only")
    add("--launches", action="store_true", help="count operations, and measure nothing")
    args = parser.parse_args()
    data = batches(args.steps, args.rows, args.vocab, args.device)
    mean = statistics.mean(int(b["attention_mask"].sum()) for b in data)
    cards = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(
        f"{cards}, torch {torch.__version__}, peft {peft.__version__}, {args.hidden} wide, "
        f"{args.layers} layers, base {args.dtype}, {args.rows} rows, {mean:.0f} tokens a step",
        flush=True,
    )
    known = methods(args.r, args.width)
    if args.launches:
        launches(fresh(args), data[0], known)
        return
    average = math.nan if args.no_peft else measure_peft(args, data, compiled=False)
    if args.compile_peft:
        measure_peft(args, data, compiled=True)
    measure_sweeps(args, data, known, average)


def fresh(args: argparse.Namespace) -> Any:
    """The base."""
    return qwen3(args.hidden, args.layers, args.vocab, args.device, args.dtype)


def measure_peft(args: argparse.Namespace, data: list[Batch], compiled: bool) -> float:
    """Seconds of a step, the mean over PEFT's methods and the batches."""
    low, name = args.dtype != torch.float32, "PEFT compiled" if compiled else "PEFT"
    alone: dict[str, float] = {}
    for method, config in peers(args.r).items():
        model = peft.get_peft_model(fresh(args), config)
        leaves = [p for p in model.parameters() if p.requires_grad]
        call: Any = torch.compile(model, dynamic=True) if compiled else model
        current: dict[str, Tensor] = {}

        def loss(call: Any = call, current: dict = current) -> Tensor:
            with torch.autocast(args.device, args.dtype) if low else contextlib.nullcontext():
                return call(**current).loss

        step: Callable[[], Tensor] = training_step(loss, leaves)
        times = []
        for batch in [*data[: args.warmup], *data]:
            current.update(batch)
            times.append(milliseconds(step))
        alone[method] = statistics.mean(times[args.warmup :]) / 1e3
        hours = alone[method] * TABLE_STEPS / 3600
        print(f"{name} {method:8} {1e3 * alone[method]:8.1f} ms a step, {hours:5.2f} h", flush=True)
        del model, leaves, call, step, loss
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    average = statistics.mean(alone.values())
    print(f"{name} {'mean':8} {1e3 * average:8.1f} ms a step", flush=True)
    return average


def measure_sweeps(
    args: argparse.Namespace, data: list[Batch], known: list[fadapt.Method], alone: float
) -> None:
    """Prints what sweeps cost.

    Args:
        alone: seconds of PEFT's step.
    """
    model = fresh(args)
    given = with_warmup([padded(b, args.multiple) for b in data], args.warmup)
    if args.compile is False:
        given = given[-len(data) - args.warmup :]
    for count in map(int, args.trials.split(",")):
        trials = [
            fadapt.Trial(
                fadapt.Config({"q_proj|v_proj": known[i % len(known)]}, seed=i), lr=1e-4, clip=1.0
            )
            for i in range(count)
        ]
        timed = Timed(given)
        begin = time.perf_counter()
        report = fadapt.sweep(
            model, trials, timed, steps=len(given), log_every=len(given), compile=args.compile
        )
        end = time.perf_counter()
        spans = [b - a for a, b in zip(timed.times, timed.times[1:], strict=False)]
        # Of every measured batch but the last.
        seconds = statistics.mean(spans[1 - len(data) :])
        each = seconds / count
        hours, peft_hours = (s * count * TABLE_STEPS / 3600 for s in (each, alone))
        ready = timed.times[-len(data)] - begin
        print(
            f"sweep of {count}: {1e3 * seconds:8.1f} ms a step, {1e3 * each:.1f} ms a trial and "
            f"step, at most {report.chunk} to a pass, {ready:.0f} s until warm; "
            f"{TABLE_STEPS} steps: {hours:.2f} h, PEFT one by one {peft_hours:.1f} h, "
            f"{alone / each:.1f}x; {end - begin:.0f} s measured",
            flush=True,
        )
        ended = {r.status for r in report.results}
        print(f"    losses {min(r.loss for r in report.results):.3f} to "
              f"{max(r.loss for r in report.results):.3f}, {ended}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
