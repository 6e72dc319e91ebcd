"""main: arguments to a call, and whatever goes wrong to one line and exit code 2."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import re
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import FadaptError, FadaptWarning
from .output import show

DESCRIPTION = (
    "Adapters (LoRA and its family) of frozen PyTorch models: look into their files, merge and "
    "convert them, train many at once. `fadapt COMMAND --help` explains each command."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments, without the program's name; None for the process's own.

    Returns:
        The exit code: 0; 2 after an error, of which one line is written to stderr; 130 after
        Ctrl-C.

    Example:
        >>> import torch, fadapt
        >>> from fadapt.command import main
        >>> params = fadapt.init(torch.nn.Linear(8, 4), fadapt.LoRA(r=2))
        >>> fadapt.save(params, "adapter.safetensors")
        >>> main(["inspect", "adapter.safetensors"])  # doctest: +ELLIPSIS
        adapter.safetensors: an adapter of fadapt's, ...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        import tyro  # noqa: F401
    except ImportError:
        return _refuse("the command needs tyro: pip install 'fadapt[cli]'")
    try:
        call = _parsed(arguments)
    except SystemExit as stop:
        return 2 if stop.code else 0
    try:
        with _notes():
            call()
    except FadaptError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    return 0


def _parsed(arguments: list[str]) -> Callable[[], Any]:
    """The call that the arguments mean; not made here, where what is printed is the parser's.

    Raises:
        SystemExit: after --help with 0, after what it does not understand with 2.
    """
    import tyro

    from . import files, sweeps

    functions = files.inspect, files.merge, files.convert, sweeps.sweep, sweeps.report
    commands = {function.__name__: function for function in functions}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.extras.subcommand_cli_from_dict(
                {name: _later(function) for name, function in commands.items()},
                prog="fadapt",
                description=DESCRIPTION,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code:
            _refuse(_unboxed(complaint.getvalue()))
        raise


def _later(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the same arguments that returns the call instead of making it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(function, *args, **kwargs)

    call.__name__, call.__module__ = function.__name__, function.__module__
    call.__annotations__ = typing.get_type_hints(function, include_extras=True)
    signature = inspect.signature(function, eval_str=True)
    call.__signature__ = signature  # type: ignore[attr-defined]
    # The parser keeps the line breaks of what an argument is, and breaks lines itself.
    call.__doc__ = re.sub(r"\n {8,}(?=\S)", " ", inspect.cleandoc(function.__doc__ or ""))
    return call


def _unboxed(complaint: str) -> str:
    """What the parser says in a frame, as one line without the advice that it ends with."""
    lines = [line.strip("│ ") for line in complaint.splitlines() if line.startswith("│")]
    parts = "\n".join(line for line in lines if line).split("─")
    said = [" ".join(part.split()) for part in parts if part.strip()]
    said = [part for part in said if not part.startswith("For full helptext")]
    return f"{'; '.join(said) or ' '.join(complaint.split())} (fadapt --help explains)"


@contextlib.contextmanager
def _notes() -> Any:
    """The package's warnings as lines on stderr, each once; others as Python shows them."""
    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", FadaptWarning)
        show = warnings.showwarning

        def note(message: Any, category: Any, *rest: Any, **more: Any) -> None:
            if not issubclass(category, FadaptWarning):
                show(message, category, *rest, **more)
            elif str(message) not in said:
                said.add(str(message))
                _say(f"note: {' '.join(str(message).split())}")

        warnings.showwarning = note
        yield


IN_OPTIONS = (
    (r"pass allow_other_base=True", "load it in its dtype, --base-dtype, or --allow-other-base"),
    (
        r"as_lora\(model, params, r=\.\.\.\), and read the error from each method's `error`",
        "--rank",
    ),
    (r"\bdrop_bias=", "--drop-bias "),
    (r"pass adapter=", "write --adapter "),
    (r"load_peft\(path, model, initial=its_directory\)", "--initial its_directory"),
    (r"pass Checkpoints\(directory, resume=False\)", "write --anew"),
    (r"Checkpoints\(directory, resume='anyway'\) goes on with the new\. ", ""),
    (r"fadapt\.merge\(model, params\)", "fadapt merge"),
)
"""What errors tell a script to write, and what is written here."""


def _refuse(message: str) -> int:
    for pattern, option in IN_OPTIONS:
        message = re.sub(pattern, option, message)
    _say(f"error: {' '.join(message.split())}")
    return 2


def _say(line: str) -> None:
    show(f"fadapt: {line}", sys.stderr)
