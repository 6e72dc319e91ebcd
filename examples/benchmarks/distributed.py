"""What do several GPUs give, and what does it cost that they work together?

    a  Do two GPUs train 64 trials, a share each, twice as fast as one?
    b  How many tokens a second do 16 adapters train over a base that is sharded over two GPUs
       (FSDP2, the rows of each batch split), against the whole base on one GPU? What share of a
       step is the exchange of the adapters' gradients?
    c  How many over a base that fits on no GPU: Llama's 70B shape?

Under torchrun, one process a GPU; without GPUs the same on CPUs, with gloo. The first process runs
what needs one GPU before the others join. All through fadapt.sweep; weights and tokens are random.
A step is timed between evaluations that only read the clock, so that what a sweep does beside its
passes counts.

    torchrun --nproc-per-node 2 examples/benchmarks/distributed.py --question a
    torchrun --nproc-per-node 2 examples/benchmarks/distributed.py --question b
    torchrun --nproc-per-node 2 examples/benchmarks/distributed.py --question c --layers 80

Each has the shape of its question by default; --layers 4 and so on make it smaller, and --json PATH
writes the record. What is being done goes to the standard error with the seconds so far, so that a
run that is cut off tells how far it came.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import TARGETS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import fadapt

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if CUDA else 0)
DEVICE = DEVICE if CUDA else torch.device("cpu")

# Of each question: (layers, hidden, heads, key-value heads, head's width, inner, vocabulary, tied)
SHAPES = {
    "a": (28, 1024, 16, 8, 128, 3072, 151936, True),  # Qwen3-0.6B
    "b": (36, 4096, 32, 8, 128, 12288, 151936, False),  # Qwen3-8B
    "c": (80, 8192, 64, 8, 128, 28672, 128256, False),  # Llama 70B
}
KEYS = "layers", "hidden", "heads", "kv", "head_dim", "inner", "vocab"
TRIALS = {"a": 64, "b": 16, "c": 16}

marks: list[float] = []
BEGUN = time.perf_counter()


def phase(what: str) -> None:
    """Says on the standard error that something begins, and the seconds so far."""
    if CUDA:
        torch.cuda.synchronize()
    if RANK == 0:
        memory = f", {torch.cuda.memory_allocated() / 2**30:.1f} GiB" if CUDA else ""
        seconds = time.perf_counter() - BEGUN
        print(f"[{seconds:7.1f} s{memory}] {what}", file=sys.stderr, flush=True)


def config_of(o: argparse.Namespace) -> Any:
    kind = LlamaConfig if o.question == "c" else Qwen3Config
    return kind(
        num_hidden_layers=o.layers,
        hidden_size=o.hidden,
        num_attention_heads=o.heads,
        num_key_value_heads=o.kv,
        head_dim=o.head_dim,
        intermediate_size=o.inner,
        vocab_size=o.vocab,
        tie_word_embeddings=SHAPES[o.question][7],
        use_cache=False,
        max_position_embeddings=8192,
        attn_implementation="maskless" if CUDA else "sdpa",
    )


def base(o: argparse.Namespace, mesh: Any = None) -> nn.Module:
    """The frozen model; with a mesh, made shard by shard, so that it never is whole anywhere."""
    phase("the base: its modules, without values")
    config = config_of(o)
    before = torch.get_default_dtype()
    torch.set_default_dtype(o.dtype)
    try:
        with torch.device("meta"):
            kind = LlamaForCausalLM if o.question == "c" else Qwen3ForCausalLM
            model: Any = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False).eval()
    if mesh is not None:
        phase("the base: shards")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        for part in (model.model.embed_tokens, model.lm_head):  # whole only while they run
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    phase("the base: values")
    model.to_empty(device=DEVICE)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(DEVICE)
    rng = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            full = torch.ones(weight.shape, dtype=o.dtype, device=DEVICE)
            if "norm" not in name:
                full.normal_(0, 0.02, generator=rng)
            if mesh is None:
                weight.copy_(full)
                continue
            local, parts = weight.to_local(), full.chunk(mesh.size())
            local.copy_(parts[mesh.get_local_rank()] if len(local) else local)
    if o.question != "a":  # else the activations of a pass fill the memory
        model.train()  # without dropout: only so does the model checkpoint
        model.gradient_checkpointing_enable()
    return model


def methods(o: argparse.Namespace) -> list[fadapt.Method]:
    if o.methods == "lora":
        return [fadapt.LoRA(r=o.rank)] * o.trials
    kinds: list[fadapt.Method] = [fadapt.LoRA(r=o.rank)] * 2
    kinds += [fadapt.LoRA(r=4 * o.rank), fadapt.DoRA(r=o.rank)]
    return sorted((kinds[i % 4] for i in range(o.trials)), key=repr)


def trials(o: argparse.Namespace, model: nn.Module) -> list[fadapt.Trial]:
    rates = [1e-4 * (1 + i / o.trials) for i in range(o.trials)]
    starts: dict[fadapt.Method, fadapt.Params] = {}
    for method in methods(o):
        if method not in starts:
            phase(f"init of {method}")
            starts[method] = fadapt.init(
                model, fadapt.Config({TARGETS: method}, dtype=o.adapter_dtype)
            )
    return [
        fadapt.Trial(starts[method], lr=rate, name=f"{i} {method}")
        for i, (method, rate) in enumerate(zip(methods(o), rates, strict=True))
    ]


def note_time(model: nn.Module, stack: fadapt.Stack) -> Tensor:
    """An evaluation that reads the clock, and has no best weights to keep."""
    if CUDA:
        torch.cuda.synchronize()
    marks.append(time.perf_counter())
    phase(f"reading {len(marks)}")
    return torch.full((len(stack),), torch.nan)


def measure(model: nn.Module, o: argparse.Namespace, rows: int, **options: Any) -> dict[str, Any]:
    """A sweep's time for a step, its memory and its losses."""
    rng = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, o.vocab, (rows, o.tokens), generator=rng) for _ in range(4)]
    batches = [{"input_ids": x, "labels": x} for x in ids]
    marks.clear()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    chosen = trials(o, model)
    phase(f"the sweep; a reading every {o.every} steps")
    report = fadapt.sweep(
        model,
        chosen,
        batches,
        steps=o.every * (o.rounds + 1),
        eval=note_time,
        eval_every=o.every,
        log_every=o.every,
        max_adapters=o.together,
        verify=False,
        progress=False,
        **options,
    )
    phase("the report is there")
    seconds = time.perf_counter() - begin
    at = marks[:: max(1, len(marks) // (o.rounds + 1))]
    spans = [1e3 * (b - a) / o.every for a, b in itertools.pairwise(at)]
    ms = statistics.median(spans)
    count = o.trials * rows * o.tokens
    return {
        "ms a step": round(ms, 2),
        "fastest and slowest": [round(min(spans), 2), round(max(spans), 2)],
        "tokens a second": round(1e3 * count / ms),
        "seconds until warm": round(seconds - sum(spans) * o.every / 1e3, 1),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else None,
        "losses": [round(float(report.losses[s].nanmean()), 5) for s in (1, max(report.losses))],
        "numbers trained": sum(t.numel() for p in report.final.values() for t in p.trainable()),
    }


@contextmanager
def on_its_own() -> Iterator[None]:
    """A sweep in here is one of a single process."""
    name = "TORCHELASTIC_RUN_ID"
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def exchange_ms(numbers: int, dtype: torch.dtype, group: Any, rounds: int = 5) -> float:
    """Milliseconds to sum that many numbers over the processes, measured apart."""
    flat = torch.zeros(min(numbers, 2**28), dtype=dtype, device=DEVICE)
    times = []
    for _ in range(rounds):
        if CUDA:
            torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(flat, group=group)
        if CUDA:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times) * numbers / len(flat)


def free(model: nn.Module | None) -> None:
    if model is not None:
        model.to("meta")
    if CUDA:
        torch.cuda.empty_cache()


def main() -> None:
    o = arguments()
    if CUDA:
        torch.cuda.set_device(DEVICE)
    found: dict[str, Any] = {}
    compiles: dict[str, Any] = {}
    if o.compile == "1":
        compiles["compile"] = {"mode": "reduce-overhead"} if CUDA else True
    elif o.compile == "regional":
        compiles["compile"] = {"regional": True}
    model = base(o) if o.question == "a" or (o.alone and RANK == 0) else None
    if o.alone and RANK == 0:
        with on_its_own():
            assert model is not None
            found["one"] = measure(model, o, o.rows, **(compiles if o.question == "a" else {}))
            say("one process", found["one"])
    if WORLD > 1:
        # The others wait here while the first one measures.
        device = {"device_id": DEVICE} if CUDA else {}
        backend = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=20), **device)
        dist.barrier()
        if o.question == "a":
            assert model is not None
            found["all"] = measure(model, o, o.rows, **compiles)
        else:
            free(model)
            mesh = init_device_mesh(DEVICE.type, (1, WORLD), mesh_dim_names=("sweep", "shard"))
            model = base(o, mesh["shard"])
            found["all"] = measure(model, o, WORLD * o.rows, mesh=mesh)
            numbers = found["all"]["numbers trained"]
            ms = exchange_ms(numbers, o.adapter_dtype, mesh.get_group("shard"))
            found["exchange ms"] = round(ms, 2)
            found["exchange, % of a step"] = round(100 * ms / found["all"]["ms a step"], 2)
        say(f"{WORLD} processes", found["all"])
    if len(found) > 1 and "one" in found and "all" in found:
        found["tokens a second, all / one"] = round(
            found["all"]["tokens a second"] / found["one"]["tokens a second"], 3
        )
        say("ratio", found["tokens a second, all / one"])
    if RANK == 0:
        record = {"question": o.question, **settings(o), **found}
        print(json.dumps(record, indent=1))
        if o.json:
            o.json.write_text(json.dumps(record, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


def say(what: str, value: Any) -> None:
    if RANK == 0:
        print(f"{what}: {value}", flush=True)


def settings(o: argparse.Namespace) -> dict[str, Any]:
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or None,
        "machine": torch.cuda.get_device_name() if CUDA else platform.machine(),
        "processes": WORLD,
        "torch": torch.__version__,
        "options": {k: str(v) for k, v in vars(o).items() if k not in ("json", "question")},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--question", choices="abc", required=True)
    for key in KEYS:
        parser.add_argument(f"--{key.replace('_', '-')}", type=int)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--together", type=int, help="adapters in a pass; by default 16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--methods", choices=("lora", "mixed"), help="by default lora, c: mixed")
    parser.add_argument("--rows", type=int, default=1, help="of an adapter, for each process")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--every", type=int, help="steps between readings; a: 10, b: 5, c: 1")
    parser.add_argument("--rounds", type=int, default=4, help="readings")
    parser.add_argument("--dtype", type=lambda s: getattr(torch, s))
    parser.add_argument("--adapter-dtype", type=lambda s: getattr(torch, s))
    parser.add_argument(
        "--compile",
        choices=("0", "1", "regional"),
        default="1",
        help="question a only: not, the whole pass, or equal layers once, which is sooner ready",
    )
    parser.add_argument("--alone", type=int, help="0 or 1: one process first; c: 0")
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    for key, value in zip(KEYS, SHAPES[o.question], strict=False):
        if getattr(o, key) is None:
            setattr(o, key, value)
    o.trials = o.trials or TRIALS[o.question]
    o.together = o.together or 16
    o.every = o.every or {"a": 10, "b": 5, "c": 1}[o.question]
    o.methods = o.methods or ("mixed" if o.question == "c" else "lora")
    o.dtype = o.dtype or (torch.bfloat16 if CUDA else torch.float32)
    o.adapter_dtype = o.adapter_dtype or o.dtype
    o.alone = o.question != "c" if o.alone is None else bool(o.alone)
    if o.rounds < 1:
        parser.error("--rounds is at least 1")
    return o


if __name__ == "__main__":
    main()
