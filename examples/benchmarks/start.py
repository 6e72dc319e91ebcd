"""How long until a compiled sweep trains, and are its steps as fast as when all is one graph?

The model compiled as a whole, and with {"regional": True}, one of its equal layers for all. Each in
a process of its own with an empty cache of Inductor's, then once more with the cache it left.

    python examples/benchmarks/start.py
    python examples/benchmarks/start.py --device cuda --hidden 1024 --layers 28 --vocab 151936 \\
        --tokens 512 --r 16 --dtype bfloat16 --adapters 16 [--mixed] [--ways regional]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from common import READY, TARGETS, Ticks, qwen3, tokens
from sweeps import mixed

import fadapt

WAYS = ("whole", "regional")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One sweep, in this process."""
    cuda = args.device == "cuda"
    dtype = getattr(torch, args.dtype)
    attention = "maskless"
    model = qwen3(args.hidden, args.layers, args.vocab, args.device, dtype, attention)
    methods = mixed(args.adapters) if args.mixed else [fadapt.LoRA(r=args.r)] * args.adapters
    trials = [
        fadapt.Trial(fadapt.Config({TARGETS: method}, dtype=dtype), lr=1e-4, seed=i)
        for i, method in enumerate(methods)
    ]
    batch = tokens(1, args.tokens, args.vocab, args.device)
    ends: list[float] = []

    class Noted(Ticks):
        def __getitem__(self, index: int) -> object:
            found = super().__getitem__(index)
            ends.append(time.perf_counter())
            return found

    ticks = Noted(batch, lambda: None, {})
    options: dict[str, object] = {"mode": "reduce-overhead"} if cuda else {"dynamic": False}
    if args.way == "regional":
        options["regional"] = True
    if args.backend:
        options["backend"] = args.backend
    begin = time.perf_counter()
    report = fadapt.sweep(
        model, trials, ticks, steps=READY + args.rounds, compile=options, progress=False,
        verify=False, max_adapters=args.adapters,
    )  # fmt: skip
    first = next(iter(report.losses.values()))
    return {
        "first step s": ends[1] - begin,
        "ready s": ends[READY] - begin,
        "ms": ticks.medians()["fit"],
        "loss first": float(first.mean()),
        "last": float(report.losses[max(report.losses)].mean()),
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = dict(hidden=64, layers=4, vocab=512, tokens=16, r=8, adapters=4, rounds=5)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="", help="of torch.compile, instead of Inductor")
    parser.add_argument("--mixed", action="store_true", help="ranks 4 to 64, LoRA, DoRA and IA3")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--once", action="store_true", help="without the second start")
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    print(
        f"{args.hidden} wide, {args.layers} layers, {args.adapters} adapters x {args.tokens} "
        f"tokens, {'mixed' if args.mixed else f'LoRA r={args.r}'}, {args.dtype}, "
        f"torch {torch.__version__}"
    )
    print(
        f"{'way':10}{'cache':>7}{'first step s':>14}{'ready s':>9}{'ms/step':>9}{'tokens/s':>10}"
        f"{'loss first':>12}{'last':>9}{'peak GiB':>10}"
    )
    for way in args.ways.split(","):
        with tempfile.TemporaryDirectory() as cache:
            for kept in ("empty",) if args.once else ("empty", "kept"):
                found = _apart(way, cache)
                rate = args.adapters * args.tokens / found["ms"] * 1e3
                print(
                    f"{way:10}{kept:>7}{found['first step s']:14.1f}{found['ready s']:9.1f}"
                    f"{found['ms']:9.1f}{rate:10.0f}{found['loss first']:12.4f}"
                    f"{found['last']:9.4f}{found['peak GiB']:10.1f}",
                    flush=True,
                )


def _apart(way: str, cache: str) -> dict[str, float]:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, *sys.argv, "--way", way], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
