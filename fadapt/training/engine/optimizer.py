"""TrialOptimizer: a torch.optim optimiser over flat params, with per-trial hyper-parameters.

A trial whose loss, gradient or new weights are not finite keeps its weights of before the step,
and is never updated again; no other trial is touched. The flags stay on the device: a step does
not wait for them.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...distributed.split import Split
from ...errors import CheckpointError, ConfigError, require
from ..checkpoint import SEPARATOR, State, expect, expect_keys, expect_like
from ..trial import Trial
from .flat_params import FlatGroup, FlatParams

ELEMENTWISE = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad,
    torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Rprop, torch.optim.ASGD,
)  # fmt: skip
"""Optimisers that treat every entry alone: a trial's row is one parameter. The others (Adafactor,
Muon) get every leaf, at its own rank, as a parameter of its own."""

AT_ONCE = 2**30
"""Numbers up to which all trials are updated in one call of the optimiser. More go trial by trial:
the weights of before the step, which a trial that diverges keeps, are a copy."""


@dataclass
class _Row:
    """One trial: its place, and what the optimiser sees of it.

    Attributes:
        values: flat views per buffer, or each leaf.
        grads: the same of the gradients.
        ratios: of each one's learning rate to the trial's; 0 is not trained.
    """

    trial: int
    group: FlatGroup
    row: int
    values: list[Tensor]
    grads: list[Tensor]
    ratios: list[float]

    def give(self, now: bool) -> None:
        """Lets the optimiser see this trial's gradients, or not."""
        for value, grad, ratio in zip(self.values, self.grads, self.ratios, strict=True):
            value.grad = grad if now and ratio else None


class TrialOptimizer:
    """Gradient clipping, the optimiser's step and the guard against divergence.

    Args:
        flat: the values and gradients.
        trials: by trial number.
        factory: ``factory(param_groups)`` returns the optimiser; functools.partial holds what else
            it takes. lr and weight decay come from the trials.
        steps: batches in all, from which the schedules know their end.
        split: over processes that train the same trials: which of them this one updates.

    Attributes:
        mine: the rows that this process updates.
        alive: a flag per row of each group.
        accumulates: whether some trial's gradient adds up over several batches.
    """

    def __init__(
        self,
        flat: FlatParams,
        trials: Sequence[Trial],
        factory: Callable[..., Optimizer],
        steps: int,
        split: Split | None = None,
    ):
        self.split = split
        self.flat, self.trials, self.factory, self.steps = flat, trials, factory, steps
        self.accumulates = any(trial.accumulate > 1 for trial in trials)
        self.elementwise = _unwrap_partial(factory) in ELEMENTWISE
        self.rows = [self._row(*place) for place in flat.rows()]
        self.mine = [row for row in self.rows if split is None or split.is_mine(row.trial)]
        groups: dict[Any, dict[str, Any]] = {}
        self._leaders: list[tuple[int, float]] = []
        for row in self.mine:
            t = trials[row.trial]
            for value, ratio in zip(row.values, row.ratios, strict=True):
                if not ratio:
                    continue
                # Of the other optimisers some compute across the parameters of a group.
                key = (_schedule_key(t) if self.elementwise else row.trial), ratio
                if key not in groups:
                    rates = {"lr": t.rate(0, 1) * ratio, "weight_decay": t.weight_decay}
                    groups[key] = {"params": [], **rates}
                    self._leaders.append((row.trial, ratio))
                groups[key]["params"].append(value)
        self.optimizer = _build(factory, list(groups.values()))
        numbers = sum(v.numel() for b in flat.blocks for v in b.values)
        free = not any(b.projects for b in flat.blocks)
        self.in_turn = self.elementwise and free and numbers > AT_ONCE
        _check_supported(self.optimizer, [trials[t] for t in flat.order])
        self.alive = [torch.ones(b.size, dtype=torch.bool, device=b.device) for b in flat.blocks]
        limits = [[trials[t].clip or math.inf for t in flat.order[s]] for _, s in flat.spans()]
        self._clip = [
            block_norms(b).new_tensor(limit) if min(limit) < math.inf else None
            for b, limit in zip(flat.blocks, limits, strict=True)
        ]

    def _row(self, trial: int, group: FlatGroup, row: int) -> _Row:
        ratio = self.trials[trial].ratio
        if self.elementwise:
            views, names = group.row, [b.leaf for b in group.buffers]
        else:
            views, names = group.member, [p.leaf for p in group.places]
        values = [v.detach() for v in views(row, group.values)]
        return _Row(trial, group, row, values, views(row, group.grads), [ratio(n) for n in names])

    @property
    def name(self) -> str:
        """Of the optimiser's class, as its state has it."""
        return type(self.optimizer).__name__

    def rates(self, step: int) -> dict[int, float]:
        """The learning rate of every trial at a step (from 0)."""
        return {t: self.trials[t].rate_at(step, self.steps) for t in self.flat.order}

    @torch.no_grad()
    def step(self, step: int, losses: Tensor) -> None:
        """Updates the trials whose gradient is complete at this step (from 0).

        Args:
            losses: (N,) in the flat's order; only their finiteness matters here.
        """
        due = [(step + 1) % self.trials[row.trial].accumulate == 0 for row in self.rows]
        for (_, span), alive in zip(self.flat.spans(), self.alive, strict=True):
            alive &= torch.isfinite(losses[span]).to(alive.device)
        if not any(due):
            return
        for row in self.rows:
            for grad, ratio in zip(row.grads, row.ratios, strict=True):
                if not ratio:  # no part of the norm, nor a reason to stop
                    grad.zero_()
        whole = None if all(due) else self._device_flags(due)
        for i, block in enumerate(self.flat.blocks):
            self._clip_gradients(i, block, None if whole is None else whole[i])
        rates = self.rates(step)
        for group, (trial, ratio) in zip(self.optimizer.param_groups, self._leaders, strict=True):
            group["lr"] = rates[trial] * ratio
        if self.in_turn:
            self._update_in_turn(due)
        else:
            self._update_at_once(due, whole)
        for i, block in enumerate(self.flat.blocks):
            self._clear(block, None if whole is None else whole[i])

    def _update_at_once(self, due: list[bool], whole: list[Tensor] | None) -> None:
        before = [[v.clone() for _, v in block.own_values] for block in self.flat.blocks]
        for row, now in zip(self.rows, due, strict=True):
            row.give(now)
        self.optimizer.step()
        for row, now in zip(self.rows, due, strict=True):
            if now and self.split is not None:
                self.split.send(row.trial, row.values)
        for i, block in enumerate(self.flat.blocks):
            block.project()
            self._guard(i, block, before[i], None if whole is None else whole[i])

    def _update_in_turn(self, due: list[bool]) -> None:
        """The same, trial by trial, with a copy of one trial's weights at a time."""
        for row in self.rows:
            row.give(False)
        flags = [alive[k] for alive in self.alive for k in range(len(alive))]
        for row, now, alive in zip(self.rows, due, flags, strict=True):
            if not now:
                continue
            before = [v.clone() for v in row.values]
            if self.split is None or self.split.is_mine(row.trial):
                row.give(True)
                self.optimizer.step()
                row.give(False)
            if self.split is not None:
                self.split.send(row.trial, row.values)
            for new in row.values:
                if new.numel():
                    largest = torch.linalg.vector_norm(new, torch.inf)
                    alive &= torch.isfinite(largest).to(alive.device)  # a view of the flags
            for new, old in zip(row.values, before, strict=True):
                torch.where(alive.to(new.device), new, old, out=new)

    def freeze(self, trials: Collection[int]) -> None:
        """Updates these trials no more."""
        for (block, span), alive in zip(self.flat.spans(), self.alive, strict=True):
            kept = [t not in trials for t in self.flat.order[span]]
            if not all(kept):
                alive &= torch.tensor(kept, device=block.device)

    def _device_flags(self, due: list[bool]) -> list[Tensor]:
        return [torch.tensor(due[span], device=b.device) for b, span in self.flat.spans()]

    def _clip_gradients(self, i: int, block: FlatGroup, due: Tensor | None) -> None:
        norm = block_norms(block)
        alive = self.alive[i]
        alive &= torch.isfinite(norm)
        limit = self._clip[i]
        if limit is None:
            return
        # As torch.nn.utils.clip_grad_norm_, for each row by itself.
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        if due is not None:
            scale = torch.where(due, scale, 1.0)
        for rows, grad in block.own_grads:
            grad.mul_(scale[rows].to(grad.device, grad.dtype)[:, None])

    def _guard(self, i: int, block: FlatGroup, before: list[Tensor], due: Tensor | None) -> None:
        alive = self.alive[i]
        for rows, new in block.own_values:
            largest = torch.linalg.vector_norm(new, torch.inf, dim=1)
            alive[rows] &= torch.isfinite(largest).to(alive.device)
        changed = alive if due is None else alive & due
        for (rows, new), old in zip(block.own_values, before, strict=True):
            # In one pass over the memory; both are read before the result is written.
            torch.where(changed[rows].to(new.device)[:, None], new, old, out=new)

    def _clear(self, block: FlatGroup, due: Tensor | None) -> None:
        """Gradients that became an update count no more."""
        for rows, grad in block.own_grads:
            if due is not None:
                grad.masked_fill_(due[rows].to(grad.device)[:, None], 0)
            elif self.accumulates:  # otherwise the next pass overwrites it
                grad.zero_()

    def states(self) -> dict[int, list[dict[str, Any]]]:
        """The optimiser's state of each trial as it is, to hand on to another layout's heir."""
        return {
            row.trial: [dict(self.optimizer.state.get(value, {})) for value in row.values]
            for row in self.rows
        }

    def load_states(self, states: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
        """Takes over what :meth:`states` of an optimiser of more trials returned for these."""
        for row in self.rows:
            # A trial that has not been updated yet has none.
            for value, state in zip(row.values, states.get(row.trial, ()), strict=False):
                if state:
                    self.optimizer.state[value] = dict(state)

    def state_dict(self) -> State:
        """The state of each trial, in an order that does not depend on the other trials.

        Over processes that share the updates, of those that this one makes.
        """
        result: State = {"class": self.name}
        for row in self.mine:
            for i, state in enumerate(self._packed(row)):
                for name, value in state.items():
                    if value is not None and not isinstance(value, (Tensor, bool, int, float)):
                        raise CheckpointError(
                            f"the optimiser keeps {name!r} as {type(value).__name__}, which a "
                            "checkpoint cannot hold; use another optimiser, or directory=None"
                        )
                    result[SEPARATOR.join((str(row.trial), str(i), name))] = value
        return result

    def load_state_dict(self, state: State, step: int) -> None:
        """Takes over what :meth:`state_dict` returned after so many steps.

        Over processes that share the updates, each gets all states and takes its own.

        The state is compared with that of an optimiser which has made a step: a kernel reads and
        writes moments of another shape without a look.
        """
        expect(
            state.get("class") == self.name,
            f"the optimiser is {state.get('class')!r}",
        )
        likes = self._template()
        updated = [r for r in self.mine if step >= self.trials[r.trial].accumulate]
        known = {
            SEPARATOR.join((str(r.trial), str(i), name)): like
            for r in updated
            for i, one in enumerate(likes[r.trial])
            for name, like in one.items()
        }
        others = {str(r.trial) for r in self.rows} - {str(r.trial) for r in self.mine}
        given = {
            k: v for k, v in state.items() if k != "class" and k.split(SEPARATOR)[0] not in others
        }
        expect_keys(given, known, "the optimiser's state")
        for key, like in known.items():
            _check_state(key, given[key], like, self.steps)
        for row in updated:
            packed = [
                {name: given[SEPARATOR.join((str(row.trial), str(i), name))] for name in one}
                for i, one in enumerate(likes[row.trial])
            ]
            self._unpack(row, packed, likes[row.trial])

    def _template(self) -> dict[int, list[dict[str, Any]]]:
        """The packed states of an optimiser of the same kind after a step without gradients."""
        mine = {row.trial for row in self.mine}
        flat = self.flat.keep([i for i, row in enumerate(self.rows) if row.trial in mine])
        other = TrialOptimizer(flat, self.trials, self.factory, self.steps)
        for row in other.rows:
            for value, grad, ratio in zip(row.values, row.grads, row.ratios, strict=True):
                value.grad = grad.zero_() if ratio else None
        with torch.no_grad():
            other.optimizer.step()
        return {row.trial: other._packed(row) for row in other.rows}

    def _sets(self, row: _Row) -> list[tuple[list[int], list[int]]]:
        """(leaves, values) that make one entry of the packed state."""
        if self.elementwise:
            return row.group.sets(self.trials[row.trial].lr_ratio or {})
        return [([i], [i]) for i in range(len(row.values))]

    def _packed(self, row: _Row) -> list[dict[str, Any]]:
        result = []
        for leaves, members in self._sets(row):
            states = {k: self.optimizer.state.get(row.values[k], {}) for k in members}
            first, like = states[members[0]], row.values[members[0]]
            packed = {}
            for name, value in first.items():
                if self.elementwise and isinstance(value, Tensor) and value.shape == like.shape:
                    flats = [states[k][name] if k in states else v
                             for k, v in enumerate(row.values)]  # fmt: skip
                    value = row.group.pack(row.row, flats, leaves)
                packed[name] = value
            result.append(packed)
        return result

    def _unpack(self, row: _Row, packed: list[dict[str, Any]], likes: list[dict[str, Any]]) -> None:
        for (leaves, members), state, like in zip(self._sets(row), packed, likes, strict=True):
            if not state:
                continue
            size = sum(row.values[k].numel() for k in members)
            new: dict[int, dict[str, Any]] = {k: {} for k in members}
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    for k in members:
                        new[k][name] = value
                elif self.elementwise and value.dim() == 1 and value.numel() == size:
                    flats = [torch.empty_like(v, dtype=value.dtype) for v in row.values]
                    row.group.unpack(row.row, flats, leaves, value)
                    for k in members:
                        new[k][name] = flats[k]
                else:
                    # Counters of steps lie on the host for some of torch's kernels.
                    for k in members:
                        on_host = like[name].device.type == "cpu"
                        device = torch.device("cpu") if on_host else row.values[k].device
                        new[k][name] = value.to(device, copy=True)
            for k in members:
                self.optimizer.state[row.values[k]] = new[k]


def _check_state(key: str, value: Any, like: Any, steps: int) -> None:
    what = f"the optimiser's {key}"
    if isinstance(like, Tensor):
        expect_like(value, like, what)
        if key.endswith(SEPARATOR + "step"):
            expect(bool(((value >= 0) & (value <= steps)).all()), f"{what} is {value.tolist()}")
    elif like is None or isinstance(like, bool):
        expect(type(value) is type(like) and value == like, f"{what} is {value!r}")
    else:
        number = type(value) in (int, float) and math.isfinite(value)
        expect(number, f"{what} is {value!r}")
        if key.endswith(SEPARATOR + "step"):
            expect(0 <= value <= steps, f"{what} is {value!r}")


def block_norms(block: FlatGroup) -> Tensor:
    """The 2-norm of each row's gradient, (n,), in float32 or better."""
    wide = functools.reduce(torch.promote_types, (g.dtype for g in block.grads), torch.float32)
    total = torch.zeros(block.size, dtype=wide, device=block.device)
    for rows, grad in block.own_grads:
        norm = torch.linalg.vector_norm(grad, dim=1, dtype=wide)
        total[rows] += norm.square().to(total.device)
    return total.sqrt()


def _build(factory: Callable[..., Optimizer], groups: list[Any]) -> Any:
    if _unwrap_partial(factory) in (torch.optim.LBFGS, torch.optim.SparseAdam):
        raise ConfigError(f"{factory!r} does not fit a sweep; use fadapt.fit's default, AdamW")
    fast: list[dict[str, Any]] = [{}]
    preset = factory.keywords.keys() if isinstance(factory, functools.partial) else set()
    if not preset & {"fused", "foreach", "capturable", "differentiable"}:
        fast = [{k: True} for k in ("fused", "foreach") if k in _parameters(factory)] + fast
    for extra in fast:
        try:
            found = factory(groups, **extra)
        except RuntimeError:
            # torch refuses fused where a device or dtype has no such kernel.
            if not extra:
                raise
            continue
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the optimiser refuses: {error}") from error
        if not all(hasattr(found, a) for a in ("param_groups", "state", "step", "defaults")):
            raise ConfigError(
                f"optimizer returned {type(found).__name__}; it must return an optimiser of "
                "torch.optim's kind"
            )
        return found
    raise AssertionError


def _check_supported(optimizer: Optimizer, trials: Sequence[Trial]) -> None:
    require(
        "lr" in optimizer.defaults, f"{type(optimizer).__name__} has no lr that trials could set"
    )
    if "weight_decay" not in optimizer.defaults and any(t.weight_decay for t in trials):
        raise ConfigError(
            f"{type(optimizer).__name__} has no weight_decay, but a trial asks for it"
        )


def _schedule_key(trial: Trial) -> tuple[Any, ...]:
    """Equal for trials whose learning rate and weight decay are equal at every step."""
    schedule = trial.schedule if isinstance(trial.schedule, str) else id(trial.schedule)
    return trial.lr, trial.weight_decay, trial.warmup, schedule, trial.accumulate


def _unwrap_partial(factory: Any) -> Any:
    return _unwrap_partial(factory.func) if isinstance(factory, functools.partial) else factory


def _parameters(factory: Any) -> frozenset[str]:
    try:
        found = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return frozenset()
    preset = factory.keywords if isinstance(factory, functools.partial) else {}
    return frozenset(found) - preset.keys()
