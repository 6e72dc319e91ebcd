"""Every example runs, for two steps.

A new one takes ``--steps``, or says in OPTIONS what makes it quick.
"""

from __future__ import annotations

import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(p.name for p in EXAMPLES.glob("*.py") if not p.name.startswith("_"))
ELSEWHERE = {"metamath_gsm8k.py"}  # minutes as a whole: test_metamath.py runs it in parts
NEEDS = {"quantized.py": "bitsandbytes"}
OPTIONS = {
    "pretrain_base.py": (
        "--steps 2 --batch 8 --texts 300 --vocabulary 320 --stories 4 --out base --device cpu"
    ),
    "word_problems.py": "--train 20 --test 10",
}


@pytest.fixture(autouse=True)
def _as_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # In this process, since importing torch takes longer than most of them.
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("script", [s for s in SCRIPTS if s not in ELSEWHERE])
def test_runs(script: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip(NEEDS.get(script, "sklearn"), exc_type=ImportError)
    monkeypatch.setattr(sys, "argv", [script, *OPTIONS.get(script, "--steps 2").split()])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert capsys.readouterr().out


def test_each_is_in_the_readme() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [s for s in SCRIPTS if f"[{s}]({s})" not in text] == []


@pytest.mark.filterwarnings("default")
def test_the_benchmark_of_methods_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = EXAMPLES / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    small = "--hidden 64 --layers 1 --tokens 8 --vocab 64 --rounds 1 --only DoRA --out here"
    monkeypatch.setattr(sys, "argv", ["methods.py", *small.split()])
    runpy.run_path(str(folder / "methods.py"), run_name="__main__")
    (row,) = json.loads((tmp_path / "here.json").read_text())["rows"]
    assert (row["method"], row["identity"], row["rank"]) == ("DoRA", 0, "full")
    assert 0 < row["parity"] < 1e-5
    assert row["time"] > 0
    assert row["memory"] > 1
    assert "| DoRA | " in (tmp_path / "here.md").read_text()


@pytest.mark.filterwarnings("default")
def test_the_switching_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("peft")
    folder = EXAMPLES / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["switching.py", "--smoke"])
    runpy.run_path(str(folder / "switching.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "fadapt - PEFT 0, base - PEFT 0.0" in printed  # the same outputs, which are adapted


@pytest.mark.filterwarnings("default")
def test_the_cost_of_the_table_is_measured(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("peft")
    folder = EXAMPLES / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    small = "--device cpu --dtype float32 --hidden 64 --layers 2 --vocab 64 --r 2 --width 64"
    common = [*small.split(), "--rows", "1", "--steps", "2", "--warmup", "1"]

    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["table_cost.py", *common, *options])
        runpy.run_path(str(folder / "table_cost.py"), run_name="__main__")
        return capsys.readouterr().out

    counts = {
        line[:20].strip(): int(line.split()[-4].replace(",", ""))
        for line in run("--launches").splitlines()[1:]
    }
    # Hardly any more trials' own, but those of every method.
    assert counts["2 IA3"] < counts["2 LoRA"] < counts["16 mixed"] / 5
    assert counts["48 mixed"] < 1.5 * counts["16 mixed"]
    options = '{"regional": true, "backend": "eager"}'
    measured = run("--no-peft", "--trials", "2", "--multiple", "512", "--compile", options)
    assert "sweep of 2:" in measured
    assert "{'finished'}" in measured
