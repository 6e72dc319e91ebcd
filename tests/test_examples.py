"""Every example runs, for two steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(p.name for p in EXAMPLES.glob("*.py") if not p.name.startswith("_"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_runs(script: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes" if script == "quantized.py" else "sklearn")
    command = [sys.executable, str(EXAMPLES / script), "--steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


def test_each_is_in_the_readme() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [s for s in SCRIPTS if f"[{s}]({s})" not in text] == []
