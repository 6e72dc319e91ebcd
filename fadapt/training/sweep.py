"""fit and sweep: training of one adapter or of many in one folded pass."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import ConfigError, FadaptWarning
from ..params.params import Params
from ..params.stack import Stack, stack, unstack
from ..run import LossFn
from .data import Order
from .grid import grid as grid
from .grid import named
from .loop import Loop
from .report import Goal as Goal
from .report import Report as Report
from .report import Result as Result
from .settings import Settings
from .trial import Halving as Halving
from .trial import Schedule
from .trial import Trial as Trial


def sweep(
    model: nn.Module,
    trials: Iterable[Trial],
    batches: Any,
    *,
    eval: Any = None,  # noqa: A002 - the pinned name
    steps: int | None = None,
    loss_fn: LossFn | None = None,
    per_adapter: bool = False,
    order: Order = "shared",
    calib: Iterable[Any] | None = None,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    optimizer_args: Mapping[str, Any] | None = None,
    eval_every: int | None = None,
    goal: Goal = "min",
    halving: Halving | None = None,
    max_adapters: int | str | None = "auto",
    compile: bool | Mapping[str, Any] = False,  # noqa: A002 - as torch.compile
    directory: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    checkpoint_minutes: float | None = 10.0,
    resume: bool = True,
    tensorboard: bool = False,
    progress: bool | None = None,
    log_every: int = 10,
    seed: int = 0,
) -> Report:
    """Trains many adapters of one frozen model at once.

    All trials go through the base in one pass, with their own gradients, optimiser state and
    hyper-parameters. A trial that diverges is frozen at its last finite weights and reported; the
    others are the same to the last bit.

    Args:
        model: the frozen base; it is not changed. Its training flag (dropout) is the caller's.
        trials: what to train, for example from :func:`grid`.
        batches: a sequence or a re-iterable (DataLoader) of batches as :func:`fadapt.run` takes
            them; repeated when it ends. They are moved to the model's device.
        eval: batches, for the mean loss (weighted by rows); or ``eval(model, stack)``, which
            returns (n,) scores, or a dict of them by metric, for the n adapters of the stack;
            the first metric ranks. The best weights are kept.
        steps: batches that every trial sees; None means one epoch of a sized ``batches``.
        loss_fn: as for :func:`fadapt.run`.
        per_adapter: batches are (N, B, ...) tensors, or lists of N batches, one part per trial.
        order: "shared": all trials see the same batches; "own": each its own permutation of a
            sequence of batches, by its seed.
        calib: as for :func:`fadapt.init`.
        optimizer: a class or factory of torch.optim's kind, ``optimizer(param_groups, **args)``;
            fused or foreach where it has that. Each trial is a param group of its own.
        optimizer_args: its other arguments, such as {"betas": (0.9, 0.95)}.
        eval_every: steps between evaluations; there is always one at the end.
        goal: whether a lower ("min") or a higher score is better.
        halving: stop the worse trials early; see :class:`Halving`.
        max_adapters: the most adapters in one pass. "auto" begins with all and halves when memory
            runs out, as does a number; None never splits.
        compile: compile the pass and its gradient, each as one graph; or options for
            torch.compile, such as {"mode": "reduce-overhead"}. The update is the optimiser's own
            fused kernel. New learning rates and diverged or stopped trials do not recompile.
        directory: for checkpoints, ``log.jsonl``, TensorBoard and the final adapters.
        checkpoint_every: steps between checkpoints, beside the minutes.
        checkpoint_minutes: minutes between checkpoints, or None.
        resume: go on from the directory's checkpoint; on the CPU the final weights are those of
            an uninterrupted run, bit for bit.
        tensorboard: write losses and scores for TensorBoard, too.
        progress: a progress bar; None means on a terminal.
        log_every: steps between readings of the losses from the device.
        seed: of the global generators within the sweep (dropout, a DataLoader's order); they are
            restored afterwards.

    Raises:
        ConfigError: before the first step: trials of different base models, no trials, settings
            or batches that do not fit.
        CheckpointError: a damaged checkpoint, or a disk that refuses; if training had begun, its
            ``report`` attribute holds the weights so far, and the earlier checkpoint is whole.
    """
    settings = Settings(
        eval=eval,
        steps=steps,
        loss_fn=loss_fn,
        per_adapter=per_adapter,
        order=order,
        calib=calib,
        optimizer=optimizer,
        optimizer_args=optimizer_args or {},
        eval_every=eval_every,
        goal=goal,
        halving=halving,
        max_adapters=max_adapters,
        compile=compile,
        directory=directory,
        checkpoint_every=checkpoint_every,
        checkpoint_minutes=checkpoint_minutes,
        resume=resume,
        tensorboard=tensorboard,
        progress=progress,
        log_every=log_every,
        seed=seed,
    )
    return Loop(model, named(trials), batches, settings).run()


@overload
def fit(model: nn.Module, params: Params, batches: Any, **options: Any) -> Params: ...


@overload
def fit(model: nn.Module, params: Stack, batches: Any, **options: Any) -> Stack: ...


def fit(
    model: nn.Module,
    params: Params | Stack,
    batches: Any,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: int = 0,
    schedule: Schedule = "constant",
    clip: float | None = None,
    accumulate: int = 1,
    **options: Any,
) -> Params | Stack:
    """Trains one adapter, or a stack with the same hyper-parameters for all members.

    Args:
        params: where to begin; not changed.
        lr, weight_decay, warmup, schedule, clip, accumulate: see :class:`Trial`.
        options: all other arguments of :func:`sweep`.

    Returns:
        New params of the same kind: of the best evaluation where there is one, else the last.
        An adapter that diverged comes back as it last was finite, with a FadaptWarning.

    Raises:
        ConfigError, CheckpointError: as :func:`sweep`.
    """
    if not isinstance(params, (Params, Stack)):
        raise ConfigError(f"fit takes Params or a Stack, got {type(params).__name__}")
    members = unstack(params) if isinstance(params, Stack) else [params]
    trials = [
        Trial(
            member, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule,
            seed=i, clip=clip, accumulate=accumulate, name=f"adapter {i}",
        )
        for i, member in enumerate(members)
    ]  # fmt: skip
    report = sweep(model, trials, batches, **options)
    for result in report.results:
        if result.status == "diverged":
            message = f"{result.name} diverged at step {result.step}: {result.reason}"
            warnings.warn(message, FadaptWarning, stacklevel=2)
    trained = [report.params[t.name or ""] for t in trials]
    return stack(trained) if isinstance(params, Stack) else trained[0]
