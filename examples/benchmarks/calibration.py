"""How long does a data-driven start take, against PEFT, and what does one more method cost?

C5, G9: EVA's start from the same batches, fadapt against PEFT, alternating in one process, with
the overlap of both with the exact principal components (singular values of the product of the two
bases; 1 is the same subspace). Then one pass that serves four methods against the dearest alone.

    python examples/benchmarks/calibration.py [--hidden 512] [--layers 4] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from common import TARGETS, peak_bytes, qwen3
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import Tensor, nn

import fadapt
from fadapt.calibration import Statistic, SumSq

Batch = dict[str, Tensor]


def structured(model: nn.Module, decay: float = 0.9) -> None:
    """Embeddings whose variance falls geometrically, as a trained model's does."""
    weight = model.get_input_embeddings().weight
    rng = torch.Generator().manual_seed(2)
    d = weight.shape[1]
    turn = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q
    values = torch.randn(len(weight), d, generator=rng) * decay ** torch.arange(d)
    with torch.no_grad():
        weight.copy_((values @ turn).to(weight))


def padded(count: int, rows: int, length: int, vocab: int, device: str) -> list[Batch]:
    """Batches of sequences between half and full length."""
    rng = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, vocab, (rows, length), generator=rng)
        lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=rng)
        mask = (torch.arange(length) < lengths).long()
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return batches


def peft_eva(model: nn.Module, batches: list[Batch], r: int) -> tuple[Callable[[], Any], nn.Module]:
    """PEFT's start as a function without arguments, and the model that it fills."""
    config = LoraConfig(
        r=r,
        target_modules=TARGETS.split("|"),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    return lambda: initialize_lora_eva_weights(adapted, batches, show_progress_bar=False), adapted


def rows_of(model: nn.Module, sites: list[str], batches: list[Batch]) -> dict[str, Tensor]:
    """The unmasked inputs of some sites, by ordinary hooks."""
    seen: dict[str, list[Tensor]] = {site: [] for site in sites}
    for batch in batches:
        keep = batch["attention_mask"].bool()
        handles = [
            model.get_submodule(site.removesuffix(".weight")).register_forward_hook(
                lambda m, args, out, to=seen[site], keep=keep: to.append(args[0][keep])
            )
            for site in sites
        ]
        with torch.no_grad():
            model.model(**batch)
        for handle in handles:
            handle.remove()
    return {site: torch.cat(parts).double() for site, parts in seen.items()}


def overlap(a: Tensor, rows: Tensor) -> float:
    """The least singular value between the span of a's rows and the exact leading components."""
    exact = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[: len(a)]
    basis = torch.linalg.qr(a.double().mT).Q
    return float(torch.linalg.svdvals(exact @ basis)[-1])


def timed(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def against_peft(args: argparse.Namespace, model: nn.Module, batches: list[Batch]) -> None:
    config = {TARGETS: fadapt.EVA(args.r)}
    ours, theirs = [], []
    for i in range(args.rounds + 1):
        start, adapted = peft_eva(copy_of(model), batches, args.r)
        times = timed(lambda: fadapt.init(model, config, batches)), timed(start)
        if i:  # the first round warms up
            ours.append(times[0])
            theirs.append(times[1])
    params = fadapt.init(model, config, batches)
    filled = dict(adapted.named_parameters())
    names = {n: f"base_model.model.{n.removesuffix('weight')}lora_A.default.weight" for n in params}
    last = args.layers - 1
    sites = [
        f"model.layers.{layer}.{part}.weight"
        for layer in sorted({0, last})
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    rows = rows_of(model, [s for s in sites if s in params], batches)
    a, b = (statistics.median(x) for x in (ours, theirs))
    print(f"EVA r={args.r}, rho=2: fadapt {a:.2f} s, PEFT {b:.2f} s, PEFT/fadapt {b / a:.1f}")
    print(f"{'overlap with the exact components':44}{'rank':>5}{'fadapt':>9}{'rank':>6}{'PEFT':>9}")
    for site, x in rows.items():
        mine, other = params[site].train["A"].detach(), filled.get(names[site])
        line = f"  {site:42}{len(mine):5}{overlap(mine, x):9.4f}"
        print(
            line + (f"{len(other):6}{overlap(other.detach(), x):9.4f}" if other is not None else "")
        )
    print(
        f"peak memory of new tensors: fadapt {mib(lambda: fadapt.init(model, config, batches))}",
        end="",
    )
    print(f", PEFT {mib(peft_eva(copy_of(model), batches, args.r)[0])}")


def copy_of(model: nn.Module) -> nn.Module:
    """PEFT changes its model; the weights may be shared."""
    memo = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)


def mib(function: Callable[[], Any]) -> str:
    return f"{peak_bytes(function) / 2**20:.0f} MiB"


def one_pass(args: argparse.Namespace, model: nn.Module, batches: list[Batch]) -> None:
    asks: dict[str, dict[str, Any]] = {
        "EVA": {"cfg": {TARGETS: fadapt.EVA(args.r)}},
        "CorDA": {"cfg": {TARGETS: fadapt.CorDA(args.r)}},
        "Wanda": {"cfg": {TARGETS: fadapt.LoRA()}, "statistics": [Statistic(SumSq())]},
        "ASVD": {"cfg": {TARGETS: fadapt.AntiPaSTOASVD(args.r)}},
    }
    together = [ask["cfg"] for ask in asks.values()]
    asks["all four"] = {"cfg": together, "statistics": [Statistic(SumSq())]}
    times: dict[str, list[float]] = {name: [] for name in asks}
    for i in range(args.rounds + 1):
        for name, ask in asks.items():
            seconds = timed(lambda ask=ask: fadapt.observe(model, batches=batches, **ask))
            if i:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, ask in asks.items():
        stats = fadapt.observe(model, batches=batches, **ask)
        peak = mib(lambda ask=ask: fadapt.observe(model, batches=batches, **ask))
        print(
            f"  {name:9}{medians[name]:7.2f} s   states {stats.nbytes / 2**20:6.1f} MiB   "
            f"peak {peak}"
        )
    dearest = max(t for name, t in medians.items() if name != "all four")
    print(f"  all four in one pass / the dearest alone: {medians['all four'] / dearest:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = dict(hidden=512, layers=2, vocab=2048, rows=8, length=64, batches=8, r=16, rounds=2)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    model = qwen3(args.hidden, args.layers, args.vocab, args.device, dtype)
    structured(model)
    batches = padded(args.batches, args.rows, args.length, args.vocab, args.device)
    count = sum(int(b["attention_mask"].sum()) for b in batches)
    print(
        f"{args.hidden} wide, {args.layers} layers, {args.batches} batches, {count} tokens, "
        f"{args.device}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"peft {peft.__version__}"
    )
    against_peft(args, model, batches)
    one_pass(args, model, batches)


if __name__ == "__main__":
    main()
