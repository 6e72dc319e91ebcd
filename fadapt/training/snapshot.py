"""What a checkpoint of a sweep holds, and how a loop goes on from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..params.params import Train
from . import checkpoint
from .engine.flat_params import LAYOUT, FlatParams
from .leaderboard import Standing


def write(loop: Any, directory: Path) -> None:
    """Writes the loop's state between two steps.

    Raises:
        CheckpointError: the disk refuses; the earlier checkpoint is untouched.
    """
    numbers, states = checkpoint.pack_states(loop.optimizer.states())
    position, epoch = loop.data.state()
    history, records = loop.history.state()
    meta = {
        "kind": "sweep",
        "sweep": description(loop),
        "starts": loop.digests,
        "step": loop.step,
        "seconds": loop.elapsed(),
        "chunk": loop.chunk,
        "chosen": loop.runner.chosen,
        "members": loop.flat.order,
        "metric": loop.board.metric,
        "standings": [dataclasses.asdict(x) for x in loop.board.standings],
        "optimizer": numbers,
        "position": position,
        "history": history,
    }
    parts = {
        "rows": dict(_rows(loop.flat)),
        "optimizer": states,
        "best": _flatten(loop.board.best),
        "left": _flatten(loop.board.left),
        "epoch": epoch,
        "generators": loop.generators.state(),
        "history": records,
    }
    checkpoint.write(directory, meta, parts)


def restore(loop: Any, directory: Path) -> None:
    """Brings a fresh loop to the state of the checkpoint, if there is one.

    Raises:
        CheckpointError: a damaged file, or initial adapters that are no longer the same.
        ConfigError: the checkpoint of another sweep.
    """
    found = checkpoint.read(directory)
    if found is None:
        return
    meta, parts = found
    checkpoint.check_same(directory, meta["sweep"], description(loop))
    if changed := [n for n, digest in loop.digests.items() if meta["starts"][n] != digest]:
        raise CheckpointError(
            f"{directory}: {changed[0]} and {len(changed) - 1} more trials begin with other values "
            "than in the checkpoint: another base model, or other calibration data"
        )
    loop.shrink(meta["members"])
    loop.rechunk(meta.get("chosen"))
    loop.board.left = _unflatten(parts.get("left", {}))
    loop.board.best = _unflatten(parts.get("best", {}))
    loop.board.metric = meta["metric"]
    loop.board.standings = [Standing(**x) for x in meta["standings"]]
    for key, values in _rows(loop.flat):
        values.copy_(parts["rows"][key])
    devices = {trial: block.device for trial, block, _ in loop.flat.rows()}
    states = checkpoint.unpack_states(meta["optimizer"], parts.get("optimizer", {}), devices)
    loop.optimizer.load_states(states)
    loop.history.restore(meta["history"], parts.get("history", {}))
    loop.step, loop.seconds, loop.chunk = meta["step"], meta["seconds"], meta["chunk"]
    loop.data.restore(meta["position"], parts.get("epoch", {}))
    # Last: the feed has used the generators to find its place.
    loop.generators.restore(parts["generators"])
    loop.quieten()


def description(loop: Any) -> dict[str, Any]:
    """What must be the same in a sweep that goes on: all that its numbers depend on."""
    s = loop.settings
    trials = dict(zip(loop.board.names, loop.board.trials, strict=True))
    data = {
        **{f"trial {name}": trial.to_json() for name, trial in trials.items()},
        "layout": LAYOUT,
        "names": list(trials),
        "steps": loop.steps,
        "optimizer": getattr(s.optimizer, "__qualname__", repr(s.optimizer)),
        "optimizer_args": {k: repr(v) for k, v in s.optimizer_args.items()},
        "eval_every": s.eval_every,
        "goal": s.goal,
        "halving": s.halving and dataclasses.asdict(s.halving),
        "order": s.order,
        "per_adapter": s.per_adapter,
        "seed": s.seed,
    }
    return json.loads(json.dumps(data))


def _rows(flat: FlatParams) -> Iterator[tuple[str, Tensor]]:
    """Each trial's own values and gradients, views, by name."""
    for trial, block, row in flat.rows():
        for kind, buffers in (("value", block.values), ("grad", block.grads)):
            for k, view in enumerate(block.row(row, buffers)):
                yield f"{trial}|{k}|{kind}", view


def _flatten(trees: dict[int, Train]) -> dict[str, Tensor]:
    return {
        f"{trial}|{site}|{leaf}": tensor
        for trial, train in trees.items()
        for site, leaves in train.items()
        for leaf, tensor in leaves.items()
    }


def _unflatten(tensors: dict[str, Tensor]) -> dict[int, Train]:
    trees: dict[int, Train] = {}
    for key, tensor in tensors.items():
        trial, site, leaf = key.split("|")
        trees.setdefault(int(trial), {}).setdefault(site, {})[leaf] = tensor
    return trees
