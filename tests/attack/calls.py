"""Hostile and careless calls of the public functions: python -m tests.attack.calls.

Every call ends in a FadaptError that says what to write, or in the right result. The base is
compared after each.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fadapt
from fadapt.calibration import Statistic
from fadapt.statistics.sums import SumSq
from tests.attack.tally import Tally, attempt
from tests.models import trained

Call = Callable[[], Any]
Case = tuple[str, str, Call, Callable[[Any], bool] | None]
THINGS: dict[str, Any] = {
    "None": None,
    "True": True,
    "an int": 5,
    "a float": 0.5,
    "a str": "text",
    "bytes": b"text",
    "a list": [1],
    "an empty list": [],
    "a dict": {"a": 1},
    "an empty dict": {},
    "a tensor": torch.ones(2),
    "a function": len,
    "a class": fadapt.LoRA,
    "an object": object(),
}
NUMBERS: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "10**400": 10**400,
    "complex": 1j,
    "a vector": torch.ones(3),
    "an int tensor": torch.tensor(1),
    "a bool tensor": torch.tensor(True),
    "a NaN tensor": torch.tensor(math.nan),
}


class World:
    """A small model, adapters of it, and a folder."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        self.folder = folder
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False))
        self.x = torch.randn(4, 8)
        self.p = self.trained(fadapt.LoRA(r=2))
        self.q = self.trained(fadapt.IA3())
        self.stack = fadapt.stack([self.p, self.p])
        self.mixed = fadapt.stack([self.p, self.q])
        self.train, self.rest = fadapt.split(self.p)
        self.rows = fadapt.select(self.stack, [0, 1, None, 0])
        self.file = folder / "a"
        fadapt.save(self.p, self.file)
        self.stats = fadapt.observe(
            self.net, fadapt.EVA(r=2), [self.x.repeat(8, 1)], progress=False
        )
        self.other = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False))
        self.before = {k: v.clone() for k, v in self.net.state_dict().items()}

    def trained(self, cfg: Any) -> fadapt.Params:
        return trained(self.net, cfg, std=0.1)

    def loss(self, y: Any, batch: Any) -> Any:
        return y.square().mean()

    def unchanged(self) -> bool:
        now = self.net.state_dict()
        return all(torch.equal(now[k], v) for k, v in self.before.items())


def all_but(*names: str, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in {**THINGS, **more}.items() if k not in names}


def cases(w: World) -> Iterator[Case]:
    """(area, name, call, whether its result is right)."""
    f = fadapt
    never = None

    def each(
        area: str, what: str, things: dict[str, Any], call: Callable[[Any], Any]
    ) -> Iterator[Case]:
        for name, thing in things.items():
            yield area, f"{what}: {name}", (lambda thing=thing: call(thing)), never

    # split and join
    yield from each("split, join", "split", THINGS, f.split)
    yield from each("split, join", "join(train)", THINGS, lambda t: f.join(t, w.rest))
    yield from each("split, join", "join(rest)", THINGS, lambda t: f.join(w.train, t))
    yield from each("split, join", "trainable", THINGS, f.trainable)
    site = w.train["0.weight"]
    leaves: dict[str, Any] = {
        "missing": {"A": site["A"]},
        "extra": {**site, "Z": w.x},
        "wider": {**site, "A": torch.ones(3, 8)},
        "stacked": {**site, "A": site["A"][None]},
        "of ints": {**site, "A": site["A"].long()},
        "double": {**site, "A": site["A"].double()},
        "complex": {**site, "A": site["A"] + 0j},
        "meta": {**site, "A": site["A"].to("meta")},
        "None": {**site, "A": None},
        "numbers": {**site, "A": 1.0},
        "renamed": {"a": site["A"], "b": site["B"]},
    }
    yield from each(
        "split, join", "a leaf", leaves, lambda t: f.join({**w.train, "0.weight": t}, w.rest)
    )
    yield from each(
        "split, join", "a site", THINGS, lambda t: f.join({**w.train, "0.weight": t}, w.rest)
    )
    for verb in (
        f.split,
        f.stack,
        f.project,
        lambda r: f.scale(r, 1.0),
        lambda r: f.apply(w.net, r, w.x),
    ):
        yield (
            "split, join",
            "the rest alone",
            (lambda v=verb: v([w.rest] if v is f.stack else w.rest)),
            never,
        )
    yield (
        "split, join",
        "joined again",
        lambda: f.apply(w.net, f.join(w.train, w.rest), w.x),
        lambda y: torch.equal(y, f.apply(w.net, w.p, w.x)),
    )
    # scale
    scalars = all_but("an int", "a float", **NUMBERS)
    yield from each("scale", "of params by", scalars, lambda c: f.scale(w.p, c))
    yield from each(
        "scale", "of a stack by", all_but("a tensor", **NUMBERS), lambda c: f.scale(w.stack, c)
    )
    yield from each("scale", "one of two is", scalars, lambda c: f.scale(w.stack, [1.0, c]))
    yield from each("scale", "of", THINGS, lambda p: f.scale(p, 1.0))
    base = w.net(w.x)
    for c in (0, 0.0, torch.tensor(0.0), -0.0):
        yield (
            "scale",
            f"by {c!r} is the base",
            (lambda c=c: f.apply(w.net, f.scale(w.p, c), w.x)),
            (lambda y: torch.equal(y, base)),
        )
    # project, to, only
    yield from each("project, to", "project", all_but(stack=w.stack, rows=w.rows), f.project)
    things = all_but(
        "an int", "a tensor", "an empty list", ints=torch.int32, two=(1, 2), far="cuda:99999"
    )
    yield from each("project, to", "to", things, lambda d: w.p.to(d))
    yield from each("project, to", "only", all_but(), lambda d: w.p.only(d))
    yield from each("project, to", "without", all_but(), lambda d: w.p.without(d))
    # stack, unstack, select
    yield from each(
        "stack", "stack", all_but(params=w.p, split=[w.rest], nested=[w.stack]), f.stack
    )
    yield from each("stack", "of one and", all_but(), lambda p: f.stack([w.p, p]))
    yield from each("stack", "unstack", all_but(params=w.p, rows=w.rows), f.unstack)
    ids = all_but(
        "a list",
        mask=torch.tensor([True, False]),
        floats=[0.6, 1.7],
        far=[9],
        negative=[-1],
        strs=["0"],
        nested=[[0]],
        matrix=torch.zeros(2, 2, dtype=torch.int64),
        scalar=torch.tensor(0),
        farther=torch.tensor([0, 9]),
        below=torch.tensor([-1]),
        empty=torch.tensor([], dtype=torch.int64),
        bools=[True, False],
    )
    yield from each("stack", "select from one group", ids, lambda i: f.select(w.stack, i))
    yield from each("stack", "select from two groups", ids, lambda i: f.select(w.mixed, i))
    yield from each(
        "stack", "select from", all_but(params=w.p, rows=w.rows), lambda s: f.select(s, [0])
    )
    # merge and combine
    yield from each(
        "merge", "params", all_but(stack=w.stack, rest=w.rest), lambda p: f.merge(w.net, p)
    )
    yield from each("merge", "model", all_but(params=w.p), lambda m: f.merge(m, w.p))
    dtypes = all_but(
        "None", **{str(d): d for d in (torch.int32, torch.bool, torch.complex64, torch.int8)}
    )
    yield from each("merge", "dtype", dtypes, lambda d: f.merge(w.net, w.p, dtype=d))
    yield from each(
        "merge", "combine", all_but(params=w.p, stack=w.stack), lambda p: f.combine(p, [1.0])
    )
    yield from each("merge", "weights", all_but("a list"), lambda c: f.combine([w.p], c))
    yield from each(
        "merge",
        "a weight",
        all_but("an int", "a float", **NUMBERS),
        lambda c: f.combine([w.p], [c]),
    )
    # files
    folder = w.folder
    (folder / "directory").mkdir(exist_ok=True)
    os.symlink(folder / "loop", folder / "loop")
    paths = {
        "a missing folder": folder / "no" / "a",
        "a folder": folder / "directory",
        "a file as a folder": w.file / "a",
        "a long name": folder / ("x" * 300),
        "a NUL": str(folder / "a\0b"),
        "empty": "",
        "a loop": folder / "loop",
        "half a character": str(folder / "\ud800"),
        "a device": "/dev/null",
        "bytes": os.fsencode(w.file),
    }
    bad_paths = {**all_but("a str", "bytes"), **paths}
    yield from each("files", "save to", bad_paths, lambda p: f.save(w.p, p))
    yield from each("files", "load from", bad_paths, lambda p: f.load(p, w.net))
    yield from each("files", "Stats.save to", bad_paths, lambda p: w.stats.save(p))
    yield from each("files", "Stats.load from", bad_paths, lambda p: f.Stats.load(p))
    yield from each(
        "files",
        "save",
        all_but(stack=w.stack, rest=w.rest, none=f.Params({})),
        lambda p: f.save(p, folder / "b"),
    )
    yield from each(
        "files", "load into", all_but(other=w.other, params=w.p), lambda m: f.load(w.file, m)
    )
    yield "files", "adapters as statistics", lambda: f.Stats.load(w.file), never
    # calibration
    eva, rows = f.EVA(r=2), [w.x.repeat(8, 1)]

    def observe(**options: Any) -> Any:
        return f.observe(w.net, eva, rows, **{"progress": False, **options})

    yield from each(
        "calibration",
        "tolerance",
        all_but("a float", "True", **NUMBERS, big=1.5, low=-0.1),
        lambda t: observe(tolerance=t),
    )
    yield from each(
        "calibration",
        "max_memory",
        all_but(
            "None", "an int", **{k: v for k, v in NUMBERS.items() if k != "10**400"}, zero=0, low=-1
        ),
        lambda t: observe(max_memory=t),
    )
    yield from each(
        "calibration",
        "statistics",
        all_but("an empty list", one=Statistic(SumSq())),
        lambda t: observe(statistics=t),
    )
    yield from each(
        "calibration",
        "batches",
        all_but("a function", "a class", "an object", "a list"),
        lambda b: f.observe(w.net, eva, b, progress=False),
    )
    yield from each(
        "calibration",
        "cfg",
        all_but(method=f.Method),
        lambda c: f.observe(w.net, c, rows, progress=False),
    )
    yield from each(
        "calibration",
        "model",
        all_but(params=w.p),
        lambda m: f.observe(m, eva, rows, progress=False),
    )
    yield from each(
        "calibration", "get(site)", all_but(), lambda s: w.stats.get(s, Statistic(SumSq()))
    )
    yield from each(
        "calibration", "get(statistic)", all_but(), lambda s: w.stats.get("0.weight", s)
    )
    yield from each("calibration", "tokens", all_but(), lambda s: w.stats.tokens(s))
    yield from each("calibration", "combine", all_but(params=w.p), lambda s: w.stats.combine(s))
    yield from each(
        "calibration",
        "init(calib)",
        {k: THINGS[k] for k in ("None", "a str", "a tensor", "a dict")},
        lambda s: f.init(w.net, eva, s),
    )
    yield "calibration", "another base", lambda: f.init(w.other, eva, w.stats), never
    # run and apply
    params = all_but(model=w.net, rest=w.rest, subset=dict(w.p.items()))
    yield from each("run", "params", params, lambda p: f.run(w.net, p, w.x, w.loss))
    yield from each("run", "model", all_but(params=w.p), lambda m: f.run(m, w.p, w.x, w.loss))
    yield from each("run", "params of apply", params, lambda p: f.apply(w.net, p, w.x))
    # init
    yield from each("init", "cfg", all_but(method=f.Method), lambda c: f.init(w.net, c))
    yield from each("init", "model", all_but(params=w.p), lambda m: f.init(m, f.LoRA(r=2)))


def attack(only: str = "") -> Tally:
    """All calls, or those of one area."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = World(Path(folder))
        for area, name, call, right in cases(world):
            if only and area != only:
                continue
            tally.add(area, name, *attempt(call, right))
            if not world.unchanged():
                tally.add("the base", f"after {area}: {name}", "silent", "changed")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="one area")
    tally = attack(parser.parse_args().only)
    print(tally.table())
    raise SystemExit(bool(tally.bad))


if __name__ == "__main__":
    main()
