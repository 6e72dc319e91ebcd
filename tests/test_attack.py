"""Hostile files and calls end in a FadaptError or in the right result; see tests/attack."""

from __future__ import annotations

import pytest

from tests.attack import calls, files


@pytest.mark.parametrize("kind", ["adapters", "statistics", "plain"])
def test_files(kind: str) -> None:
    tally = files.attack(tries=60, seed=1, only=kind)
    assert not tally.bad, tally.table()


def test_a_sparse_file_takes_no_memory(tmp_path) -> None:
    tally = files.Tally()
    for target in (files.AdapterFile(tmp_path, "a"), files.StatsFile(tmp_path, "s")):
        files.huge_files(tmp_path, target, tally)
    assert not tally.bad, tally.table()


def test_calls() -> None:
    tally = calls.attack()
    assert not tally.bad, tally.table()
    assert sum(sum(c.values()) for c in tally.counts.values()) > 700
