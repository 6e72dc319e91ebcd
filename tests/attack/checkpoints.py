"""Checkpoints and logs of sweeps, damaged or crafted: python -m tests.attack.checkpoints.

A sweep is stopped half way; its file is changed and the sweep called again. Damage must be refused
or leave the outcome as it was. A crafted file has a right checksum: what no sweep of these settings
can have written must be refused, and nothing in it may lead to another error, much less a crash.
"""

from __future__ import annotations

import argparse
import copy
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fadapt
from fadapt.training import checkpoint
from tests.attack.files import contents, craft, damage
from tests.attack.tally import Tally, attempt

Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]
STEPS, STOP = 6, 3
VALUES: tuple[Any, ...] = (
    None, 5, -1, 10**9, 2.5, float("nan"), True, "x", "", [], [7], [[]], {}, {"a": 1}, {"0": None},
)  # fmt: skip


class StopHereError(BaseException):
    pass


def loss_fn(output: Tensor, batch: Any) -> Tensor:
    return output.square().mean()


class Loader:
    """Batches that can be iterated again, but not be picked."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.ones(4, 8), torch.zeros(4, 8) + 0.5])


def go(directory: Path) -> fadapt.Report:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8))
    trials = [
        fadapt.Trial(fadapt.LoRA(r=2), name="a"),
        fadapt.Trial(fadapt.IA3(), accumulate=2, name="b"),
        fadapt.Trial(fadapt.LoRA(r=1), lr=1e30, name="c"),
        fadapt.Trial(fadapt.LoRA(r=3), lr=1e-9, lr_ratio={"B": 4.0}, name="d"),
    ]
    return fadapt.sweep(
        net, trials, Loader(), steps=STEPS, eval=[torch.ones(4, 8)], eval_every=1, loss_fn=loss_fn,
        halving=fadapt.Halving(first=2, factor=1.5), log_every=1, progress=False,
        directory=fadapt.Checkpoints(directory, every=1),
    )  # fmt: skip


def half_way(directory: Path) -> None:
    """Leaves the checkpoint of step STOP, as a process that is killed there."""
    write = checkpoint.write

    def stopping(path: Path, state: dict[str, Any]) -> None:
        write(path, state)
        if state["step"] == STOP:
            raise StopHereError

    checkpoint.write = stopping  # type: ignore[assignment]
    try:
        go(directory)
    except StopHereError:
        pass
    finally:
        checkpoint.write = write


def outcome(report: fadapt.Report) -> Any:
    """All that a report tells of the training, in a form that can be compared."""
    weights = {
        (kind, name, i): t.detach().tolist()
        for kind in ("params", "final")
        for name, params in getattr(report, kind).items()
        for i, t in enumerate(fadapt.trainable(params))
    }
    losses = {step: repr(row.tolist()) for step, row in report.losses.items()}
    scores = {s: {k: repr(v.tolist()) for k, v in m.items()} for s, m in report.scores.items()}
    results = [repr((r.name, r.status, r.step, r.score, r.reason)) for r in report.results]
    return weights, losses, scores, results


def crafted(meta: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Change]:
    """What no sweep of these settings can have written."""
    changes: dict[str, Change] = {}
    for key, own in meta.items():
        if key in ("format_version", "leaves"):
            continue
        changes[f"lacks {key}"] = lambda m, t, key=key: m.pop(key)
        for value in VALUES:
            # The time so far may be any number of seconds, and any sweep may have come apart.
            legal = (key == "seconds" and value == 2.5) or (key == "separate" and value is True)
            if repr(value) != repr(own) and not legal:
                changes[f"{key} = {value!r}"] = lambda m, t, k=key, v=value: m.update({k: v})
    for key, tensor in tensors.items():
        part = key.split("|")[0]
        changes[f"{key} gone"] = lambda m, t, key=key: t.pop(key)
        changes[f"{key} of another shape"] = lambda m, t, key=key: t.update({key: torch.ones(3)})
        other = torch.float16 if tensor.dtype == torch.float32 else torch.float32
        changes[f"{key} of another dtype"] = lambda m, t, k=key, d=other: t.update({k: t[k].to(d)})
        changes[f"{part} with another key"] = lambda m, t, p=part: t.update(
            {f"{p}|x": torch.ones(1)}
        )
        if part in ("best", "left") or key.endswith("|value"):
            changes[f"{key} is NaN"] = lambda m, t, k=key: t.update({k: t[k] * float("nan")})
        if key.endswith("|step"):
            changes[f"{key} is 1e9"] = lambda m, t, k=key: t.update({k: t[k] + 1e9})
    optimizer, members = meta["optimizer"], meta["members"]
    changes |= {
        "a parameter of number 3e7": lambda m, t: m["optimizer"].update({"0|30000000|step": 1.0}),
        "an optimiser's key 'a'": lambda m, t: m["optimizer"].update(a=1.0),
        "another optimiser": lambda m, t: m["optimizer"].update({"class": "SGD"}),
        "step 10**6": lambda m, t: m.update(step=10**6),
        "step earlier": lambda m, t: m.update(step=meta["step"] - 1),
        "settled long ago": lambda m, t: m.update(settled=0),
        "position further": lambda m, t: m["position"].update(step=9, index=9),
        "position after other data": lambda m, t: m["position"].update(first="0" * 16),
        "members twice": lambda m, t: m.update(members=[members[0]] * 2),
        "members reversed": lambda m, t: m.update(members=members[::-1]),
        "one member less": lambda m, t: m.update(members=members[1:]),
        "status 'won'": lambda m, t: m["standings"][0].update(status="won"),
        "who diverged runs": lambda m, t: m["standings"][2].update(status="running"),
        "a trial's step of tomorrow": lambda m, t: m["standings"][2].update(step=99),
        "an infinite score": lambda m, t: m["standings"][0].update(score=float("inf")),
        "a score of nowhen": lambda m, t: m["standings"][0].update(best_step=0),
        "one standing less": lambda m, t: m["standings"].pop(),
        "a standing more": lambda m, t: m["standings"].append(m["standings"][0]),
        "a standing with a word more": lambda m, t: m["standings"][0].update(x=1),
        "another metric": lambda m, t: m.update(metric="accuracy"),
        "a metric twice": lambda m, t: m["history"].update(metrics=["loss", "loss"]),
        "an evaluation more": lambda m, t: m["history"]["evaluated"].append(STEPS),
        "fewer losses": lambda m, t: m["history"].update(steps=1),
    }  # fmt: skip
    assert len(members) > 1
    assert optimizer
    return changes


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every entry of a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from nodes(value, (*path, key))


def mutated(meta: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The metadata with one entry, however deep, replaced or removed."""
    new = copy.deepcopy(meta)
    *path, key = rng.choice([p for p in nodes(new) if p[0] not in ("format_version", "leaves")])
    parent: Any = new
    for step in path:
        parent = parent[step]
    if rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = rng.choice(VALUES)
    return new


def damaged_log(raw: bytes, rng: random.Random) -> bytes:
    """A log of a process that was killed, a disk that failed, or another program's lines."""
    at = rng.randrange(len(raw))
    if rng.random() < 0.3:
        return raw[:at]
    if rng.random() < 0.5:
        return raw[:at] + rng.randbytes(rng.randrange(9)) + raw[at + rng.randrange(9) :]
    return raw + rng.choice((b"\xff\xfe", b"5\n", b"{}\n", b'{"step": "x"}\n', b"null\n", b"{"))


def attack(tries: int, seed: int = 0) -> Tally:
    """Everything once, random changes so often."""
    tally, rng = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        origin, place, whole = (Path(name, d) for d in ("half", "tried", "whole"))
        half_way(origin)
        wanted, log = outcome(go(whole)), (whole / "log.jsonl").read_bytes()
        file = place / checkpoint.FILE
        raw, lines = ((origin / f).read_bytes() for f in (checkpoint.FILE, "log.jsonl"))
        meta, tensors = contents(origin / checkpoint.FILE)

        def tried(area: str, what: str, taken_is_right: bool = False) -> None:
            def right(report: Any) -> bool:
                same = outcome(report) == wanted and (place / "log.jsonl").read_bytes() == log
                return same or taken_is_right

            tally.add(area, what, *attempt(lambda: go(place), right))
            shutil.rmtree(place)

        def fresh() -> None:
            shutil.copytree(origin, place)

        fresh()
        tried("checkpoint", "as it was")
        for i in range(tries):
            fresh()
            file.write_bytes(damage(raw, rng))
            tried("checkpoint, damaged", str(i))
            fresh()
            (place / "log.jsonl").write_bytes(damaged_log(lines, rng))
            tried("log, damaged", str(i))
            fresh()
            craft(file, mutated(meta, rng), tensors)
            # A reason or a score in other words is no harm.
            tried("checkpoint, any entry changed", str(i), taken_is_right=True)
        for what, change in crafted(meta, tensors).items():
            new, values = copy.deepcopy(meta), dict(tensors)
            change(new, values)
            fresh()
            craft(file, new, values)
            tally.add("checkpoint, crafted", what, *attempt(lambda: go(place)))
            shutil.rmtree(place)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=500, help="random changes of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tally = attack(args.tries, args.seed)
    print(tally.table())
    raise SystemExit(bool(tally.bad))


if __name__ == "__main__":
    main()
