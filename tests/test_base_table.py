"""No pair of a method and a base is silent: each is exact, or refused with its reason."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("bitsandbytes", exc_type=ImportError)

from tests.base_table import BASES, EXACT, KERNEL, SMALL, cell, table, written

CALIBRATED = {n for n, m in SMALL.items() if getattr(m, "statistic", None) is not None}
OBSERVED = {"nn.Linear", "GPT-2 Conv1D", "tied lm_head", "nf4", "fp4", "nf4 double", "8bit"}
NO_BIAS = {"nn.Embedding"} | {b.title for b in BASES if b.title.startswith("experts")}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.title)
@pytest.mark.parametrize("row", SMALL)
def test_cell(row: str, base) -> None:
    text = cell(SMALL[row], base)
    if row in CALIBRATED and base.title not in OBSERVED:
        assert text.startswith("refused: ")
    elif row == "BitFit" and base.title in NO_BIAS:
        assert text.startswith("run: ")
    else:
        assert text == (KERNEL if base.quantised or base.float32 else EXACT)


def test_the_table_is_that_of_the_guide_with_a_row_for_every_method() -> None:
    text = table()
    assert text == written(), "the guide's table is an old one: python -m tests.base_table"
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 1 + len(SMALL)
    assert {row.count("|") for row in rows} == {len(BASES) + 2}
    assert {line.split("]")[0] for line in lines if line.startswith("[")} == {"[1", "[2"}
