"""Every argument of every public call, one at a time, as every kind of thing.

    python -m tests.attack.arguments --only peft

A row of ``table`` is a call that is right; each of its arguments is replaced by each of ``things``.
Every attempt ends in a FadaptError, or as ``taken.txt`` says: there stand, looked at one by one,
the things that are right in a place, and those (after "~") whose own error comes out: what a
model says to an input that it cannot take, or a function to its arguments. ``--write`` writes the
file anew, for a look at its diff. The base and the adapters are compared after each.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import math
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import fadapt
import fadapt.calibration
import fadapt.testing
from tests.attack.tally import CLEAR, FOREIGN, RIGHT, SILENT, Tally, attempt
from tests.models import trained

f = fadapt


class Floats(float):
    """A number of another class."""


class World:
    """A small model, adapters of it, files, and a folder."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        self.folder = folder
        self.net = self.new_net()
        self.x = torch.randn(4, 8)
        self.p = self.trained(f.LoRA(r=2))
        self.q = self.trained(f.IA3())
        self.ada = self.trained(f.AdaLoRA(r=3))
        self.stack = f.stack([self.p, self.p])
        self.train, self.rest = f.split(self.p)
        self.rows = f.select(self.stack, [0, 1, None, 0])
        self.other = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.strange = f.init(self.other, f.LoRA(r=2))
        self.meta = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False)).to(
            "meta"
        )
        self.file = folder / "a.safetensors"
        f.save(self.p, self.file)
        self.served = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)})
        self.s = f.init(self.served, f.LoRA(r=2))
        self.peft = folder / "peft"
        f.peft.save_peft(self.served, self.s, self.peft)
        self.config, self.tensors = f.peft.peft_dict(self.served, self.s)
        self.stats = self.observed()
        self.state = f.RankBudget(4).update(None, self.ada, 1, self.grads())
        self.before = self.values()

    def new_net(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8, bias=False))

    def observed(self) -> Any:
        return f.observe(self.net, f.EVA(r=2), [self.x.repeat(8, 1)], progress=False)

    def grads(self) -> Any:
        return {n: {k: torch.ones_like(t) for k, t in a.train.items()} for n, a in self.ada.items()}

    def trained(self, cfg: Any) -> f.Params:
        return trained(self.net, cfg, std=0.1)

    def loss(self, y: Any, batch: Any) -> Any:
        return y.square().mean()

    def values(self) -> list[torch.Tensor]:
        leaves = [
            t
            for p in (self.p, self.q, self.ada, self.s)
            for a in p.values()
            for t in a.leaves.values()
        ]
        return [
            t.detach().clone()
            for t in [*self.net.state_dict().values(), *self.served.state_dict().values(), *leaves]
        ]

    def unchanged(self) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.values(), self.before, strict=True))


def things(w: World) -> dict[str, Callable[[], Any]]:
    """{what: how it is made}; made anew for each attempt, since some are used up."""

    def closed() -> Any:
        file = open(w.file, "rb")  # noqa: SIM115
        file.close()
        return file

    made: dict[str, Any] = {
        "None": None, "True": True, "False": False, "0": 0, "-1": -1, "5": 5, "10**400": 10**400,
        "0.5": 0.5, "-0.5": -0.5, "nan": math.nan, "inf": math.inf, "1j": 1j,
        "1e400 as str": "1e400",
        "a str": "text", "an empty str": "", "'..'": "..", "'a/../b'": "a/../b", "'('": "(",
        "half a character": "\ud800", "NUL": "a\0b", "bytes": b"text",
        "[]": [], "[1]": [1], "[None]": [None], "['a']": ["a"], "{}": {}, "{'a': 1}": {"a": 1},
        "{1: 2}": {1: 2}, "a set": {1}, "()": (),
        "np.float64": np.float64(0.5), "np.float32": np.float32(0.5), "np.int64": np.int64(2),
        "np.bool_": np.bool_(True), "an array": np.ones(2),
        "an array of objects": np.array([None]),
        "Fraction": Fraction(1, 2), "a float of a class": Floats(0.5),
        "a Path": Path("no such file"), "a folder": w.folder, "a file": w.file,
        "a tensor": torch.ones(2), "a 0-d tensor": torch.tensor(0.5),
        "a NaN tensor": torch.tensor(math.nan),
        "an int tensor": torch.tensor(2), "an empty tensor": torch.ones(0),
        "a meta tensor": torch.ones(2, device="meta"),
        "a sparse tensor": torch.eye(2).to_sparse(), "a complex tensor": torch.ones(2) + 0j,
        "a parameter": nn.Parameter(torch.ones(2)),
        "a function": len, "a lambda of none": lambda: 1, "a class": f.LoRA,
        "a method": f.LoRA(r=2),
        "an object": object(), "a module of Python": math, "a dtype": torch.int8,
        "a device": torch.device("meta"),
        "params": w.p, "other params": w.strange, "params of IA3": w.q, "a stack": w.stack,
        "rows": w.rows,
        "rest": w.rest, "train": w.train, "a list of params": [w.p, w.p],
        "a list of stacks": [w.stack],
        "no params": f.Params({}), "dict of params": dict(w.p.items()),
        "one adapter": w.p["0.weight"],
        "a model": w.net, "another model": w.other, "a model on meta": w.meta,
        "a class of models": nn.Linear,
        "an empty model": nn.Sequential(), "state_dict": w.net.state_dict(),
        "leaves": f.trainable(w.p),
        "stats": w.stats, "a trial": f.Trial(f.LoRA()), "a Config": f.Config({"": f.LoRA(r=2)}),
        "an exception": ValueError("x"), "NotImplemented": NotImplemented, "...": ...,
        "a slice": slice(2), "a range": range(2),
    }  # fmt: skip
    result = {name: (lambda thing=thing: thing) for name, thing in made.items()}
    result["a generator"] = lambda: (i for i in [w.x, w.x])
    result["a generator of params"] = lambda: (p for p in [w.p, w.p])
    result["an empty generator"] = lambda: iter(())
    result["a closed file"] = closed
    return result


@dataclass
class Row:
    """A call that is right, and what else is right in the place of its arguments."""

    area: str
    call: Callable[..., Any]
    arguments: dict[str, Any]
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or self.call.__name__


TAKEN = Path(__file__).with_name("taken.txt")


def taken() -> dict[str, list[str]]:
    """{place: things that it takes; after "~" those whose own error comes out}."""
    lines = TAKEN.read_text().splitlines() if TAKEN.exists() else []
    return {place: things.split(" | ") for place, _, things in (x.partition("\t") for x in lines)}


def table(w: World) -> Iterator[Row]:
    train_one = {"steps": 1, "loss_fn": w.loss, "progress": False}
    batches = [w.x, w.x]

    def new(name: str) -> Path:
        return w.folder / name

    def run_sweep(**options: Any) -> Any:
        model, trials, rows = (options.pop(k) for k in ("model", "trials", "batches"))
        return f.sweep(model, trials, rows, **options)

    def run_fit(**options: Any) -> Any:
        model, params, rows = (options.pop(k) for k in ("model", "params", "batches"))
        return f.fit(model, params, rows, **options)

    def run_apply(model: Any, params: Any, x: Any, **options: Any) -> Any:
        return f.apply(model, params, x, **options)

    def in_bound(model: Any, params: Any) -> Any:
        with f.bound(model, params):
            return w.net(w.x)

    yield Row("core", f.init, {"model": w.net, "cfg": f.LoRA(r=2), "calib": None, "loss_fn": None})
    yield Row(
        "core", f.init, {"model": w.net, "cfg": f.EVA(r=2), "calib": w.stats}, name="init(EVA)"
    )
    yield Row(
        "core",
        f.init,
        {"model": w.net, "cfg": f.LoRAGA(r=2), "calib": batches, "loss_fn": w.loss},
        name="init(LoRAGA)",
    )
    yield Row(
        "core",
        f.run,
        {
            "model": w.net,
            "params": w.p,
            "batch": w.x,
            "loss_fn": w.loss,
            "per_adapter": False,
            "verify": True,
        },
    )
    yield Row(
        "core",
        f.run,
        {
            "model": w.net,
            "params": w.stack,
            "batch": w.x,
            "loss_fn": w.loss,
            "per_adapter": False,
            "verify": True,
        },
        name="run(stack)",
    )
    yield Row(
        "core",
        run_apply,
        {
            "model": w.net,
            "params": w.p,
            "x": w.x,
            "method": "forward",
            "per_adapter": False,
            "verify": True,
        },
    )
    yield Row(
        "core",
        run_apply,
        {
            "model": w.net,
            "params": w.stack,
            "x": w.x,
            "method": "forward",
            "per_adapter": False,
            "verify": True,
        },
        name="apply(stack)",
    )
    yield Row("core", in_bound, {"model": w.net, "params": w.p})
    yield Row("core", f.as_module, {"model": w.net, "params": w.p})
    yield Row("core", f.summary, {"params": w.p, "model": w.net})
    yield Row("core", f.split, {"params": w.p})
    yield Row("core", f.trainable, {"params": w.p})
    yield Row("core", f.project, {"params": w.p})
    yield Row("core", f.join, {"train": w.train, "rest": w.rest})
    yield Row("core", f.scale, {"params": w.p, "c": 0.5})
    yield Row("core", f.scale, {"params": w.stack, "c": [0.5, 1.0]}, name="scale(stack)")
    yield Row("core", f.stack, {"params": [w.p, w.p]})
    yield Row("core", f.unstack, {"stack": w.stack})
    yield Row("core", f.select, {"stack": w.stack, "ids": [0, 1, None, 0]})
    yield Row(
        "config",
        f.Config,
        {
            "rules": {"": f.LoRA(r=2)},
            "layers": None,
            "roles": (),
            "exclude": (),
            "dtype": None,
            "seed": 0,
        },
    )
    yield Row("config", f.Config, {"rules": {"": None}}, name="Config(rules)")

    def init_config(**options: Any) -> Any:
        return f.init(w.net, f.Config({"": f.LoRA(r=2)}, **options))

    yield Row(
        "config",
        init_config,
        {"layers": None, "roles": (), "exclude": (), "dtype": None, "seed": 0},
    )
    for name in ("only", "without"):
        yield Row("params", lambda a, name=name: getattr(w.p, name)(a), {"a": "0"}, name=name)
    yield Row("params", w.p.map, {"fn": lambda a: a})
    yield Row("params", w.stack.map, {"function": lambda p: p}, name="Stack.map")
    yield Row("params", w.p.with_adapters, {"adapters": dict(w.p.items())})
    yield Row("params", f.Params, {"adapters": dict(w.p.items()), "config": None})
    yield Row("params", w.p.to, {"device": "cpu", "dtype": torch.float32})
    yield Row("params", w.stack.to, {"device": "cpu", "dtype": torch.float32}, name="Stack.to")
    # merge
    yield Row("merge", f.merge, {"model": w.net, "params": w.p, "dtype": None})
    yield Row(
        "merge",
        f.merge_many,
        {
            "model": w.net,
            "params": [w.p, w.q],
            "weights": [1.0, 0.5],
            "rule": "ties",
            "density": 0.5,
            "seed": 0,
            "dtype": None,
        },
    )
    yield Row("merge", f.combine, {"params": [w.p, w.q], "weights": [1.0, 0.5]})
    for name in ("an item of params", "an item of weights"):
        first = name.endswith("params")
        yield Row(
            "merge",
            lambda a, first=first: f.merge_many(
                w.net, [w.p, a if first else w.q], [1.0, 1.0 if first else a]
            ),
            {"a": w.q if first else 0.5},
            name=f"merge_many: {name}",
        )
        yield Row(
            "merge",
            lambda a, first=first: f.combine(
                [w.p, a if first else w.q], [1.0, 1.0 if first else a]
            ),
            {"a": w.q if first else 0.5},
            name=f"combine: {name}",
        )
    yield Row("merge", f.as_lora, {"model": w.net, "params": w.p, "r": 2, "drop_bias": ()})
    # training
    options = {
        "eval": None,
        "steps": 1,
        "loss_fn": w.loss,
        "per_adapter": False,
        "order": "shared",
        "calib": None,
        "optimizer": torch.optim.AdamW,
        "eval_every": None,
        "goal": "min",
        "halving": None,
        "max_adapters": "auto",
        "verify": True,
        "compile": False,
        "directory": None,
        "tensorboard": False,
        "progress": False,
        "log_every": 10,
        "seed": 0,
        "mesh": None,
    }
    trials = [f.Trial(f.LoRA(r=2), name="a"), f.Trial(f.IA3(), name="b")]
    yield Row(
        "training", run_sweep, {"model": w.net, "trials": trials, "batches": batches, **options}
    )
    yield Row(
        "training",
        run_fit,
        {
            "model": w.net,
            "params": w.p,
            "batches": batches,
            "lr": 0.1,
            "weight_decay": 0.0,
            "warmup": 0,
            "schedule": "constant",
            "clip": None,
            "accumulate": 1,
            "lr_ratio": None,
            "return_report": False,
            **train_one,
        },
    )
    yield Row(
        "training",
        lambda a: run_sweep(model=w.net, trials=[trials[0], a], batches=batches, **options),
        {"a": trials[1]},
        name="sweep: a trial",
    )
    yield Row(
        "training",
        lambda a: run_sweep(
            model=w.net, trials=trials, batches=[w.x, a], **{**options, "steps": 2}
        ),
        {"a": w.x},
        name="sweep: a batch",
    )
    yield Row(
        "training",
        lambda a: run_sweep(
            model=w.net,
            trials=trials,
            batches=batches,
            **{**options, "loss_fn": lambda y, b: y.square().mean() if a is None else a},
        ),
        {"a": None},
        name="sweep: a loss",
    )
    yield Row(
        "training",
        lambda a: run_sweep(
            model=w.net, trials=trials, batches=batches, **{**options, "eval": lambda m, s: a}
        ),
        {"a": torch.ones(2)},
        name="sweep: a score",
    )
    yield Row(
        "training",
        lambda a: run_sweep(
            model=w.net,
            trials=trials,
            batches=batches,
            **{**options, "eval": lambda m, s: {"k": a}},
        ),
        {"a": torch.ones(2)},
        name="sweep: a metric",
    )
    yield Row(
        "training",
        lambda a: run_sweep(
            model=w.net, trials=trials, batches=batches, **{**options, "eval": [w.x, a]}
        ),
        {"a": w.x},
        name="sweep: a batch of eval",
    )
    yield Row(
        "training",
        lambda a: f.run(w.net, w.p, w.x, lambda y, b: a),
        {"a": torch.ones(())},
        name="run: a loss",
    )
    yield Row(
        "training",
        lambda a: f.run(w.net, w.stack, w.x, lambda y, b: a),
        {"a": torch.ones(())},
        name="run(stack): a loss",
    )
    yield Row(
        "training",
        f.Trial,
        {
            "config": f.LoRA(),
            "lr": 0.1,
            "weight_decay": 0.0,
            "warmup": 0,
            "schedule": "constant",
            "seed": 0,
            "clip": None,
            "accumulate": 1,
            "lr_ratio": None,
            "name": "a",
        },
    )
    yield Row(
        "training",
        lambda a: f.Trial(f.LoRA(), schedule=lambda x: a).rate(1, 4),
        {"a": 0.5},
        name="Trial: a rate",
    )
    yield Row(
        "training",
        lambda a: run_sweep(
            model=w.net,
            trials=[f.Trial(f.LoRA(r=2), schedule=lambda x: a)],
            batches=batches,
            **options,
        ),
        {"a": 0.5},
        name="sweep: a rate",
    )
    yield Row("training", f.Trial(f.LoRA()).rate, {"update": 1, "updates": 4}, name="Trial.rate")
    yield Row("training", f.Trial(f.LoRA()).ratio, {"leaf": "A"}, name="Trial.ratio")
    yield Row("training", f.Halving, {"first": 2, "factor": 2.0, "least": 1, "shrink": None})
    yield Row("training", f.Halving(2).rungs, {"steps": 8, "trials": 4}, name="Halving.rungs")
    yield Row("training", f.Checkpoints, {"directory": "x", "every": 1, "resume": True})
    yield Row(
        "training",
        lambda every, resume: run_sweep(
            model=w.net,
            trials=trials,
            batches=batches,
            **{**options, "directory": f.Checkpoints(new("sweep"), every=every, resume=resume)},
        ),
        {"every": 1, "resume": True},
        name="sweep(Checkpoints)",
    )
    yield Row("training", f.grid, {"config": f.LoRA(), "lr": [0.1, 0.2]})
    yield Row("training", f.param_groups, {"params": w.p, "ratios": {"B": 16.0}, "lr": 0.1})
    yield Row(
        "training",
        lambda a: f.param_groups(w.p, {"B": a}, lr=0.1),
        {"a": 2.0},
        name="param_groups: a ratio",
    )
    yield Row(
        "training",
        f.RankBudget,
        {
            "total_step": 4,
            "target_r": 2,
            "tinit": 0,
            "tfinal": 0,
            "deltaT": 1,
            "beta1": 0.8,
            "beta2": 0.8,
        },
    )
    budget = f.RankBudget(4, target_r=2)
    yield Row(
        "training",
        budget.update,
        {"state": None, "params": w.ada, "step": 1, "grads": w.grads()},
        name="RankBudget.update",
    )
    yield Row("training", budget.importance, {"state": w.state}, name="RankBudget.importance")
    yield Row(
        "training", budget.budget, {"step": 1, "start": 6, "target": 4}, name="RankBudget.budget"
    )
    yield Row("training", budget.kept, {"state": w.state, "step": 1}, name="RankBudget.kept")
    yield Row(
        "training",
        lambda params, state, step: budget.cut(
            params if params is not None else w.trained(f.AdaLoRA(r=3)), state, step
        ),
        {"params": w.trained(f.AdaLoRA(r=3)), "state": w.state, "step": 2},
        name="RankBudget.cut",
    )
    from fadapt.distributed import all_reduce_gradients

    yield Row(
        "training",
        all_reduce_gradients,
        {"params": w.p, "mean": True, "group": None},
        name="all_reduce_gradients",
    )
    # calibration
    rows = [w.x.repeat(8, 1)]
    yield Row(
        "calibration",
        f.observe,
        {
            "model": w.net,
            "cfg": f.EVA(r=2),
            "batches": rows,
            "statistics": (),
            "label_mask": False,
            "max_memory": None,
            "tolerance": 0.0,
            "share": True,
            "progress": False,
            "loss_fn": None,
        },
    )
    yield Row(
        "calibration",
        lambda a: f.observe(w.net, f.EVA(r=2), [rows[0], a], progress=False),
        {"a": rows[0]},
        name="observe: a batch",
    )
    yield Row(
        "calibration",
        f.wanda_scores,
        {"weight": w.net[0].weight, "stats": torch.ones(8), "sites": None},
    )
    yield Row(
        "calibration",
        f.wanda_scores,
        {
            "weight": w.net,
            "stats": f.observe(
                w.net,
                f.LoRA(),
                rows,
                statistics=[f.Statistic(fadapt.calibration.SumSq())],
                progress=False,
            ),
            "sites": None,
        },
        name="wanda_scores(model)",
    )
    c = fadapt.calibration
    for cls in (c.PCA, c.Sketch, c.PairedSums):
        good = {"k": 2, "center": True, "seed": 0}
        taken = {k: good[k] for k in inspect.signature(cls).parameters}
        yield Row("calibration", cls, taken)
    yield Row("calibration", f.Statistic, {"reduction": c.Gram(), "side": "in", "at_least": 1})
    yield Row(
        "calibration",
        w.stats.get,
        {"site": "0.weight", "statistic": f.Statistic(c.Gram())},
        name="Stats.get",
    )
    yield Row("calibration", w.stats.to, {"device": "cpu"}, name="Stats.to")
    yield Row("calibration", w.stats.check_base, {"model": w.net}, name="Stats.check_base")
    yield Row(
        "calibration", lambda a: w.stats.combine(a), {"a": w.observed()}, name="Stats.combine"
    )
    yield Row("calibration", c.combine_all, {"parts": [w.observed()]})
    yield Row("calibration", c.all_reduce, {"stats": w.stats, "group": None})

    class Words:
        pad_token = "x"

        def __call__(self, texts: Any, **more: Any) -> Any:
            return {"input_ids": torch.ones(len(texts), 4, dtype=torch.int64)}

    yield Row(
        "calibration",
        lambda **k: list(c.text_batches(**k)),
        {
            "texts": ["a", "b"],
            "tokenizer": Words(),
            "batch_size": 2,
            "max_length": 4,
            "limit": None,
            "column": "text",
        },
        name="text_batches",
    )
    # files
    yield Row("files", f.save, {"params": w.p, "path": new("b")})
    yield Row("files", f.load, {"path": w.file, "model": w.net, "allow_other_base": False})
    yield Row("files", w.stats.save, {"path": new("s")}, name="Stats.save")
    w.stats.save(new("stats"))
    yield Row(
        "files",
        f.Stats.load,
        {"path": new("stats"), "model": w.net}
        if len(inspect.signature(f.Stats.load).parameters) > 1
        else {"path": new("stats")},
        name="Stats.load",
    )
    # peft
    yield Row(
        "peft",
        f.peft.load_peft,
        {"path": w.peft, "model": w.served, "adapter": None, "initial": None},
    )
    yield Row(
        "peft",
        f.peft.save_peft,
        {"model": w.served, "params": w.s, "path": new("peft2"), "serving": False},
    )
    yield Row(
        "peft",
        f.peft.save_peft,
        {"model": w.served, "params": w.s, "path": new("peft3"), "serving": True},
        name="save_peft(serving)",
    )
    yield Row(
        "peft",
        lambda a: f.peft.save_peft(w.served, {a: w.s}, new("peft4")),
        {"a": "name"},
        name="save_peft: a name",
    )
    yield Row(
        "peft",
        lambda a: f.peft.save_peft(w.served, {"one": w.s, "two": a}, new("peft5")),
        {"a": w.s},
        name="save_peft: a member",
    )
    yield Row("peft", f.peft.peft_dict, {"model": w.served, "params": w.s, "serving": True})
    yield Row(
        "peft", f.peft.from_peft_dict, {"model": w.served, "config": w.config, "tensors": w.tensors}
    )
    yield Row("peft", f.peft.adapters_in, {"path": w.peft})
    key = next(iter(w.tensors))
    yield Row(
        "peft",
        lambda a: f.peft.from_peft_dict(w.served, w.config, {**w.tensors, key: a}),
        {"a": w.tensors[key]},
        name="from_peft_dict: a tensor",
    )
    yield Row(
        "peft",
        lambda a: f.peft.from_peft_dict(w.served, w.config, {**w.tensors, a: w.tensors[key]}),
        {"a": key},
        name="from_peft_dict: a key",
    )
    for name in w.config:
        yield Row(
            "peft",
            lambda a, name=name: f.peft.from_peft_dict(w.served, {**w.config, name: a}, w.tensors),
            {"a": w.config[name]},
            name=f"from_peft_dict: {name}",
        )
    sconfig, stensors = f.peft.peft_dict(w.served, w.s, serving=True)
    yield Row("peft", f.peft.served_by, {"config": sconfig, "tensors": stensors, "layers": None})
    for name in sconfig:
        yield Row(
            "peft",
            lambda a, name=name: f.peft.served_by({**sconfig, name: a}, stensors),
            {"a": sconfig[name]},
            name=f"served_by: {name}",
        )
    # testing
    t = fadapt.testing

    def checked(**values: Any) -> None:
        try:
            t.check_method(**values)
        except AssertionError as law:  # what check_method is for
            raise f.FadaptError(str(law)) from law

    yield Row("testing", t.check_contract, {"method": f.LoRA(r=2)})
    yield Row(
        "testing",
        checked,
        {"method": f.IA3(), "cases": [t.Case()], "calib": None, "count": None},
    )
    yield Row(
        "testing",
        t.Case,
        {
            "widths": (4, 4, 4),
            "bias": True,
            "dtype": torch.float64,
            "seed": 0,
            "calib": None,
            "rule": "",
        },
    )


def chosen(name: str, share: int) -> bool:
    """Whether a name is among one in so many, always the same ones."""
    return zlib.crc32(name.encode()) % share == 0


def attack(only: str = "", title: str = "", share: int = 1) -> tuple[Tally, dict[str, list[str]]]:
    """All rows, those of one area or one row; one in so many attempts. Also what was taken."""
    tally, known, found = Tally(), taken(), {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        stack.callback(os.chdir, os.getcwd())
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(None))
        warnings.simplefilter("ignore")
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
        world = World(folder)
        for row in table(world):
            if (only and row.area != only) or (title and title != row.title):
                continue
            end, said = attempt(lambda r=row: r.call(**r.arguments), lambda _: True)
            if end != RIGHT:
                tally.add(row.area, f"{row.title}, as it is right", FOREIGN, said)
                continue
            for argument in row.arguments:
                place = f"{row.title}({argument})"
                for name, make in things(world).items():
                    if not chosen(f"{place} {name}", share):
                        continue
                    here = folder / "here"
                    here.mkdir()
                    os.chdir(here)
                    values = {**row.arguments, argument: make()}
                    end, said = attempt(lambda r=row, v=values: r.call(**v))
                    if end != CLEAR:
                        what = name if end == SILENT else f"~{name}"
                        found.setdefault(place, []).append(what)
                        end = RIGHT if what in known.get(place, ()) else end
                    tally.add(row.area, f"{place}: {name}", end, said)
                    if not world.unchanged():
                        tally.add("the base", f"{place}: {name}", SILENT, "changed")
                        world.before = world.values()
                    os.chdir(folder)
                    for used in (here, folder / "sweep"):
                        shutil.rmtree(used, ignore_errors=True)
    return tally, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="one area")
    parser.add_argument("--row", default="", help="one row")
    parser.add_argument("--share", type=int, default=1, help="one in so many attempts")
    parser.add_argument("--write", action="store_true", help="write what is taken anew")
    args = parser.parse_args()
    tally, found = attack(args.only, args.row, args.share)
    print(tally.table())
    if args.write:
        old = taken()
        lines = [f"{place}\t{' | '.join(names)}" for place, names in {**old, **found}.items()]
        TAKEN.write_text("\n".join(sorted(lines)) + "\n")
    raise SystemExit(bool(tally.bad))


if __name__ == "__main__":
    main()
