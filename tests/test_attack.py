"""Hostile files and calls end in a FadaptError or in the right result; see tests/attack."""

from __future__ import annotations

import pytest

from tests.attack import arguments, calls, files


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


def test_arguments() -> None:
    """One in twelve; all of them are tried by ``tox -e attack``."""
    tally, _ = arguments.attack(share=12)
    assert not tally.bad, tally.table()
    assert sum(sum(c.values()) for c in tally.counts.values()) > 2000
