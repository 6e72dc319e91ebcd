"""Damaged and crafted checkpoints and logs of sweeps; see tests/attack/checkpoints."""

from __future__ import annotations

from tests.attack import checkpoints, disks


def test_checkpoints_and_logs() -> None:
    tally = checkpoints.attack(tries=15, seed=2)
    assert not tally.bad, tally.table()


def test_disks_that_refuse() -> None:
    tally = disks.attack(("replace", "listdir", "scandir"))
    assert not tally.bad, tally.table()
