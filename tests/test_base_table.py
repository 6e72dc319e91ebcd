"""No pair of a method and a base is silent: each is exact, or refused with its reason."""

from __future__ import annotations

import logging
import re

import pytest

pytest.importorskip("bitsandbytes", exc_type=ImportError)

from tests.base_table import BASES, EXACT, KERNEL, SMALL, cell, table, written

EXPERTS = {base.title for base in BASES if base.title.startswith("experts")}
QUANTIZED = {base.title for base in BASES if base.quantised}

CALIBRATED = {n for n, m in SMALL.items() if getattr(m, "statistic", None) is not None}
OBSERVED = {"nn.Linear", "GPT-2 Conv1D", "tied lm_head", "nf4", "fp4", "nf4 double", "8bit"}
NO_BIAS = {"nn.Embedding"} | EXPERTS
NO_VECTOR = {"nn.Linear", "tied lm_head", "MultiheadAttention"} | NO_BIAS | QUANTIZED
NO_EMBEDDING = {"nn.Linear", "MultiheadAttention"} | QUANTIZED
REFUSED = {
    **dict.fromkeys(CALIBRATED, {base.title for base in BASES} - OBSERVED),
    "LNTuning": NO_VECTOR,
    "TrainableTokens": NO_EMBEDDING,
}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.title)
@pytest.mark.parametrize("row", SMALL)
def test_cell(row: str, base) -> None:
    text = cell(SMALL[row], base)
    if base.title in REFUSED.get(row, ()):
        assert text.startswith("refused: ")
    elif row in ("BitFit", "ReFT") and base.title in NO_BIAS:
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
    reasons = {line.split("]")[0] + "]" for line in lines if line.startswith("[")}
    assert reasons == set(re.findall(r"\[\d+\]", "".join(rows)))
