"""Every method of fadapt adapts one frozen model to data that it has never seen.

A small transformer learns scikit-learn's handwritten digits and is frozen. Then the digits are
rotated by 90 degrees and inverted, and each method in turn learns to read them, over the same
frozen weights. With the adapter off, the logits on the original digits are the base's to the bit.
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
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fadapt

TARGETS = "_proj"  # a regex: the linear maps of attention and MLP
STEPS, BATCH = 60, 64
EVALUATE_EVERY = 10

LEFT_OUT = ("Method", "Chain", "SSteer")  # the contract, a composite, and one that never trains

# Methods that are not named here run with their defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"r": 4} for name in ("LoRA", "RsLoRA", "PiSSA", "DoRA", "DeLoRA", "EVA", "CorDA")},
    "OFT": {"block_size": 8},
    "RoAd": {"group_size": 8},
}

# A few numbers a site, which start at zero, take larger steps than the factors of a matrix.
FEW = ("AntiPaSTO", "AntiPaSTOASVD", "AntiPaSTOAblate", "AntiPaSTOCorDA", "AntiPaSTORotation",
       "IA3", "IA3FF", "RoAd")  # fmt: skip
LEARNING_RATE = dict.fromkeys(FEW, 0.1)
DEFAULT_LEARNING_RATE = 0.01


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm1(h)
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.o_proj(mixed)
        return h + self.down_proj(F.gelu(self.up_proj(self.norm2(h))))


class Reader(nn.Module):
    """Images (batch, 8, 8) -> logits (batch, 10). Each row of an image is a token."""

    def __init__(self, width: int = 32, heads: int = 2, depth: int = 2):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        h = self.embed(images) + self.position
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h).mean(1))


@dataclass
class Digits:
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same random batches each time."""
        rng = torch.Generator().manual_seed(0)
        for _ in range(steps):
            i = torch.randint(len(self.train_x), (BATCH,), generator=rng)
            yield self.train_x[i], self.train_y[i]

    def shifted(self) -> Digits:
        """The same digits, lying on their side, white on black."""

        def shift(x: Tensor) -> Tensor:
            return 1 - x.rot90(dims=(1, 2))

        return Digits(shift(self.train_x), self.train_y, shift(self.test_x), self.test_y)


@dataclass
class Result:
    name: str
    trainable: int
    curve: list[float]
    off: float
    seconds: float


def load() -> Digits:
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[500:], order[:500]
    return Digits(x[train], y[train], x[test], y[test])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()


def train_base(digits: Digits, steps: int = 300) -> Reader:
    torch.manual_seed(0)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for x, y in digits.batches(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


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
    try:
        return fadapt.init(model, {TARGETS: method})
    except fadapt.CalibrationError:
        return fadapt.init(model, {TARGETS: method}, calib=[x for x, _ in digits.batches(4)])


def adapt(model: Reader, method: fadapt.Method, original: Digits, digits: Digits) -> Result:
    name, start = title(method), time.perf_counter()
    base_logits = model(original.test_x)
    params = fresh(model, method, digits)
    lr = LEARNING_RATE.get(type(method).__name__, DEFAULT_LEARNING_RATE)
    optimizer = torch.optim.AdamW(fadapt.trainable(params), lr=lr, weight_decay=0)

    def score() -> float:
        with torch.no_grad():
            return accuracy(fadapt.apply(model, params, digits.test_x), digits.test_y)

    curve = [score()]
    for step, (x, y) in enumerate(digits.batches(STEPS), 1):
        loss = fadapt.run(model, params, x, lambda logits, _, y=y: F.cross_entropy(logits, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fadapt.project(params)
        if step % EVALUATE_EVERY == 0:
            curve.append(score())

    off = fadapt.apply(model, fadapt.scale(params, 0.0), original.test_x)
    for what, logits in (("with the adapter off", off), ("itself", model(original.test_x))):
        if not torch.equal(logits, base_logits):
            sys.exit(f"{name}: the model {what} differs from the base on the original digits")
    trainable = sum(leaf.numel() for leaf in fadapt.trainable(params))
    return Result(
        name, trainable, curve, accuracy(off, original.test_y), time.perf_counter() - start
    )


def table(results: list[Result]) -> Table:
    columns = ("trainable", "before", "after", "original, off", "seconds")
    result = Table("method", title="Accuracy on held-out digits, shifted (and original)")
    for column in columns:
        result.add_column(column, justify="right")
    for r in results:
        scores = (f"{a:.1%}" for a in (r.curve[0], r.curve[-1], r.off))
        result.add_row(r.name, f"{r.trainable:,}", *scores, f"{r.seconds:.1f}")
    return result


def draw(results: list[Result], path: Path) -> None:
    """One panel a method, with all the others behind it in grey."""
    columns = math.ceil(math.sqrt(len(results)))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(2.6 * columns, 2 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    steps = range(0, STEPS + 1, EVALUATE_EVERY)
    for axis, shown in zip_longest(axes.flat, results):
        if shown is None:
            axis.axis("off")
            continue
        for other in results:
            axis.plot(steps, other.curve, color="0.85", linewidth=1)
        axis.plot(steps, shown.curve, color="C0", linewidth=2)
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
    picture = parser.parse_args().picture

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
                results.append(adapt(model, method, original, shifted))
            except fadapt.CalibrationError:
                uncalibrated.append(name)

    console.print(table(results))
    if uncalibrated:
        console.print(f"needs calibration: {', '.join(uncalibrated)}")
    draw(results, picture)
    console.print(f"learning curves: {picture}")
    if weak := [r.name for r in results if r.curve[-1] < r.curve[0] + 0.2]:
        sys.exit(f"not clearly above the unadapted base: {', '.join(weak)}")


if __name__ == "__main__":
    main()
