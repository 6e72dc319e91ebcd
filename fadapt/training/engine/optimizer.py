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
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...errors import ConfigError, require
from ..trial import Trial
from .flat_params import FlatGroup, FlatParams

ELEMENTWISE = (
    torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad,
    torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Rprop, torch.optim.ASGD,
)  # fmt: skip
"""Optimisers that treat every entry alone: a trial's row is one parameter. The others (Adafactor,
Muon) get every leaf, at its own rank, as a parameter of its own."""


class TrialOptimizer:
    """Gradient clipping, the optimiser's step and the guard against divergence.

    Args:
        flat: the values and gradients.
        trials: by trial number.
        factory: ``factory(param_groups, **kwargs)`` returns the optimiser.
        kwargs: for the factory; lr and weight decay come from the trials.
        steps: batches in all, from which the schedules know their end.

    Attributes:
        alive: a flag per row of each block.
        accumulates: whether some trial's gradient adds up over several batches.
    """

    def __init__(
        self,
        flat: FlatParams,
        trials: Sequence[Trial],
        factory: Callable[..., Optimizer],
        kwargs: Mapping[str, Any],
        steps: int,
    ):
        self.flat, self.trials, self.steps = flat, trials, steps
        self.accumulates = any(trial.accumulate > 1 for trial in trials)
        self.elementwise = _unwrap_partial(factory) in ELEMENTWISE
        self.parameters: list[tuple[int, list[Tensor], list[Tensor]]] = []
        for trial, block, row in flat.rows():
            views = block.row if self.elementwise else block.member
            values = [p.detach() for p in views(row, block.values)]
            self.parameters.append((trial, values, views(row, block.grads)))
        groups: dict[Any, dict[str, Any]] = {}
        self._leaders: list[int] = []
        for trial, values, _ in self.parameters:
            t = trials[trial]
            # Of the other optimisers some compute across the parameters of a group.
            key = _schedule_key(t) if self.elementwise else trial
            if key not in groups:
                rates = {"lr": t.rate(0, 1), "weight_decay": t.weight_decay}
                groups[key] = {"params": [], **rates}
                self._leaders.append(trial)
            groups[key]["params"] += values
        self.optimizer = _build(factory, list(groups.values()), dict(kwargs))
        _check_supported(self.optimizer, [trials[t] for t in flat.order])
        self.alive = [torch.ones(b.size, dtype=torch.bool, device=b.device) for b in flat.blocks]
        limits = [[trials[t].clip or math.inf for t in flat.order[s]] for _, s in flat.spans()]
        self._clip = [
            block_norms(b).new_tensor(limit) if min(limit) < math.inf else None
            for b, limit in zip(flat.blocks, limits, strict=True)
        ]

    def rates(self, step: int) -> dict[int, float]:
        """The learning rate of every trial at a step (from 0)."""
        result = {}
        for trial in self.flat.order:
            t = self.trials[trial]
            result[trial] = t.rate(step // t.accumulate, self.steps // t.accumulate)
        return result

    @torch.no_grad()
    def step(self, step: int, losses: Tensor) -> None:
        """Updates the trials whose gradient is complete at this step (from 0).

        Args:
            losses: (N,) in the flat's order; only their finiteness matters here.
        """
        due = [(step + 1) % self.trials[t].accumulate == 0 for t, _, _ in self.parameters]
        for (_, span), alive in zip(self.flat.spans(), self.alive, strict=True):
            alive &= torch.isfinite(losses[span]).to(alive.device)
        if not any(due):
            return
        whole = None if all(due) else self._device_flags(due)
        before = []
        for i, block in enumerate(self.flat.blocks):
            self._clip_gradients(i, block, None if whole is None else whole[i])
            before.append([v.clone() for _, v in block.own_values])
        rates = self.rates(step)
        for group, leader in zip(self.optimizer.param_groups, self._leaders, strict=True):
            group["lr"] = rates[leader]
        for (_, values, grads), now in zip(self.parameters, due, strict=True):
            for value, grad in zip(values, grads, strict=True):
                value.grad = grad if now else None
        self.optimizer.step()
        for i, block in enumerate(self.flat.blocks):
            block.project()
            self._guard(i, block, before[i], None if whole is None else whole[i])

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
        for rows, grad in block.own_grads:
            if due is not None:
                grad.masked_fill_(due[rows].to(grad.device)[:, None], 0)
            elif self.accumulates:  # otherwise the next pass overwrites it
                grad.zero_()

    def states(self) -> dict[int, list[dict[str, Any]]]:
        """The optimiser's state of each trial, one dict per parameter."""
        return {
            trial: [dict(self.optimizer.state.get(value, {})) for value in values]
            for trial, values, _ in self.parameters
        }

    def load_states(self, states: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
        """Takes over what :meth:`states` of another updater returned for these trials."""
        for trial, values, _ in self.parameters:
            # A trial that has not been updated yet has none.
            for value, state in zip(values, states.get(trial, ()), strict=False):
                if state:
                    self.optimizer.state[value] = dict(state)


def block_norms(block: FlatGroup) -> Tensor:
    """The 2-norm of each row's gradient, (n,), in float32 or better."""
    wide = functools.reduce(torch.promote_types, (g.dtype for g in block.grads), torch.float32)
    total = torch.zeros(block.size, dtype=wide, device=block.device)
    for rows, grad in block.own_grads:
        norm = torch.linalg.vector_norm(grad, dim=1, dtype=wide)
        total[rows] += norm.square().to(total.device)
    return total.sqrt()


def _build(factory: Callable[..., Optimizer], groups: list[Any], kwargs: dict[str, Any]) -> Any:
    if _unwrap_partial(factory) in (torch.optim.LBFGS, torch.optim.SparseAdam):
        raise ConfigError(f"{factory!r} does not fit a sweep; use fadapt.fit's default, AdamW")
    fast: list[dict[str, Any]] = [{}]
    names = _parameters(factory)
    given = kwargs.keys() & {"fused", "foreach", "capturable", "differentiable"}
    if not given:
        fast = [{k: True} for k in ("fused", "foreach") if k in names] + fast
    for extra in fast:
        try:
            return factory(groups, **extra, **kwargs)
        except RuntimeError:
            # torch refuses fused where a device or dtype has no such kernel.
            if not extra:
                raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the optimiser refuses: {error}") from error
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
