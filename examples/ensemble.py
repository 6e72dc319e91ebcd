"""A 16-member ensemble in one forward, and what it knows about what it does not know.

The digits transformer of ``_digits.py`` is frozen. Sixteen adapters, each with its own start and
its own order of the batches, learn its original digits in one sweep. All sixteen then read digits
that none of them has seen in one forward: upright ones, turned ones, and turned ones in white on
black. On the shifted digits the members disagree, which one member cannot tell of itself.

    python examples/ensemble.py [--steps 120]
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from _digits import TARGETS, Labelled, accuracy_on, load, loss_fn, make_batches, train_base
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fadapt

MEMBERS, STEPS, BATCH, BINS = 16, 120, 16, 10


def entropy(p: Tensor) -> Tensor:
    """In nats, of distributions along the last axis."""
    return -(p * p.clamp_min(1e-12).log()).sum(-1)


def calibration_error(p: Tensor, labels: Tensor) -> float:
    """Expected calibration error of (images, classes): |accuracy - confidence| over equal bins."""
    confidence, guess = p.max(-1)
    right = (guess == labels).float()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = [
        (right[bins == b].mean() - confidence[bins == b].mean()).abs() * (bins == b).float().mean()
        for b in bins.unique()
    ]
    return float(sum(gaps))


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The chance that a value of the first is above one of the second; ties count half."""
    difference = positive[:, None] - negative[None, :]
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # the model is too small to share out
    console = Console()
    digits = load()
    model = Labelled(train_base(digits, steps=120))
    trials = [
        fadapt.Trial({TARGETS: fadapt.LoRA(r=4)}, lr=1e-2, seed=i, schedule="cosine")
        for i in range(MEMBERS)
    ]
    start = time.perf_counter()
    report = fadapt.sweep(
        model,
        trials,
        make_batches(digits, steps, BATCH),
        steps=steps,
        loss_fn=loss_fn,
        order="own",
    )
    console.print(f"{MEMBERS} members trained in {time.perf_counter() - start:.1f} s, in one sweep")
    ensemble = fadapt.stack(list(report.params.values()))

    shifts = {"original": digits.test_x, "turned by 90 degrees": digits.test_x.rot90(dims=(1, 2))}
    shifts["turned, white on black"] = digits.shifted().test_x
    table = Table("test digits", title=f"{MEMBERS} members, one forward", min_width=100)
    columns = ("accuracy: one", "all", "calibration error: one", "all", "disagreement", "ms")
    for column in columns:
        table.add_column(column, justify="right")
    disagreements = {}
    for name, images in shifts.items():
        start = time.perf_counter()
        with torch.no_grad():
            logits = fadapt.apply(model, ensemble, images, digits.test_y)
        seconds = time.perf_counter() - start
        members = logits.softmax(-1)  # (members, images, classes)
        mean = members.mean(0)
        # What the members know together beyond each alone: the mutual information of prediction
        # and member.
        disagreements[name] = entropy(mean) - entropy(members).mean(0)
        labels = digits.test_y
        one = (members.argmax(-1) == labels).float().mean().item()
        error = sum(calibration_error(p, labels) for p in members) / MEMBERS
        table.add_row(
            name,
            f"{one:.1%}",
            f"{(mean.argmax(-1) == labels).float().mean():.1%}",
            f"{error:.3f}",
            f"{calibration_error(mean, labels):.3f}",
            f"{disagreements[name].mean():.3f}",
            f"{1000 * seconds:.0f}",
        )
    console.print(table)
    known, *unknown = disagreements.values()
    detected = [auroc(values, known) for values in unknown]
    console.print(
        "disagreement tells shifted digits from original ones with AUROC "
        + ", ".join(f"{d:.3f}" for d in detected)
    )
    accuracy = accuracy_on(digits.test_x, digits.test_y)(model, ensemble)["accuracy"]
    if steps >= STEPS and (accuracy.min() < 0.8 or min(detected) < 0.7):
        sys.exit("the ensemble did not learn, or does not notice the shift")


if __name__ == "__main__":
    main()
