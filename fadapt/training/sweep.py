"""fit and sweep: training of one adapter or of many in one folded pass."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Unpack, overload

import torch
from torch import nn
from torch.optim import Optimizer

from ..arguments import check_flags
from ..base.checks import check_model
from ..calibration.stats import Stats
from ..distributed.team import Team
from ..errors import ConfigError, FadaptWarning
from ..params.params import Params
from ..params.stack import Stack, stack, unstack
from ..run import LossFn
from .data import Order
from .directory import Checkpoints as Checkpoints
from .grid import grid as grid
from .grid import named
from .loop import Loop
from .report import Goal as Goal
from .report import Report as Report
from .report import Result as Result
from .settings import Options, Settings, named_options, with_named_options
from .trial import Halving as Halving
from .trial import Schedule
from .trial import Trial as Trial


@with_named_options
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
    calib: Stats | Iterable[Any] | None = None,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    eval_every: int | None = None,
    goal: Goal = "min",
    halving: Halving | None = None,
    max_adapters: int | str | None = "auto",
    verify: bool = True,
    compile: bool | Mapping[str, Any] = False,  # noqa: A002 - as torch.compile
    directory: str | os.PathLike[str] | Checkpoints | None = None,
    tensorboard: bool = False,
    progress: bool | None = None,
    log_every: int = 10,
    seed: int = 0,
    mesh: Any = None,
) -> Report:
    """Trains many adapters of one frozen model at once.

    All trials go through the base in one pass, with their own gradients, optimiser state and
    hyper-parameters. A trial that diverges is frozen at its last finite weights and reported; the
    others are the same to the last bit.

    With ``max_adapters=1`` each trial is, bit for bit, what :func:`fit` makes of it alone. With
    more in a pass it is that up to rounding: losses and gradients agree within a few units in the
    last place, which an optimiser may enlarge where a gradient is almost zero; masks of the base's
    own dropout are drawn for each row, so not the draws are those of the trial alone, but their
    distribution; and what the base draws once for a pass, such as whether a layer is left out, is
    one draw for all trials of the pass. Before the first step two members train together and
    alone: losses and gradients in eval mode, and the losses in training mode without dropout. Where
    rows of different adapters meet, as in BatchNorm in training mode, or where the model's own loss
    is not one call of its loss function on each adapter's rows, as in encoder-decoders, the trials
    run one by one, bit for bit as alone, and a :class:`OneByOneWarning` says why.

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
        optimizer: a class or factory of torch.optim's kind, ``optimizer(param_groups)``; with
            other arguments, ``functools.partial(torch.optim.AdamW, betas=(0.9, 0.95))``. Fused or
            foreach where it has that. To it each trial is a parameter of its own.
        eval_every: steps between evaluations; there is always one at the end.
        goal: whether a lower ("min") or a higher score is better.
        halving: stop the worse trials early; see :class:`Halving`.
        max_adapters: the most adapters in one pass. "auto" begins with all and halves when memory
            runs out, as does a number; None never splits.
        verify: compare two members together and alone before the first step, for each later kind
            of batch, and at steps 16, 128, and so on, which takes a few more passes and calls
            ``loss_fn`` as often; False trusts that rows stay apart.
        compile: compile the pass and its gradient, each as one graph; or options for
            torch.compile, such as {"mode": "reduce-overhead"}; with {"regional": True} the equal
            blocks of the model (its layers) are compiled as one function that runs each of them,
            which takes a fraction of the time, and the rest runs as it is. The update is the
            optimiser's own fused kernel. New learning rates and diverged or stopped trials do not
            recompile.
        directory: for checkpoints, ``log.jsonl``, TensorBoard and the final adapters; the sweep
            goes on from a checkpoint that is there. :class:`Checkpoints` says how often, and
            whether to begin anew.
        tensorboard: write losses and scores for TensorBoard, too.
        progress: a progress bar; None means on a terminal.
        log_every: steps between readings of the losses from the device.
        seed: of torch's global generators within the sweep (dropout, a DataLoader's order), and of
            Python's and numpy's within each pass; they are restored afterwards.
        mesh: a DeviceMesh over all processes with the dimensions "sweep" and "shard", or one of
            them: the trials are split over the first, the rows of each batch over the second, over
            which the base may be fully_shard'ed. None: under torchrun, the trials over all
            processes. Every process returns the whole report; the first writes the files. With a
            number as ``max_adapters`` the passes, and so on a CPU all weights, are to the last bit
            those of one process; else the trials of each process share its passes, and agree with
            one process as trials in other passes do.

    Raises:
        ConfigError: before the first step: no trials, trials of different base models, settings
            or batches that do not fit, processes with other models, trials or data, or the
            checkpoint of another sweep.
        FadaptError: another process of the sweep failed or ended.
        CheckpointError: a damaged checkpoint, a directory that another sweep uses, or a disk that
            refuses.

    If training had begun, any error, also one of ``loss_fn`` or ``eval``, carries the outcome so
    far as its ``report`` attribute, a note that names the step and the trials, and leaves a whole
    checkpoint in the directory.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> batches = [torch.ones(3, 4)] * 5
        >>> trials = fadapt.grid(fadapt.LoRA, r=[1, 2], lr=[1e-3, 1e-2])
        >>> def loss_fn(output, batch):
        ...     return output.square().mean()
        >>> report = fadapt.sweep(model, trials, batches, loss_fn=loss_fn)
        >>> len(report.results), report.best.status
        (4, 'finished')
    """
    settings = Settings(
        eval=eval,
        steps=steps,
        loss_fn=loss_fn,
        per_adapter=per_adapter,
        order=order,
        calib=calib,
        optimizer=optimizer,
        eval_every=eval_every,
        goal=goal,
        halving=halving,
        max_adapters=max_adapters,
        verify=verify,
        compile=compile,
        directory=directory,
        tensorboard=tensorboard,
        progress=progress,
        log_every=log_every,
        seed=seed,
        mesh=mesh,
    )
    check_model(model)
    if mesh is not None and not hasattr(mesh, "mesh_dim_names"):
        raise ConfigError(
            f"mesh must be a torch.distributed.device_mesh.DeviceMesh or None, got {mesh!r:.80}"
        )
    # A caller that only evaluates otherwise may have turned gradients off.
    with torch.inference_mode(False), torch.enable_grad():
        team = Team(mesh)
        with team.together():
            return Loop(model, named(trials), batches, settings, team).run()


@overload
def fit(
    model: nn.Module, params: Params, batches: Any, *, lr: float = ..., weight_decay: float = ...,
    warmup: int = ..., schedule: Schedule = ..., clip: float | None = ..., accumulate: int = ...,
    lr_ratio: Mapping[str, float] | None = ..., return_report: Literal[False] = ...,
    **options: Unpack[Options],
) -> Params: ...  # fmt: skip


@overload
def fit(
    model: nn.Module, params: Stack, batches: Any, *, lr: float = ..., weight_decay: float = ...,
    warmup: int = ..., schedule: Schedule = ..., clip: float | None = ..., accumulate: int = ...,
    lr_ratio: Mapping[str, float] | None = ..., return_report: Literal[False] = ...,
    **options: Unpack[Options],
) -> Stack: ...  # fmt: skip


@overload
def fit(
    model: nn.Module, params: Params, batches: Any, *, lr: float = ..., weight_decay: float = ...,
    warmup: int = ..., schedule: Schedule = ..., clip: float | None = ..., accumulate: int = ...,
    lr_ratio: Mapping[str, float] | None = ..., return_report: Literal[True],
    **options: Unpack[Options],
) -> tuple[Params, Report]: ...  # fmt: skip


@overload
def fit(
    model: nn.Module, params: Stack, batches: Any, *, lr: float = ..., weight_decay: float = ...,
    warmup: int = ..., schedule: Schedule = ..., clip: float | None = ..., accumulate: int = ...,
    lr_ratio: Mapping[str, float] | None = ..., return_report: Literal[True],
    **options: Unpack[Options],
) -> tuple[Stack, Report]: ...  # fmt: skip


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
    lr_ratio: Mapping[str, float] | None = None,
    return_report: bool = False,
    **options: Unpack[Options],
) -> Params | Stack | tuple[Params | Stack, Report]:
    """Trains one adapter, or a stack with the same hyper-parameters for all members.

    Args:
        model: the frozen base; it is not changed.
        params: where to begin; not changed.
        batches: as for :func:`sweep`.
        lr, weight_decay, warmup, schedule, clip, accumulate, lr_ratio: see :class:`Trial`.
        return_report: whether to return the :class:`Report`, too: curves, scores and the last
            weights beside the best.
        options: all other keyword arguments of :func:`sweep`.

    Returns:
        New params of the same kind: of the best evaluation where there is one, else the last.
        An adapter that diverged comes back as it last was finite, with a FadaptWarning.

    Raises:
        ConfigError, CheckpointError: as :func:`sweep`; also for a keyword that it does not have.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> params = fadapt.init(model, fadapt.LoRA(r=1))
        >>> batches = [torch.ones(3, 4)] * 5
        >>> params, report = fadapt.fit(
        ...     model, params, batches, loss_fn=lambda out, _: out.square().mean(),
        ...     return_report=True)
        >>> len(report.losses)
        5
    """
    if not isinstance(params, (Params, Stack)):
        raise ConfigError(f"fit takes Params or a Stack, got {type(params).__name__}")
    if isinstance(params, Stack) and params.per_row:
        raise ConfigError("fit takes the resident stack, not what select made of it")
    known = [*inspect.signature(sweep).parameters][3:]
    own = ("lr", "weight_decay", "warmup", "schedule", "clip", "accumulate", "lr_ratio")
    named_options("fit", options, [*known, *own, "return_report"])
    members = unstack(params) if isinstance(params, Stack) else [params]
    trials = [
        Trial(
            member, lr=lr, weight_decay=weight_decay, warmup=warmup, schedule=schedule,
            seed=i, clip=clip, accumulate=accumulate, lr_ratio=lr_ratio, name=f"adapter {i}",
        )
        for i, member in enumerate(members)
    ]  # fmt: skip
    check_flags(return_report=return_report)
    report = sweep(model, trials, batches, **options)
    for result in report.results:
        if result.status == "diverged":
            message = f"{result.name} diverged at step {result.step}: {result.reason}"
            warnings.warn(message, FadaptWarning, stacklevel=2)
    trained = [report.params[t.name or ""] for t in trials]
    found = stack(trained) if isinstance(params, Stack) else trained[0]
    return (found, report) if return_report else found
