"""Checkpoints of a sweep: killed at any moment it goes on to the same bits; disks that refuse."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import fadapt
from fadapt.training import Halving, Trial, fit, sweep

from .models import Tokens, seeded
from .test_laws import ROWS

STEPS = 40


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mid = nn.Linear(6, 8), nn.Linear(8, 8)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x, labels=None):
        h = self.drop(torch.tanh(self.up(x)))
        return self.head(torch.tanh(self.mid(h)))


def net():
    return seeded(Net(), std=0.5).requires_grad_(False).train()


def loss_fn(output, batch):
    return F.cross_entropy(output, batch["labels"])


class StopHereError(Exception):
    pass


class Loss:
    """The loss, until it has been taken so often in training; then ``end`` is called."""

    def __init__(self, calls=math.inf, end=None):
        self.left, self.end = calls, end

    def __call__(self, output, batch):
        self.left -= output.requires_grad
        if self.left < 0:
            self.stop()
        return loss_fn(output, batch)

    def stop(self):
        if self.end is None:
            raise StopHereError
        self.left = math.inf
        self.end()


def rows(count=20):
    rng = torch.Generator().manual_seed(0)
    xs = torch.randn(count, 6, generator=rng)
    return [{"x": x, "labels": (x[0] > 0).long() + (x[1] > 0).long()} for x in xs]


def loader(**kwargs):
    """Shuffled by the global generator; an epoch is 5 batches."""
    return DataLoader(rows(), batch_size=4, shuffle=True, **kwargs)


TRIALS = [
    Trial(fadapt.LoRA(r=2), lr=1e-2, name="plain"),
    Trial(fadapt.LoRA(r=4), lr=3e-2, schedule="cosine", warmup=4, weight_decay=0.1, name="decayed"),
    Trial(fadapt.DoRA(r=2), lr=2e-2, accumulate=4, clip=0.5, seed=3, name="accumulated"),
    Trial(fadapt.IA3(), lr=1e-2, accumulate=8, name="slow"),
    Trial(fadapt.LoRA(r=3), lr=1e30, name="wild"),
    Trial(fadapt.LoRA(r=3), lr=1e-6, name="stopped"),
]


def full_sweep(directory: Path | None, steps: int = STEPS, model=None, **options):
    """Everything at once: dropout, shuffling, accumulation, divergence, halving, best weights."""
    given = dict(
        steps=steps, loss_fn=Loss(), eval=list(loader_eval()), eval_every=7,
        halving=Halving(first=10), directory=directory, checkpoint_every=1, log_every=3, seed=5,
        verify=False,  # which would count as calls of the loss
    )  # fmt: skip
    return sweep(model or net(), TRIALS, loader(), **{**given, **options})


def loader_eval():
    return DataLoader(rows(8), batch_size=4)


def weights(report):
    return {
        f"{kind}|{name}|{i}": leaf.detach()
        for kind in ("params", "final")
        for name, params in getattr(report, kind).items()
        for i, leaf in enumerate(fadapt.trainable(params))
    }


def same(a, b):
    """Bit for bit, losses and scores included."""
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    assert [k for k in wa if not torch.equal(wa[k], wb[k])] == []
    outcome = ("name", "status", "step", "best_step", "reason")
    for ra, rb in zip(a.results, b.results, strict=True):
        assert [getattr(ra, f) for f in outcome] == [getattr(rb, f) for f in outcome]
    assert a.losses.keys() == b.losses.keys()
    for step in a.losses:
        torch.testing.assert_close(a.losses[step], b.losses[step], atol=0, rtol=0, equal_nan=True)
    assert a.scores.keys() == b.scores.keys()


def log_of(directory):
    return (directory / "log.jsonl").read_text()


KILLER = """
import os, random, signal, sys, time
import torch
from tests.test_resume import full_sweep, Path

torch.set_num_threads(1)
directory, seed = Path(sys.argv[1]), int(sys.argv[2])

def begin(path):
    child = os.fork()
    if child == 0:
        full_sweep(path)
        os._exit(0)
    return child

# How long this machine takes without a kill: every kill comes within a quarter of that, so that
# several come before the end, on a fast machine as on a slow one.
start = time.monotonic()
os.waitpid(begin(directory.with_name("timed")), 0)
whole = time.monotonic() - start
chance, kills = random.Random(seed), 0
while True:
    child = begin(directory)
    time.sleep(chance.uniform(0, whole / 4))
    done, status = os.waitpid(child, os.WNOHANG)
    if not done and kills < 25:
        os.kill(child, signal.SIGKILL)
        done, status = os.waitpid(child, 0)
        kills += 1
    elif not done:
        done, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print(kills)
        sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path, seed):
    expected = full_sweep(tmp_path / "whole")
    assert {r.status for r in expected.results} == {"finished", "stopped", "diverged"}
    killed = tmp_path / "killed"
    run = subprocess.run(
        [sys.executable, "-c", KILLER, str(killed), str(seed)],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 3, "too few kills to mean anything"
    same(expected, full_sweep(killed))
    assert log_of(killed) == log_of(tmp_path / "whole")
    assert not list(killed.glob(".*.tmp"))


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adafactor, torch.optim.ASGD],
)
def test_interrupted_at_many_steps(tmp_path, optimizer):
    """In turn within each of many steps, before and after a rung; the same end."""
    options = dict(optimizer=optimizer, steps=16)
    expected = full_sweep(None, checkpoint_every=None, **options)
    for stop in (1, 2, 4, 7, 9, 10, 11):
        directory = tmp_path / str(stop)
        interrupted(directory, stop, **options)
        torch.manual_seed(stop)  # what the global generator does in between must not matter
        same(expected, full_sweep(directory, **options))


def test_the_best_weights_of_before_are_kept(tmp_path):
    """The rate becomes absurd after the best evaluation; the interruption comes later still."""
    trial = Trial(fadapt.LoRA(r=2), lr=0.01, schedule=lambda done: 1 if done < 0.4 else 300)
    eval_batches = list(loader_eval())

    def run(**options):
        given = dict(steps=20, loss_fn=Loss(), eval=eval_batches, eval_every=1, checkpoint_every=1)
        return sweep(net(), [trial], loader(), **{**given, **options})

    expected = run()
    assert expected.best.best_step < 14
    with pytest.raises(StopHereError):
        run(directory=tmp_path, loss_fn=Loss(15))
    same(expected, run(directory=tmp_path))


def test_the_log_has_every_step_once(tmp_path):
    """Steps after the checkpoint were logged before the interruption, and are again after it."""
    options = dict(checkpoint_every=6, log_every=1)
    full_sweep(tmp_path / "whole", **options)
    interrupted(tmp_path / "stopped", 9, **options)
    assert '"step": 9' in log_of(tmp_path / "stopped")
    full_sweep(tmp_path / "stopped", **options)
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")


def test_data_order_of_their_own_goes_on(tmp_path):
    batches = list(loader_eval())
    options = dict(loss_fn=Loss(), order="own", steps=9, checkpoint_every=2)
    trials = [Trial(fadapt.LoRA(r=2), seed=s) for s in range(3)]
    expected = sweep(net(), trials, batches, **options)
    stopping = Loss(3 * 5)
    with pytest.raises(StopHereError):
        sweep(net(), trials, batches, directory=tmp_path, **{**options, "loss_fn": stopping})
    same(expected, sweep(net(), trials, batches, directory=tmp_path, **options))


def test_a_loader_with_its_own_generator_and_workers(tmp_path):
    def loader_of(seed):
        return loader(generator=torch.Generator().manual_seed(seed), num_workers=1)

    options = dict(loss_fn=Loss(), steps=12)
    expected = sweep(net(), TRIALS[:1], loader_of(4), **options)
    with pytest.raises(StopHereError):
        sweep(net(), TRIALS[:1], loader_of(4), directory=tmp_path, checkpoint_every=1,
              **{**options, "loss_fn": Loss(7)})  # fmt: skip
    again = sweep(
        net(), TRIALS[:1], loader_of(9), directory=tmp_path, checkpoint_every=1, **options
    )
    same(expected, again)


def test_a_finished_sweep_is_not_trained_again(tmp_path):
    first = full_sweep(tmp_path)
    same(first, full_sweep(tmp_path, loss_fn=Loss(0)))


class Scores:
    """The losses on a batch, until they have been taken so often."""

    def __init__(self, batch, calls):
        self.batch, self.left = batch, calls

    def __call__(self, model, stack):
        self.left -= 1
        if self.left < 0:
            raise StopHereError
        with torch.no_grad():
            return {"loss": fadapt.run(model, stack, self.batch, loss_fn)}


def test_every_method_goes_on(tmp_path):
    """Best weights and those of stopped trials too, whatever leaves a method has."""
    trained = {name: method for name, method in ROWS.items() if name != "SSteer"}
    draw = torch.Generator().manual_seed(0)
    batches = [
        {
            "ids": torch.randint(12, (4, 5), generator=draw),
            "labels": torch.randint(8, (4,), generator=draw),
        }
        for _ in range(4)
    ]

    def all_methods(directory, evaluations=100):
        model = seeded(Tokens(), std=0.5).requires_grad_(False)
        trials = [Trial(method, lr=1e-2, name=name) for name, method in trained.items()]
        return sweep(
            model, trials, batches, steps=4, loss_fn=loss_fn, calib=batches,
            eval=Scores(batches[0], evaluations), eval_every=1,
            halving=Halving(first=2, factor=3), directory=directory, checkpoint_every=1,
            verify=False,
        )  # fmt: skip

    expected = all_methods(None)
    with pytest.raises(StopHereError):
        all_methods(tmp_path, evaluations=2)
    found = all_methods(tmp_path)
    same(expected, found)
    assert {r.status for r in found.results} == {"finished", "stopped"}
    same(expected, all_methods(tmp_path))  # all that is kept comes from the file


def test_fit_resumes(tmp_path):
    params = fadapt.init(net(), fadapt.LoRA(r=2))
    options = dict(steps=10, lr=0.01, loss_fn=Loss(), checkpoint_every=1)
    expected = fit(net(), params, loader(), **options)
    with pytest.raises(StopHereError):
        fit(net(), params, loader(), directory=tmp_path, **{**options, "loss_fn": Loss(6)})
    found = fit(net(), params, loader(), directory=tmp_path, **options)
    assert all(map(torch.equal, fadapt.trainable(expected), fadapt.trainable(found)))


def interrupted(directory, after=6, **options):
    """Stops in the middle of a step; the trials that take part in each of the first are all."""
    with pytest.raises(StopHereError):
        full_sweep(directory, loss_fn=Loss(after * len(TRIALS) + 1), **options)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    interrupted(tmp_path)
    file = tmp_path / "checkpoint.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) - 100] ^= 1
    elif damage == "empty":
        data = bytearray()
    else:
        fadapt.save(fadapt.init(net(), fadapt.LoRA(r=2)), file)
        data = bytearray(file.read_bytes())
    file.write_bytes(data)
    with pytest.raises(fadapt.CheckpointError):
        full_sweep(tmp_path)


def test_a_half_written_checkpoint_is_not_looked_at(tmp_path):
    interrupted(tmp_path)
    whole = (tmp_path / "checkpoint.safetensors").read_bytes()
    (tmp_path / ".checkpoint.safetensors.123.tmp").write_bytes(whole[: len(whole) // 3])
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 7, "loss": {"pl')
    same(full_sweep(None), full_sweep(tmp_path))
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line)


def test_another_sweep_is_not_continued(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(fadapt.ConfigError, match="steps"):
        full_sweep(tmp_path, steps=STEPS + 8)
    with pytest.raises(fadapt.ConfigError, match="optimizer"):
        full_sweep(tmp_path, optimizer=torch.optim.Adam)
    other = seeded(Net(), seed=1, std=0.5).train()
    with pytest.raises(fadapt.CheckpointError, match="base model"):
        full_sweep(tmp_path, model=other)
    same(full_sweep(None), full_sweep(tmp_path, resume=False))


def test_values_in_another_order_are_not_taken_over(tmp_path, monkeypatch):
    """As an earlier version of the library may have written them."""
    monkeypatch.setattr("fadapt.training.identity.FORMAT", 2)
    full_sweep(tmp_path, steps=8, halving=None)
    monkeypatch.undo()
    with pytest.raises(fadapt.CheckpointError, match="format 2, this fadapt reads 3"):
        full_sweep(tmp_path, steps=8, halving=None)


def test_an_unwritable_directory_is_refused_before_the_first_step(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    calls = []
    with pytest.raises(fadapt.CheckpointError, match="file"):
        full_sweep(blocked / "sweep", loss_fn=lambda o, b: calls.append(1))
    assert not calls


FULL = """
import resource, signal, sys
import torch
from tests.test_resume import *

torch.set_num_threads(1)
directory = Path(sys.argv[1])
expected = full_sweep(None)
interrupted(directory)
before = (directory / "checkpoint.safetensors").read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
# All later ones are larger, whatever number of digits their times have.
limit = {"nothing": 0, "checkpoint": len(before) * 3 // 4}[sys.argv[2]]
assert limit < len(before)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
try:
    full_sweep(directory)
except fadapt.CheckpointError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    where = "checkpoint.safetensors" if sys.argv[2] == "checkpoint" else "log.jsonl"
    assert where in str(error), error
    assert set(error.report.final) == {t.name for t in TRIALS}
    assert all(p.isfinite().all() for p in weights(error.report).values())
else:
    sys.exit("the disk was not full")
assert (directory / "checkpoint.safetensors").read_bytes() == before
assert not list(directory.glob(".*.tmp"))
same(expected, full_sweep(directory))
"""


@pytest.mark.parametrize("grows", ["nothing", "checkpoint"])
def test_a_full_disk_loses_nothing(tmp_path, grows):
    """No file may grow beyond a limit, which fails a write as a full disk does."""
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "sweep"), grows],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("file", ["log.jsonl", "checkpoint.safetensors"])
def test_a_disk_that_begins_to_refuse_loses_nothing(tmp_path, file):
    """The error carries the weights of the last step; the directory goes on once it is mended."""

    def breaks():
        (tmp_path / file).rename(tmp_path / "aside")
        (tmp_path / file).mkdir()

    breaking = Loss(8 * len(TRIALS) - 1, breaks)
    with pytest.raises(fadapt.CheckpointError, match=file) as caught:
        full_sweep(tmp_path, loss_fn=breaking, checkpoint_every=4)
    at = max(caught.value.report.losses)
    assert at in (8, 9)
    whole = full_sweep(None)
    for step in range(1, at + 1):
        pair = caught.value.report.losses[step], whole.losses[step]
        torch.testing.assert_close(*pair, atol=0, rtol=0, equal_nan=True)
    (tmp_path / file).rmdir()
    (tmp_path / "aside").rename(tmp_path / file)
    same(whole, full_sweep(tmp_path, checkpoint_every=4))


def small(directory, options=None, **changes):
    """A sweep of two trials; what a test changes of it."""
    x = torch.ones(4, 8)
    given = dict(
        model=seeded(nn.Sequential(nn.Linear(8, 8)), std=0.3),
        trials=[Trial(fadapt.LoRA(r=2)), Trial(fadapt.IA3())],
        batches=[x * i for i in range(1, 5)], steps=8, loss_fn=Loss8(), eval=[x], eval_every=2,
        verify=False,
    )  # fmt: skip
    kept = fadapt.Checkpoints(directory, **{"every": 1, **(options or {})})
    return sweep(**{**given, "directory": kept, **changes})


class Loss8(Loss):
    def __call__(self, output, batch):
        self.left -= output.requires_grad
        if self.left < 0:
            self.stop()
        return output.square().mean()


def stopped_half_way(directory, **changes):
    with pytest.raises(StopHereError):
        small(directory, loss_fn=Loss8(9), **changes)


def doubled(output, batch):
    return 2 * output.square().mean()


def score(model, stack):
    return {"loss": torch.zeros(len(stack))}


OTHERS = {
    "a weight": (dict(model=seeded(nn.Sequential(nn.Linear(8, 8)), seed=1, std=0.3)), "0.bias"),
    "a batch": (dict(batches=[torch.ones(4, 8)] * 3 + [torch.zeros(4, 8)]), "batches"),
    "the number of batches": (dict(batches=[torch.ones(4, 8) * i for i in range(1, 4)]), "of 3"),
    "another loss": (dict(loss_fn=doubled), "loss_fn.*doubled"),
    "eval batches": (dict(eval=[torch.zeros(4, 8)]), "eval"),
    "an eval function": (dict(eval=score), "eval.*score"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_a_sweep_was_is_compared(tmp_path, what):
    stopped_half_way(tmp_path)
    changes, match = OTHERS[what]
    with pytest.raises(fadapt.FadaptError, match=match):
        small(tmp_path, **changes)
    if what != "a weight":  # a loss or an eval function that was mended
        assert len(small(tmp_path, dict(resume="anyway"), **changes).losses) == 8
    else:
        same(small(tmp_path), small(tmp_path / "anew"))


def test_functions_count_by_their_code_and_numbers():
    from fadapt.training.fingerprints import code_of

    def squares(k):
        return lambda o, b: k * o.square().mean()

    def lengths(k):
        return lambda o, b: k * o.abs().mean()

    assert code_of(squares(1.0)) == code_of(squares(1.0))
    assert code_of(squares(1.0)) != code_of(squares(2.0))
    assert code_of(squares(1.0)).split("code")[1] != code_of(lengths(1.0)).split("code")[1]
    assert code_of(Loss()) == code_of(Loss(5))
    assert code_of(Loss()) != code_of(Loss8())


def test_other_data_behind_a_loader_are_refused(tmp_path):
    """The set is not a list, so its first batch tells."""

    class Rows(torch.utils.data.Dataset):
        def __init__(self, value):
            self.value = value

        def __len__(self):
            return 12

        def __getitem__(self, i):
            return torch.full((8,), self.value * (i + 1.0))

    def of(value):
        return DataLoader(Rows(value), batch_size=4, shuffle=True)

    stopped_half_way(tmp_path, batches=of(0.5))
    with pytest.raises(fadapt.ConfigError, match="first batch"):
        small(tmp_path, batches=of(0.25))
    same(small(tmp_path, batches=of(0.5)), small(tmp_path / "anew", batches=of(0.5)))


def test_an_eval_that_raises_loses_nothing(tmp_path):
    """The error is the user's own; the mended sweep ends as one that never failed."""

    class Score:
        def __init__(self, fails):
            self.fails = fails

        def __call__(self, model, stack):
            if self.fails:
                self.fails -= 1
                if not self.fails:
                    raise KeyError("mine")
            return fadapt.run(model, stack, torch.ones(4, 8), Loss8())

    whole = small(tmp_path / "whole", eval=Score(0))
    with pytest.raises(KeyError, match="mine") as caught:
        small(tmp_path / "failed", options=dict(), eval=Score(3))
    notes = "\n".join(caught.value.__notes__)
    assert "'LoRA(r=2)', 'IA3'" in notes
    assert "evaluation after step 6 of 8" in notes
    assert len(caught.value.report.losses) == 6
    assert sorted(caught.value.report.scores) == [2, 4]
    same(whole, small(tmp_path / "failed", eval=Score(0)))
    assert log_of(tmp_path / "failed") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("calls", [10, 11])
def test_a_loss_that_raises_loses_no_step(tmp_path, accumulate, calls):
    """Between two checkpoints, in the first or second trial of a step: one is written then."""
    trials = [Trial(fadapt.LoRA(r=2), accumulate=accumulate), Trial(fadapt.LoRA(r=2), seed=1)]
    options = dict(trials=trials, batches=DataLoader(torch.ones(12, 8), batch_size=2, shuffle=True))
    for width in ("auto", 1):
        whole = small(tmp_path / f"whole {width}", max_adapters=width, **options)
        directory = tmp_path / f"failed {width}"
        with pytest.raises(StopHereError) as caught:
            small(directory, dict(every=None), max_adapters=width, loss_fn=Loss8(calls), **options)
        # A gradient that is half added up is no state to go on from.
        half = accumulate > 1 and width == 1 and calls == 11
        assert "after step 5 of 8" in caught.value.__notes__[-1]
        assert ("goes on from here" in caught.value.__notes__[-1]) != half
        same(whole, small(directory, max_adapters=width, **options))


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"5\n", b'{"step": "x"}\n', None])
def test_a_damaged_log_is_made_anew(tmp_path, damage):
    small(tmp_path / "whole")
    stopped_half_way(tmp_path / "half")
    log = tmp_path / "half" / "log.jsonl"
    log.write_bytes(log.read_bytes()[30:] + damage if damage else b"")
    small(tmp_path / "half")
    assert log_of(tmp_path / "half") == log_of(tmp_path / "whole")


def test_adapters_are_those_of_this_sweep_after_any_end(tmp_path, monkeypatch):
    def files():
        return sorted(p.name for p in (tmp_path / "adapters").iterdir())

    with monkeypatch.context() as patch:
        patch.setattr("fadapt.training.loop.save_adapters", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small(tmp_path)
    report = small(tmp_path)
    assert files() == ["000-LoRA_r=2_.safetensors", "001-IA3.safetensors"]
    model = seeded(nn.Sequential(nn.Linear(8, 8)), std=0.3)
    found = fadapt.load(tmp_path / "adapters" / "001-IA3.safetensors", model)
    assert torch.equal(fadapt.trainable(found)[0], fadapt.trainable(report.params["IA3"])[0])
    (tmp_path / "adapters" / "mine.txt").touch()
    with pytest.raises(StopHereError):
        small(tmp_path, dict(resume=False), trials=[Trial(fadapt.DoRA(r=1))], loss_fn=Loss8(3))
    assert files() == ["mine.txt"]


HOLDER = """
import sys, time
from pathlib import Path
from fadapt.training.directory import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_one_sweep_at_a_time_in_a_directory(tmp_path):
    """In another process, in another thread, and after that process was killed."""
    from fadapt.training.directory import held

    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(fadapt.CheckpointError, match=rf"in use .*process {holder.pid}"):
        small(tmp_path)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with held(tmp_path), pytest.raises(fadapt.CheckpointError, match="in use"):
        small(tmp_path)
    small(tmp_path)


def test_a_checkpoint_may_go_on_at_another_width(tmp_path):
    """One by one the values lie otherwise in memory; the file does not tell."""
    whole = small(tmp_path / "whole")
    for first, then in (("auto", 1), (1, None), (2, 1)):
        directory = tmp_path / f"{first} {then}"
        stopped_half_way(directory, max_adapters=first)
        found = small(directory, max_adapters=then)
        for a, b in zip(weights(whole).values(), weights(found).values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_takes_the_outcome_along(tmp_path, stop):
    """And with a directory it goes on from the step that was interrupted, bit for bit."""

    def stops():
        raise stop

    breaking = Loss(6 * len(TRIALS) + 1, stops)
    for directory in (None, tmp_path):
        breaking.left = 6 * len(TRIALS) + 1
        with pytest.raises(stop) as caught:
            full_sweep(directory, loss_fn=breaking, checkpoint_every=None)
        report, (note,) = caught.value.report, caught.value.__notes__
        assert sorted(report.losses) == [1, 2, 3, 4, 5, 6]
        assert set(report.final) == {t.name for t in TRIALS}
        assert "after step 6 of" in note
        assert ("the checkpoint goes on from here" in note) == (directory is not None)
    same(full_sweep(None), full_sweep(tmp_path, checkpoint_every=None))


def test_ctrl_c_at_any_moment_is_made_up_for(tmp_path):
    """A signal between two instructions, wherever; at worst from an earlier step."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    rng, whole, hits = random.Random(), full_sweep(None), 0
    start = time.monotonic()
    full_sweep(tmp_path / "timed", checkpoint_every=5)
    takes = time.monotonic() - start
    try:
        for k in range(3):
            for _ in range(3):
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.02, 0.9) * takes)
                try:
                    full_sweep(tmp_path / str(k), checkpoint_every=5)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    break
                except KeyboardInterrupt:
                    hits += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            same(whole, full_sweep(tmp_path / str(k), checkpoint_every=5))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits
