"""Loop: the steps of a sweep, its evaluations, its stops and its checkpoints."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..base.eval_mode import evaluating
from ..base.torch_private import pytree
from ..errors import CheckpointError, ConfigError
from ..io.adapters import save
from ..params.stack import stack
from . import snapshot
from .checkpoint import Generators, start_digest
from .data import Feed, to_device
from .engine.chunks import ChunkRunner
from .engine.compiler import Compiler
from .engine.flat_params import FlatParams
from .engine.optimizer import TrialOptimizer
from .engine.rotary import tables_written
from .history import History
from .leaderboard import Leaderboard, on_all
from .progress import Bar
from .report import Report
from .settings import Settings, device_of
from .starts import initial
from .trial import Trial


class Loop:
    """One run of a sweep, from its start or its checkpoint to the end.

    Attributes:
        step: batches done.
        seconds: spent before the last restart.
        chunk: the most adapters in one pass.
    """

    def __init__(self, model: nn.Module, trials: Mapping[str, Trial], batches: Any, s: Settings):
        self.steps = s.checked(batches, trials)
        self.model, self.settings, self.trials = model, s, list(trials.values())
        self.device = device_of(model)
        seeds = [t.data_seed for t in self.trials]
        self.data = Feed(batches, seeds, s.order, s.per_adapter, self.device)
        starts = initial(model, trials, s.calib)
        self.digests = {n: start_digest(p) for n, p in zip(trials, starts, strict=True)}
        self.board = Leaderboard(trials, starts, s.goal)
        self.flat = FlatParams(stack(starts), range(len(starts)))
        self.compiler = Compiler(s.compile, self.device)
        self.optimizer = self._make_optimizer()
        self.runner = self._make_runner()
        self.chunk, self.step, self.seconds = 0, 0, 0.0
        self.rungs = s.halving.rungs(self.steps, len(trials)) if s.halving else {}
        self.generators = Generators(self.device)
        path = s.path
        tensorboard = path / "tensorboard" if path is not None and s.tensorboard else None
        self.history = History(self.board.names, path and path / "log.jsonl", tensorboard)

    def run(self) -> Report:
        """Trains to the end; the global generators are as before afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        tables = tables_written(self.model) if self.compiler.compiles else nullcontext()
        with torch.random.fork_rng(devices=devices), tables:
            self._started = self._saved = time.monotonic()
            self.generators.seed(self.settings.seed)
            self._resume()
            try:
                self.history.start(self.step)
                self._train()
                self.history.close()
            except (CheckpointError, ConfigError) as error:
                # Nothing is lost to a full disk: the weights so far go with the error.
                error.report = self.report()  # type: ignore[attr-defined]
                raise
        return self.report()

    def report(self) -> Report:
        """The outcome so far."""
        last = {trial: block.train(row) for trial, block, row in self.flat.rows()}
        return self.board.report(last, self.step, self.history, self.elapsed(), self.chunk)

    def elapsed(self) -> float:
        """Seconds of this sweep, over all restarts."""
        return self.seconds + time.monotonic() - self._started

    def _make_optimizer(self) -> TrialOptimizer:
        s = self.settings
        return TrialOptimizer(self.flat, self.trials, s.optimizer, s.optimizer_args, self.steps)

    def _make_runner(self, chosen: int | None = None) -> ChunkRunner:
        s = self.settings
        return ChunkRunner(
            self.model, self.flat, s.loss_fn, self.data.per_adapter, s.max_adapters,
            self.compiler, self.optimizer.accumulates, chosen,
        )  # fmt: skip

    def _resume(self) -> None:
        path = self.settings.path
        if path is not None and self.settings.resume:
            snapshot.restore(self, path)

    def _train(self) -> None:
        if self.step == self.steps:
            return
        self._save()  # before the first step, so that a disk that refuses shows now
        with Bar(self.steps, self.settings.progress) as bar:
            while self.step < self.steps and self.board.running():
                self._one_step()
                self._after_step(bar)
        self._note()
        for trial in self.board.running():
            self.board.close(trial, "finished", "", self.step)
        self._save()
        self._save_adapters()

    def _one_step(self) -> None:
        order = self.flat.order
        weights = [1 / self.trials[t].accumulate for t in order]
        losses = self.runner.gradients(next(self.data), weights)
        rates = self.optimizer.rates(self.step)
        self.optimizer.step(self.step, losses)
        self.step += 1
        self.chunk = max(self.chunk, self.runner.width)
        alive = torch.cat([a.to(losses.device) for a in self.optimizer.alive])
        self.history.add(self.step, order, losses, alive, rates)

    def _after_step(self, bar: Bar) -> None:
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
        if saves:
            self._save()

    def _note(self) -> list[float]:
        """Waits for the device and notes what has diverged; returns the running losses."""
        running = set(self.board.running())
        for step, trial, loss in self.history.flush():
            if trial in running:
                finite = math.isfinite(loss)
                self._leave(
                    trial,
                    "diverged",
                    "gradient or new weights not finite" if finite else f"loss {loss}",
                    step,
                )
        self.quieten()
        last = self.history.losses.get(self.step)
        return [] if last is None else [x for x in last.tolist() if math.isfinite(x)]

    def _leave(self, trial: int, status: str, reason: str, step: int) -> None:
        self.board.close(trial, status, reason, step)
        self.history.event(step, status, trial, reason)

    def quieten(self) -> None:
        """Trials that do not train but are still in the stack run idle."""
        self.runner.idle = frozenset(self.flat.order) - set(self.board.running())
        self.optimizer.freeze(self.runner.idle)

    def _evaluate(self) -> Tensor:
        s, running = self.settings, set(self.board.running())
        with evaluating(self.model):
            found = self.runner.scores(s.eval) if callable(s.eval) else self._mean_losses()
        order, count = self.flat.order, len(self.trials)
        scores = {k: on_all(order, v, running, count) for k, v in found.items()}
        self.history.score(self.step, scores)
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
            self._leave(trial, "stopped", reason, self.step)
        if not self.compiler.compiles if halving.shrink is None else halving.shrink:
            self.shrink(self.board.running())
        self.quieten()

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
        self.rechunk(self.runner.chosen)

    def rechunk(self, chosen: int | None) -> None:
        """Makes the passes anew, at a width that was settled before."""
        self.runner = self._make_runner(chosen and min(chosen, len(self.flat)))

    def _checkpoint_due(self) -> bool:
        s, minutes = self.settings, self.settings.checkpoint_minutes
        if s.path is None:
            return False
        if s.checkpoint_every is not None and self.step % s.checkpoint_every == 0:
            return True
        return minutes is not None and time.monotonic() - self._saved >= 60 * minutes

    def _save(self) -> None:
        if self.settings.path is not None:
            self.history.write()
            snapshot.write(self, self.settings.path)
            self._saved = time.monotonic()

    def _save_adapters(self) -> None:
        if self.settings.path is None:
            return
        directory = self.settings.path / "adapters"
        try:
            directory.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"could not make {directory}: {error}") from error
        params = self.report().params
        for number, name in enumerate(self.board.names):
            short = re.sub(r"[^\w.=+-]+", "_", name)[:100]
            save(params[name], directory / f"{number:03d}-{short}.safetensors")
