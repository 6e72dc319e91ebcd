"""Checks that run in several processes: one group of them for a whole file of tests."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120

Check = Callable[[int, int, Path], None]
"""(rank, processes, a directory of its own that all share)."""


def _work(rank: int, world: int, checks: dict[str, Check], where: str) -> None:
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{where}/store", timeout=timedelta(seconds=SECONDS), rank=rank,
        world_size=world,
    )  # fmt: skip
    found = {}
    for name, check in checks.items():
        directory = Path(where) / name
        directory.mkdir(exist_ok=True)
        try:
            check(rank, world, directory)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        everyone: list = [None] * world
        dist.all_gather_object(everyone, found[name])
        found[name] = "\n".join(f"rank {r}: {text}" for r, text in enumerate(everyone) if text)
        if rank == 0:  # after each, as a failure may leave the group unusable
            (Path(where) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(world: int, checks: dict[str, Check], where: Path) -> dict[str, str]:
    """{check: what failed in it, "" if nothing}, of processes that run all of them in turn."""
    found = dict.fromkeys(checks, "did not run: an earlier check left the processes apart")
    try:
        mp.spawn(_work, (world, checks, str(where)), nprocs=world)
    except Exception as error:
        found = {name: f"{text}\n{error}" for name, text in found.items()}
    file = where / "found.json"
    return found | (json.loads(file.read_text()) if file.exists() else {})
