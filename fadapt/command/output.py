"""show: lines for a terminal, in which what files say of themselves can do nothing."""

from __future__ import annotations

import sys
from typing import TextIO


def show(text: object, file: TextIO | None = None) -> None:
    """Prints lines; what is not printable, such as an escape sequence, by its code."""
    print(printable(str(text)), file=file or sys.stdout)


def printable(text: str) -> str:
    """A text whose other characters than printable ones and ends of lines are written out."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
