"""48 fine-tunes of one frozen model in one process, at once.

The digits transformer of ``digits.py`` learns to read rotated, inverted digits with four methods,
three ranks and four learning rates, all in one folded pass per step. Every seventh of the trials
is then trained alone, by the same loop on the same batches, to see what one after the other would
take, and that it is the same training.

    python examples/sweep.py [--picture out/sweep.png] [--directory out/sweep]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import TARGETS, Digits, Reader, load, train_base
from torch import Tensor, nn

import fadapt

STEPS, BATCH, EVALUATE_EVERY = 150, 8, 30
SAMPLED = slice(None, None, 7)
COMPARED = 20  # steps; later, rounding has grown into another trajectory


class Labelled(nn.Module):
    """Takes a batch with its labels, which only the loss reads."""

    def __init__(self, reader: Reader):
        super().__init__()
        self.reader = reader

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.reader(images)


Batch = dict[str, Tensor]


def loss_fn(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch["labels"])


def make_batches(digits: Digits, steps: int, size: int) -> list[Batch]:
    """Random batches, the same each time."""
    rng = torch.Generator().manual_seed(0)
    picks = torch.randint(len(digits.train_x), (steps, size), generator=rng)
    return [{"images": digits.train_x[i], "labels": digits.train_y[i]} for i in picks]


def accuracy_on(images: Tensor, labels: Tensor):
    """An evaluation of all adapters in one forward."""

    def evaluate(model: Labelled, stack: fadapt.Stack) -> dict[str, Tensor]:
        logits = fadapt.apply(model, stack, images, labels)  # (adapters, images, classes)
        return {"accuracy": (logits.argmax(-1) == labels).double().mean(-1)}

    return evaluate


def make_trials() -> list[fadapt.Trial]:
    trials = []
    for method in (fadapt.LoRA, fadapt.RsLoRA, fadapt.PiSSA, fadapt.DoRA):
        configs = [fadapt.Config({TARGETS: method(r=r)}) for r in (2, 4, 8)]
        rates = [1e-3, 3e-3, 1e-2, 3e-2]
        trials += fadapt.grid(configs, lr=rates, warmup=10, schedule="cosine", clip=1.0)
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, default=Path("out/sweep.png"), metavar="PATH")
    parser.add_argument("--directory", type=Path, metavar="PATH", help="checkpoints and log")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the model is too small to share out
    started = time.perf_counter()
    original = load()
    digits = original.shifted()
    model = Labelled(train_base(original))
    batches = make_batches(digits, STEPS, BATCH)
    trials = make_trials()

    def train(chosen: list[fadapt.Trial], **options) -> fadapt.Report:
        return fadapt.sweep(
            model,
            chosen,
            batches,
            steps=STEPS,
            loss_fn=loss_fn,
            eval=accuracy_on(digits.test_x, digits.test_y),
            eval_every=EVALUATE_EVERY,
            goal="max",
            **options,
        )

    start = time.perf_counter()
    report = train(trials, directory=arguments.directory)
    together = time.perf_counter() - start
    print(report)
    report.plot(arguments.picture)
    print(f"curves: {arguments.picture}")

    start = time.perf_counter()
    sample = trials[SAMPLED]
    alone = [train([trial]) for trial in sample]
    one_by_one = (time.perf_counter() - start) / len(sample) * len(trials)
    steps = range(1, COMPARED + 1)
    gap = max(
        abs(float(report.losses[step][i] - single.losses[step][0]))
        for i, single in zip(range(len(trials))[SAMPLED], alone, strict=True)
        for step in steps
    )
    print(
        f"{len(trials)} trials x {STEPS} steps of {BATCH} images ({8 * BATCH} tokens): "
        f"{together:.1f} s together, {one_by_one:.1f} s one after the other (from {len(sample)} of "
        f"them): {one_by_one / together:.1f}x. Losses of the first {COMPARED} steps differ by at "
        f"most {gap:.0e}"
    )
    print(f"everything: {time.perf_counter() - started:.0f} s")
    if report.best.score < 0.7 or gap > 1e-3:
        sys.exit("the sweep did not learn, or not as single runs do")


if __name__ == "__main__":
    main()
