"""Every method of fadapt adapts one frozen model to data that it has never seen.

A small transformer learns scikit-learn's handwritten digits and is frozen. Then the digits are
rotated by 90 degrees and inverted, and each method in turn learns to read them, over the same
frozen weights. With the adapter off, the logits on the original digits are the base's to the bit.

    python examples/digits.py [--picture out/digits.png] [--steps 60]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _digits import (
    DEFAULT_LEARNING_RATE,
    LEARNING_RATE,
    TARGETS,
    Digits,
    Reader,
    accuracy,
    load,
    train_base,
)
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fadapt

STEPS = 60

# The contract, composites, what as_lora returns, one that never trains, and one for embeddings,
# which this model has not.
LEFT_OUT = ("Method", "Chain", "Sum", "TruncatedLoRA", "SSteer", "TrainableTokens")

# Biases alone do not turn the digits back; all others have to.
MODEST = ("BitFit",)

# Methods that are not named here run with their defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"r": 4} for name in ("LoRA", "RsLoRA", "PiSSA", "DoRA", "DeLoRA", "EVA", "CorDA")},
    **{name: {"r": 4} for name in ("OLoRA", "MiCA", "KaSA", "LoRAGA", "ReFT", "AdaLoRA", "PSOFT")},
    **{name: {"r": 4} for name in ("LoHa", "LoKr", "HiRA", "GraLoRA")},
    "MiSS": {"r": 8},
    "SHiRA": {"r": 4},
    "RandLoRA": {"r": 8, "alpha": 80},
    "TinyLoRA": {"r": 16},
    "C3A": {"block_size": 8},
    "FourierFT": {"n_frequency": 200},
    "OFT": {"block_size": 8},
    "RoAd": {"group_size": 8},
}


@dataclass
class Result:
    name: str
    trainable: int
    curve: list[float]
    off: float
    seconds: float


def all_methods() -> Iterator[fadapt.Method]:
    """An instance of every public method, so that a new one appears here by itself."""
    for name, cls in sorted(vars(fadapt).items()):
        if isinstance(cls, type) and issubclass(cls, fadapt.Method) and name not in LEFT_OUT:
            yield cls(**SETTINGS.get(name, {}))
    yield fadapt.AntiPaSTO(r=16, select="wanda")  # on directions that data choose


def title(method: fadapt.Method) -> str:
    return " ".join(filter(None, (type(method).__name__, getattr(method, "select", None))))


def fresh(model: Reader, method: fadapt.Method, digits: Digits) -> fadapt.Params:
    """Untrained adapters; methods that need statistics see a few batches of the new digits."""
    rules = {TARGETS if method.usual_kind == "linear" else "": method}
    try:
        return fadapt.init(model, rules)
    except fadapt.CalibrationError:
        batches = list(digits.batches(4))
        labels = iter([y for _, y in batches])
        return fadapt.init(
            model,
            rules,
            calib=[x for x, _ in batches],
            # For LoRAGA, which starts at the gradient of the loss.
            loss_fn=lambda logits, _: F.cross_entropy(logits, next(labels)),
        )


def adapt(
    model: Reader, method: fadapt.Method, original: Digits, digits: Digits, steps: int
) -> Result:
    name, start = title(method), time.perf_counter()
    base_logits = model(original.test_x)
    params = fresh(model, method, digits)
    lr = LEARNING_RATE.get(type(method).__name__, DEFAULT_LEARNING_RATE)
    optimizer = torch.optim.AdamW(fadapt.trainable(params), lr=lr, weight_decay=0)

    def score() -> float:
        with torch.no_grad():
            return accuracy(fadapt.apply(model, params, digits.test_x), digits.test_y)

    curve = [score()]
    for step, (x, y) in enumerate(digits.batches(steps), 1):
        loss = fadapt.run(model, params, x, lambda logits, _, y=y: F.cross_entropy(logits, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fadapt.project(params)
        if step % interval(steps) == 0:
            curve.append(score())

    off = fadapt.apply(model, fadapt.scale(params, 0.0), original.test_x)
    for what, logits in (("with the adapter off", off), ("itself", model(original.test_x))):
        if not torch.equal(logits, base_logits):
            sys.exit(f"{name}: the model {what} differs from the base on the original digits")
    trainable = sum(leaf.numel() for leaf in fadapt.trainable(params))
    return Result(
        name, trainable, curve, accuracy(off, original.test_y), time.perf_counter() - start
    )


def interval(steps: int) -> int:
    """Steps between evaluations."""
    return max(steps // 6, 1)


def table(results: list[Result]) -> Table:
    columns = ("trainable", "before", "after", "original, off", "seconds")
    result = Table("method", title="Accuracy on held-out digits, shifted (and original)")
    for column in columns:
        result.add_column(column, justify="right")
    for r in results:
        scores = (f"{a:.1%}" for a in (r.curve[0], r.curve[-1], r.off))
        result.add_row(r.name, f"{r.trainable:,}", *scores, f"{r.seconds:.1f}")
    return result


def draw(results: list[Result], steps: int, path: Path) -> None:
    """One panel a method, with all the others behind it in grey."""
    columns = math.ceil(math.sqrt(len(results)))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(2.6 * columns, 2 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    ticks = range(0, steps + 1, interval(steps))
    for axis, shown in zip_longest(axes.flat, results):
        if shown is None:
            axis.axis("off")
            continue
        for other in results:
            axis.plot(ticks, other.curve, color="0.85", linewidth=1)
        axis.plot(ticks, shown.curve, color="C0", linewidth=2)
        axis.set_title(f"{shown.name}  {shown.curve[-1]:.0%}", fontsize=10)
        axis.set_ylim(0, 1)
        axis.tick_params(labelbottom=True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("training step")
    figure.supylabel("accuracy on shifted digits")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("out/digits.png"), metavar="PATH")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each method")
    arguments = parser.parse_args()
    steps, picture = arguments.steps, arguments.picture

    torch.set_num_threads(1)  # the model is too small to share out
    console = Console()
    original = load()
    shifted = original.shifted()
    methods = list(all_methods())
    results: list[Result] = []
    uncalibrated: list[str] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("base", total=len(methods) + 1)
        model = train_base(original)
        for method in methods:
            name = title(method)
            progress.update(task, advance=1, description=name)
            try:
                results.append(adapt(model, method, original, shifted, steps))
            except fadapt.CalibrationError:
                uncalibrated.append(name)

    console.print(table(results))
    if uncalibrated:
        console.print(f"needs calibration: {', '.join(uncalibrated)}")
    draw(results, steps, picture)
    console.print(f"learning curves: {picture}")
    weak = [r.name for r in results if r.curve[-1] < r.curve[0] + 0.2 and r.name not in MODEST]
    if weak and steps >= STEPS:
        sys.exit(f"not clearly above the unadapted base: {', '.join(weak)}")


if __name__ == "__main__":
    main()
