"""What does one more adapter in a sweep cost in memory, apart from its activations?

C6: bytes per trainable value that a sweep of growing size holds between its steps and at most, with
two tokens. Value, gradient and AdamW's two moments in float32 are 16 bytes; while an update is
checked there is a copy of the values, in memory that the activations of a real batch have left.

    python examples/benchmarks/memory.py [--hidden 512] [--device cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import READY, TARGETS, Ticks, kept_bytes, qwen3, tokens

import fadapt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in dict(hidden=512, layers=2, vocab=256, r=16).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    model = qwen3(args.hidden, args.layers, args.vocab, args.device)
    batch = tokens(1, 2, args.vocab, args.device)
    members = [
        fadapt.init(model, fadapt.Config({TARGETS: fadapt.LoRA(r=args.r)}, seed=i))
        for i in range(32)
    ]
    values = sum(t.numel() for t in fadapt.trainable(members[0]))
    print(
        f"{args.hidden} wide, {args.layers} layers, LoRA r={args.r} with {values:,} values, "
        f"{args.device}, torch {torch.__version__}"
    )
    print(f"{'adapters':>9}{'kept MiB':>10}{'peak MiB':>10}{'kept, each more':>17}{'peak':>7}")
    before = (0, 0, 0)
    for n in (8, 16, 32):
        trials = [fadapt.Trial(p, name=str(i)) for i, p in enumerate(members[:n])]

        def work(note: Callable[[], None], trials: list[fadapt.Trial] = trials) -> None:
            fadapt.sweep(model, trials, Ticks(batch, note, {}), steps=READY + 1)

        found = (n, *kept_bytes(work))
        more = [(b - a) / (n - before[0]) / values for a, b in zip(before, found, strict=True)]
        print(
            f"{n:9}{found[1] / 2**20:10.1f}{found[2] / 2**20:10.1f}"
            + (f"{more[1]:12.2f} B/v {more[2]:6.2f}" if before[0] else ""),
            flush=True,
        )
        before = found


if __name__ == "__main__":
    main()
