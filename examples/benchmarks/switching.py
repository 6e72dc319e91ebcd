"""What does it cost to change the adapter, and to serve many in one batch?

Switching: N resident adapters are one stack, and a compiled step takes the index of the one to run
as a tensor, so a switch is one write of that index. It is timed for a few N on the host alone
(nothing waits for the device); ``fail_on_recompile`` stands over all of it. Beside it: select()
without a compiler, and the same step with another index against the same index again.

Mixed: a batch whose rows have an adapter each, against the base on the same batch and against
PEFT's ``adapter_names``, whose adapters have the same values. All by turns in one process.

    python examples/benchmarks/switching.py --device cuda --hidden 1024 --layers 28 --vocab 151936 \
        --dtype bfloat16
    python examples/benchmarks/switching.py --smoke
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import TARGETS, alternate, qwen3, tokens
from torch import Tensor, nn

import fadapt

try:
    import peft
except ImportError:
    peft = None


def resident(model: nn.Module, count: int, r: int, dtype: torch.dtype) -> fadapt.Stack:
    """A stack of LoRAs with random A and B."""
    one = fadapt.init(model, fadapt.Config({TARGETS: fadapt.LoRA(r=r, alpha=r)}, dtype=dtype))
    stack = fadapt.stack([one] * count)
    rng = torch.Generator(next(model.parameters()).device).manual_seed(2)
    for leaf in fadapt.trainable(stack):
        leaf.requires_grad_(False).normal_(std=0.02, generator=rng)
    return stack


def host_us(function: Callable[[int], Any], repeats: int) -> float:
    """Median microseconds until a call returns; the device is idle before each."""
    spans = []
    for i in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function(i)
        spans.append(1e6 * (time.perf_counter() - start))
    return statistics.median(spans)


def switching(model: nn.Module, args: argparse.Namespace) -> None:
    print("| resident | write of the index, us | same index, ms | another index, ms | ", end="")
    print("eager select, us |\n|---|---|---|---|---|")
    for count in args.resident:
        wrote, ms, selected = switches(model, count, args)
        print(
            f"| {count} | {wrote:.1f} | {ms['same']:.2f} | {ms['another']:.2f} | {selected:.0f} |",
            flush=True,
        )
        if args.device == "cuda":
            torch.cuda.empty_cache()


def switches(
    model: nn.Module, count: int, args: argparse.Namespace
) -> tuple[float, dict[str, float], float]:
    ids = tokens(1, args.decode_tokens, args.vocab, args.device)["input_ids"]
    torch.compiler.reset()
    stack = resident(model, count, args.r, args.adapter_dtype)
    index = torch.zeros(1, dtype=torch.long, device=args.device)
    numbers = itertools.count()

    def forward(index: Tensor) -> Tensor:
        chosen = fadapt.select(stack, index)
        return fadapt.apply(model, chosen, input_ids=ids, logits_to_keep=1).logits

    step = compiled(forward, args)

    def write(_: int = 0) -> None:
        index.fill_((7 * next(numbers) + 1) % count)

    def another() -> None:
        write()
        step(index)

    with torch.no_grad():
        for _ in range(4):
            another()
        with torch.compiler.set_stance("fail_on_recompile" if args.compile else "default"):
            wrote = host_us(write, 200)
            ms = alternate({"same": lambda: step(index), "another": another}, args.rounds)
        return wrote, ms, host_us(lambda _: fadapt.select(stack, index), 10)


def mixed(model: nn.Module, args: argparse.Namespace) -> None:
    rows, device = args.rows, args.device
    stack = resident(model, rows, args.r, args.adapter_dtype)
    batch = tokens(rows, args.tokens, args.vocab, device)["input_ids"]
    order = [(5 * i + 3) % rows for i in range(rows)]  # each adapter once
    index = torch.tensor(order, device=device)
    keep = {"logits_to_keep": 1}
    torch.compiler.reset()

    def base() -> Tensor:
        return model(input_ids=batch, **keep).logits

    def ours(index: Tensor) -> Tensor:
        chosen = fadapt.select(stack, index)
        return fadapt.apply(model, chosen, input_ids=batch, **keep).logits

    fast_base, fast_ours = compiled(base, args), compiled(ours, args)
    steps: dict[str, Callable[[], Any]] = {
        "base": base,
        "fadapt": lambda: ours(index),
    }
    if args.compile:
        steps |= {"base compiled": fast_base, "fadapt compiled": lambda: fast_ours(index)}
    with torch.no_grad():
        wanted = ours(index).float().clone()
        if peft is not None:
            twin = with_peft(stack, args)
            names = [f"a{i}" for i in order]
            steps["PEFT adapter_names"] = lambda: (
                twin(input_ids=batch, adapter_names=names, **keep).logits
            )
            theirs = steps["PEFT adapter_names"]().float()
            gap = float((wanted - theirs).norm() / theirs.norm())
            apart = float((theirs - base().float()).norm() / theirs.norm())
            print(f"\nLogits: fadapt - PEFT {gap:.2g}, base - PEFT {apart:.2g}, relative norms.")
        else:
            print("\nPEFT is not installed: adapter_names was not measured.")
        ms = alternate(steps, args.rounds)
    total = rows * args.tokens
    print(f"\n{rows} rows of {args.tokens} tokens, an adapter each.\n")
    print("| run | ms | thousand tokens a second | share of the base | x PEFT |")
    print("|---|---|---|---|---|")
    for name, value in ms.items():
        peer = ms["base compiled" if "compiled" in name else "base"]
        times = f"{ms['PEFT adapter_names'] / value:.2f}" if peft is not None else ""
        print(f"| {name} | {value:.2f} | {total / value:.1f} | {peer / value:.0%} | {times} |")


def with_peft(stack: fadapt.Stack, args: argparse.Namespace) -> nn.Module:
    """PEFT's model over a base of its own, with the adapters of the stack."""
    assert peft is not None
    config = peft.LoraConfig(r=args.r, lora_alpha=args.r, target_modules=TARGETS.split("|"))
    twin = peft.get_peft_model(build(args), config, adapter_name="a0")
    for i in range(1, len(stack)):
        twin.add_adapter(f"a{i}", config)
    twin = twin.to(args.device).eval()
    modules = dict(twin.named_modules())
    for i, member in enumerate(fadapt.unstack(stack)):
        for name, adapter in member.items():
            layer = modules["base_model.model." + name.removesuffix(".weight")]
            for leaf in "AB":
                own = getattr(layer, f"lora_{leaf}")[f"a{i}"].weight
                own.data = adapter.train[leaf].detach().to(own.device)
    return twin


def compiled(function: Callable, args: argparse.Namespace) -> Callable:
    if not args.compile:
        return function
    mode = "reduce-overhead" if args.device == "cuda" else None
    return torch.compile(function, mode=mode, fullgraph=True)


def build(args: argparse.Namespace) -> nn.Module:
    return qwen3(args.hidden, args.layers, args.vocab, args.device, args.dtype, args.attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = dict(hidden=512, layers=4, vocab=2048, r=16, rows=32, tokens=128, decode_tokens=16)
    for name, default in {**sizes, "rounds": 15}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--adapter-dtype", type=lambda name: getattr(torch, name))
    parser.add_argument("--attention", default="maskless")
    parser.add_argument("--resident", default="10,100,1000", help="numbers of adapters")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--smoke", action="store_true", help="seconds on a CPU; no figures")
    args = parser.parse_args()
    if args.smoke:
        small = dict(hidden=64, layers=1, vocab=64, r=2, rows=4, tokens=8, decode_tokens=4)
        vars(args).update(**small, rounds=2, resident="2,5", compile=False)
    args.resident = [int(n) for n in args.resident.split(",")]
    args.adapter_dtype = args.adapter_dtype or args.dtype
    model = build(args)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"torch {torch.__version__}, {where}, {args.dtype}, r={args.r}\n")
    switching(model, args)
    mixed(model, args)


if __name__ == "__main__":
    main()
