"""sweep and report: many trials from a file of settings, and what became of them."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from ..training.checkpoint import make_directory
from ..training.log import read_log
from ..training.sweep import sweep as train
from ..training.trial import Trial
from .config import read_config
from .output import show

ConfigFile = Annotated[str, tyro.conf.arg(metavar="CONFIG.toml")]
Directory = Annotated[str, tyro.conf.arg(metavar="DIRECTORY")]


def sweep(config: ConfigFile, /, *, anew: bool = False, check: bool = False) -> None:
    """Train many adapters of one frozen model at once, as a TOML file says.

    Killed, and called again, it goes on from its last checkpoint. The guide's page on the command
    shows such a file: base, directory, [data], [sweep] and one [[trials]] or more.

    Args:
        config: the file of settings.
        anew: begin anew over a checkpoint that is there.
        check: read the settings, say which trials they mean, and train nothing.
    """
    settings = read_config(config)
    if check:
        for name, trial in settings.named_trials().items():
            show(f"{name}: {_said(trial)}")
        return
    make_directory(settings.directory)
    job = settings.load(anew)
    report = train(job.model, job.trials, job.batches, **job.options)
    show(report)
    show(f"\nadapters and log: {settings.directory}")


def report(directory: Directory, /, *, goal: Literal["min", "max"] | None = None) -> None:
    """Print the table of a sweep from its directory, also while it runs, without its model.

    Args:
        directory: what the sweep was given, with its log.jsonl.
        goal: whether a lower or a higher score is better; by default as the sweep was told.
    """
    log = read_log(directory)
    show(log.table(goal))
    if file := log.best_file(goal):
        show(f"\nbest: {file}")


def _said(trial: Trial) -> str:
    """What is adapted by what, and what is not as by default."""
    config = trial.resolved()
    rules = getattr(config, "rule_list", ())
    said = [f"{pattern or 'every linear map'} by {method!r}" for pattern, method in rules]
    for f in dataclasses.fields(trial):
        value = getattr(trial, f.name)
        if f.name == "lr" or (f.name not in ("config", "name") and value != f.default):
            said.append(f"{f.name}={value}")
    return ", ".join(said)
