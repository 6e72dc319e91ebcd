"""The directory of a sweep: who writes to it, how often, and the adapters at the end."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, ConfigError, require
from ..io.adapters import save
from ..params.params import Params
from .checkpoint import make_directory

ADAPTERS = "adapters"
LOCK = ".lock"
NAME_BYTES = 100
"""Of a trial's name in a file name, of which most systems allow 255 bytes."""

_held: dict[str, int] = {}
_holding = threading.Lock()


@dataclass(frozen=True)
class Checkpoints:
    """Where a sweep keeps its checkpoints, ``log.jsonl`` and final adapters, and how often.

    Args:
        directory: made where it does not exist. One sweep at a time may use it.
        every: steps (an int) or time (a timedelta) between checkpoints; None for one at the start
            and one at the end. There is always one after an ``eval`` or ``loss_fn`` that raised.
        resume: go on from the directory's checkpoint, if there is one; on the CPU the final weights
            are those of an uninterrupted run, bit for bit. Refused where trials, settings, base
            model, data, loss or eval are others. "anyway" accepts other data, loss and eval, say
            an eval function that was mended. False begins anew, over what is there.

    Raises:
        ConfigError: a value of the wrong type or out of its range.

    Example:
        >>> import datetime, fadapt
        >>> kept = fadapt.Checkpoints("out", every=datetime.timedelta(minutes=2))
        >>> kept.resume
        True
    """

    directory: str | os.PathLike[str]
    every: int | timedelta | None = timedelta(minutes=10)
    resume: bool | Literal["anyway"] = True

    def __post_init__(self) -> None:
        where = self.directory
        if not isinstance(where, (str, os.PathLike)) or not isinstance(os.fspath(where), str):
            raise ConfigError(f"directory must be a str or a pathlib.Path, got {where!r}")
        require(
            bool(os.fspath(where).strip()) and "\0" not in os.fspath(where),
            f"directory={where!r} names no directory; write directory='.' for the present one",
        )
        every = self.every
        if isinstance(every, timedelta):
            require(every >= timedelta(0), f"every must not be negative, got {every!r}")
        else:
            require(
                every is None or (type(every) is int and every >= 1),
                f"every must be steps (an int of at least 1), a datetime.timedelta or None, got "
                f"{every!r}",
            )
        require(
            self.resume is True
            or self.resume is False
            or (isinstance(self.resume, str) and self.resume == "anyway"),
            f"resume must be True, False or 'anyway', got {self.resume!r:.80}",
        )

    @property
    def path(self) -> Path:
        """The directory."""
        return Path(self.directory)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Makes the directory and keeps other sweeps, of all processes, out of it.

    The lock belongs to the process, not to the file: one that was killed no longer holds it.

    Raises:
        CheckpointError: another sweep uses the directory, or the disk refuses.
    """
    make_directory(directory)
    path = directory / LOCK
    key = os.path.realpath(path)
    with _holding:
        # Record locks do not part the threads of a process, and closing the file would end them.
        if _held.get(key) == os.getpid():
            raise CheckpointError(_in_use(directory, "this process"))
        _held[key] = os.getpid()
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        with _holding:
            _held.pop(key, None)
        raise CheckpointError(f"could not write {path}: {error}") from error
    try:
        with file:
            if not _lock(file):
                file.seek(0)
                raise CheckpointError(_in_use(directory, f"process {file.read(20).strip()}"))
            with contextlib.suppress(OSError):  # a full disk: the number is for messages only
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), str(os.getpid()).encode())
            yield
    finally:
        with _holding:
            _held.pop(key, None)


def _in_use(directory: Path, by: str) -> str:
    return f"{directory} is in use by another sweep ({by}); wait for it, or choose another"


def _lock(file: Any) -> bool:
    """Whether this process could take the lock of a file, until it closes it or ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        # Not flock, which a DataLoader's worker would inherit and hold on after its parent's death.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def save_adapters(params: Mapping[str, Params], directory: Path) -> None:
    """Writes ``adapters/NNN-name.safetensors``, each whole, and removes those of other sweeps.

    Raises:
        CheckpointError: the disk refuses.
    """
    where = directory / ADAPTERS
    make_directory(where)
    files = {_file_name(i, name): p for i, (name, p) in enumerate(params.items())}
    for file, one in files.items():
        save(one, where / file)
    remove_adapters(directory, files)


def remove_adapters(directory: Path, but: Any = ()) -> None:
    """Removes what :func:`save_adapters` wrote for another sweep, and nothing else.

    Raises:
        CheckpointError: the disk refuses.
    """
    where = directory / ADAPTERS
    try:
        names = os.listdir(where) if where.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"could not look into {where}: {error}") from error
    for name in names:
        if re.fullmatch(r"\d{3,}-.*\.safetensors", name) and name not in but:
            try:
                (where / name).unlink()
            except OSError as error:
                raise CheckpointError(f"could not remove {where / name}: {error}") from error


def _file_name(number: int, name: str) -> str:
    short = re.sub(r"[^\w.=+-]+", "_", name).encode()[:NAME_BYTES].decode(errors="ignore")
    return f"{number:03d}-{short}.safetensors"
