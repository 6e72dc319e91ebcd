"""48 fine-tunes of one frozen model in one process, at once.

The digits transformer of ``_digits.py`` learns to read rotated, inverted digits with four methods,
three ranks and four learning rates, all in one folded pass per step. Every seventh of the trials
is then trained alone, by the same loop on the same batches, to see what one after the other would
take, and that it is the same training.

    python examples/sweep.py [--picture out/sweep.png] [--directory out/sweep] [--steps 150]

Over several processes, each of which trains its share of the trials, with the same report:

    torchrun --nproc-per-node 2 examples/sweep.py
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from _digits import TARGETS, Labelled, accuracy_on, load, loss_fn, make_batches, train_base

import fadapt

STEPS, BATCH, EVALUATE_EVERY = 150, 8, 30
SAMPLED = slice(None, None, 7)
TOGETHER = 12  # in a pass: with a number, the passes are the same on any number of processes
COMPARED = 20  # steps; later, rounding has grown into another trajectory


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
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    number, compared = arguments.steps, min(COMPARED, arguments.steps)

    torch.set_num_threads(1)  # the model is too small to share out
    started = time.perf_counter()
    original = load()
    digits = original.shifted()
    model = Labelled(train_base(original))
    batches = make_batches(digits, number, BATCH)
    trials = make_trials()

    def train(chosen: list[fadapt.Trial], **options) -> fadapt.Report:
        return fadapt.sweep(
            model,
            chosen,
            batches,
            steps=number,
            loss_fn=loss_fn,
            eval=accuracy_on(digits.test_x, digits.test_y),
            eval_every=EVALUATE_EVERY,
            goal="max",
            max_adapters=TOGETHER,
            **options,
        )

    start = time.perf_counter()
    report = train(trials, directory=arguments.directory)
    together = time.perf_counter() - start
    first = os.environ.get("RANK", "0") == "0"  # every process has the whole report
    if first:
        print(report)
        report.plot(arguments.picture)
        print(f"curves: {arguments.picture}")

    start = time.perf_counter()
    sample = trials[SAMPLED]
    alone = [train([trial]) for trial in sample]
    one_by_one = (time.perf_counter() - start) / len(sample) * len(trials)
    steps = range(1, compared + 1)
    gap = max(
        abs(float(report.losses[step][i] - single.losses[step][0]))
        for i, single in zip(range(len(trials))[SAMPLED], alone, strict=True)
        for step in steps
    )
    if first:
        print(
            f"{len(trials)} trials x {number} steps of {BATCH} images ({8 * BATCH} tokens): "
            f"{together:.1f} s together, {one_by_one:.1f} s one after the other (from "
            f"{len(sample)} of them): {one_by_one / together:.1f}x. Losses of the first {compared} "
            f"steps differ by at most {gap:.0e}"
        )
        print(f"everything: {time.perf_counter() - started:.0f} s")
    if gap > 1e-3 or (report.best.score < 0.7 and number >= STEPS):
        sys.exit("the sweep did not learn, or not as single runs do")


if __name__ == "__main__":
    main()
