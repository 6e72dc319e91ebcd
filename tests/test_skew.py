"""Skew matrices from tables that are kept, and autocast that is switched off where it is on."""

from __future__ import annotations

import pytest
import torch

from fadapt import linalg


def by_definition(upper: torch.Tensor, size: int) -> torch.Tensor:
    made = upper.new_zeros(size, size)
    i, j = torch.triu_indices(size, size, 1)
    made[i, j] = upper
    return made - made.mT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_matrix_of_its_upper_triangle_also_at_the_second_time(dtype) -> None:
    for size in (3, 5, 3):
        upper = torch.randn(size * (size - 1) // 2, dtype=dtype)
        assert torch.equal(linalg.skew(upper, size), by_definition(upper, size))


def test_what_was_first_seen_in_inference_mode_or_a_transform_trains_afterwards(
    monkeypatch,
) -> None:
    monkeypatch.setattr(linalg, "_places", {})
    upper = torch.randn(6)
    with torch.inference_mode():
        linalg.skew(upper.clone(), 4)
    torch.func.grad(lambda u: linalg.skew(u, 4).square().sum())(upper)
    torch.func.vmap(lambda u: linalg.skew(u, 4))(upper.expand(3, -1))
    assert len(linalg._places) == 1
    leaf = upper.clone().requires_grad_()
    linalg.skew(leaf, 4).square().sum().backward()
    torch.testing.assert_close(leaf.grad, 4 * upper)
    assert not any(t.is_inference() for pair in linalg._places.values() for t in pair)


def test_a_transform_and_a_fake_tensor_leave_nothing_behind(monkeypatch) -> None:
    monkeypatch.setattr(linalg, "_places", {})
    torch.func.vmap(lambda u: linalg.skew(u, 3))(torch.randn(2, 3))
    with torch._subclasses.FakeTensorMode():
        linalg.skew(torch.randn(3), 3)
    torch.compile(lambda u: linalg.skew(u, 3), backend="eager", fullgraph=True)(torch.randn(3))
    assert not linalg._places


def test_small_products_are_in_full_precision_within_autocast_too() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
        with linalg.full_precision(x):
            assert (x @ x).dtype is torch.float32
    with linalg.full_precision(x):
        assert (x @ x).dtype is torch.float32
