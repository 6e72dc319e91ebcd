"""MetaMathQA to GSM8K: every method, learning rate and seed in one sweep over one frozen model.

    python examples/metamath_gsm8k.py                                  # the embedded base, CPU
    python examples/metamath_gsm8k.py --probe                          # is every method alive?
    python examples/metamath_gsm8k.py --model Qwen/Qwen3-0.6B-Base --train meta-math/MetaMathQA \\
        --eval openai/gsm8k --protocol peft --methods LoRA,DoRA,PiSSA --lr 1e-4,3e-4,1e-3

Without arguments it takes ``examples/tiny_base`` and the word problems of ``word_problems.py``. It
prints the table, and writes it with one result file a trial, in the schema of PEFT's method
comparison, and two pictures.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from metamath import costs, data, recipes, results
from metamath.arguments import Scores, best_rate, mean, rates, tuned
from metamath.arguments import arguments as command_line
from metamath.generate import accuracy, interval
from metamath.probe import probe
from metamath.protocol import PROTOCOLS, DataError, Protocol
from torch import Tensor, nn

import fadapt

HERE = Path(__file__).parent
WEIGHT_DECAY, CLIP, FULL_RATE = 0.1, 1.0, 1e-3


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line."""
    return command_line(argv, (__doc__ or "").split("\n")[0])


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The frozen model and its tokenizer.

    Raises:
        DataError: no model at that place.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if "LOCAL_RANK" in os.environ and args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # a GPU for each process of torchrun
    source = args.model or str(HERE / "tiny_base")
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.model else "float32"))
    options: dict[str, Any] = {"dtype": dtype}
    if args.quantize != "none":
        from transformers import BitsAndBytesConfig

        four = args.quantize == "4bit"
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=four, load_in_8bit=not four, bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = args.device
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"cannot load {source}: {_one_line(error)}") from error
    if args.quantize == "none":
        model = model.to(args.device)
    if args.quantize == "4bit" and args.device == "cpu":
        for name, module in model.named_modules():
            if type(module).__name__ == "Linear4bit" and module.in_features % 64:
                raise DataError(
                    f"on a CPU bitsandbytes takes the inputs of 4-bit weights in blocks of 64, and "
                    f"{name} has {module.in_features}; write --quantize 8bit"
                )
    return model.eval().requires_grad_(False), tokenizer


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class PerTrial:
    """Batches whose order depends on the seed: each trial gets those of its own seed.

    Args:
        batches: {seed: batches}.
        seeds: of the trials.
    """

    def __init__(self, batches: dict[int, data.Batches], seeds: list[int]):
        self.batches, self.seeds = batches, seeds

    def __len__(self) -> int:
        return min(map(len, self.batches.values()))

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if step >= len(self):
            raise IndexError(step)
        one = next(iter(self.batches.values()))
        order = list(self.batches)
        rows = [b.examples[i] for b in self.batches.values() for i in b.rows[step]]
        # Padded together, so that the seeds' batches have one length.
        joint = one.protocol.collate(rows, one.pad)
        index = torch.tensor([order.index(s) for s in self.seeds])
        return {k: v.unflatten(0, (len(order), -1))[index] for k, v in joint.items()}


def train_full(model: Any, batches: data.Batches, protocol: Protocol, lr: float) -> Any:
    """A copy of the model with all its weights trained."""
    tuned = copy.deepcopy(model).requires_grad_(True)
    device = next(tuned.parameters()).device
    optimizer = torch.optim.AdamW(tuned.parameters(), lr, weight_decay=WEIGHT_DECAY)
    steps, warmup = len(batches), protocol.warmup(len(batches))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            (i + 1) / warmup
            if i < warmup
            else 0.5 * (1 + math.cos(math.pi * (i - warmup) / max(steps - warmup, 1)))
        ),
    )
    for i in range(steps):
        batch = {k: v.to(device) for k, v in batches[i].items()}
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        optimizer.zero_grad()
        protocol.loss(tuned(**inputs, use_cache=False), batch).backward()
        nn.utils.clip_grad_norm_(tuned.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    return tuned.eval()


@dataclass
class Bench:
    """What is compared: the model, the data, and one trial for each method, rate and seed."""

    args: argparse.Namespace
    protocol: Protocol
    model: Any
    tokenizer: Any
    data: data.Data
    batches: dict[int, data.Batches]
    methods: dict[str, tuple[fadapt.Method, float]]

    @property
    def first(self) -> data.Batches:
        """The batches of the first seed."""
        return next(iter(self.batches.values()))

    @property
    def calib(self) -> list[dict[str, Tensor]]:
        """The batches that calibrated methods start from."""
        return [self.first[i] for i in range(min(16, len(self.first)))]

    @cached_property
    def stats(self) -> fadapt.Stats | None:
        """What calibrated methods start from, of all of them and all seeds in one pass."""
        calibrated = [n for n, (m, _) in self.methods.items() if m.statistic is not None]
        if not calibrated:
            return None
        configs = [self.configs[name] for name in calibrated]
        return fadapt.observe(self.model, configs, self.calib, loss_fn=self.protocol.loss)

    @cached_property
    def configs(self) -> dict[str, fadapt.Config]:
        """What each method adapts."""
        targets = self.args.targets
        return {
            name: fadapt.Config({targets: method} if targets else method)
            for name, (method, _) in self.methods.items()
        }

    @cached_property
    def earlier(self) -> Scores:
        """The grid of an earlier run in which the rates were found, if --lr names one."""
        return tuned(self.args.lr) if isinstance(self.args.lr, Path) else {}

    def _rates(self, method: str, own: float) -> list[float]:
        if not isinstance(self.args.lr, Path):
            return rates(self.args.lr, own)
        if method not in self.earlier:
            known = ", ".join(self.earlier)
            raise DataError(f"{self.args.lr} has no rates of {method}, only of {known}")
        return [best_rate(self.earlier[method])]

    @cached_property
    def keys(self) -> list[tuple[str, float, int]]:
        """(method, rate, seed) of every trial."""
        return [
            (name, lr, seed)
            for name, (_, own) in self.methods.items()
            for lr in self._rates(name, own)
            for seed in self.batches
        ]

    @cached_property
    def trials(self) -> list[fadapt.Trial]:
        """What the sweep trains."""
        return [
            fadapt.Trial(
                self.configs[name],
                lr=lr,
                weight_decay=WEIGHT_DECAY,
                warmup=self.protocol.warmup(self.args.steps),
                schedule="cosine",
                clip=CLIP,
                seed=seed,
                name=f"{name}-lr{lr:g}-seed{seed}",
            )
            for name, lr, seed in self.keys
        ]

    def accuracy(self, model: Any, stack: Any, rows: list[data.Row]) -> Tensor:
        """Shares of right answers."""
        return accuracy(
            model,
            stack,
            rows,
            self.tokenizer,
            self.protocol,
            # A GPU is bounded by the number of passes, a CPU by its caches.
            batch=50 if self.args.device == "cpu" else 200,
            new_tokens=self.args.new_tokens,
        )

    def forgotten(self, model: Any, stack: Any = None) -> Tensor:
        """Mean losses on the texts that are to be remembered, NaN without such texts."""
        if not self.data.kept:
            return torch.full((1 if stack is None else stack.size,), math.nan)
        texts, limit = self.data.kept, self.args.max_length
        return data.loss_on_texts(model, stack, texts, self.tokenizer, limit)


def prepare(args: argparse.Namespace) -> Bench:
    """Reads everything that the arguments name."""
    embedded = args.model is None
    if embedded and (args.train or args.eval):
        raise DataError("--train and --eval need --model as well")
    if not embedded and not (args.train and args.eval):
        raise DataError("--model needs --train and --eval as well")
    args.r = args.r or (8 if embedded else 32)
    small = embedded and args.device == "cpu"
    args.steps = args.steps or (40 if small else 150 if embedded else 5000)
    args.batch = args.batch or (6 if small else 12 if embedded else 4)
    args.new_tokens = args.new_tokens or (64 if embedded else None)
    args.test_rows = args.test_rows or (60 if small else 200 if embedded else None)
    args.eval_every = args.eval_every or (args.steps if embedded else max(args.steps // 20, 1))
    seeds = args.seeds
    if args.halving and args.halving > args.steps:
        raise DataError(f"--halving {args.halving} is after the last of --steps {args.steps}")

    protocol = PROTOCOLS[args.protocol]()
    model, tokenizer = load_model(args)
    tokenizer = protocol.prepare(tokenizer)
    if embedded:
        found = data.embedded(protocol, args.train_rows, args.test_rows, seeds[0])
    else:
        found = data.load(args.train, args.eval, args.kept, protocol, seeds[0])
    found.test = found.test[: args.test_rows]
    positions = getattr(model.config, "max_position_embeddings", None)
    limits = args.max_length, args.new_tokens, positions
    data.check_lengths(protocol, found, tokenizer, *limits)
    batches = {
        seed: data.training_batches(
            protocol,
            found,
            tokenizer,
            steps=args.steps,
            batch=args.batch,
            limit=args.max_length,
            seed=seed,
        )
        for seed in seeds
    }
    known = recipes.small(args.r) if embedded else recipes.recipes(args.r)
    if args.targets and args.methods == "all":
        others = [name for name, (method, _) in known.items() if method.usual_kind != "linear"]
        print(f"without {', '.join(others)}, which do not adapt linear maps: --targets", flush=True)
        known = {name: found for name, found in known.items() if name not in others}
    methods = recipes.chosen(args.methods, known)
    return Bench(args, protocol, model, tokenizer, found, batches, methods)


def train(bench: Bench) -> fadapt.Report:
    """All trials, in one sweep."""
    args = bench.args
    # PEFT's order of the data does not depend on the seed.
    own_data = len(bench.batches) > 1 and bench.protocol.name != "peft"
    seeds = [seed for _, _, seed in bench.keys]
    return fadapt.sweep(
        bench.model,
        bench.trials,
        PerTrial(bench.batches, seeds) if own_data else bench.first,
        per_adapter=own_data,
        steps=args.steps,
        loss_fn=bench.protocol.loss,
        eval=lambda model, stack: {
            "valid accuracy": bench.accuracy(model, stack, bench.data.valid)
        },
        eval_every=args.eval_every,
        goal="max",
        calib=bench.stats,
        halving=fadapt.Halving(every=args.halving, factor=3) if args.halving else None,
        max_adapters=1 if args.one_by_one else args.max_adapters or "auto",
        compile=args.compile,
        directory=fadapt.Checkpoints(args.out / "sweep", every=timedelta(minutes=2)),
    )


def tabulate(bench: Bench, report: fadapt.Report, seconds: float) -> tuple[list[dict], dict]:
    """The rows of the table, best first, and {method: {rate: validation accuracies}}.

    Each method's rate is the one with the best mean validation accuracy; only its trials are
    tested, with their last weights. One of which a seed diverged is not chosen; where all are so,
    the one that is tested answers nothing.
    """
    args, model, found = bench.args, bench.model, bench.data
    by_name = {r.name: r for r in report.results}
    names = [t.name or "" for t in bench.trials]
    scores: dict[str, dict[float, list[float]]] = {}
    for name, (method, lr, _) in zip(names, bench.keys, strict=True):
        result = by_name[name]
        # Its score is the best before that.
        score = math.nan if result.status == "diverged" else result.score
        scores.setdefault(method, {}).setdefault(lr, []).append(score)
    best = {method: best_rate(by_rate) for method, by_rate in scores.items()}
    tested = [i for i, (m, lr, _) in enumerate(bench.keys) if best[m] == lr]
    results.write({"validation": scores}, args.out / "validation.json")

    right, lost = {}, {}
    chunk = max(1, min(report.chunk, 32))
    for start in range(0, len(tested), chunk):
        part = tested[start : start + chunk]
        stack = fadapt.stack([report.final[names[i]] for i in part])
        right |= dict(zip(part, bench.accuracy(model, stack, found.test).tolist(), strict=True))
        lost |= dict(zip(part, bench.forgotten(model, stack).tolist(), strict=True))
    scores = {m: bench.earlier.get(m, {}) | by_rate for m, by_rate in scores.items()}
    # Kept before the costs are measured, should that fail.
    early = {names[i]: {"test accuracy": right[i], "loss on kept texts": lost[i]} for i in tested}
    results.write({"tested": early, "validation": scores}, args.out / "accuracies.json")
    known = float(bench.forgotten(model))
    count = len(found.test)
    for i in tested:
        if by_name[names[i]].status == "diverged":  # whose weights are those of some step before
            print(f"{names[i]} diverged, as did each rate of this method", flush=True)
            right[i], lost[i] = 0.0, math.nan

    def row(method: str, value: float, answers: int, **more: Any) -> dict[str, Any]:
        return {"method": method, "accuracy": value, "interval": interval(value, answers), **more}

    rows = [row("base", float(bench.accuracy(model, None, found.test)), count)]
    if args.model is None and not args.no_full:
        shares, losses = [], []
        for batches in bench.batches.values():
            whole = train_full(model, batches, bench.protocol, FULL_RATE)
            shares.append(float(bench.accuracy(whole, None, found.test)))
            losses.append(float(bench.forgotten(whole)))
        rows.append(
            row(
                "full fine-tuning",
                mean(shares),
                count * len(shares),
                seeds=shares,
                lr=FULL_RATE,
                parameters=sum(p.numel() for p in model.parameters()),
                forgetting=mean(losses) - known,
            )
        )
    for method, config in bench.configs.items():
        cost = costs.measure(model, config, bench.first[0], bench.protocol.loss, bench.calib)
        mine = [i for i in tested if bench.keys[i][0] == method]
        rows.append(
            row(
                method,
                mean([right[i] for i in mine]),
                # Of all seeds' answers together.
                count * len(mine),
                seeds=[right[i] for i in mine],
                lr=best[method],
                valid=mean(scores[method][best[method]]),
                **dataclasses.asdict(cost),
                forgetting=mean([lost[i] for i in mine]) - known,
            )
        )
        for i in mine:
            forgetting = lost[i] - known
            result = peft_file(bench, report, i, right[i], forgetting, cost, seconds)
            results.write(result, args.out / "results" / f"{method.lower()}--{names[i]}.json")
    return sorted(rows, key=lambda r: -r["accuracy"]), scores


def peft_file(
    bench: Bench,
    report: fadapt.Report,
    index: int,
    right: float,
    forgetting: float,
    cost: costs.Cost,
    seconds: float,
) -> dict[str, Any]:
    """One trial in the schema of PEFT's method comparison; its times are its share of the sweep."""
    args, (method, lr, seed) = bench.args, bench.keys[index]
    name = bench.trials[index].name or ""
    column = report.names.index(name)
    result = next(r for r in report.results if r.name == name)
    diverged = result.status == "diverged"
    losses = {s: float(v[column]) for s, v in report.losses.items() if math.isfinite(v[column])}
    last = mean(list(losses.values())[-10:]) if losses else math.nan
    share, tokens = seconds / len(bench.keys), bench.first.tokens()
    metrics: list[dict[str, Any]] = [
        {
            "step": step,
            "valid accuracy": float(by_metric["valid accuracy"][column]),
            "train loss": losses.get(step, last),
            "train samples": step * args.batch,
            "train time": share * step / args.steps,
            "eval time": 0.0,
            "tokens / sec": tokens / share,
            "mem allocated avg": 0.0,
            "mem reserved avg": 0.0,
            "elapsed time": seconds * step / args.steps,
        }
        for step, by_metric in sorted(report.scores.items())
        if math.isfinite(by_metric["valid accuracy"][column])
    ]
    metrics.append(
        {
            "step": args.steps,
            "test accuracy": right,
            "train loss": last,
            "train samples": args.steps * args.batch,
            "train total tokens": tokens,
            "forgetting": forgetting,
        }
    )
    dtype = str(bench.model.dtype).removeprefix("torch.")
    return results.peft_result(
        name=f"{Path(args.model or 'tiny_base').name}-{name}",
        method=method,
        train_config={
            "model_id": args.model or "examples/tiny_base",
            "dtype": {"4bit": "int4", "8bit": "int8"}.get(args.quantize, dtype),
            "max_seq_length": args.max_length,
            "batch_size": args.batch,
            "batch_size_eval": 50,
            "max_steps": args.steps,
            "eval_steps": args.eval_every,
            "compile": args.compile,
            "use_gc": False,
            "query_template": bench.protocol.prompt("{query}"),
            "seed": seed,
            "grad_norm_clip": CLIP,
            "optimizer_type": "AdamW",
            "optimizer_kwargs": {"lr": lr, "weight_decay": WEIGHT_DECAY},
            "lr_scheduler": "cosine",
            "use_amp": False,
            "autocast_adapter_dtype": True,
            "generation_kwargs": {
                "max_length": bench.protocol.max_total_tokens,
                "max_new_tokens": args.new_tokens or bench.protocol.max_new_tokens,
            },
            "attn_implementation": None,
            "init_kv_cache_prefix": None,
        },
        peft_config=None,
        seconds=share,
        metrics=metrics,
        parameters=cost.parameters,
        total_parameters=sum(p.numel() for p in bench.model.parameters()) + cost.parameters,
        file_size=cost.file_bytes,
        extra={
            "version": fadapt.__version__,
            "protocol": bench.protocol.name,
            "sweep_size": len(bench.keys),
            "seeds": sorted(bench.batches),
            "times": "an equal share of the sweep's",
        },
        status="failed" if diverged else "success",
        error=f"diverged: {result.reason}" if diverged else "",
    )


def run(argv: Sequence[str] | None = None) -> None:
    """The whole script."""
    args = arguments(argv)
    started = time.perf_counter()
    bench = prepare(args)
    if args.probe:
        for name, (_, lr) in bench.methods.items():
            config, some = bench.configs[name], bench.calib[:2]
            steps = min(4, args.steps)
            numbers = probe(name, bench.model, config, some, bench.protocol.loss, lr, steps)
            print(name.ljust(18), "  ".join(f"{k} {v:.3g}" for k, v in numbers.items()), flush=True)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    report = train(bench)
    seconds = time.perf_counter() - begin
    if int(os.environ.get("RANK", "0")):
        return  # the first process has all trials' weights, and writes
    print(f"{len(bench.keys)} trials of {args.steps} steps: {seconds:.0f} s", flush=True)
    rows, scores = tabulate(bench, report, seconds)
    table = results.markdown(rows)
    summary = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "fadapt": fadapt.__version__,
        "sweep_seconds": seconds,
        "seconds": time.perf_counter() - started,
        "trials": len(bench.keys),
        "test_rows": len(bench.data.test),
        "rows": rows,
        "validation": {m: {f"{lr:g}": v for lr, v in by.items()} for m, by in scores.items()},
    }
    results.write(summary, args.out / "table.json")
    (args.out / "table.md").write_text(table + "\n")
    paths = results.pictures(rows, scores, args.out)
    print(table)
    print(f"\n{args.out / 'table.json'} {' '.join(map(str, paths))}: {summary['seconds']:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code; what is wrong with the arguments or the data is one line."""
    try:
        run(argv)
    except (DataError, fadapt.FadaptError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # As after Ctrl-C, the next call then goes on from the last step.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
