"""Where do the milliseconds of a compiled step of 16 adapters go on a GPU?

The kernels of a few steps of fadapt.fit in classes, by name, and the time between them. Products of
less than --small microseconds are small: the adapters', but for the narrowest of the base.

    python examples/benchmarks/where.py --hidden 1024 --layers 28 --vocab 151936 --tokens 512 \\
        --r 16 [--mixed] [--regional] [--top 15]
"""

from __future__ import annotations

import argparse
import collections
import re
from typing import Any

import torch
from common import READY, TARGETS, Ticks, qwen3, tokens
from sweeps import mixed
from torch.profiler import ProfilerActivity, profile

import fadapt

STEPS = 4

CLASSES = {
    "attention": r"flash|fmha|attention|attn",
    "optimizer": r"adam|multi_tensor|foreach",
    "softmax and loss": r"softmax|nll|cross_entropy|logsumexp|exp_sub",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitK|bmm|triton_tem|_mm_",
    "copies": r"memcpy|memset|copy",
    "reductions": r"triton_red|triton_per|reduce|norm",
    "pointwise": r".",
}


def class_of(name: str, us: float, small: float) -> str:
    found = next(c for c, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE))
    if found == "products":
        return f"products below {small:g} us" if us < small else "large products"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = dict(
        hidden=1024, layers=28, vocab=151936, tokens=512, rows=1, r=16, adapters=16, top=15
    )
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--small", type=float, default=30.0, help="microseconds")
    parser.add_argument("--mixed", action="store_true", help="ranks 4 to 64, LoRA, DoRA and IA3")
    parser.add_argument("--regional", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    cuda, dtype = args.device == "cuda", torch.bfloat16
    model = qwen3(args.hidden, args.layers, args.vocab, args.device, dtype, "maskless")
    methods = mixed(args.adapters) if args.mixed else [fadapt.LoRA(r=args.r)] * args.adapters
    members = [
        fadapt.init(model, fadapt.Config({TARGETS: m}, seed=i, dtype=dtype))
        for i, m in enumerate(methods)
    ]
    rows = tokens(args.rows, args.tokens, args.vocab, args.device)
    batch = {k: torch.stack([v] * args.adapters) for k, v in rows.items()}
    options: dict[str, Any] = {"mode": "reduce-overhead"} if cuda else {"backend": "eager"}
    if args.regional:
        options["regional"] = True
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    recorded = profile(activities=[activity])

    class Recorded(Ticks):
        def __getitem__(self, index: int) -> Any:
            found = super().__getitem__(index)
            if len(self.spans["fit"]) == READY + STEPS:
                recorded.stop()
            return found

    ticks = Recorded(batch, recorded.start, {})
    stack, steps = fadapt.stack(members), READY + STEPS + 1
    fadapt.fit(
        model, stack, ticks, steps=steps, per_adapter=True, compile=options, verify=False,
        log_every=steps,
    )  # fmt: skip
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in recorded.events() or []
        if e.device_type.name == args.device.upper()
    )
    total: dict[str, float] = collections.defaultdict(float)
    count: dict[str, int] = collections.defaultdict(int)
    by_name: dict[str, float] = collections.defaultdict(float)
    busy, end = 0.0, spans[0][0]
    for start, stop, name in spans:
        key = class_of(name, stop - start, args.small)
        total[key] += stop - start
        by_name[f"{key}: {name[:100]}"] += stop - start
        count[key] += 1
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - spans[0][0]
    step = ticks.medians()["fit"]
    print(
        f"{args.hidden} wide, {args.layers} layers, {args.adapters} adapters x "
        f"{args.rows * args.tokens} tokens, {'mixed' if args.mixed else f'LoRA r={args.r}'}, "
        f"bfloat16, compiled {options}, torch {torch.__version__}: {step:.1f} ms a step, "
        f"{args.adapters * args.rows * args.tokens / step:.1f}k tokens/s"
    )
    print("| kernels | a step | ms a step | of the step |\n|---|---|---|---|")
    for key in sorted(total, key=lambda k: -total[k]):
        ms = total[key] / 1e3 / STEPS
        print(f"| {key} | {count[key] / STEPS:.0f} | {ms:.1f} | {100 * total[key] / whole:.0f} % |")
    gaps = whole - busy
    print(f"| nothing runs | | {gaps / 1e3 / STEPS:.1f} | {100 * gaps / whole:.0f} % |")
    for name in sorted(by_name, key=lambda k: -by_name[k])[: args.top]:
        print(f"  {by_name[name] / 1e3 / STEPS:7.2f} ms  {name}")


if __name__ == "__main__":
    main()
