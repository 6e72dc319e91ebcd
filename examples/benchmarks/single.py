"""Is one adapter's training step as fast as PEFT's, and what does the runner cost by itself?

C3: the same method, rank, data, dtype and optimiser, fadapt against PEFT, alternating in one
process. C4: ``run`` with no adapters against calling the model.

    python examples/benchmarks/single.py [--hidden 512] [--layers 2] [--tokens 512] [--rounds 7]
"""

from __future__ import annotations

import argparse
from typing import Any

import peft
import torch
from common import TARGETS, alternate, gradient_norm, qwen3, tokens, training_step

import fadapt


def pairs(r: int) -> dict[str, tuple[fadapt.Method, Any]]:
    """{name: (fadapt's method, PEFT's config)}."""
    names = TARGETS.split("|")
    oft = dict(oft_block_size=32, use_cayley_neumann=True, target_modules=names)
    return {
        "LoRA": (
            fadapt.LoRA(r=r),
            peft.LoraConfig(r=r, lora_alpha=16, target_modules=names),
        ),
        "DoRA": (
            fadapt.DoRA(r=r),
            peft.LoraConfig(r=r, lora_alpha=16, use_dora=True, target_modules=names),
        ),
        "HRA": (fadapt.HRA(r=r), peft.HRAConfig(r=r, target_modules=names)),
        "OFT": (fadapt.OFT(block_size=32, exact=False), peft.OFTConfig(**oft)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = dict(hidden=512, layers=2, vocab=2048, tokens=512, r=16, rounds=7)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    batch = tokens(1, args.tokens, args.vocab)
    print(
        f"{args.hidden} wide, {args.layers} layers, r={args.r}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, peft {peft.__version__}, fp32"
    )
    print(
        f"{'method':8}{'fadapt ms':>11}{'PEFT ms':>10}{'PEFT/fadapt':>13}{'tokens/step':>13}"
        f"{'loss first':>12}{'last':>8}{'grad norm':>11}"
    )
    for name, (method, config) in pairs(args.r).items():
        model = qwen3(args.hidden, args.layers, args.vocab)
        params = fadapt.init(model, {TARGETS: method})
        leaves = fadapt.trainable(params)
        other = peft.get_peft_model(qwen3(args.hidden, args.layers, args.vocab), config)
        ours = training_step(lambda m=model, p=params: fadapt.run(m, p, batch), leaves)
        theirs = training_step(
            lambda m=other: m(**batch).loss, [p for p in other.parameters() if p.requires_grad]
        )
        first = float(ours())
        ms = alternate({"fadapt": ours, "PEFT": theirs}, args.rounds)
        last = float(ours())
        print(
            f"{name:8}{ms['fadapt']:11.1f}{ms['PEFT']:10.1f}{ms['PEFT'] / ms['fadapt']:13.2f}"
            f"{args.tokens:13}{first:12.4f}{last:8.4f}{gradient_norm(leaves):11.3g}"
        )
    model, empty = qwen3(args.hidden, args.layers, args.vocab), fadapt.Params({})
    with torch.no_grad():
        ms = alternate(
            {"run": lambda: fadapt.run(model, empty, batch), "model": lambda: model(**batch)},
            3 * args.rounds,
        )
    print(
        f"run with no adapters {ms['run']:.2f} ms, the model {ms['model']:.2f} ms: "
        f"{ms['run'] / ms['model']:.3f}"
    )


if __name__ == "__main__":
    main()
