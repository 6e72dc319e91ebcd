"""main: arguments to a function, and whatever goes wrong to one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Sequence

from ..errors import FadaptError
from .files import convert, inspect, merge
from .sweeps import report, sweep

DESCRIPTION = "Adapters of frozen models: look into their files, merge and convert them, train many at once."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments, without the program's name; None for the process's own.

    Returns:
        The exit code: 0, or 2 after an error, of which one line is written to stderr.

    Example:
        >>> from fadapt.command import main
        >>> fadapt.save(fadapt.init(model, fadapt.LoRA(r=2)), "adapter.safetensors")
        >>> main(["inspect", "adapter.safetensors"])  # doctest: +ELLIPSIS
        site ...
        0
    """
    try:
        import tyro
    except ImportError:
        return _refuse("the command needs tyro: pip install 'fadapt[cli]'")
    commands = {f.__name__: f for f in (inspect, merge, convert, sweep, report)}
    complaints = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaints):
            call = tyro.extras.subcommand_cli_from_dict(
                {name: _later(f) for name, f in commands.items()},
                prog="fadapt",
                description=DESCRIPTION,
                args=None if argv is None else list(argv),
                console_outputs=True,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            return 0
        return _refuse(_first_line(complaints.getvalue()))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FadaptWarningKind)
            call()
        for warning in caught:
            print(f"fadapt: note: {warning.message}", file=sys.stderr)  # noqa: T201
    except FadaptError as error:
        return _refuse(str(error))
    except (OSError, ValueError) as error:
        return _refuse(f"{type(error).__name__}: {error}")
    return 0
