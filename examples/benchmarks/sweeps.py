"""Is one fold of N adapters faster than N runs of PEFT, one after the other?

B0 is PEFT as its users run it (eager; fp32 adapters and autocast over a bf16 base). B1 is PEFT at
its best (adapters in the base's dtype, torch.compile). Alternating in one process. A run of one
adapter at a time is N times as long as its step; the peak is what a process with one run alone
would hold.

    python examples/benchmarks/sweeps.py                            C1 on the CPU
    python examples/benchmarks/sweeps.py --hidden 512 --tokens 512 --adapters 16      C2
    python examples/benchmarks/sweeps.py --device cuda --hidden 1024 --layers 28 \\
        --vocab 151936 --tokens 512 --adapters 16 --dtype bfloat16 --compile          G1
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from common import TARGETS, alternate, gradient_norm, peak_bytes, qwen3, tokens, training_step

import fadapt


def mixed(n: int) -> list[fadapt.Method]:
    """G6: ranks 4 to 64 and three methods in one stack."""
    kinds = [fadapt.LoRA(r=r) for r in (4, 8, 16, 32, 64)]
    kinds += [fadapt.DoRA(r=16), fadapt.IA3()]
    return sorted((kinds[i % len(kinds)] for i in range(n)), key=lambda m: type(m).__name__)


def folded(
    model: torch.nn.Module, methods: list[fadapt.Method], batch: dict, args: argparse.Namespace
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A step of all adapters; each has its own rows."""
    members = [
        fadapt.init(model, fadapt.Config({TARGETS: m}, seed=i, dtype=args.adapter_dtype))
        for i, m in enumerate(methods)
    ]
    alone = len(members) == 1
    params = members[0] if alone else fadapt.stack(members)
    parts = batch if alone else {k: torch.stack([v] * len(methods)) for k, v in batch.items()}

    def losses(params: fadapt.Params | fadapt.Stack) -> torch.Tensor:
        return fadapt.run(model, params, parts, per_adapter=not alone)

    if args.compile:
        mode = "reduce-overhead" if args.graphs else None
        losses = torch.compile(losses, fullgraph=True, mode=mode)
    leaves = fadapt.trainable(params)
    return training_step(lambda: losses(params), leaves), leaves


def peft_step(args: argparse.Namespace, batch: dict, best: bool) -> tuple[Callable, list]:
    config = peft.LoraConfig(r=args.r, lora_alpha=16, target_modules=TARGETS.split("|"))
    base = qwen3(args.hidden, args.layers, args.vocab, args.device, args.dtype)
    model: Any = peft.get_peft_model(base, config, autocast_adapter_dtype=not best)
    leaves = [p for p in model.parameters() if p.requires_grad]
    call = torch.compile(model) if best and args.compile else model
    low = args.dtype != torch.float32 and not best

    def loss() -> torch.Tensor:
        with torch.autocast(args.device, args.dtype) if low else contextlib.nullcontext():
            return call(**batch).loss

    return training_step(loss, leaves), leaves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = dict(
        hidden=128,
        layers=3,
        vocab=256,
        tokens=16,
        rows=1,
        r=8,
        adapters=16,
        rounds=7,
        peers=1,
        single=1,
    )
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=lambda s: getattr(torch, s), default=torch.float32)
    parser.add_argument("--adapter-dtype", type=lambda s: getattr(torch, s), default=None)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs for ours")
    parser.add_argument("--mixed", action="store_true", help="also a stack of ranks and methods")
    args = parser.parse_args()
    n, per_adapter = args.adapters, args.rows * args.tokens
    batch = tokens(args.rows, args.tokens, args.vocab, args.device)
    model = qwen3(args.hidden, args.layers, args.vocab, args.device, args.dtype)
    runs: dict[str, tuple[int, Callable, list]] = {}
    if args.peers:
        runs["B0 PEFT"] = (1, *peft_step(args, batch, best=False))
        runs["B1 PEFT best"] = (1, *peft_step(args, batch, best=True))
    if args.single:
        runs["fadapt x 1"] = (1, *folded(model, [fadapt.LoRA(r=args.r)], batch, args))
    runs[f"fadapt x {n}"] = (n, *folded(model, [fadapt.LoRA(r=args.r)] * n, batch, args))
    if args.mixed:
        runs[f"fadapt x {n} mixed"] = (n, *folded(model, mixed(n), batch, args))
    first = {}
    for name, (_, step, _) in runs.items():
        start = time.perf_counter()
        first[name] = float(step().mean())
        print(f"first step of {name}: {time.perf_counter() - start:.0f} s", flush=True)
    ms = alternate({name: step for name, (_, step, _) in runs.items()}, args.rounds)
    print(
        f"{args.hidden} wide, {args.layers} layers, r={args.r}, {args.device}, base {args.dtype}, "
        f"adapters {args.adapter_dtype or 'float32'}, compiled {args.compile}, "
        f"graphs {args.graphs}, torch {torch.__version__}, peft {peft.__version__}"
    )
    print(
        f"{'run':20}{'tokens/adapter':>15}{'ms/step':>9}{'ms/adapter':>11}{'k tok/s':>9}"
        f"{'x B0':>7}{'x B1':>7}{'peak MiB':>10}{'/ adapter':>11}{'loss first':>12}{'last':>8}"
        f"{'grad norm':>11}"
    )
    base = sum(t.nbytes for t in model.parameters())
    each = {name: ms[name] / count for name, (count, _, _) in runs.items()}
    for name, (_, step, leaves) in runs.items():
        last = float(step().mean())
        ratios = "".join(
            f"{each[b] / each[name]:7.2f}" if b in each else f"{'-':>7}"
            for b in ("B0 PEFT", "B1 PEFT best")
        )
        # The base, the adapters with both moments of AdamW, and what a step needs beside them; a
        # captured graph keeps the last for good, so that no call shows it.
        peaks = ("-", "-")
        if not (args.compile if args.device == "cpu" else args.graphs and "fadapt" in name):
            peak = base + 3 * sum(t.nbytes for t in leaves) + peak_bytes(step)
            peaks = (f"{peak / 2**20:.1f}", f"{peak / 2**20 / runs[name][0]:.1f}")
        print(
            f"{name:20}{per_adapter:15}{ms[name]:9.1f}{each[name]:11.2f}"
            f"{per_adapter / each[name]:9.1f}{ratios}{peaks[0]:>10}{peaks[1]:>11}"
            f"{first[name]:12.4f}{last:8.4f}{gradient_norm(leaves):11.3g}"
        )


if __name__ == "__main__":
    main()
