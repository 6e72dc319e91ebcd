"""One pass over the data starts five methods.

The digits transformer of ``_digits.py`` sees a few batches of rotated, inverted digits once. From
the statistics of that pass come EVA, CorDA, AntiPaSTO-CorDA, AntiPaSTO-ASVD and AntiPaSTO on the
directions that Wanda scores highest. What was shared is printed, and each start is compared bit by
bit with that of a calibration of its own.

    python examples/calibrate.py [--steps 60]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

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
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fadapt
from fadapt import Config, Stats
from fadapt.calibration import wanda_scores

METHODS = {
    "EVA": fadapt.EVA(4),
    "CorDA": fadapt.CorDA(4),
    "AntiPaSTO-CorDA": fadapt.AntiPaSTOCorDA(16),
    "AntiPaSTO-ASVD": fadapt.AntiPaSTOASVD(16),
    "AntiPaSTO, Wanda": fadapt.AntiPaSTO(16, select="wanda"),
}
STEPS = 60


def states(stats: Stats) -> Table:
    """What is kept, and for whom."""
    table = Table("fed by", "side", "state", "KiB", title="one pass")
    groups = {group[0]: group for group in stats.shared}
    for (site, side), kinds in stats.states.items():
        sites = groups.get(site, [site]) if side == "in" else [site]
        short = [name.removeprefix("layers.").removesuffix(".weight") for name in sites]
        for reduction, state in kinds.items():
            size = sum(t.nbytes for t in state.values()) / 1024
            table.add_row(" ".join(short), side, type(reduction).__name__, f"{size:.1f}")
    return table


def train(model: Reader, params: fadapt.Params, digits: Digits, lr: float, steps: int) -> float:
    """Accuracy on the shifted digits after some steps."""
    optimizer = torch.optim.AdamW(fadapt.trainable(params), lr=lr, weight_decay=0)
    for x, y in digits.batches(steps):
        optimizer.zero_grad()
        fadapt.run(model, params, x, lambda logits, _, y=y: F.cross_entropy(logits, y)).backward()
        optimizer.step()
    with torch.no_grad():
        return accuracy(fadapt.apply(model, params, digits.test_x), digits.test_y)


def same(a: fadapt.Params, b: fadapt.Params) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(leaf, b[name].leaves[k])
        for name, p in a.items()
        for k, leaf in p.leaves.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each method")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    console = Console()
    original = load()
    model, digits = train_base(original), original.shifted()
    batches: list[Tensor] = [x for x, _ in digits.batches(8)]
    configs = {name: Config({TARGETS: method}) for name, method in METHODS.items()}

    start = time.perf_counter()
    stats = fadapt.observe(model, list(configs.values()), batches)
    together = time.perf_counter() - start
    console.print(states(stats))
    for group in stats.shared:
        console.print(f"one tensor feeds {', '.join(group)}: one state for {len(group)} sites")

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "stats.safetensors"
        stats.save(path)
        size = path.stat().st_size
        stats = Stats.load(path, model)  # once calibrated, never again for this base
    console.print(
        f"{stats}, {stats.tokens(next(iter(stats.streams)))} tokens, {size:,} bytes on disk"
    )

    table = Table("method", "sites", "trainable", "equal to its own pass", "before", "after")
    before = accuracy(model(digits.test_x), digits.test_y)
    start = time.perf_counter()
    own = {name: fadapt.observe(model, config, batches) for name, config in configs.items()}
    apart = time.perf_counter() - start
    for name, config in configs.items():
        params = fadapt.init(model, config, stats)
        equal = "yes" if same(params, fadapt.init(model, config, own[name])) else "to rounding"
        count = sum(leaf.numel() for leaf in fadapt.trainable(params))
        lr = LEARNING_RATE.get(type(METHODS[name]).__name__, DEFAULT_LEARNING_RATE)
        after = train(model, params, digits, lr, steps)
        table.add_row(name, str(len(params)), f"{count:,}", equal, f"{before:.1%}", f"{after:.1%}")
    console.print(table)
    console.print(f"one pass for all: {1e3 * together:.0f} ms; five passes: {1e3 * apart:.0f} ms")

    site, scores = next(iter(wanda_scores(model, stats).items()))
    weakest = int(scores.sum(0).argmin())
    console.print(f"Wanda: input {weakest} matters least to {site}")


if __name__ == "__main__":
    main()
