"""Sweeps over processes: trials over ranks, and rows over a sharded base. gloo, on CPUs.

The reference is the same sweep in one process.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fadapt
from fadapt import DoRA, LoRA
from fadapt.distributed import team
from fadapt.statistics.reduction import statistics_of
from fadapt.training import loop
from fadapt.training.engine import optimizer as engine_optimizer
from tests import models, ranks
from tests.test_laws import ROWS

ROOT = Path(__file__).parents[1]


def batches(count: int = 4, rows: int = 4) -> list[dict]:
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, models.VOCAB, (rows, 6), generator=rng) for _ in range(count)]
    return [{"input_ids": i, "labels": i} for i in ids]


def trials() -> list[fadapt.Trial]:
    configs = [{"proj": m} for m in (LoRA(r=1), LoRA(r=4), DoRA(r=2), fadapt.IA3())]
    return fadapt.grid(configs, lr=[1e-3, 1e-2], clip=1.0)[:7]


def train(model: nn.Module, chosen=None, **options) -> fadapt.Report:
    options = {"eval": batches(1), "eval_every": 2, **options}
    return fadapt.sweep(model, chosen or trials(), batches(), **options)


@contextlib.contextmanager
def no_group():
    """Sweeps in one process, whatever group there is."""
    joined = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = joined


def alone(model: nn.Module, *args, **options) -> fadapt.Report:
    """The same sweep in one process."""
    with no_group():
        return train(model, *args, **options)


def equal(got: fadapt.Report, want: fadapt.Report, tolerance: float = 0.0) -> None:
    rows = [[(r.name, r.status, r.step) for r in report.results] for report in (got, want)]
    if tolerance:  # equals may change their places
        rows = [sorted(some) for some in rows]
    assert rows[0] == rows[1]
    assert got.losses.keys() == want.losses.keys()
    for kind in ("params", "final"):
        for name, params in getattr(want, kind).items():
            found = getattr(got, kind)[name].trainable()
            for a, b in zip(found, params.trainable(), strict=True):
                assert (a - b).abs().max() <= tolerance, (kind, name, (a - b).abs().max())
    for step, row in want.losses.items():
        gap = (got.losses[step] - row).nan_to_num().abs().max()
        assert gap <= tolerance
        assert torch.equal(got.losses[step].isnan(), row.isnan())


HALVING = fadapt.Halving(2)


def trials_over_ranks(rank: int, world: int, directory: Path) -> None:
    """Shares, halving, own data. Passes of a set width are, bit for bit, those of one process."""
    model = models.qwen3().requires_grad_(False)
    for options in (
        {"max_adapters": 2, "halving": HALVING},
        {"max_adapters": 3, "optimizer": torch.optim.SGD},
        {"max_adapters": 1, "order": "own", "seed": 3},
    ):
        equal(train(model, **options), alone(model, **options))
    path = directory / "sweep"
    equal(train(model, halving=HALVING, directory=path), alone(model, halving=HALVING), 1e-5)
    dist.barrier()
    names = sorted(p.name for p in path.iterdir())
    assert {"log.jsonl", "checkpoint.safetensors"} <= set(names)
    lines = (path / "log.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines))
    # It goes on in one process, and from one process in several.
    one = directory / f"one {rank}"
    if rank == 0:
        stop_at(model, one, 3)
    dist.barrier()
    found = train(model, halving=HALVING, max_adapters=2, directory=directory / "one 0")
    equal(found, alone(model, halving=HALVING, max_adapters=2))


class StopError(Exception):
    pass


def stop_at(model: nn.Module, path: Path, step: int) -> None:
    """A sweep in one process that ends in the middle."""
    calls = iter(range(step))

    class Ends(list):
        def __getitem__(self, index):
            if next(calls, None) is None:
                raise StopError
            return super().__getitem__(index)

        def __reduce__(self):
            return list, (list(self),)

    kept = fadapt.Checkpoints(path, every=1)
    data = Ends(batches())
    data.__class__.__name__ = "list"
    with no_group(), pytest.raises(StopError):
        fadapt.sweep(
            model, trials(), data, steps=4, eval=batches(1), eval_every=2, halving=HALVING,
            max_adapters=2, directory=kept,
        )  # fmt: skip


def fewer_trials_than_processes(rank: int, world: int, _: Path) -> None:
    """A process without a trial, from the start or after a halving; passes of a width not set."""
    model = models.qwen3().requires_grad_(False)
    for options in (
        {},
        {"max_adapters": None},
        {"max_adapters": 1},
        {"eval": None, "eval_every": None},
    ):
        equal(train(model, trials()[:1], **options), alone(model, trials()[:1], **options), 1e-5)
    data = batches(8)
    again = fadapt.Halving(2, factor=3)  # to one trial, of which the others hold nothing
    options = {"eval": batches(1), "eval_every": 1, "optimizer": torch.optim.SGD}
    got = fadapt.sweep(model, trials()[:3], data, halving=again, **options)
    with no_group():
        want = fadapt.sweep(model, trials()[:3], data, halving=again, **options)
    equal(got, want, 1e-5)


def differences(rank: int, world: int, directory: Path) -> None:
    """Other models, trials or data in one process; an error of one's own."""
    model = models.qwen3().requires_grad_(False)
    other = models.qwen3(seed=rank).requires_grad_(False)
    with pytest.raises(fadapt.ConfigError, match=r"another model than process 0.*weight"):
        train(other)
    with pytest.raises(fadapt.ConfigError, match="another sweep than process 0; trial"):
        train(model, fadapt.grid({"proj": LoRA(r=2)}, lr=[1e-3 * (1 + rank), 1e-2]))
    with pytest.raises(fadapt.ConfigError, match="another data, loss or eval than process 0; eval"):
        train(model, eval=batches(1 + rank))
    with pytest.raises(fadapt.ConfigError, match="another sweep than process 0; seed"):
        train(model, seed=rank)

    for name, value, other in (
        ("max_adapters", 2, 3),
        ("log_every", 1, 2),
        ("directory", directory / "x", None),
        ("verify", True, False),
    ):
        with pytest.raises(fadapt.ConfigError, match=f"another sweep than process 0; {name}"):
            train(model, **{name: other if rank else value})

    def broken(output, batch):
        if os.environ["RANK"] == "1":
            raise ZeroDivisionError("mine")
        return output.loss

    mine = ZeroDivisionError if rank == 1 else team.PeerError
    with pytest.raises(mine, match="mine"):
        train(model, loss_fn=broken, verify=False)

    def full(model, stack):
        if os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("mine")
        return torch.zeros(len(stack))

    mine = torch.OutOfMemoryError if rank == 1 else team.PeerError
    with pytest.raises(mine, match="mine") as caught:
        train(model, eval=full)
    report = caught.value.report
    assert len(report.names) == len(report.results) == 7
    assert 0 < len(report.params) < 7  # of its own trials
    with pytest.raises(fadapt.ConfigError, match="mesh has the dimensions"):
        train(model, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("data",)))
    with pytest.raises(fadapt.ConfigError, match="must be a torch"):
        train(model, mesh=(1, world))
    with pytest.MonkeyPatch.context() as monkeypatch:
        same = SimpleNamespace(uuid="GPU-1")
        monkeypatch.setattr(team, "compute_device", lambda weight: torch.device("cuda", rank))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: same)
        with pytest.raises(fadapt.ConfigError, match=r"processes 0 and 1 have .* on one GPU"):
            train(model)
    equal(train(model), alone(model), 1e-5)  # the group is as good as before


def sharded(model: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def rows_over_ranks(rank: int, world: int, directory: Path) -> None:
    """fully_shard and the rows of each batch over "shard", trials over "sweep"."""
    whole = models.qwen3().requires_grad_(False)
    half = world // 2
    mesh = init_device_mesh("cpu", (half, 2), mesh_dim_names=("sweep", "shard"))
    model = sharded(whole, mesh=mesh["shard"])
    data = batches()
    for batch in data:  # not equally many tokens in each row
        batch["labels"] = batch["labels"].clone()
        batch["labels"][0, :4] = -100
    sgd = {"optimizer": functools.partial(torch.optim.SGD, momentum=0.9)}
    options = {"eval": batches(1), "eval_every": 2, "halving": HALVING, **sgd}
    path = directory / "sweep"
    got = fadapt.sweep(model, trials(), data, mesh=mesh, directory=path, **options)
    with no_group():
        want = fadapt.sweep(whole, trials(), data, **options)
    equal(got, want, 1e-5)
    everyone: list = [None] * world
    dist.all_gather_object(everyone, [t for p in got.final.values() for t in p.trainable()])
    for other in everyone:
        assert all(map(torch.equal, other, everyone[0]))
    with pytest.raises(fadapt.ConfigError, match="3 rows does not divide over 2"):
        fadapt.sweep(model, trials(), batches(rows=3), mesh=mesh, verify=False)
    apart = [{k: torch.stack([t] * 7) for k, t in b.items()} for b in batches(rows=3)]
    with pytest.raises(fadapt.ConfigError, match="3 rows does not divide over 2"):
        fadapt.sweep(model, trials(), apart, mesh=mesh, per_adapter=True, verify=False)
    some = fadapt.grid({"proj": LoRA(r=2)}, lr=[1e-3], accumulate=2)
    with pytest.raises(fadapt.ConfigError, match="accumulate"):
        fadapt.sweep(model, some, batches(), mesh=mesh)
    with pytest.raises(fadapt.ConfigError, match="mesh=init_device_mesh"):
        train(model)
    with pytest.raises(fadapt.ConfigError, match="compile="):
        train(model, mesh=mesh, compile=True)
    other = fadapt.grid({"proj": fadapt.PiSSA(r=2) if rank else LoRA(r=2)}, lr=[1e-3, 1e-2])
    with pytest.raises(fadapt.ConfigError, match="another sweep than process 0; trial"):
        train(model, other, mesh=mesh)  # before one of them gathers weights for its start
    wide = sharded(whole)
    with pytest.raises(fadapt.ConfigError, match=r"over the processes \[0, 1, 2, 3\]"):
        train(wide, mesh=mesh)
    # FSDP2 over both: shards within "shard", and copies over "sweep", which never wait.
    model = sharded(whole, mesh=mesh)
    got = fadapt.sweep(model, trials(), data, mesh=mesh, **options)
    equal(got, want, 1e-5)


def split_by_tensors(rank: int, world: int, _: Path) -> None:
    """Tensor parallelism, whose processes see the same rows."""
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("sweep", "shard"))
    model = models.llama().requires_grad_(False)
    for layer in model.model.layers:
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
        parallelize_module(layer.mlp, mesh["shard"], {**plan, "down_proj": RowwiseParallel()})
    for options in ({"mesh": mesh}, {}):
        with pytest.raises(fadapt.ConfigError, match="is split by tensor parallelism"):
            train(model, **options)


def states_over_ranks(rank: int, world: int, directory: Path) -> None:
    """Each process keeps the optimiser's state of some trials: the same to the last bit."""
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("sweep", "shard"))
    model = sharded(models.qwen3().requires_grad_(False), mesh=mesh["shard"])

    def score(model, stack):
        score.left -= 1
        if not score.left:
            raise StopError
        with torch.no_grad():
            return fadapt.run(model, stack, batches(1)[0])

    def swept(path: Path | None = None, stop: int = 0) -> fadapt.Report:
        score.left = stop
        some = trials()
        some[1] = dataclasses.replace(some[1], accumulate=1, lr=1e30)  # diverges
        kept = path and fadapt.Checkpoints(path, every=1)
        options = {"eval": score, "eval_every": 1, "halving": fadapt.Halving(3), "directory": kept}
        return fadapt.sweep(model, some, batches(), mesh=mesh, log_every=1, **options)

    want = swept()
    calls = -score.left
    for in_turn in (engine_optimizer.AT_ONCE, 0):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(engine_optimizer, "AT_ONCE", in_turn)
            monkeypatch.setattr(loop, "SPLIT_FROM", 0)
            made: list = []

            class Kept(engine_optimizer.TrialOptimizer):
                def __init__(self, *given, made=made):
                    super().__init__(*given)
                    made.append(self)

            monkeypatch.setattr(loop, "TrialOptimizer", Kept)
            equal(swept(directory / str(in_turn)), want)
            for optimizer in made:
                everyone: list = [None] * world
                dist.all_gather_object(everyone, {row.trial for row in optimizer.mine})
                assert sum(map(len, everyone)) == len(optimizer.rows) == len(set.union(*everyone))
                assert all(everyone) or len(optimizer.rows) < world
                assert len(optimizer.optimizer.state) <= sum(len(r.values) for r in optimizer.mine)
            with pytest.raises(StopError):
                swept(directory / "stopped", stop=3)
        dist.barrier()
        equal(swept(directory / "stopped"), want)  # it goes on where no states are split
        assert -score.left < calls
        dist.barrier()
        if rank == 0:
            shutil.rmtree(directory / "stopped")
        dist.barrier()


def every_method_over_rows(rank: int, world: int, directory: Path) -> None:
    """Each row of the laws' table, and dropout, trained over a sharded base and a split batch."""
    whole = models.qwen3().requires_grad_(False)
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("sweep", "shard"))
    model = sharded(whole, mesh=mesh["shard"])
    dropout = {"dropout": LoRA(r=2, dropout=0.3), "DoRA's": DoRA(r=2, dropout=0.3)}
    pairs = [(b, c) for b, c in zip(batches(4)[:2], batches(4)[2:], strict=True)]
    groups: dict = {}  # {(what to calibrate on, whether they share a pass): trials}
    calibs = {"": None, "rows": batches(2), "pairs": pairs}
    for name, method in {**ROWS, **dropout}.items():
        linear = method.usual_kind == "linear"
        rule = {"q_proj|down_proj": method} if linear else method
        config = fadapt.Config(rule, layers=[0] if method.usual_kind != "embedding" else None)
        needs = "" if method.statistic is None else "rows"
        if any(s.reduction.paired for s in statistics_of(method.statistic)):
            needs = "pairs"
        if fadapt.init(whole, config, calibs[needs]).trainable():  # not SSteer
            trial = fadapt.Trial(config, lr=1e-2, clip=1.0, name=name)
            groups.setdefault((needs, linear), []).append(trial)
    data = batches(2)
    for batch in data:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][0, :4] = -100
    whole.train(), model.train()
    for (needs, linear), some in groups.items():
        options = {"calib": calibs[needs], "optimizer": torch.optim.SGD, "verify": False}
        options["max_adapters"] = None if linear else 1
        got = fadapt.sweep(model, some, data, mesh=mesh, **options)
        with no_group():
            want = fadapt.sweep(whole, some, data, **options)
        equal(got, want, 1e-5)


def every_method_moves(rank: int, world: int, _: Path) -> None:
    """Trials of all methods go to the other process at a halving, with their optimiser's state."""
    model = models.seeded(models.Tokens(), std=0.5).double().requires_grad_(False)
    ids = torch.randint(12, (3, 4, 5), generator=torch.Generator().manual_seed(0))
    data = [{"ids": some} for some in ids]
    chosen = [fadapt.Trial(m, lr=1e-2, name=n) for n, m in ROWS.items() if n != "SSteer"]
    options = {"steps": 3, "loss_fn": lambda output, _: output.sin().mean(), "verify": False}
    halving = fadapt.Halving(1, factor=1.5)
    options |= {"calib": data, "eval": data[:1], "eval_every": 1, "halving": halving}
    got = fadapt.sweep(model, chosen, data, max_adapters=25, **options)
    with no_group():
        want = fadapt.sweep(model, chosen, data, max_adapters=25, **options)
    equal(got, want)


TWO = {
    f.__name__: f
    for f in (
        trials_over_ranks,
        fewer_trials_than_processes,
        differences,
        split_by_tensors,
        states_over_ranks,
        every_method_over_rows,
        every_method_moves,
    )
}
FOUR = {f.__name__: f for f in (rows_over_ranks,)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return ranks.run(2, TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return ranks.run(4, FOUR, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", TWO)
def test_two_processes(name, two):
    assert not two[name], two[name]


@pytest.mark.parametrize("name", FOUR)
def test_four_processes(name, four):
    assert not four[name], four[name]


SCRIPT = """
import os, signal, sys
import torch, fadapt
from tests.test_distributed_sweeps import HALVING, batches, models, trials
torch.set_num_threads(1)
directory, kill = sys.argv[1], int(sys.argv[2])
model = models.qwen3().requires_grad_(False)

def score(model, stack):
    if kill and os.environ.get("RANK") == "1" and score.calls == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    score.calls += 1
    with torch.no_grad():
        return fadapt.run(model, stack, batches(1)[0])

score.calls = 0
kept = fadapt.Checkpoints(directory, every=1)
report = fadapt.sweep(model, trials(), batches(), eval=score, eval_every=1, halving=HALVING,
                      directory=kept, max_adapters=2)
if os.environ.get("RANK", "0") == "0":
    torch.save({n: p.trainable() for n, p in report.final.items()}, directory + "/last.pt")
"""


def test_killed_and_on_another_number(tmp_path):
    """An unchanged script under torchrun; a process is killed, and the command given again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(processes: int, where: str, kill: int = 0):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*(torchrun if processes > 1 else ()), script, tmp_path / where, str(kill)]
        return subprocess.run(
            [sys.executable, *map(str, command)], env=environment, timeout=100, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    assert start(1, "whole").returncode == 0
    killed = start(2, "broken", kill=3)
    assert killed.returncode
    assert "Signal 9" in killed.stderr, killed.stderr
    found = start(3, "broken")
    assert found.returncode == 0, found.stderr
    want, got = (torch.load(tmp_path / d / "last.pt") for d in ("whole", "broken"))
    for name, leaves in want.items():
        assert all(map(torch.equal, leaves, got[name])), name


ALONE = """
import os, signal, sys, time
import torch, fadapt
import torch.distributed as dist
from datetime import timedelta
from torch.distributed.device_mesh import init_device_mesh
from fadapt.distributed import team
from tests.test_distributed_sweeps import batches, models, sharded, trials
torch.set_num_threads(1)
team.TOLD_WITHIN = 1.0
where, how, rank = sys.argv[1], sys.argv[2], int(os.environ["RANK"])
dist.init_process_group("gloo", f"file://{where}/{how}", timeout=timedelta(seconds=60), rank=rank,
                        world_size=2)
model, options = models.qwen3().requires_grad_(False), {}
if how == "memory":
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("sweep", "shard"))
    model, options = sharded(model, mesh=mesh["shard"]), {"mesh": mesh}

def loss_fn(output, batch):
    loss_fn.calls += 1
    if loss_fn.calls > 10 and os.environ["RANK"] == "1":
        if "mesh" not in options:
            os.kill(os.getpid(), signal.SIGKILL)
        raise torch.OutOfMemoryError("no memory")
    return output.loss

loss_fn.calls = 0
try:
    fadapt.sweep(model, trials(), batches(), loss_fn=loss_fn, log_every=1, verify=False, **options)
except Exception as error:
    print(type(error).__name__, error, "report of", len(error.report.params), flush=True)
    os._exit(3)
"""


def test_one_of_two_processes_ends(tmp_path):
    """Killed; or without memory in the middle of a pass over a shared base. The other ends, too."""
    script = tmp_path / "script.py"
    script.write_text(ALONE)
    started = {}
    for how in ("killed", "memory"):
        for rank in (0, 1):
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            started[how, rank] = subprocess.Popen(
                [sys.executable, str(script), str(tmp_path), how],
                env={**environment, "RANK": str(rank), "WORLD_SIZE": "2"}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
    said = {}
    for key, process in started.items():
        try:
            said[key] = process.communicate(timeout=100)[0]
        finally:
            process.kill()
    assert started["killed", 1].returncode == -9
    assert "OutOfMemoryError no memory" in said["memory", 1]
    for how in ("killed", "memory"):
        assert started[how, 0].returncode == 3, said[how, 0]
        assert "PeerError process 0 of 2 cannot reach the others" in said[how, 0]
        assert "report of" in said[how, 0]


def test_the_example_prints_the_same_report(tmp_path):
    pytest.importorskip("sklearn", exc_type=ImportError)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def report(*launcher: str) -> str:
        command = [sys.executable, *launcher, str(ROOT / "examples" / "sweep.py"), "--steps", "2"]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, timeout=100, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return done.stdout.partition("\n48 trials, ")[0]

    one = report()
    assert "LoRA(r=8)" in one
    assert report("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2") == one


def test_the_benchmark_runs(tmp_path):
    """Question b, small; a and c run by the same functions."""
    options = "--question b --layers 2 --hidden 32 --heads 2 --kv 1 --head-dim 16 --inner 64"
    options += " --vocab 64 --tokens 8 --trials 4 --together 2 --rank 2 --every 1 --rounds 1"
    script = ROOT / "examples" / "benchmarks" / "distributed.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), *options.split(), "--json", str(tmp_path / "record.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=100,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["one"]["losses"][0] == pytest.approx(record["all"]["losses"][0], rel=0.01)
    assert record["all"]["tokens a second"] > 0
    assert record["exchange, % of a step"] > 0
