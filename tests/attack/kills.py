"""Sweeps that are killed at random moments: python -m tests.attack.kills --sweeps 20.

Each sweep runs in a process of its own, which SIGKILL ends up to so many times, and is called again
until it returns. Report, weights, log and adapters must be those of the sweep that nobody killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import fadapt
from tests.attack.checkpoints import outcome
from tests.test_resume import Loss, loader_eval, net, rows

METHODS = (
    fadapt.LoRA(r=2), fadapt.DoRA(r=3), fadapt.IA3(), fadapt.OFT(block_size=2, coft=0.3),
    fadapt.PiSSA(r=1), fadapt.Chain((fadapt.LoRA(r=1), fadapt.LoRA(r=2))),
)  # fmt: skip


def trials() -> list[fadapt.Trial]:
    chosen = [
        fadapt.Trial(method, lr=0.01 * (i + 1), accumulate=(1, 2, 4)[i % 3], name=f"trial {i}")
        for i, method in enumerate(METHODS)
    ]
    return [
        *chosen,
        fadapt.Trial(fadapt.LoRA(r=2), lr=1e30, name="wild"),
        fadapt.Trial(fadapt.LoRA(r=2), lr=1e-3, lr_ratio={"B": 16.0, "A": 0.0}, name="B alone"),
    ]


def shuffled(directory: Path) -> fadapt.Report:
    """Dropout, a shuffling loader, halving, accumulation, a trial that diverges."""
    return fadapt.sweep(
        net(), trials(), DataLoader(rows(), batch_size=4, shuffle=True), steps=24, loss_fn=Loss(),
        eval=list(loader_eval()), eval_every=5, halving=fadapt.Halving(first=8, factor=1.5),
        optimizer=torch.optim.NAdam, log_every=3, seed=5,
        directory=fadapt.Checkpoints(directory, every=1),
    )  # fmt: skip


def one_by_one(directory: Path) -> fadapt.Report:
    """Trials that each run alone, with batches in an order of their own."""
    return fadapt.sweep(
        net(), trials(), list(loader_eval()) * 3, steps=12, loss_fn=Loss(), order="own",
        max_adapters=1, optimizer=torch.optim.Adafactor,
        directory=fadapt.Checkpoints(directory, every=1),
    )  # fmt: skip


SWEEPS: dict[str, Callable[[Path], fadapt.Report]] = {
    "shuffled": shuffled, "one by one": one_by_one,
}  # fmt: skip


def forked(work: Callable[[], Any]) -> int:
    """The process that does it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def killed(sweep: Callable[[Path], Any], directory: Path, whole: float, rng: random.Random) -> int:
    """Runs a sweep to its end, killing it on the way; how often."""
    kills, most = 0, rng.randint(1, 4)
    while True:
        child = forked(lambda: sweep(directory))
        if kills < most:
            time.sleep(rng.uniform(0, whole / 2))
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                continue
        else:
            _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0, "the resumed sweep failed"
        return kills


def differences(directory: Path, whole: Path, sweep: Callable[[Path], fadapt.Report]) -> list[str]:
    """What is not as in the directory of a sweep that ran through."""
    found, names = (
        [],
        ("log.jsonl", *(f"adapters/{p.name}" for p in (whole / "adapters").iterdir())),
    )
    for name in names:
        here = directory / name
        if not here.exists():
            found.append(f"{name} is missing")
        elif here.read_bytes() != (whole / name).read_bytes():
            found.append(f"{name} differs")
    if len(list((directory / "adapters").iterdir())) != len(names) - 1:
        found.append("adapters of nobody")
    if list(directory.rglob("*.tmp")):
        found.append("left-over temporaries")
    if outcome(sweep(directory)) != outcome(sweep(whole)):
        found.append("the report differs")
    return found


def attack(sweeps: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Counts, and what went wrong."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    bad: list[str] = []
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        for name, sweep in SWEEPS.items():
            whole = Path(place, name)
            start = time.monotonic()
            os.waitpid(forked(lambda s=sweep, w=whole: s(w)), 0)
            seconds = time.monotonic() - start
            for i in range(sweeps):
                directory = Path(place, f"{name} {i}")
                counts[f"{name}: kills"] += killed(sweep, directory, seconds, rng)
                wrong = differences(directory, whole, sweep)
                counts[f"{name}: {'wrong' if wrong else 'right'}"] += 1
                bad += [f"{name} {i}: {text}" for text in wrong]
    return counts, bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweeps", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts, bad = attack(args.sweeps, args.seed)
    print("\n".join([*(f"{name:24}{n:6}" for name, n in counts.items()), *bad]))
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
