"""Is one fold of N adapters faster than N runs of PEFT, one after the other?

B0 is PEFT as its users run it (eager; fp32 adapters and autocast over a bf16 base). B1 is PEFT at
its best (adapters in the base's dtype, torch.compile). Alternating in one process. A run of one
adapter at a time is N times as long as its step; the peak is what a process with one run alone
would hold. "run" is fadapt.run in a plain loop like PEFT's; "fit" is fadapt.fit, with its clipping,
guards and records, its steps in turn with PEFT's. All is compiled before anything is measured, and
several of these benchmarks can compile side by side (--processes) and then measure in turn.

    python examples/benchmarks/sweeps.py --compile                        C1 on the CPU
    python examples/benchmarks/sweeps.py --hidden 512 --tokens 512        C2
    python examples/benchmarks/sweeps.py --device cuda --hidden 1024 --layers 28 \\
        --vocab 151936 --tokens 512 --r 16 --dtype bfloat16 --adapter-dtype bfloat16 \\
        --compile --plain 0 --attention maskless --stacks n               G1, G5; with
    --rows 4 G2; --stacks 1 G3; --stacks n,mixed G6; --memory-budget 0.75 for G5 at its best
    --hidden 4096 --layers 4 --adapters 4 --rows 4 --stacks 1,n           wide; without --compile
    and with --nf4, QLoRA
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import torch._functorch.config as functorch  # the documented place of activation_memory_budget
from common import (
    READY,
    TARGETS,
    Ticks,
    alternate,
    announce,
    four_bit,
    gradient_norm,
    peak_bytes,
    qwen3,
    tokens,
    training_step,
    turn,
)

import fadapt


def mixed(n: int) -> list[fadapt.Method]:
    """G6: ranks 4 to 64 and three methods in one stack."""
    kinds = [fadapt.LoRA(r=r) for r in (4, 8, 16, 32, 64)]
    kinds += [fadapt.DoRA(r=16), fadapt.IA3()]
    return sorted((kinds[i % len(kinds)] for i in range(n)), key=lambda m: type(m).__name__)


def base_model(args: argparse.Namespace) -> torch.nn.Module:
    model = qwen3(args.hidden, args.layers, args.vocab, args.device, args.dtype, args.attention)
    return four_bit(model) if args.nf4 else model


def start(
    model: torch.nn.Module, methods: list[fadapt.Method], batch: dict, args: argparse.Namespace
) -> tuple[fadapt.Params | fadapt.Stack, dict]:
    """Fresh adapters, and the batch with rows for each."""
    members = [
        fadapt.init(model, fadapt.Config({TARGETS: m}, seed=i, dtype=args.adapter_dtype))
        for i, m in enumerate(methods)
    ]
    if len(members) == 1:
        return members[0], batch
    return fadapt.stack(members), {k: torch.stack([v] * len(methods)) for k, v in batch.items()}


def folded(
    model: torch.nn.Module, methods: list[fadapt.Method], batch: dict, args: argparse.Namespace
) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A step of all adapters in a plain loop; each has its own rows."""
    params, parts = start(model, methods, batch, args)

    def losses(params: fadapt.Params | fadapt.Stack) -> torch.Tensor:
        return fadapt.run(model, params, parts, per_adapter=len(methods) > 1)

    if args.compile:
        losses = torch.compile(losses, fullgraph=True)
    leaves = fadapt.trainable(params)
    return training_step(lambda: losses(params), leaves), leaves


@torch.no_grad()
def proof_cost(
    model: torch.nn.Module, methods: list[fadapt.Method], batch: dict, args: argparse.Namespace
) -> tuple[float, float, float]:
    """Milliseconds of the proof on the first batch, of asking for it again, and of a forward."""
    params, parts = start(model, methods, batch, args)

    def ms(verify: bool) -> float:
        begin = time.perf_counter()
        fadapt.run(model, params, parts, per_adapter=True, verify=verify).tolist()
        return 1e3 * (time.perf_counter() - begin)

    ms(False)
    first = ms(True)
    without = sorted(ms(False) for _ in range(args.rounds))[args.rounds // 2]
    again = sorted(ms(True) for _ in range(args.rounds))[args.rounds // 2]
    return first - without, again - without, without


def fitted(
    model: torch.nn.Module,
    methods: list[fadapt.Method],
    batch: dict,
    args: argparse.Namespace,
    when_ready: Callable[[], None],
    peers: dict[str, Callable],
) -> dict[str, Any]:
    """The same by fadapt.fit: milliseconds of steps, first and last loss, gradient norm, peak."""
    params, parts = start(model, methods, batch, args)
    several, cuda = len(methods) > 1, args.device == "cuda"
    options: dict[str, Any] = {"per_adapter": True} if several else {}
    if args.compile:
        options["compile"] = {"mode": "reduce-overhead"} if cuda else True
        if args.regional:
            options["compile"] = {"regional": True, **(options["compile"] if cuda else {})}
    if args.options:
        options["compile"] = json.loads(args.options)
    held = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    peak = float("nan")

    def ready() -> None:
        nonlocal peak
        if cuda:
            peak = torch.cuda.max_memory_allocated() - held + bytes_of(model.parameters())
        when_ready()

    ticks, steps = Ticks(parts, ready, peers), args.rounds + READY + 1
    trained = fadapt.fit(model, params, ticks, steps=steps, log_every=steps, **options)
    # One by one: as it is, not compiled, the stack takes several times its memory.
    first, last = (fadapt.unstack(p) if several else [p] for p in (params, trained))
    with torch.no_grad():
        before = [fadapt.run(model, p, batch) for p in first]
    after = []
    for p in last:
        loss = fadapt.run(model, p, batch)
        loss.backward()
        after.append(loss.detach())
    leaves = [leaf for p in last for leaf in fadapt.trainable(p)]
    return {
        "ms": ticks.medians(),
        "preparation": ticks.preparation(),
        "first": float(torch.stack(before).mean()),
        "last": float(torch.stack(after).mean()),
        "norm": gradient_norm(leaves),
        "peak": peak,
    }


def print_head(args: argparse.Namespace) -> None:
    print(
        f"{args.hidden} wide, {args.layers} layers, r={args.r}, {args.device}, base {args.dtype}, "
        f"adapters {args.adapter_dtype or 'float32'}, {'nf4, ' if args.nf4 else ''}"
        f"compiled {args.options or ('regionally' if args.regional else args.compile)}, "
        f"attention {args.attention}, memory budget {args.memory_budget}, "
        f"torch {torch.__version__}, peft {peft.__version__}"
    )
    print(
        f"{'run':20}{'tokens/adapter':>15}{'ms/step':>9}{'ms/adapter':>11}{'k tok/s':>9}"
        f"{'x B0':>7}{'x B1':>7}{'peak MiB':>10}{'/ adapter':>11}{'loss first':>12}{'last':>8}"
        f"{'grad norm':>11}"
    )


def bytes_of(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


def peft_step(args: argparse.Namespace, batch: dict, best: bool) -> tuple[Callable, list]:
    config = peft.LoraConfig(r=args.r, lora_alpha=16, target_modules=TARGETS.split("|"))
    base = base_model(args)
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
        plain=1,
    )
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=lambda s: getattr(torch, s), default=torch.float32)
    parser.add_argument("--adapter-dtype", type=lambda s: getattr(torch, s), default=None)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--regional", action="store_true", help="fit: equal layers compiled once")
    parser.add_argument("--options", default="", help="fit: compile=, as JSON, instead")
    parser.add_argument("--nf4", action="store_true", help="a base of bitsandbytes' 4-bit layers")
    parser.add_argument("--attention", default="sdpa", help="sdpa, or maskless (see common.py)")
    parser.add_argument("--memory-budget", type=float, default=1.0, help="of torch.compile")
    parser.add_argument("--stacks", default="1,n", help="which: 1, n, mixed")
    parser.add_argument("--processes", type=int, default=1, help="that compile side by side")
    parser.add_argument(
        "--meet", type=Path, default=Path(tempfile.gettempdir()) / "fadapt-benchmarks"
    )
    args = parser.parse_args()
    functorch.activation_memory_budget = args.memory_budget
    n, per_adapter = args.adapters, args.rows * args.tokens
    batch = tokens(args.rows, args.tokens, args.vocab, args.device)
    model = base_model(args)
    lora = fadapt.LoRA(r=args.r)
    known = {
        "1": ("x 1", [lora]),
        "n": (f"x {n}", [lora] * n),
        "mixed": (f"x {n} mixed", mixed(n)),
    }
    asked = dict(known[k] for k in args.stacks.split(","))
    for name, methods in asked.items():
        if len(methods) > 1:
            once, again, forward = proof_cost(model, methods, batch, args)
            print(
                f"proof of {name}: {once:.1f} ms once, {again:.2f} ms at every later call "
                f"(the forward: {forward:.1f} ms)",
                flush=True,
            )
    runs: dict[str, tuple[int, Callable, list]] = {}
    if args.peers:
        runs["B0 PEFT"] = (1, *peft_step(args, batch, best=False))
        runs["B1 PEFT best"] = (1, *peft_step(args, batch, best=True))
    if args.plain:
        for name, methods in asked.items():
            runs[f"run {name}"] = (len(methods), *folded(model, methods, batch, args))
    first = {}
    for name, (_, step, _) in runs.items():
        begin = time.perf_counter()
        first[name] = float(step().mean())
        print(f"first step of {name}: {time.perf_counter() - begin:.0f} s", flush=True)
    peers = {name: step for name, (_, step, _) in runs.items() if "PEFT" in name}

    def row(
        name: str, count: int, ms: float, others: dict[str, float], peak: float, *numbers: float
    ) -> None:
        each = ms / count
        ratios = "".join(
            f"{others[b] / each:7.2f}" if b in others else f"{'-':>7}"
            for b in ("B0 PEFT", "B1 PEFT best")
        )
        print(
            f"{name:20}{per_adapter:15}{ms:9.1f}{each:11.2f}{per_adapter / each:9.1f}"
            f"{ratios}{peak / 2**20:10.1f}{peak / 2**20 / count:11.1f}"
            + "".join(f"{x:{w}.4g}" for x, w in zip(numbers, (12, 8, 11), strict=True)),
            flush=True,
        )

    def measure_steps() -> None:
        ms = alternate({name: step for name, (_, step, _) in runs.items()}, args.rounds)
        for name, (count, step, leaves) in runs.items():
            last, peak = float(step().mean()), float("nan")
            if args.device == "cuda" or not args.compile:  # whose frames a CPU's count would stop
                # The base, the adapters with both moments of AdamW, and what a step needs.
                peak = bytes_of(model.parameters()) + 3 * bytes_of(leaves) + peak_bytes(step)
            row(name, count, ms[name], ms, peak, first[name], last, gradient_norm(leaves))

    def measure(fits: list[tuple[str, list[fadapt.Method]]]) -> None:
        """Prepares the fits one inside the other; the innermost is measured first."""
        if not fits:
            stack.enter_context(turn(args.meet, args.processes))
            print_head(args)
            measure_steps()
            return
        (name, methods), *others = fits
        found = fitted(model, methods, batch, args, lambda: measure(others), peers)
        numbers = (found[k] for k in ("peak", "first", "last", "norm"))
        row(f"fit {name}", len(methods), found["ms"]["fit"], found["ms"], *numbers)
        print(f"{'':20}prepared in {found['preparation']:.0f} s", flush=True)

    with contextlib.ExitStack() as stack:
        if args.processes > 1:
            stack.callback(announce, args.meet)
        measure(list(asked.items()))


if __name__ == "__main__":
    main()
