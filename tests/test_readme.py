"""The README's Python blocks run, in order, as one program; its commands are what CI runs."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[int, str]]:
    """(line number, text) of every fenced block in this language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [(README.count("\n", 0, m.start(1)), m.group(1)) for m in found]


# From torch, about the speed of attention under vmap on the CPU.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_python_blocks_run_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    program = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, program.__name__, program)
    found = blocks("python")
    assert len(found) == README.count("```python")
    for line, text in found:
        # Blank lines in front give a traceback the README's own line numbers.
        exec(compile("\n" * line + text, str(ROOT / "README.md"), "exec"), program.__dict__)


def test_ci_runs_the_test_command() -> None:
    _, (_, test) = blocks("sh")
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").endswith("\n" + test)


def test_tox_has_the_environments_of_the_commands() -> None:
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    for _, command in blocks("sh"):
        environment = re.search(r"-e (\S+)", command)
        assert environment
        assert re.search(rf"^env_list = .*\b{environment[1]}\b", tox, re.MULTILINE)
