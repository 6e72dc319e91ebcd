"""No pair of a method and a base is silent: each is exact, or refused with its reason."""

from __future__ import annotations

import logging
import re

import pytest

pytest.importorskip("bitsandbytes", exc_type=ImportError)

from tests.base_table import BASES, EXACT, KERNEL, SMALL, cell, short, stated, written

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
    wanted = stated()[row, base.title]
    assert short(text) == wanted, "the guide's table is an old one: python -m tests.base_table"


def test_the_guide_has_a_row_for_every_method_and_a_column_for_every_base() -> None:
    assert list(stated()) == [(row, base.title) for row in sorted(SMALL) for base in BASES]
    reasons = {line.split("]")[0] + "]" for line in written().splitlines() if line[:1] == "["}
    assert reasons == set(re.findall(r"\[\d+\]", written().split("\nkernel: ")[0]))
