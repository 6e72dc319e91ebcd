"""The progress bar; quiet where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError


class Bar:
    """A rich progress bar on stderr.

    Args:
        steps: in all.
        show: True asks for it (and for rich), False for silence; None shows it on a terminal where
            rich is installed.
    """

    def __init__(self, steps: int, show: bool | None):
        self._bar: Any = None
        if show is False or (show is None and not sys.stderr.isatty()):
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeRemainingColumn as Remaining
        except ImportError as error:
            if show is None:
                return
            raise ConfigError("progress=True needs rich: pip install 'fadapt[train]'") from error
        columns = (BarColumn(), MofNCompleteColumn(), Remaining(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, losses: Sequence[float], best: str = "") -> None:
        """Shows the step, how many trials train, and their losses."""
        if self._bar is None:
            return
        text = f"{len(losses)} adapters"
        if losses:
            ordered = sorted(losses)
            text += f"  loss {ordered[0]:.4g} … {ordered[len(ordered) // 2]:.4g} (median)"
        self._bar.update(self._task, completed=step, description=f"{text}  {best}")
