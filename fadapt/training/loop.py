"""Loop: the steps of a sweep, its evaluations, its stops and its checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..base.device import device_of, to_device
from ..base.eval_mode import evaluating, modules_by_id, training_pass
from ..base.sharded import shapes_of
from ..base.torch_private import pytree
from ..distributed.rows import part_of, share_of
from ..distributed.shares import cost, edges
from ..distributed.split import Split
from ..distributed.team import Team
from ..dropout import of_part
from ..errors import CheckpointError, ConfigError, FadaptError, OneByOneWarning
from ..fold import proof
from ..params.params import Params
from ..params.stack import groups_of, stack_of
from . import checkpoint, identity
from .checkpoint import SEPARATOR, State, expect, expect_float, expect_int, expect_keys, expect_like
from .data import Feed
from .directory import held, remove_adapters, save_adapters
from .engine.chunks import ChunkRunner, bounds
from .engine.compiler import Compiler
from .engine.flat_params import FlatParams
from .engine.optimizer import TrialOptimizer
from .engine.rotary import tables_written
from .fingerprints import batch_of
from .generators import Generators, pass_seed
from .history import History
from .leaderboard import Leaderboard, on_all
from .progress import Bar
from .report import Report
from .settings import Settings
from .starts import initial
from .trial import Trial

T = TypeVar("T")

STOPS = KeyboardInterrupt, SystemExit
"""Ctrl-C, and what a handler of SIGTERM raises."""


class Loop:
    """One run of a sweep, from its start or its checkpoint to the end.

    Attributes:
        step: batches done.
        settled: the step up to which evaluations and stops are done, too.
        seconds: spent before the last restart.
        chunk: the most adapters in one pass.
        whole: whether the state is that between two steps, which a checkpoint may hold.
        modules: of the model, by id.
    """

    def __init__(
        self,
        model: nn.Module,
        trials: Mapping[str, Trial],
        batches: Any,
        s: Settings,
        team: Team | None = None,
    ):
        self.team = team = team or Team()
        team.check(model, s.compile is not False)
        check_weights(model)
        self.steps = s.checked(batches, trials)
        if team.several:  # before anything that all have to do alike
            team.check_same("model", shapes_of(model))
            team.check_same("sweep", identity.settings_of(s, trials, self.steps))
            team.check_same("sweep", s.of_processes())
        self.model, self.settings, self.trials = model, s, list(trials.values())
        self.modules = modules_by_id(model)
        self.device = device_of(model)
        seeds = [t.data_seed for t in self.trials]
        self.data = Feed(batches, seeds, s.order, s.per_adapter, self.device)
        self.starts = initial(model, trials, s.calib, s.loss_fn)
        self.board = Leaderboard(trials, self.starts, s.goal)
        self.by_rank = padding(self.starts) > PADDING
        self.compiler = Compiler(s.compile, self.device)
        self.members = self.own = list(range(len(self.trials)))
        self.proved: set[Hashable] = set()
        if team.several:
            self._check_spread()
            self.separate = s.max_adapters == 1
            self._deal()
        else:
            self.flat = self._make_flat(separate=s.max_adapters == 1)
            self.optimizer = self._make_optimizer()
            self.runner = self._make_runner()
        self.chunk, self.step, self.settled, self.seconds = 0, 0, 0, 0.0
        self.whole = True
        self.rungs = s.halving.rungs(self.steps, len(trials)) if s.halving else {}
        self.generators = Generators(self.device)
        path = s.path if team.first else None
        tensorboard = path / "tensorboard" if path is not None and s.tensorboard else None
        log = path and path / "log.jsonl"
        self.history = History(self.board.names, self._rate, log, tensorboard)
        self._batches, self._identity = batches, {}
        self._last_batch: Any = None

    def run(self) -> Report:
        """Trains to the end; the global generators are as before afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        path = self.settings.path
        writes = path is not None and self.team.first
        with contextlib.ExitStack() as scope:
            scope.enter_context(torch.random.fork_rng(devices=devices))
            scope.enter_context(
                tables_written(self.model) if self.compiler.compiles else nullcontext()
            )
            scope.enter_context(held(path) if path is not None and writes else nullcontext())
            self._started = self._saved = time.monotonic()
            self.generators.seed(self.settings.seed)
            if path is not None or self.team.several:
                self._open(path)
            with self._nothing_lost():
                self.history.start(self.step, self.board.events())
                self._train()
                self.history.close()
        return self.report()

    def report(self) -> Report:
        """The outcome so far."""
        if self.team.size == 1:  # all processes train all trials, whose weights may be much
            self.team.gather(None)  # none has failed
            return self._report_of_own()
        last = self._last()
        parts = self.team.gather((last, self.board.best, self.board.left, self.chunk))
        last, self.board.best, self.board.left = (
            {t: tree for part in parts for t, tree in part[k].items()} for k in range(3)
        )
        self.chunk = max(part[3] for part in parts)
        return self.board.report(last, self.step, self.history, self.elapsed(), self.chunk)

    def _report_of_own(self) -> Report:
        last = self._last()
        return self.board.report(last, self.step, self.history, self.elapsed(), self.chunk)

    def _last(self) -> dict[int, Any]:
        """The weights of this process's own trials that are in the stack."""
        return {t: block.train(row) for t, block, row in self.flat.rows() if t in self.own}

    def elapsed(self) -> float:
        """Seconds of this sweep, over all restarts."""
        return self.seconds + time.monotonic() - self._started

    def _rate(self, trial: int, step: int) -> float:
        return self.trials[trial].rate_at(step, self.steps)

    def _named(self, values: Sequence[T]) -> dict[str, T]:
        return dict(zip(self.board.names, values, strict=True))

    def _make_flat(self, separate: bool, some: Sequence[int] | None = None) -> FlatParams:
        """A layout in which trials run together, or each as :func:`fadapt.fit` runs it alone.

        Args:
            separate: which of the two.
            some: trials; by default all.
        """
        self.separate = separate
        apart = {leaf for trial in self.trials for leaf in trial.lr_ratio or ()}
        numbers = range(len(self.starts)) if some is None else some
        members = [self.starts[t] for t in numbers]
        if separate:
            return FlatParams.separate(members, numbers, apart)
        return FlatParams(stack_of(members, self.by_rank), numbers, apart)

    def _make_optimizer(self) -> TrialOptimizer:
        split, team = None, self.team
        if team.shards > 1:
            sizes = {t: sum(v.numel() for v in b.row(r, b.values)) for t, b, r in self.flat.rows()}
            if len(sizes) >= team.shards and sum(sizes.values()) > SPLIT_FROM:
                split = Split(sizes, team.shard_group)
        given = self.flat, self.trials, self.settings.optimizer, self.steps
        return TrialOptimizer(*given, split)

    def _deal(self, chosen: int | None = None) -> None:
        """This process's share of the members, their values as they were at the start.

        Chunks of a settled width are those of a sweep in one process, and stay whole; else every
        share makes its own. A process without a share holds one trial, which stays idle.
        """
        whole = list(range(len(self.starts)))
        if not self.separate:
            whole = FlatParams.order_of(self.starts, self.by_rank)
        members = set(self.members)
        order = [t for t in whole if t in members]
        width = 1 if self.separate else self.settings.max_adapters
        fixed = type(width) is int
        units = bounds(0, len(order), min(width, len(order)) if type(width) is int else 1)
        costs = [sum(cost(self.starts[t]) for t in order[low:high]) for low, high in units]
        cuts = edges(costs, self.team.size)
        mine = units[cuts[self.team.place] : cuts[self.team.place + 1]]
        self.own = [t for low, high in mine for t in order[low:high]]
        held = self.own or order[:1]
        if self.device.type == "cpu" and not self.separate:
            # As wide as in one process, of whose kernels the last bits are.
            flat = self._make_flat(False)
            self.flat = flat.keep([i for i, t in enumerate(flat.order) if t in set(held)])
        else:
            self.flat = self._make_flat(self.separate, held)
        self.optimizer = self._make_optimizer()
        chunks = None
        if mine and fixed:
            chunks = [(low - mine[0][0], high - mine[0][0]) for low, high in mine]
        self.runner = self._make_runner(chosen and min(chosen, len(self.flat)), chunks)
        self._dealt = True

    def _check_spread(self) -> None:
        """Refuses what a sweep over several processes does not know."""
        for name, trial in self._named(self.trials).items():
            if trial.accumulate > 1 and self.team.shards > 1:
                raise ConfigError(
                    f"{name}: accumulate={trial.accumulate} with the rows of a batch over "
                    f"{self.team.shards} processes; give larger batches instead"
                )

    def _redeal(self, members: list[int]) -> None:
        """Spreads the members evenly again; what moves takes its optimiser's state along."""
        for trial, block, row in self.flat.rows():
            if trial in self.own and trial not in members:
                self.board.left[trial] = block.train(row)
        kept, chosen = self._only(members), self.runner.chosen
        if self.team.shards > 1:
            split = self.optimizer.split is not None  # each has its part of the states
            for state in self.team.of_peers(kept["optimizer"] if split else {}):
                kept["optimizer"] |= state
        self.members = sorted(members)
        self._deal(chosen)
        everyone = self.team.gather(self.own)
        elsewhere = {t for p, own in enumerate(everyone) for t in own if p != self.team.place}
        found: State = {"rows": {}, "optimizer": {}}
        sent = {part: _of(kept[part], elsewhere) for part in kept}
        for part in (kept, *self.team.gather(sent)):
            for name in found:
                found[name] |= _of(part[name], self.own)
        if self.own:
            self._load_rows(found["rows"])
            found["optimizer"]["class"] = self.optimizer.name
            self.optimizer.load_state_dict(found["optimizer"], self.step)

    def _only(self, trials: Collection[int]) -> State:
        """The rows and optimiser states of this process's own trials among these."""
        wanted = set(self.own) & set(trials)
        states = {"rows": self._rows(), "optimizer": self.optimizer.state_dict()}
        return {name: _of(state, wanted) for name, state in states.items()}

    def _make_runner(
        self,
        chosen: int | None = None,
        chunks: Sequence[tuple[int, int]] | None = None,
    ) -> ChunkRunner:
        s = self.settings
        return ChunkRunner(
            self.model, self.flat, s.loss_fn, self.data.per_adapter, s.max_adapters, s.verify,
            self.compiler, self.optimizer.accumulates, self._named(self.trials), chosen,
            chunks, self.team.shards == 1,
        )  # fmt: skip

    def _open(self, path: Path | None) -> None:
        """Goes on from the directory's checkpoint, or begins anew."""
        kept = self.settings.directory
        self.data.watch()
        self._identity = {
            "kind": "sweep",
            "format": identity.FORMAT,
            "sweep": identity.settings_of(self.settings, self._named(self.trials), self.steps),
            "given": identity.given_of(self.settings, self._batches),
            "base": identity.base_of(self.model),
            "starts": identity.starts_of(self._named(self.starts)),
        }
        for part, what in DIFFERENT.items():
            self.team.check_same(what, self._identity[part])
        if path is None:
            return
        if self.team.several:
            self._open_in_all(path)
            return
        if kept.resume:
            with checkpoint.opened(path) as file:
                if file is not None:
                    identity.check(path, file.meta, self._identity, kept.resume == "anyway")
                    self.load_state_dict(checkpoint.state_of(file))
                    return
        remove_adapters(path)

    def _open_in_all(self, path: Path) -> None:
        """The first process reads the checkpoint, all go on from it."""
        kept, state = self.settings.directory, None
        if self.team.first and kept.resume:
            with checkpoint.opened(path) as file:
                if file is not None:
                    identity.check(path, file.meta, self._identity, kept.resume == "anyway")
                    state = checkpoint.state_of(file)
        state = self.team.of_first(state)
        if state is None:
            if self.team.first:
                remove_adapters(path)
            return
        with checkpoint.fitting(path):
            self.load_state_dict(state)
        if not self.team.first and self.team.size > 1:  # one keeps what no longer trains
            self.board.best, self.board.left = {}, {}

    def _train(self) -> None:
        if self.board.running():
            self._save()  # before the first step, so that a disk that refuses shows now
            with Bar(self.steps, self.settings.progress if self.team.first else False) as bar:
                while self.board.running():
                    if self.settled < self.step:
                        self._settle(bar)
                    elif self.step < self.steps:
                        self._one_step()
                    else:
                        break
            with self._changing():
                self._note()
                for trial in self.board.running():
                    self.board.close(trial, "finished", "", self.step)
            self._save()
        if self.settings.path is not None:
            adapters = self._best_in_order()
            if self.team.first:
                save_adapters(adapters, self.settings.path)

    def _one_step(self) -> None:
        before = self.data.state_dict(), self.generators.state_dict()
        self.whole = False
        order = self.flat.order
        try:
            batch = next(self.data)
            self._check_independence(batch)
            if self.team.several:
                self._step_of_several(batch)
                self.whole = True
                return
            with training_pass(self.model, self.modules):
                if self.runner.chosen is None:
                    self.runner.choose(batch)
                    if self.runner.chosen == 1:
                        self._separate()
                order = self.flat.order
                weights = [1 / self.trials[t].accumulate for t in order]
                losses = self.runner.gradients(batch, weights, self.step)
        except (Exception, *STOPS):
            self.data.go_back(before[0])
            self.generators.load_state_dict(before[1])
            self.whole = not self.runner.partial
            raise
        self._update(order, losses)

    def _step_of_several(self, batch: Any) -> None:
        """This process's part of a step."""
        self._last_batch, team = batch, self.team
        with training_pass(self.model, self.modules):
            if self._dealt:  # and not: where this process has no width yet, which others may have
                if self.own:
                    self.runner.choose(batch)
                widths = team.gather((self.runner.chosen, len(self.own)))
                alone = any(width == 1 < own for width, own in widths)
                if alone and not self.separate and self.step == 0:
                    self._separate()
                self._dealt = False
            if not self.own:
                self.step += 1
                return
            order = self.flat.order
            share = None
            if team.shards > 1:
                axis = int(self.data.per_adapter)
                batch = part_of(batch, team.shards, team.shard, axis)
                share = share_of(
                    batch, self.model, self.settings.loss_fn is None, bool(axis),
                    team.shard_group, self.device,
                )  # fmt: skip
                share = share[order] if len(share) > 1 else share.expand(len(order))
            weights = [1 / self.trials[t].accumulate for t in order]
            if share is not None:
                weights = [w * x for w, x in zip(weights, share.tolist(), strict=True)]
            # What the passes draw (dropout) differs by process; the data's order must not.
            kept = self.generators.state_dict()
            self.generators.seed(pass_seed(self.settings.seed, self.step, team.rank))
            try:
                losses = self.runner.gradients(batch, weights, of_part(self.step, team.shard))
            finally:
                self.generators.load_state_dict(kept)
            if share is not None:
                losses = losses * share.to(losses)
                dist.all_reduce(losses, group=team.shard_group)
                for block in self.flat.blocks:
                    for grad in block.grads:
                        dist.all_reduce(grad, group=team.shard_group)
        self._update(order, losses)

    def _update(self, order: list[int], losses: Tensor) -> None:
        with self._changing():
            self.optimizer.step(self.step, losses)
            self.step += 1
            self.chunk = max(self.chunk, self.runner.width)
            alive = torch.cat([a.to(losses.device) for a in self.optimizer.alive])
            self.history.add(self.step, order, losses, alive)
            self.runner.partial = False

    def _check_independence(self, batch: Any) -> None:
        """Before the first step, for other kinds of batches, and now and again."""
        # Shards of a batch may differ in kind, and all processes have to be there.
        kind = None if self.team.several else proof.batch_kind(batch)
        if self.step == 0:
            self._prove(batch)
        elif kind not in self.proved or proof.is_due(self.step):
            self._prove_again(batch)
        self.proved.add(kind)

    def _prove_again(self, batch: Any) -> None:
        why = self.runner.one_by_one(batch, self.step) if self.own else ""
        if why := next((found for found in self.team.gather(why) if found), ""):
            raise FadaptError(
                f"the trials of this sweep have shared a pass until step {self.step}, and cannot: "
                f"{why} Begin it anew with max_adapters=1, so that they run one by one; or, where "
                "the difference is meant, with verify=False"
            )

    def _prove(self, batch: Any) -> None:
        """Trials that do not train as they would alone in one pass run one by one."""
        why = self.runner.one_by_one(batch, self.step) if self.own else ""
        # Found in one process, it holds in all.
        why = next((found for found in self.team.gather(why) if found != ""), "")
        if why:
            message = f"the trials of this sweep run one by one, since {why}"
            warnings.warn(message, OneByOneWarning, stacklevel=6)
        if why != "":
            self._separate()

    def _separate(self) -> None:
        """Trials that run one by one lie apart, as if they were alone."""
        if self.team.several:
            self.separate = True
            self._deal(1)
            return
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
            with self._changing():
                losses = self._note()
            bar.update(self.step, losses, self.board.leader())
        if evaluates and self.board.running():
            scores = self._evaluate()
            if rung:
                with self._changing():
                    self._stop_losers(scores)
        self.settled = self.step
        if saves:
            self._save()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What is interrupted within is no state to go on from."""
        self.whole = False
        yield
        self.whole = True

    def _note(self) -> list[float]:
        """Waits for the device and notes what has diverged; returns the running losses."""
        running = set(self.board.running())
        if self.team.several:
            self.team.check_same("batch", {"the last": batch_of(self._last_batch)})
            self.history.exchange(self.team.gather)
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
                found: Mapping[str, Tensor] = {}
                if self.own:
                    found = self.runner.scores(s.eval) if callable(s.eval) else self._mean_losses()
            order, count = self.flat.order, len(self.trials)
            mine = {k: on_all(order, v, running, count) for k, v in found.items()}
            scores = self._scores_of_all(mine)
            self.history.score(self.step, scores)
        except Exception as error:
            self.generators.load_state_dict(generators)
            error.add_note(f"fadapt: in the evaluation after step {self.step} of {self.steps}")
            raise
        self.board.metric = next(iter(scores))
        ranked = scores[self.board.metric]
        with self._changing():
            better = set(self.board.improved(self.step, ranked))
            for trial in better:  # another process may have kept it
                self.board.best.pop(trial, None)
            for trial, block, row in self.flat.rows():
                if trial in better and trial in self.own:
                    self.board.best[trial] = block.train(row)
        return ranked

    def _scores_of_all(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scores of all processes' trials."""
        if not self.team.several:
            return mine
        parts = [part for part in self.team.gather(mine) if part]
        if any(list(part) != list(parts[0]) for part in parts):
            raise ConfigError(
                f"eval(model, stack) returned the metrics {list(parts[0])} in one process and "
                f"others in another: {[list(part) for part in parts]}"
            )
        joined = dict(parts[0])
        for part in parts[1:]:
            for metric, row in part.items():
                joined[metric] = torch.where(row.isnan(), joined[metric], row)
        return joined

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
        if self.team.several:
            if members and len(members) < len(self.members):
                self._redeal(members)
            return
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
            "chosen": self._chosen(),
            "separate": self.separate,
            "members": self.members if self.team.several else sorted(self.flat.order),
            "rows": self._rows(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.data.state_dict(),
            "history": self.history.state_dict(),
            "generators": self.generators.state_dict(),
        }

    def _chosen(self) -> int:
        """The width of the passes; over several processes that of the same sweep in one."""
        if not self.team.several:
            return self.runner.chosen or 0
        most = self.settings.max_adapters
        if self.step == 0 and most == "auto":
            return 0
        return 1 if self.separate else min(most if type(most) is int else 2**31, len(self.members))

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
        if self.team.several:
            self.separate = self.separate or state["separate"]
            self.members = sorted(members)
            self._deal(chosen or None)
            states = {"class": state["optimizer"].get("class"), **_of(state["optimizer"], self.own)}
            state = {**state, "rows": _of(state["rows"], self.own), "optimizer": states}
        else:
            if state["separate"] and not self.separate:
                self.flat = self._make_flat(separate=True)
                self.optimizer = self._make_optimizer()
            self.shrink(members)
            expect(members == sorted(self.flat.order), f"members is {members!r}")
            self._rechunk(chosen or None)
        self.history.load_state_dict(state["history"], step)
        metrics = state["history"]["metrics"]
        self.board.load_state_dict(state, step, members, metrics)
        if self.own:
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
        """An error of the caller's code, the disk or the device takes the outcome so far along.

        So does Ctrl-C, at whichever instruction it comes.
        """
        try:
            yield
        except (Exception, *STOPS) as error:
            kept = ""
            if self.team.several:  # the others may be anywhere, and have trials of their own
                kept = ", which has the weights of this process's trials"
            elif self.settings.path is not None and not isinstance(error, CheckpointError):
                kept = self._rescue()
            # The device may be what failed, and an error may refuse attributes.
            with contextlib.suppress(Exception):
                error.report = self._report_of_own()  # type: ignore[attr-defined]
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
        if self.team.several and isinstance(kept.every, timedelta):
            if self.step % self.settings.log_every:
                return False
            passed = time.monotonic() - self._saved
            return self.team.of_first(passed >= kept.every.total_seconds())
        if isinstance(kept.every, timedelta):
            return time.monotonic() - self._saved >= kept.every.total_seconds()
        return self.step % kept.every == 0

    def _save(self) -> None:
        if self.settings.path is None:
            return
        state = self.state_dict()
        if self.team.several:
            kept = {part: state[part] for part in ("best", "left")} | self._only(self.members)
            states = kept.pop("optimizer")
            if self.team.shards > 1:
                sent = states if self.team.shard == 0 or self.optimizer.split else {}
                everyone = self.team.to_first(sent, of_all=True)
                state["optimizer"] = {k: v for one in everyone for k, v in one.items()}
            else:
                kept["optimizer"] = states
            everyone = self.team.to_first(kept) if self.team.size > 1 else [kept]
            for part in kept:
                state[part] = {k: v for one in everyone for k, v in one[part].items()}
            state["optimizer"]["class"] = self.optimizer.name
        if self.team.first:
            self.history.write()
            checkpoint.write(self.settings.path, state)
        self._saved = time.monotonic()

    def _best_in_order(self) -> Any:
        params = self.report().params
        return {name: params[name] for name in self.board.names}


SPLIT_FROM = 2**28
"""Numbers that are trained from which on processes over one base each keep the optimiser's state of
some trials. Fewer are updated faster than they are sent."""

PADDING = 2**28
"""Numbers to fill up ranks from which on each rank is a group of its own. Fewer groups are faster,
where memory allows."""


def padding(members: Sequence[Params]) -> int:
    """How many numbers a stack would add, so that all ranks of a group are equal."""
    sizes = [sum(t.numel() for t in member.trainable()) for member in members]
    return sum(
        len(group) * max(sizes[i] for i in group) - sum(sizes[i] for i in group)
        for group in groups_of(members)
    )


DIFFERENT = {"sweep": "sweep", "given": "data, loss or eval", "base": "model", "starts": "start"}
"""What processes may differ in, by the part of a checkpoint that tells."""


def _of(state: Mapping[str, Any], trials: Collection[int]) -> dict[str, Any]:
    """The entries of some trials in a state whose keys begin with the trial."""
    wanted = set(map(str, trials))
    return {k: v for k, v in state.items() if k.split(SEPARATOR)[0] in wanted}


def check_weights(model: nn.Module) -> None:
    """Refuses weights that can be part of no gradient.

    Raises:
        ConfigError: a model made under torch.inference_mode.
    """
    if any(p.is_inference() for p in model.parameters()):
        raise ConfigError(
            "the model was loaded or made under torch.inference_mode, and its weights can be part "
            "of no gradient; load it outside of that"
        )
