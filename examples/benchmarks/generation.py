"""Does a stack of N adapters generate faster than its members one after the other?

Greedy, with a prompt of its own for every member: N generations by fadapt, N by PEFT (one adapter
each), and one by ``apply(model, stack, method="generate", per_adapter=True)``, in turn in one
process. With a cache that grows and, where transformers can, with a static one.

    python examples/benchmarks/generation.py [--adapters 16] [--prompt 16] [--new 32]
    python examples/benchmarks/generation.py --device cuda --hidden 1024 --layers 28 \\
        --vocab 151936 --r 16 --dtype bfloat16 --new 64
"""

from __future__ import annotations

import argparse

import peft
import torch
from common import TARGETS, alternate, qwen3, tokens

import fadapt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = dict(hidden=64, layers=2, vocab=512, r=8, adapters=16, prompt=16, new=32, rounds=3)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    n, dtype = args.adapters, getattr(torch, args.dtype)

    def base() -> torch.nn.Module:
        return qwen3(args.hidden, args.layers, args.vocab, args.device, dtype)

    model = base()
    config = fadapt.LoRA(r=args.r)
    members = [
        fadapt.init(model, fadapt.Config({TARGETS: config}, seed=i, dtype=dtype)) for i in range(n)
    ]
    with torch.no_grad():
        for member in members:
            for leaf in fadapt.trainable(member):
                leaf += 0.02 * torch.randn_like(leaf)
    stack = fadapt.stack(members)
    other = peft.get_peft_model(
        base(), peft.LoraConfig(r=args.r, target_modules=TARGETS.split("|"))
    ).to(dtype)
    ids = tokens(n, args.prompt, args.vocab, args.device)["input_ids"][:, None]
    print(
        f"{args.hidden} wide, {args.layers} layers, {n} adapters, {args.prompt} + {args.new} "
        f"tokens, {args.dtype}, torch {torch.__version__}, peft {peft.__version__}"
    )
    print(
        f"{'cache':9}{'stack ms':>10}{'alone ms':>10}{'PEFT ms':>9}{'alone/stack':>13}"
        f"{'PEFT/stack':>12}{'tokens/s':>10}{'same tokens':>13}"
    )
    for cache in ("dynamic", "static"):
        options = dict(
            max_new_tokens=args.new, min_new_tokens=args.new, do_sample=False, use_cache=True,
            pad_token_id=0, cache_implementation=cache, disable_compile=True,
        )  # fmt: skip

        def together(options: dict = options) -> torch.Tensor:
            return fadapt.apply(
                model, stack, method="generate", input_ids=ids, per_adapter=True, **options
            )

        def alone(options: dict = options) -> torch.Tensor:
            pairs = zip(members, ids, strict=True)
            return torch.stack(
                [
                    fadapt.apply(model, p, method="generate", input_ids=x, **options)
                    for p, x in pairs
                ]
            )

        def of_peft(options: dict = options) -> list[torch.Tensor]:
            return [other.generate(input_ids=x, **options) for x in ids]

        with torch.no_grad():
            same = (together() == alone()).float().mean()
            ms = alternate({"stack": together, "alone": alone, "PEFT": of_peft}, args.rounds, 1)
        print(
            f"{cache:9}{ms['stack']:10.1f}{ms['alone']:10.1f}{ms['PEFT']:9.1f}"
            f"{ms['alone'] / ms['stack']:13.2f}{ms['PEFT'] / ms['stack']:12.2f}"
            f"{1e3 * n * args.new / ms['stack']:10.0f}{100 * float(same):12.1f}%"
        )


if __name__ == "__main__":
    main()
