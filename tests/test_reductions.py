"""Reductions are monoids: any split, order, tree, padding or mask gives the same statistic."""

from __future__ import annotations

import contextlib
import os
import random
from functools import reduce

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import decomposition
from torch import Tensor

from fadapt import CalibrationError
from fadapt.calibration import (
    PCA,
    CenteredGram,
    Gram,
    MaxAbs,
    PairedSums,
    Reduction,
    Sketch,
    Stats,
    Sum,
    SumAbs,
    SumSq,
    all_reduce,
)
from fadapt.statistics.reduction import exact_products

D = 6
WEIGHT = torch.randn(D, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
REDUCTIONS = [
    Sum(),
    SumSq(),
    SumAbs(),
    MaxAbs(),
    Gram(),
    CenteredGram(),
    PCA(3),
    PCA(2, center=False),
    Sketch(3),
    Sketch(4, center=False, seed=7),
    PairedSums(3),
]
ids = repr


def data(seed: int, n: int, reduction: Reduction) -> Tensor:
    """Rows with very different scales and a large mean, where sums lose digits first."""
    rng = torch.Generator().manual_seed(seed)
    width = 2 * D if reduction.paired else D
    scale = torch.logspace(-2, 2, width, dtype=torch.float64)
    return torch.randn(n, width, generator=rng, dtype=torch.float64) * scale + 3 * scale


def zero(reduction: Reduction) -> dict[str, Tensor]:
    return reduction.zero(D, weight=WEIGHT)


def same(a: dict[str, Tensor], b: dict[str, Tensor], tol: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for leaf in a:
        scale = b[leaf].abs().max().clamp(min=1)
        assert (a[leaf] - b[leaf]).abs().max() <= tol * scale, leaf


def tree(reduction: Reduction, states: list, rng: random.Random) -> dict[str, Tensor]:
    """Combines in a random order and a random bracketing."""
    states = list(states)
    while len(states) > 1:
        a = states.pop(rng.randrange(len(states)))
        b = states.pop(rng.randrange(len(states)))
        states.append(reduction.combine(a, b))
    return states[0]


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=ids)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    padding=st.integers(0, 5),
)
def test_any_split_order_tree_and_padding(
    reduction: Reduction, seed: int, sizes: list[int], padding: int
) -> None:
    rng = random.Random(seed)
    x = data(seed, sum(sizes), reduction)
    whole = reduction.update(zero(reduction), x)
    parts = []
    for block in x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))].split(
        sizes
    ):
        # Padding holds what a model leaves there: anything, NaN too.
        junk = float("nan") if rng.random() < 0.5 else 1e9
        pad = torch.full((padding, x.shape[1]), junk, dtype=x.dtype)
        at = rng.randrange(len(block) + 1)
        padded = torch.cat([block[:at], pad, block[at:]])
        mask = torch.ones(len(padded))
        mask[at : at + padding] = 0
        parts.append(reduction.update(zero(reduction), padded, mask))
    same(tree(reduction, parts, rng), whole)
    chained = zero(reduction)
    for block in x.split(1):
        chained = reduction.update(chained, block)
    same(chained, whole)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=ids)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), n=st.tuples(*[st.integers(0, 5)] * 3))
def test_associative_commutative_with_identity(
    reduction: Reduction, seed: int, n: tuple[int, int, int]
) -> None:
    a, b, c = (
        reduction.update(zero(reduction), data(seed + i, size, reduction))
        for i, size in enumerate(n)
    )
    combine = reduction.combine
    same(combine(combine(a, b), c), combine(a, combine(b, c)))
    same(combine(a, b), combine(b, a))
    same(combine(a, zero(reduction)), a, 0)
    same(combine(zero(reduction), a), a, 0)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 20))
def test_statistics_are_those_of_numpy(seed: int, n: int) -> None:
    x = data(seed, n, Sum())
    a = x.numpy()

    def of(reduction: Reduction) -> np.ndarray:
        return reduction.finalize(reduction.update(zero(reduction), x)).numpy()  # type: ignore[attr-defined]

    np.testing.assert_allclose(of(Sum()), a.mean(0), rtol=1e-12)
    np.testing.assert_allclose(of(SumSq()), (a**2).mean(0), rtol=1e-12)
    np.testing.assert_allclose(of(SumAbs()), np.abs(a).mean(0), rtol=1e-12)
    np.testing.assert_allclose(of(MaxAbs()), np.abs(a).max(0), rtol=0)
    np.testing.assert_allclose(of(Gram()), a.T @ a / n, rtol=1e-10)
    covariance = np.cov(a.T, bias=True)
    np.testing.assert_allclose(
        of(CenteredGram()), covariance, rtol=1e-9, atol=1e-11 * np.abs(a).max() ** 2
    )


@pytest.mark.parametrize("target", [Sum(), SumSq(), Gram(), PCA(2, center=False)], ids=ids)
@pytest.mark.parametrize("source", [Gram(), CenteredGram()], ids=ids)
def test_a_wider_state_holds_the_narrower_ones(source: Reduction, target: Reduction) -> None:
    x = data(0, 30, target)
    assert source.covers(target)
    read = source.convert(source.update(zero(source), x), target)
    same(read, target.update(zero(target), x))


def test_no_other_state_is_read_from_another() -> None:
    for source in REDUCTIONS:
        assert source.stored.covers(source)
        for target in (SumAbs(), MaxAbs(), CenteredGram(), Sketch(9), PairedSums(2)):
            if source.stored != target:
                assert not source.stored.covers(target), (source, target)


@pytest.mark.parametrize("center", [True, False])
def test_pca_is_sklearns(center: bool) -> None:
    x = data(3, 200, Sum())
    spectrum = PCA(4, center).finalize(PCA(4, center).update(zero(PCA(4, center)), x))
    if center:
        reference = decomposition.PCA(4, svd_solver="full").fit(x.numpy())
        vectors, ratios = reference.components_, reference.explained_variance_ratio_
    else:
        _, s, vectors = np.linalg.svd(x.numpy(), full_matrices=False)
        ratios = (s**2 / (s**2).sum())[:4]
    cosines = (spectrum.vectors.mT.numpy() * vectors[:4]).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-9)
    np.testing.assert_allclose(spectrum.ratios.numpy(), ratios, rtol=1e-9)
    largest = spectrum.vectors.abs().argmax(0)
    assert (spectrum.vectors.gather(0, largest[None]) > 0).all()


def test_a_mean_far_above_the_deviation_costs_no_digits() -> None:
    """float32 rows of mean 1e3 and deviation 1; their squares alone would lose six digits."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, D, generator=rng) + 1000
    exact = np.cov(x.double().numpy().T, bias=True)

    def error(reduction: Reduction) -> float:
        state = zero(reduction)
        for block in x.split(1000):
            state = reduction.update(state, block)
        moment = CenteredGram().finalize(state) if reduction == CenteredGram() else None
        if moment is None:
            mean = state["sum"] / state["n"]
            moment = state["gram"] / state["n"] - torch.outer(mean, mean)
        return np.abs(moment.numpy() - exact).max()

    assert error(CenteredGram()) < 1e-6
    assert error(Gram()) > 1e-4  # what the centred update is for


def test_low_precision_rows_are_summed_in_float64() -> None:
    ones = torch.ones(3000, D, dtype=torch.bfloat16)
    state = Sum().zero(D)
    for block in ones.split(1000):
        state = Sum().update(state, block)
    # bfloat16 stops counting at 256.
    assert state["sum"].dtype == torch.float64
    assert (state["sum"] == 3000).all()


def test_products_ignore_autocast_and_restore_tf32() -> None:
    x = data(0, 40, Gram()).float()
    plain = Gram().update(zero(Gram()), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(Gram().update(zero(Gram()), x), plain, 0)
    cuda = torch.backends.cuda.matmul
    before = cuda.fp32_precision
    try:
        cuda.fp32_precision = "tf32"
        with contextlib.suppress(ZeroDivisionError), exact_products("cpu"):
            inside = cuda.fp32_precision
            raise ZeroDivisionError
        assert inside == "ieee"
        assert cuda.fp32_precision == "tf32"
    finally:
        cuda.fp32_precision = before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=ids)
def test_bad_rows_are_counted_and_left_out(reduction: Reduction, bad: float) -> None:
    x = data(0, 12, reduction)
    dirty = x.clone()
    dirty[3, 1] = bad
    dirty[7, -1] = bad
    dirty[9] = bad
    mask = torch.ones(12)
    mask[9] = 0  # masked and bad: padding, not a bad row
    state = reduction.update(zero(reduction), dirty, mask)
    clean = reduction.update(zero(reduction), x[[0, 1, 2, 4, 5, 6, 8, 10, 11]])
    assert state.pop("bad") == 2
    clean.pop("bad")
    same(state, clean)


def test_sketch_is_exact_for_low_rank_and_below_the_truth_otherwise() -> None:
    rng = torch.Generator().manual_seed(1)
    d, r = 40, 5
    factor = torch.randn(r, d, generator=rng, dtype=torch.float64)
    low = torch.randn(300, r, generator=rng, dtype=torch.float64) @ factor + 0.5
    noisy = low + 0.3 * torch.randn(300, d, generator=rng, dtype=torch.float64)
    for x, exact in ((low, True), (noisy, False)):
        for center in (True, False):
            sketch = Sketch(4 * r, center)
            got = sketch.finalize(sketch.update(sketch.zero(d), x))
            centered = x - x.mean(0) * center
            values, vectors = np.linalg.eigh((centered.mT @ centered / len(x)).numpy())
            values, vectors = values[::-1], vectors[:, ::-1]
            overlap = np.linalg.svd(got.vectors[:, :r].mT.numpy() @ vectors[:, :r])[1]
            assert overlap.min() > (1 - 1e-9 if exact else 0.99)
            assert (got.values.numpy() <= values[: 4 * r] + 1e-9).all()
            np.testing.assert_allclose(float(got.total), values.sum(), rtol=1e-9)
            if exact:
                np.testing.assert_allclose(got.values[:r].numpy(), values[:r], rtol=1e-6)


def test_sketches_with_other_test_matrices_are_other_reductions() -> None:
    x = data(0, 10, Sum())
    a = Sketch(3, seed=0).update(Sketch(3).zero(D), x)
    b = Sketch(3, seed=1).update(Sketch(3).zero(D), x)
    assert (a["sketch"] - b["sketch"]).abs().max() > 1
    assert Sketch(3, seed=0) != Sketch(3, seed=1)


def test_sketch_keeps_d_times_k() -> None:
    assert Sketch(8).nbytes(1000) < 1000 * 8 * 8 + 1000 * 8 + 100 < Gram().nbytes(1000) / 100


def test_pairs_by_the_definition() -> None:
    x = torch.randn(9, 2 * D, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    plus, minus = x[:, :D].numpy(), x[:, D:].numpy()
    reduction = PairedSums(3)
    state = reduction.update(zero(reduction), x)
    pairs = reduction.finalize(state)
    u = np.linalg.svd(WEIGHT.numpy())[0][:, :3]
    turned = np.sign((u * pairs.basis.numpy()).sum(0))
    np.testing.assert_allclose(pairs.basis.numpy() * turned, u, atol=1e-12)
    np.testing.assert_allclose(pairs.difference.numpy(), (plus - minus).mean(0), rtol=1e-10)
    ahead = ((plus - minus) @ pairs.basis.numpy() > 0).sum(0)
    np.testing.assert_array_equal(pairs.majority.numpy(), np.where(2 * ahead >= 9, 1, -1))
    turned_over = PairedSums(3).finalize(
        {**state, "basis": -state["basis"], "wins": 9 - state["wins"]}
    )
    torch.testing.assert_close(turned_over.majority, -pairs.majority)
    assert set(pairs.majority.tolist()) == {1, -1}
    assert ((ahead > 0) & (ahead < 9)).all()
    assert pairs.count == 9


def test_a_tie_of_pairs_does_not_depend_on_the_signs_of_the_basis() -> None:
    x = torch.cat([data(0, 4, Sum()), data(1, 4, Sum())], 1)
    x[2:] = x[:2].roll(D, 1)
    x[2:, 0] += 1  # two wins of four along every direction, but not the same mean
    state = PairedSums(3).update(zero(PairedSums(3)), x)
    assert (2 * state["wins"] == state["n"]).all()
    pairs = PairedSums(3).finalize(state)
    along = pairs.difference @ pairs.basis
    assert torch.equal(pairs.majority, along.sign())
    assert along.abs().min() > 0


def test_pairs_of_different_weights_do_not_combine() -> None:
    other = PairedSums(3).zero(D, weight=WEIGHT.flip(0))
    with pytest.raises(CalibrationError, match="basis"):
        PairedSums(3).combine(zero(PairedSums(3)), other)


def shard(rank: int, empty: bool) -> Stats:
    states = {}
    for i, reduction in enumerate(REDUCTIONS):
        x = data(10 * i, 24, reduction).split([7, 17])[rank]
        x = x[:0] if empty and rank == 0 else x
        states[f"site{i}", "in"] = {reduction: reduction.update(zero(reduction), x)}
    streams = {name: name for name, _ in states}
    return Stats(streams, states, {"w": "0"})


def worker(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for empty in (False, True):
            mine = shard(rank, empty)
            together = all_reduce(mine)
            apart = shard(0, empty).combine(shard(1, empty))
            for stream, kinds in apart.states.items():
                for reduction, state in kinds.items():
                    same(together.states[stream][reduction], state)
            first = [torch.empty(D), torch.empty(D)]
            dist.all_gather(first, together.states["site0", "in"][Sum()]["sum"].float())
            assert torch.equal(*first)
        other = Stats(mine.streams, mine.states, {"w": str(rank)})
        with pytest.raises(CalibrationError, match="different models"):
            all_reduce(other)
    finally:
        dist.destroy_process_group()


def test_two_processes_all_reduce_to_the_combined_statistics() -> None:
    port = 20_000 + os.getpid() % 20_000
    mp.start_processes(worker, args=(port,), nprocs=2, start_method="spawn")


def test_combine_over_many_parts_equals_one() -> None:
    parts = [shard(0, False), shard(1, False), shard(0, True)]
    one = parts[0].combine(*parts[1:])
    other = reduce(lambda a, b: a.combine(b), reversed(parts))
    for stream, kinds in one.states.items():
        for reduction, state in kinds.items():
            same(state, other.states[stream][reduction])
