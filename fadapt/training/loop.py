"""Loop: the steps of a sweep, its evaluations, its stops and its checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..base.eval_mode import evaluating, training_pass
from ..base.torch_private import pytree
from ..errors import CheckpointError, ConfigError, OneByOneWarning
from ..params.stack import stack
from . import checkpoint, identity
from .checkpoint import SEPARATOR, State, expect, expect_float, expect_int, expect_keys, expect_like
from .data import Feed, to_device
from .directory import held, remove_adapters, save_adapters
from .engine.chunks import ChunkRunner
from .engine.compiler import Compiler
from .engine.flat_params import FlatParams
from .engine.optimizer import TrialOptimizer
from .engine.rotary import tables_written
from .generators import Generators
from .history import History
from .leaderboard import Leaderboard, on_all
from .progress import Bar
from .report import Report
from .settings import Settings, device_of
from .starts import initial
from .trial import Trial

T = TypeVar("T")


class Loop:
    """One run of a sweep, from its start or its checkpoint to the end.

    Attributes:
        step: batches done.
        settled: the step up to which evaluations and stops are done, too.
        seconds: spent before the last restart.
        chunk: the most adapters in one pass.
        whole: whether the state is that between two steps, which a checkpoint may hold.
    """

    def __init__(self, model: nn.Module, trials: Mapping[str, Trial], batches: Any, s: Settings):
        check_process(model)
        self.steps = s.checked(batches, trials)
        self.model, self.settings, self.trials = model, s, list(trials.values())
        self.device = device_of(model)
        seeds = [t.data_seed for t in self.trials]
        self.data = Feed(batches, seeds, s.order, s.per_adapter, self.device)
        self.starts = initial(model, trials, s.calib)
        self.board = Leaderboard(trials, self.starts, s.goal)
        self.flat = self._make_flat(separate=s.max_adapters == 1)
        self.compiler = Compiler(s.compile, self.device)
        self.optimizer = self._make_optimizer()
        self.runner = self._make_runner()
        self.chunk, self.step, self.settled, self.seconds = 0, 0, 0, 0.0
        self.whole = True
        self.rungs = s.halving.rungs(self.steps, len(trials)) if s.halving else {}
        self.generators = Generators(self.device)
        path = s.path
        tensorboard = path / "tensorboard" if path is not None and s.tensorboard else None
        log = path and path / "log.jsonl"
        self.history = History(self.board.names, self._rate, log, tensorboard)
        self._batches, self._identity = batches, {}

    def run(self) -> Report:
        """Trains to the end; the global generators are as before afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        path = self.settings.path
        with contextlib.ExitStack() as scope:
            scope.enter_context(torch.random.fork_rng(devices=devices))
            scope.enter_context(
                tables_written(self.model) if self.compiler.compiles else nullcontext()
            )
            scope.enter_context(held(path) if path is not None else nullcontext())
            self._started = self._saved = time.monotonic()
            self.generators.seed(self.settings.seed)
            if path is not None:
                self._open(path)
            with self._nothing_lost():
                self.history.start(self.step, self.board.events())
                self._train()
                self.history.close()
        return self.report()

    def report(self) -> Report:
        """The outcome so far."""
        last = {trial: block.train(row) for trial, block, row in self.flat.rows()}
        return self.board.report(last, self.step, self.history, self.elapsed(), self.chunk)

    def elapsed(self) -> float:
        """Seconds of this sweep, over all restarts."""
        return self.seconds + time.monotonic() - self._started

    def _rate(self, trial: int, step: int) -> float:
        return self.trials[trial].rate_at(step, self.steps)

    def _named(self, values: Sequence[T]) -> dict[str, T]:
        return dict(zip(self.board.names, values, strict=True))

    def _make_flat(self, separate: bool) -> FlatParams:
        """A layout in which trials run together, or each as :func:`fadapt.fit` runs it alone."""
        self.separate = separate
        apart = {leaf for trial in self.trials for leaf in trial.lr_ratio or ()}
        numbers = range(len(self.starts))
        if separate:
            return FlatParams.separate(self.starts, numbers, apart)
        return FlatParams(stack(self.starts), numbers, apart)

    def _make_optimizer(self) -> TrialOptimizer:
        return TrialOptimizer(self.flat, self.trials, self.settings.optimizer, self.steps)

    def _make_runner(self, chosen: int | None = None) -> ChunkRunner:
        s = self.settings
        return ChunkRunner(
            self.model, self.flat, s.loss_fn, self.data.per_adapter, s.max_adapters, s.verify,
            self.compiler, self.optimizer.accumulates, self._named(self.trials), chosen,
        )  # fmt: skip

    def _open(self, path: Path) -> None:
        """Goes on from the directory's checkpoint, or begins anew."""
        kept = self.settings.directory
        self.data.watch()
        self._identity = {
            "kind": "sweep",
            "format": identity.FORMAT,
            "sweep": identity.settings_of(self.settings, self._named(self.trials), self.steps),
            "given": identity.given_of(self.settings, self._batches),
            "base": identity.base_of(self.model),
            "starts": {n: identity.start_of(p) for n, p in self._named(self.starts).items()},
        }
        if kept.resume:
            with checkpoint.opened(path) as file:
                if file is not None:
                    identity.check(path, file.meta, self._identity, kept.resume == "anyway")
                    self.load_state_dict(checkpoint.state_of(file))
                    return
        remove_adapters(path)

    def _train(self) -> None:
        if self.board.running():
            self._save()  # before the first step, so that a disk that refuses shows now
            with Bar(self.steps, self.settings.progress) as bar:
                while self.board.running():
                    if self.settled < self.step:
                        self._settle(bar)
                    elif self.step < self.steps:
                        self._one_step()
                    else:
                        break
            self._note()
            for trial in self.board.running():
                self.board.close(trial, "finished", "", self.step)
            self._save()
        if self.settings.path is not None:
            save_adapters(self._best_in_order(), self.settings.path)

    def _one_step(self) -> None:
        before = self.data.state_dict(), self.generators.state_dict()
        order = self.flat.order
        try:
            batch = next(self.data)
            if self.step == 0:
                self._prove(batch)
            with training_pass(self.model):
                if self.runner.chosen is None:
                    self.runner.choose(batch)
                    if self.runner.chosen == 1:
                        self._separate()
                order = self.flat.order
                weights = [1 / self.trials[t].accumulate for t in order]
                losses = self.runner.gradients(batch, weights, self.step)
        except Exception:
            self.whole = not self.runner.partial
            self.data.go_back(before[0])
            self.generators.load_state_dict(before[1])
            raise
        self.whole = False
        self.optimizer.step(self.step, losses)
        self.step += 1
        self.chunk = max(self.chunk, self.runner.width)
        alive = torch.cat([a.to(losses.device) for a in self.optimizer.alive])
        self.history.add(self.step, order, losses, alive)
        self.whole = True

    def _prove(self, batch: Any) -> None:
        """Trials that do not train as they would alone in one pass run one by one."""
        why = self.runner.one_by_one(batch)
        if why:
            message = f"the trials of this sweep run one by one, since {why}"
            warnings.warn(message, OneByOneWarning, stacklevel=6)
        if why != "":
            self._separate()

    def _separate(self) -> None:
        """Trials that run one by one lie apart, as if they were alone."""
        if not self.separate:
            self.flat = self._make_flat(separate=True)
            self.optimizer = self._make_optimizer()
        self.runner = self._make_runner(1)

    def _settle(self, bar: Bar) -> None:
        """What comes after a step: readings, an evaluation, stops, a checkpoint."""
        s, ends, rung = self.settings, self.step == self.steps, self.step in self.rungs
        periodic = s.eval_every is not None and self.step % s.eval_every == 0
        evaluates = s.eval is not None and (ends or rung or periodic)
        saves = self._checkpoint_due() and not ends
        if evaluates or saves or self.step % s.log_every == 0:
            bar.update(self.step, self._note(), self.board.leader())
        if evaluates and self.board.running():
            scores = self._evaluate()
            if rung:
                self._stop_losers(scores)
        self.settled = self.step
        if saves:
            self._save()

    def _note(self) -> list[float]:
        """Waits for the device and notes what has diverged; returns the running losses."""
        running = set(self.board.running())
        for step, trial, loss in self.history.flush():
            if trial in running:
                finite = math.isfinite(loss)
                self._close(
                    trial,
                    "diverged",
                    "gradient or new weights not finite" if finite else f"loss {loss}",
                    step,
                )
        self.history.write()
        self.idle_stopped()
        last = self.history.losses.get(self.step)
        return [] if last is None else [x for x in last.tolist() if math.isfinite(x)]

    def _close(self, trial: int, status: str, reason: str, step: int) -> None:
        self.board.close(trial, status, reason, step)
        self.history.event(step, status, trial, reason)

    def idle_stopped(self) -> None:
        """Trials that do not train but are still in the stack run idle."""
        self.runner.idle = frozenset(self.flat.order) - set(self.board.running())
        self.optimizer.freeze(self.runner.idle)

    def _evaluate(self) -> Tensor:
        s, running = self.settings, set(self.board.running())
        generators = self.generators.state_dict()
        try:
            with evaluating(self.model):
                found = self.runner.scores(s.eval) if callable(s.eval) else self._mean_losses()
            order, count = self.flat.order, len(self.trials)
            scores = {k: on_all(order, v, running, count) for k, v in found.items()}
            self.history.score(self.step, scores)
        except Exception as error:
            self.generators.load_state_dict(generators)
            error.add_note(f"fadapt: in the evaluation after step {self.step} of {self.steps}")
            raise
        self.board.metric = next(iter(scores))
        ranked = scores[self.board.metric]
        better = set(self.board.improved(self.step, ranked))
        for trial, block, row in self.flat.rows():
            if trial in better:
                self.board.best[trial] = block.train(row)
        return ranked

    def _mean_losses(self) -> dict[str, Tensor]:
        """The mean over the evaluation batches, weighted by their rows."""
        total, count = torch.zeros(len(self.flat), dtype=torch.float64), 0
        for batch in self.settings.eval:
            tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim()]
            rows = max((t.shape[0] for t in tensors), default=1)
            losses = self.runner.losses(to_device(batch, self.device))
            total, count = total + rows * losses.to("cpu", torch.float64), count + rows
        if not count:
            raise ConfigError("eval is empty")
        return {"loss": total / count}

    def _stop_losers(self, scores: Tensor) -> None:
        halving = self.settings.halving
        assert halving is not None
        for trial, reason in self.board.losers(self.rungs[self.step], scores):
            self._close(trial, "stopped", reason, self.step)
        if not self.compiler.compiles if halving.shrink is None else halving.shrink:
            self.shrink(self.board.running())
        self.idle_stopped()

    def shrink(self, members: list[int]) -> None:
        """Takes all other trials out of the stack."""
        positions = [i for i, t in enumerate(self.flat.order) if t in set(members)]
        if not positions or len(positions) == len(self.flat):
            return
        for trial, block, row in self.flat.rows():
            if trial not in members:
                self.board.left[trial] = block.train(row)
        states = self.optimizer.states()
        self.flat = self.flat.keep(positions)
        self.optimizer = self._make_optimizer()
        self.optimizer.load_states(states)
        self._rechunk(self.runner.chosen)

    def _rechunk(self, chosen: int | None) -> None:
        """Makes the chunks anew, at a width that was settled before."""
        self.runner = self._make_runner(chosen and min(chosen, len(self.flat)))

    def state_dict(self) -> State:
        """Everything that a fresh loop needs to go on from between these two steps."""
        return {
            **self._identity,
            **self.board.state_dict(),
            "step": self.step,
            "settled": self.settled,
            "seconds": self.elapsed(),
            "chunk": self.chunk,
            "chosen": self.runner.chosen or 0,
            "separate": self.separate,
            "members": sorted(self.flat.order),
            "rows": self._rows(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.data.state_dict(),
            "history": self.history.state_dict(),
            "generators": self.generators.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Brings a fresh loop to where :meth:`state_dict` was taken.

        Raises:
            ConfigError: other batches than those seen so far.
            ValueError, KeyError and the like: contents that no sweep of these settings can have
                written; see :func:`checkpoint.opened`.
        """
        for part in ("best", "left"):  # an empty group leaves no trace in a file
            state.setdefault(part, {})
        expect_keys(state, self.state_dict(), "the checkpoint")
        total = len(self.trials)
        step = expect_int(state["step"], 0, self.steps, "step")
        settled = expect_int(state["settled"], max(0, step - 1), step, "settled")
        seconds = expect_float(state["seconds"], "seconds")
        expect(seconds >= 0, f"seconds is {seconds!r}")
        chunk = expect_int(state["chunk"], min(step, 1), total if step else 0, "chunk")
        chosen = expect_int(state["chosen"], min(step, 1), total, "chosen")
        members = state["members"]
        known = isinstance(members, list) and all(type(m) is int for m in members)
        expect(known and bool(members) and set(members) <= set(range(total)), "members")
        expect(type(state["separate"]) is bool, "separate is no bool")
        if state["separate"] and not self.separate:
            self.flat = self._make_flat(separate=True)
            self.optimizer = self._make_optimizer()
        self.shrink(members)
        expect(members == sorted(self.flat.order), f"members is {members!r}")
        self._rechunk(chosen or None)
        self.history.load_state_dict(state["history"], step)
        metrics = state["history"]["metrics"]
        self.board.load_state_dict(state, step, members, metrics)
        self.optimizer.load_state_dict(state["optimizer"], step)
        self._load_rows(state["rows"])
        self.step, self.settled, self.seconds, self.chunk = step, settled, seconds, chunk
        self.data.load_state_dict(
            state["position"], step, self.settings.directory.resume == "anyway"
        )
        # Last: the data have used the generators to find their place.
        self.generators.load_state_dict(state["generators"])
        self.idle_stopped()

    def _rows(self) -> State:
        """Each trial's own values, and the gradients that have yet to become an update."""
        return {
            SEPARATOR.join((str(trial), str(k), kind)): block.pack(row, flats, leaves)
            for trial, block, row in self.flat.rows()
            for kind, flats in self._kinds(trial, block, row)
            for k, (leaves, _) in enumerate(block.sets(self.trials[trial].lr_ratio or {}))
        }

    def _load_rows(self, state: State) -> None:
        likes = self._rows()
        expect_keys(state, likes, "rows")
        for trial, block, row in self.flat.rows():
            for kind, flats in self._kinds(trial, block, row):
                for k, (leaves, _) in enumerate(block.sets(self.trials[trial].lr_ratio or {})):
                    key = SEPARATOR.join((str(trial), str(k), kind))
                    vector = expect_like(state[key], likes[key], key, finite=kind == "value")
                    block.unpack(row, flats, leaves, vector)

    def _kinds(self, trial: int, block: Any, row: int) -> Iterator[tuple[str, list[Tensor]]]:
        yield "value", block.row(row, block.values)
        if self.trials[trial].accumulate > 1:
            yield "grad", block.row(row, block.grads)

    @contextmanager
    def _nothing_lost(self) -> Iterator[None]:
        """An error of the caller's code, the disk or the device takes the outcome so far along."""
        try:
            yield
        except Exception as error:
            kept = ""
            if self.settings.path is not None and not isinstance(error, CheckpointError):
                kept = self._rescue()
            # The device may be what failed, and an error may refuse attributes.
            with contextlib.suppress(Exception):
                error.report = self.report()  # type: ignore[attr-defined]
                error.add_note(
                    f"fadapt: after step {self.step} of {self.steps}; the outcome so far is the "
                    f"error's .report{kept}"
                )
            raise

    def _rescue(self) -> str:
        """Writes a checkpoint where the state is whole; says what the directory holds."""
        if self.whole:
            try:
                self._note()
                self._save()
                return ", and the checkpoint goes on from here"
            except Exception as error:  # the first error is the one to tell of
                return f"; no checkpoint could be written: {error}"
        return ", and the checkpoint goes on from an earlier step"

    def _checkpoint_due(self) -> bool:
        kept = self.settings.directory
        if kept is None or kept.every is None:
            return False
        if isinstance(kept.every, timedelta):
            return time.monotonic() - self._saved >= kept.every.total_seconds()
        return self.step % kept.every == 0

    def _save(self) -> None:
        if self.settings.path is not None:
            self.history.write()
            checkpoint.write(self.settings.path, self.state_dict())
            self._saved = time.monotonic()

    def _best_in_order(self) -> Any:
        params = self.report().params
        return {name: params[name] for name in self.board.names}


def check_process(model: nn.Module) -> None:
    """Refuses several processes, which would train each on its own.

    Raises:
        ConfigError: an initialised process group of more than one.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConfigError(
            f"fit and sweep do not synchronise processes yet, and this is one of "
            f"{dist.get_world_size()}: each would train on its own batches. Train in one process, "
            "or in a loop of your own: fadapt.run, backward, all_reduce of the gradients, a step"
        )
    if any(p.is_inference() for p in model.parameters()):
        raise ConfigError(
            "the model was loaded or made under torch.inference_mode, and its weights can be part "
            "of no gradient; load it outside of that"
        )
