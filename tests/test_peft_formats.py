"""Every format against the installed PEFT, in both directions; rows in tests/peft_table.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fadapt
from tests.peft_table import (
    BASES,
    IN,
    LARGEST,
    OUT,
    PAGE,
    against_peft,
    formats,
    logits,
    make_params,
    parse,
    read_in,
    read_out,
)

pytestmark = pytest.mark.filterwarnings("ignore::fadapt.DenseFallbackWarning")


def stated() -> dict[tuple[str, str], float]:
    return parse(PAGE.read_text())


def test_the_guide_states_every_row():
    rows = [("PEFT to fadapt", name) for name in IN] + [("fadapt to PEFT", name) for name in OUT]
    assert list(stated()) == rows, "python -m tests.peft_table writes the page anew"
    assert formats() in PAGE.read_text(), "python -m tests.peft_table writes the page anew"


def bound(direction: str, name: str, found: Tensor) -> float:
    """Ten times what the guide states; where that is near 0, some roundings of the logits.

    The stated figures are one machine's, and others add in another order.
    """
    roundings = 16 * torch.finfo(found.dtype).eps * float(found.abs().max())
    return min(LARGEST, max(10 * stated()[direction, name], roundings))


@pytest.mark.parametrize("name", IN)
def test_what_peft_wrote(name, tmp_path):
    error, base, params = read_in(IN[name], tmp_path)
    x = BASES[IN[name].base][1]()
    expected = logits(fadapt.apply(base, params, x))
    assert error <= bound("PEFT to fadapt", name, expected)
    # Read, written and read by PEFT again.
    fadapt.peft.save_peft(base, params, tmp_path / "again")
    assert against_peft(base, tmp_path / "again", x, expected) <= LARGEST


@pytest.mark.parametrize("name", OUT)
def test_what_fadapt_wrote(name, tmp_path):
    row = OUT[name]
    error = read_out(row, tmp_path)
    base, x = (make() for make in BASES[row.base])
    again = fadapt.peft.load_peft(tmp_path / "adapter", base)
    expected = logits(fadapt.apply(base, make_params(row, base), x))
    assert error <= bound("fadapt to PEFT", name, expected)
    assert (logits(fadapt.apply(base, again, x)) - expected).abs().max() <= LARGEST
    assert all(t.requires_grad for t in fadapt.trainable(again))
