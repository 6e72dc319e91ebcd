"""What does every method cost and hold: its start, PEFT's map, its rank as a LoRA, time, memory?

Every public method of the package, on the seven linear maps of every layer of one model (or on the
parameters that it is for): the largest difference from the base before training, the largest
difference from PEFT for trained-like values, the rank of the LoRA that equals it, and a training
step's time and peak memory over LoRA's, in turn in one process.

    python examples/benchmarks/methods.py                                            on the CPU
    python examples/benchmarks/methods.py --device cuda --dtype bfloat16 --hidden 1024 --rows 64

Writes OUT.json and OUT.md. Where PEFT is not installed, its column is left out with a word, or
filled from another machine's file: ``--parity-from examples/benchmarks/methods_cpu.json``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import TARGETS, milliseconds, peak_bytes, qwen3, tokens, training_step
from torch import nn

import fadapt

# The contract, composites of several methods, and what as_lora returns.
LEFT_OUT = ("Method", "Chain", "Sum", "TruncatedLoRA")
WARMUP = 3
COLUMNS = {
    "method": "method",
    "trainable": "trainable",
    "identity": "untrained - base",
    "parity": "fadapt - PEFT",
    "rank": "LoRA rank",
    "time": "time / LoRA",
    "memory": "memory / LoRA",
}


def settings(r: int, wide: int) -> dict[str, dict[str, Any]]:
    """Fields that are not a method's defaults.

    Args:
        r: rank of the LoRA family.
        wide: directions of the spectral family.
    """
    ranked = (
        "LoRA RsLoRA PiSSA DoRA DeLoRA EVA CorDA OLoRA MiCA KaSA AdaLoRA HRA PSOFT ReFT LoHa LoKr "
        "HiRA GraLoRA"
    )
    found: dict[str, dict[str, Any]] = {name: {"r": r} for name in ranked.split()}
    for name in [n for n in vars(fadapt) if n.startswith("AntiPaSTO")] + ["LoRAXS", "SSteer"]:
        found[name] = {"r": wide}
    found["SSVD"] = {"k": r}
    # The gradient of a model with random weights has few directions.
    found["LoRAGA"] = {"r": min(r, 4)}
    found["PiSSA"]["niter"] = 4
    found["C3A"] = {"block_size": 64}
    found["TrainableTokens"] = {"token_indices": tuple(range(16))}
    return found


def methods(r: int, wide: int) -> dict[str, fadapt.Method]:
    """An instance of every public method, so that a new one appears by itself, and more forms."""
    fields = settings(r, wide)
    found = {
        name: cls(**fields.get(name, {}))
        for name, cls in vars(fadapt).items()
        if isinstance(cls, type) and issubclass(cls, fadapt.Method) and name not in LEFT_OUT
    }
    forms = {
        "DeLoRA, PEFT's form": fadapt.DeLoRA(r=r, form="peft"),
        "RoAd 2": fadapt.RoAd(variant=2),
        "RoAd 4": fadapt.RoAd(variant=4),
        "OFT, series": fadapt.OFT(exact=False),
        "BOFT, 2 factors": fadapt.BOFT(n_butterfly_factor=2),
        "SSVD strict": fadapt.SSVD(k=r, kind="strict"),
        "SSVD free": fadapt.SSVD(k=r, kind="free"),
        "AntiPaSTORotation both": fadapt.AntiPaSTORotation(r=wide, basis="both"),
        "MiSS bat": fadapt.MiSS(r=64, mode="bat"),
        "MiSS mini": fadapt.MiSS(r=64, mode="mini", mini_r=64),
        "TinyLoRA, tied": fadapt.TinyLoRA(weight_tying=True),
    }
    return dict(sorted({**found, **forms}.items(), key=lambda one: one[0].lower()))


def fresh(model: nn.Module, method: fadapt.Method, batch: Any, dtype: Any = None) -> fadapt.Params:
    """Untrained adapters; methods that need statistics see two batches, or a pair of them."""
    pattern = TARGETS if method.usual_kind == "linear" else ""
    config = fadapt.Config({pattern: method}, dtype=dtype)
    if method.statistic is None:
        return fadapt.init(model, config)
    one, two = (
        {"input_ids": ids, "labels": ids}
        for ids in (batch["input_ids"], batch["input_ids"].flip(1))
    )
    pairs = isinstance(method, fadapt.SSteer)
    return fadapt.init(model, config, [(one, two)] if pairs else [one, two])


def moved(params: fadapt.Params, by: float = 0.02) -> fadapt.Params:
    """Trained-like values."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf.add_(by * torch.randn(leaf.shape, generator=rng).to(leaf))
    return params


@torch.no_grad()
def identity(model: nn.Module, method: fadapt.Method, batch: Any) -> float:
    """The largest difference of a logit between untrained adapters and the base."""
    params = fresh(model, method, batch)
    ids = {"input_ids": batch["input_ids"]}
    return _difference(fadapt.apply(model, params, **ids), model(**ids))


def rank(model: nn.Module, method: fadapt.Method, batch: Any) -> str:
    """The rank of the LoRA that equals a trained adapter, of the widest of its sites."""
    params = moved(fresh(model, method, batch))
    if not isinstance(method, fadapt.TinyLoRA):  # whose numbers may be shared
        params = params.only(next(name for name in params if "shared" not in name))
    try:
        loras = fadapt.as_lora(model, params)
    except fadapt.FadaptError as error:
        said = str(error)
        return "full" if "rank" in said else "a bias, too" if "bias" in said else "none"
    return str(max(lora.method.r for lora in loras.values()))  # type: ignore[attr-defined]


@torch.no_grad()
def parity(model: nn.Module, method: fadapt.Method, batch: Any) -> float | str:
    """The largest difference of a logit between fadapt and PEFT, which reads what it wrote."""
    import peft

    if isinstance(method, fadapt.BOFT) and method.n_butterfly_factor > 1:
        return "CUDA only"  # PEFT has one factor where its extension does not compile
    ids = {"input_ids": batch["input_ids"]}
    params = moved(fresh(model, method, batch))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fadapt.peft.save_peft(model, params, folder)
        except fadapt.CheckpointError as error:
            said = str(error)
            return (
                "beside others"
                if "beside another" in said
                else "no format"
                if "no format" in said
                else "other form"
            )
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
        return _difference(fadapt.apply(model, params, **ids), theirs.eval()(**ids))


def _difference(one: Any, two: Any) -> float:
    return float((one.logits.float() - two.logits.float()).abs().max())


def cost(
    model: nn.Module, method: fadapt.Method, batch: Any, dtype: Any, lora: Any, rounds: int
) -> dict[str, Any]:
    """A step's milliseconds and peak, beside those of LoRA's step in turn with it."""
    step, leaves = _step(model, method, batch, dtype)
    numbers: dict[str, Any] = {"trainable": sum(t.numel() for t in leaves)}
    if not leaves:
        return {**numbers, "time": None, "memory": None}
    first = float(step())
    pairs = [(milliseconds(step), milliseconds(lora)) for _ in range(rounds + WARMUP)][WARMUP:]
    peak, lora_peak = peak_bytes(step), peak_bytes(lora)
    return {
        **numbers,
        # Of neighbours in time, so that other work on the machine falls on both alike.
        "time": statistics.median(mine / theirs for mine, theirs in pairs),
        "memory": peak / lora_peak,
        "milliseconds": statistics.median(mine for mine, _ in pairs),
        "peak_mib": peak / 2**20,
        "loss_first": first,
        "loss_last": float(step()),
    }


def _step(model: nn.Module, method: fadapt.Method, batch: Any, dtype: Any) -> Any:
    params = fresh(model, method, {"input_ids": batch["input_ids"][:1]}, dtype)
    leaves = fadapt.trainable(params)
    if not leaves:
        return None, leaves
    return training_step(lambda: fadapt.run(model, params, batch), leaves), leaves


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each method."""
    dtype = getattr(torch, args.dtype)
    adapter_dtype = getattr(torch, args.adapter_dtype) if args.adapter_dtype else None
    model = qwen3(args.hidden, args.layers, args.vocab, args.device, dtype)
    batch = tokens(args.rows, args.tokens, args.vocab, args.device)
    few = {k: t[:1, :64] for k, t in batch.items()}
    # Small and in float32, with biases: what is equal and of which rank is no matter of size.
    exact = qwen3(512, 1, 256, bias=True)
    ids = tokens(1, 16, 256)
    lora = _step(model, fadapt.LoRA(r=args.r), batch, adapter_dtype)[0]
    lora()
    for name, method in methods(args.r, args.wide).items():
        if args.only.lower() not in name.lower():
            continue
        row: dict[str, Any] = {"method": name}
        try:
            row["identity"] = identity(model, method, few)
            row["rank"], row["parity"] = args.known(exact, name, method, ids)
            row.update(cost(model, method, batch, adapter_dtype, lora, args.rounds))
        except Exception as error:  # the other methods are measured all the same
            row["error"] = f"{type(error).__name__}: {error}".replace("\n", " ")
        gc.collect()
        yield row


def exact_columns(source: Path | None) -> Any:
    """What measures rank and parity: here, with PEFT if it is installed, or another's file."""
    if source is not None:
        rows = json.loads(source.read_text())["rows"]
        known = {row["method"]: (row.get("rank"), row.get("parity")) for row in rows}
        return lambda model, name, method, ids: known.get(name, (None, None))
    if find_spec("peft") is None:
        print("PEFT is not installed: its column stays empty", file=sys.stderr)
        return lambda model, name, method, ids: (rank(model, method, ids), None)
    return lambda model, name, method, ids: (
        rank(model, method, ids),
        parity(model, method, ids),
    )


def machine(device: str) -> dict[str, Any]:
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(), **found}
    return {"device": f"{os.cpu_count()} CPU cores", "threads": torch.get_num_threads(), **found}


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    where = ", ".join(f"{k} {v}" for k, v in record["machine"].items())
    sizes = ", ".join(f"{k} {v}" for k, v in record["sizes"].items())
    lines = [f"{where}; {sizes}.", "", "| " + " | ".join(COLUMNS.values()) + " |"]
    lines.append("|---" * len(COLUMNS) + "|")
    for row in record["rows"]:
        if "error" in row:
            lines.append(f"| {row['method']} | {row['error'][:120]} |" + " |" * (len(COLUMNS) - 2))
            continue
        lines.append("| " + " | ".join(_cell(key, row.get(key)) for key in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if key == "trainable":
        return f"{value:,}"
    if key in ("identity", "parity"):
        return f"{value:.0e}" if value else "0"
    return f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = dict(hidden=512, layers=2, vocab=2048, tokens=512, rows=1, r=16, wide=32, rounds=5)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the base")
    parser.add_argument("--adapter-dtype", default=None, help="of the adapters; float32 if not set")
    parser.add_argument("--only", default="", help="a part of the methods' names")
    parser.add_argument(
        "--parity-from", type=Path, default=None, help="another's JSON: rank, parity"
    )
    parser.add_argument("--out", type=Path, default=Path("out/methods"), help="without a suffix")
    args = parser.parse_args()
    args.known = exact_columns(args.parity_from)

    names = (*sizes, "dtype", "adapter_dtype")
    shown = {name: getattr(args, name) or "float32" for name in names}
    record = {"machine": machine(args.device), "sizes": shown, "rows": []}
    for row in measure(args):
        record["rows"].append(row)
        shown_row = {k: _cell(k, row.get(k)) for k in COLUMNS}
        cells = [f"{v:>14}" for v in shown_row.values()]
        print(*([*cells[:1], row["error"][:300]] if "error" in row else cells), flush=True)
        # What is there so far is kept, should a later method end the process.
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(record))
    if any("error" in row for row in record["rows"]):
        sys.exit("some methods could not be measured")


if __name__ == "__main__":
    main()
