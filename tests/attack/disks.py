"""Disks that refuse, and directories that change meanwhile: python -m tests.attack.disks.

A sweep runs again and again; each time another call of the operating system fails, one kind of
call after the other, until it has run through without. Each run ends in a CheckpointError or in
the right report, and when it is called again, it gives the report and the files of one that
nothing happened to.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fadapt
from tests.attack.checkpoints import outcome
from tests.attack.tally import SILENT, Tally, attempt

CALLS = (
    *("open", "write", "fsync", "replace", "mkdir", "unlink", "listdir", "scandir", "stat"),
    *("lstat", "ftruncate", "close"),
)
ROWS = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def score(model: nn.Module, stack: fadapt.Stack) -> torch.Tensor:
    return fadapt.apply(model, stack, ROWS[0]).square().mean((1, 2))


def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return output.square().mean()


def sweep(directory: Path, evaluate: Callable[..., Any] = score) -> fadapt.Report:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    trials = [fadapt.Trial(fadapt.LoRA(r=2), name="a"), fadapt.Trial(fadapt.IA3(), name="b")]
    return fadapt.sweep(
        net, trials, ROWS, loss_fn=loss, eval=evaluate, eval_every=2, progress=False,
        directory=fadapt.Checkpoints(directory, every=1, resume="anyway"),
    )  # fmt: skip


@contextmanager
def failing(call: str, number: int, directory: Path) -> Iterator[list[int]]:
    """Inside, the so manieth such call fails; gives how many there were."""
    count = [0]
    owners: list[Any] = [builtins, io] if call == "open" else [os]
    real = getattr(owners[0], call)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if call != "open" or str(args[0]).startswith(str(directory)):
            count[0] += 1
            if count[0] == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    for owner in owners:
        setattr(owner, call, fail)
    try:
        yield count
    finally:
        for owner in owners:
            setattr(owner, call, real)


def replaced(path: Path, by: Callable[[Path], Any]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    by(path)


def changes() -> dict[str, Callable[[Path], Any]]:
    """{what happens to the directory of a sweep while it runs: how}."""
    log, half, made = "log.jsonl", "checkpoint.safetensors", "adapters"
    return {
        "it vanishes": shutil.rmtree,
        "it is moved": lambda d: d.rename(f"{d} moved"),
        "it becomes a file": lambda d: replaced(d, Path.touch),
        "the log vanishes": lambda d: (d / log).unlink(),
        "the log is cut": lambda d: os.truncate(d / log, 5),
        "the log has another's line": lambda d: (d / log).write_text("{}\n"),
        "the log becomes a folder": lambda d: replaced(d / log, Path.mkdir),
        "the log links to itself": lambda d: replaced(d / log, lambda p: p.symlink_to(p)),
        "the checkpoint vanishes": lambda d: (d / half).unlink(),
        "the checkpoint becomes a folder": lambda d: replaced(d / half, Path.mkdir),
        "the checkpoint links to itself": lambda d: replaced(d / half, lambda p: p.symlink_to(p)),
        "adapters is a file": lambda d: (d / made).touch(),
        "adapters links elsewhere": lambda d: (d / made).symlink_to(d),
        "adapters links nowhere": lambda d: (d / made).symlink_to(d / "nowhere"),
        "the lock vanishes": lambda d: (d / ".lock").unlink(),
    }


def changing(directory: Path, change: Callable[[Path], Any]) -> Callable[..., Any]:
    """An eval whose second call changes the directory."""
    calls = []

    def evaluate(model: nn.Module, stack: fadapt.Stack) -> torch.Tensor:
        calls.append(stack)
        if len(calls) == 2:
            change(directory)
        return score(model, stack)

    return evaluate


def attack(calls: tuple[str, ...] = CALLS) -> Tally:
    """Each call once, and each change."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as name:
        whole, place = Path(name, "whole"), Path(name, "tried")
        wanted, log = outcome(sweep(whole)), (whole / "log.jsonl").read_bytes()

        def right(report: Any) -> bool:
            return outcome(report) == wanted

        def as_whole(report: Any) -> bool:
            clean = not list(place.rglob("*.tmp"))
            return right(report) and clean and (place / "log.jsonl").read_bytes() == log

        for call in calls:
            number, more = 0, True
            while more:
                number += 1
                with failing(call, number, place) as count:
                    end, said = attempt(lambda: sweep(place), right)
                tally.add("a call fails", f"{call} {number}", end, said)
                tally.add(
                    "then again", f"{call} {number}", *attempt(lambda: sweep(place), as_whole)
                )
                shutil.rmtree(place)
                more = count[0] >= number
        for what, change in changes().items():
            end, said = attempt(lambda c=change: sweep(place, changing(place, c)), right)
            tally.add("a directory changes", what, end, said)
            tally.add("and again", what, *attempt(lambda: sweep(place), right))
            for left in place.parent.glob("tried*"):
                replaced(left, lambda p: None)
        if sorted(p.name for p in Path(name).iterdir()) != ["whole"]:
            tally.add("elsewhere", "files", SILENT, str(sorted(Path(name).iterdir())))
    return tally


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    tally = attack()
    print(tally.table())
    raise SystemExit(bool(tally.bad))


if __name__ == "__main__":
    main()
