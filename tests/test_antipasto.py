"""Methods over singular directions, against their papers' mutating formulas in NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fadapt
from fadapt.adapted_map import adapt, dense, start
from fadapt.base.linear_map import DenseMap
from fadapt.calibration import Gram, Pairs, Statistic, SumSq
from fadapt.method import STRENGTH, Method
from fadapt.methods.antipasto import AntiPaSTO
from fadapt.methods.antipasto_ablate import AntiPaSTOAblate
from fadapt.methods.antipasto_arrow import AntiPaSTOArrow
from fadapt.methods.antipasto_asvd import AntiPaSTOASVD
from fadapt.methods.antipasto_corda import AntiPaSTOCorDA
from fadapt.methods.antipasto_dplr import AntiPaSTODPLR
from fadapt.methods.antipasto_rotation import AntiPaSTORotation
from fadapt.methods.ssteer import SSteer
from fadapt.methods.ssvd import SSVD
from fadapt.site import Site, SiteView
from fadapt.testing import Case, check_method

F64 = torch.float64
SHAPES = ((8, 12), (12, 8), (9, 9))
STRENGTHS = (None, 1.0, 0.5, -1.0, 0.0)


def weight_of(out: int, inp: int, seed: int = 0, spectrum=None) -> np.ndarray:
    """A weight whose singular values are apart, so that its singular vectors are well defined."""
    rng, n = np.random.default_rng(seed), min(out, inp)
    left, right = (np.linalg.qr(rng.normal(size=(d, n)))[0] for d in (out, inp))
    return left * (np.linspace(3, 0.4, n) if spectrum is None else spectrum) @ right.T


def view_of(weight, bias=True, dtype=F64) -> SiteView:
    weight = torch.as_tensor(weight, dtype=dtype)
    out, inp = weight.shape
    b = torch.linspace(-1, 1, out, dtype=dtype) if bias else None
    site = Site("layers.0.proj.weight", out, inp, bias="layers.0.proj.bias" if bias else None)
    at_least = torch.promote_types(dtype, torch.float32)
    return SiteView(site, DenseMap(weight, b), torch.device("cpu"), at_least)


def leaves_of(method: Method, view: SiteView, stat=None, seed: int = 0, std: float = 0.5):
    """Train and fixed leaves with every trainable entry moved at random."""
    method.check(view.site)
    rng = torch.Generator().manual_seed(seed)
    train, fixed = start(method, view, rng, stat)
    train = {
        k: t + std * torch.randn(t.shape, generator=rng, dtype=t.dtype) for k, t in train.items()
    }
    return train, fixed


def at_strength(p: dict, c: float | None) -> dict:
    return p if c is None else {**p, STRENGTH: torch.tensor(c)}


def svd(weight, k):
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    sign = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    return (u * sign)[:, :k], s[:k], (vt.T * sign)[:, :k]


def elu(z):
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))


def upper(t, size):
    full = np.zeros((size, size))
    full[np.triu_indices(size, 1)] = t
    return full


def rotation(t, size, max_angle, c):
    """blockdiag of (I - X)⁻¹ (I + X), the reference's with the bound for blocks of any size."""
    limit, n = 2 * math.tan(max_angle / 2) / (1 / math.tan(math.pi / (2 * size))), len(t)
    whole = np.zeros((n * size, n * size))
    for i, row in enumerate(t):
        a = (upper(row, size) - upper(row, size).T) / 2
        x = c * limit * np.tanh(a / limit) / 2
        block = np.linalg.inv(np.eye(size) - x) @ (np.eye(size) + x)
        whole[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
    return whole


def mutated(method, weight, t, c):
    """W' by the paper: the residual plus the changed factors."""
    k = method.k if isinstance(method, SSVD) else method.r
    u, s, v = svd(weight, k)
    rest, eye = weight - u * s @ v.T, np.eye(k)
    match method:
        case AntiPaSTO():
            return rest + u * (s * (1 + elu(c * t["g"]))) @ v.T
        case AntiPaSTORotation(block_size=size, max_angle=angle):
            r_v, r_u = (rotation(t[n], size, angle, c) if n in t else eye for n in ("T_v", "T_u"))
            return rest + (u @ r_u.T) @ np.diag(s + c * t["d"]) @ (r_v @ v.T)
        case AntiPaSTOAblate():
            q = np.linalg.qr(t["C0"] + t["dC"])[0]
            return rest + u @ (eye - c * q @ np.diag(t["alpha"]) @ q.T) @ np.diag(s) @ v.T
        case AntiPaSTOArrow(b=b):
            core = np.diag(np.concatenate([np.ones(b), 1 + elu(c * t["g"])]))
            core[:b, :b] += c * t["M"]
            return rest + u @ core @ np.diag(s) @ v.T
        case AntiPaSTODPLR():
            return rest + u @ (np.diag(s * (1 + elu(c * t["g"]))) + c * t["B"] @ t["A"]) @ v.T
        case SSVD(kind="free"):
            g = eye + c * t["F"]
        case SSVD(kind=kind):
            skew = c * (upper(t["T"], k) - upper(t["T"], k).T)
            strict = (eye - skew) @ np.linalg.inv(eye + skew)
            g = strict if kind == "strict" else eye - 2 * skew
    return rest + u @ np.diag(s + c * t["d"]) @ g @ v.T


PLAIN = (
    AntiPaSTO(4),
    AntiPaSTO(8),
    AntiPaSTORotation(4),
    AntiPaSTORotation(6, block_size=3, basis="U"),
    AntiPaSTORotation(8, block_size=2, max_angle=1.0, basis="both"),
    AntiPaSTOAblate(5),
    AntiPaSTOAblate(5, k=3),
    AntiPaSTOArrow(6, b=2),
    AntiPaSTODPLR(6, k=2),
    SSVD(4),
    SSVD(4, kind="strict"),
    SSVD(3, kind="free"),
)


def assert_same_map(method, p, view, dense, c):
    x = torch.randn(7, view.in_features, generator=torch.Generator().manual_seed(9), dtype=F64)
    reference = x @ torch.as_tensor(dense).mT + (0 if view.base.bias is None else view.base.bias)
    error = (adapt(method, at_strength(p, c), x, view.base) - reference).norm() / reference.norm()
    assert error <= 1e-12, (method, c, float(error))


@pytest.mark.parametrize("method", PLAIN, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_mutating_formula(method, shape, bias):
    weight = weight_of(*shape)
    view = view_of(weight, bias)
    train, fixed = leaves_of(method, view)
    # Of the fixed leaves only the random start is taken; the SVD is the reference's own.
    start = {k: t for k, t in fixed.items() if k == "C0"}
    values = {k: t.numpy() for k, t in {**train, **start}.items()}
    for c in STRENGTHS:
        dense = mutated(method, weight, values, 1.0 if c is None else c)
        assert_same_map(method, {**train, **fixed}, view, dense, c)


@pytest.mark.parametrize("method", PLAIN, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rank_and_untouched_bias(method, shape):
    weight = weight_of(*shape)
    view = view_of(weight)
    train, fixed = leaves_of(method, view)
    weight_now, bias = dense(method, {**train, **fixed}, view.base)
    rank = method.k if isinstance(method, (AntiPaSTOAblate, SSVD)) else method.r
    assert np.linalg.matrix_rank(weight_now.numpy() - weight, tol=1e-10) == rank
    assert torch.equal(bias, view.base.bias)


def test_stored_factors_are_the_smaller_ones():
    for method in (AntiPaSTO(4), AntiPaSTOAblate(4), AntiPaSTOArrow(4, 2)):
        shapes = {s: method.init(view_of(weight_of(*s)), torch.Generator())[1] for s in SHAPES}
        drawn = {"C0"} if isinstance(method, AntiPaSTOAblate) else set()
        assert [fixed.keys() - drawn for fixed in shapes.values()] == [{"U"}, {"P", "U"}, {"U"}]


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_singular_values_do_not_matter_to_a_common_gain(shape):
    weight = weight_of(*shape, spectrum=np.full(min(shape), 2.0))
    view, method = view_of(weight), AntiPaSTO(min(shape))
    train, fixed = method.init(view, torch.Generator())
    for gain in (0.7, -1.3):
        p = {"g": torch.full_like(train["g"], gain), **fixed}
        assert_same_map(method, p, view, (1 + elu(np.array(gain))) * weight, None)


@pytest.mark.parametrize("method", PLAIN, ids=str)
@pytest.mark.parametrize("spectrum", [0.0, 2.0, np.array([2.0, 2, 2, 0, 0, 0, 0, 0])], ids=str)
def test_degenerate_weights_keep_identity_and_finite_gradients(method, spectrum):
    view = view_of(weight_of(12, 8, spectrum=np.broadcast_to(spectrum, 8)), dtype=torch.float32)
    train, fixed = method.init(view, torch.Generator().manual_seed(0))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(adapt(method, {**train, **fixed}, x, view.base), view.base(x))
    for moved in (0.0, 0.3):
        leaves = {k: (t + moved).requires_grad_() for k, t in train.items()}
        if isinstance(method, AntiPaSTOAblate) and moved:  # a constant shift keeps C independent
            assert np.linalg.matrix_rank((fixed["C0"] + leaves["dC"]).detach().numpy()) == method.k
        loss = adapt(method, {**leaves, **fixed}, x, view.base).sin().sum()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("max_angle", [0.5, 3.0])
def test_no_angle_exceeds_the_bound(size, max_angle):
    method = AntiPaSTORotation(24, block_size=size, max_angle=max_angle)
    rng, n = torch.Generator().manual_seed(size), size * (size - 1) // 2
    worst = 0.0
    for t in (
        torch.full((24 // size, n), 1e6, dtype=F64),
        1e6 * torch.randn(24 // size, n, generator=rng, dtype=F64),
        torch.randn(24 // size, n, generator=rng, dtype=F64),
    ):
        for c in (1.0, -1.0, 0.3):
            r = np.eye(size) + method.turns(t, at_strength({}, c)).numpy()
            np.testing.assert_allclose(
                r @ r.swapaxes(1, 2), np.eye(size)[None].repeat(len(r), 0), atol=1e-12
            )
            worst = max(worst, np.abs(np.angle(np.linalg.eigvals(r))).max())
    # Reached, not merely kept: equal signs throughout are the worst case.
    assert max_angle - 1e-6 <= worst <= max_angle + 1e-9


def samples(inp: int, n: int = 40) -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.normal(size=(n, inp)) @ rng.normal(size=(inp, inp)) * 0.1 + rng.normal(size=inp)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("c", STRENGTHS)
def test_corda_equals_its_oblique_factors(shape, c):
    weight, x = weight_of(*shape), samples(shape[1])
    view, method = view_of(weight), AntiPaSTOCorDA(4, eps=0.05)
    outputs = torch.as_tensor(x @ weight.T)
    train, fixed = leaves_of(method, view, outputs.mT @ outputs / len(x))
    moment = x.T @ x / len(x)
    ridge = 0.05 * np.trace(weight @ moment @ weight.T) / np.trace(weight @ weight.T)
    values, q = np.linalg.eigh(moment)
    u, s, vt = np.linalg.svd(weight @ q @ np.diag((values + ridge) ** 0.5) @ q.T)
    p = vt @ q @ np.diag((values + ridge) ** -0.5) @ q.T
    gain = elu((1.0 if c is None else c) * train["g"].numpy())
    dense = weight + u[:, :4] * (s[:4] * gain) @ p[:4]
    assert_same_map(method, {**train, **fixed}, view, dense, c)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("c", STRENGTHS)
def test_asvd_equals_its_oblique_factors(shape, c):
    weight, squares = weight_of(*shape), (samples(shape[1]) ** 2).mean(0)
    view, method = view_of(weight), AntiPaSTOASVD(4, eps=0.05)
    train, fixed = leaves_of(method, view, torch.as_tensor(squares))
    root = np.sqrt(squares + 0.05 * squares.mean())
    u, s, vt = np.linalg.svd(weight * root)
    gain = elu((1.0 if c is None else c) * train["g"].numpy())
    dense = weight + u[:, :4] * (s[:4] * gain) @ (vt[:4] / root)
    assert_same_map(method, {**train, **fixed}, view, dense, c)


@pytest.mark.parametrize("shape", SHAPES)
def test_wanda_takes_the_directions_of_largest_output(shape):
    weight, x = weight_of(*shape), samples(shape[1])
    u, s, v = svd(weight, min(shape))
    score = s * np.sqrt(((x @ v) ** 2).mean(0))
    chosen = np.sort(np.argsort(-score)[:4])
    assert list(chosen) != [0, 1, 2, 3], "the data should not prefer the leading directions"
    method, view = AntiPaSTO(4, "wanda"), view_of(weight)
    train, fixed = leaves_of(method, view, torch.as_tensor(x.T @ x / len(x)))
    np.testing.assert_allclose(fixed["U"].numpy(), u[:, chosen], atol=1e-12)
    gained = s[chosen] * elu(train["g"].numpy())
    assert_same_map(
        method, {**train, **fixed}, view, weight + u[:, chosen] * gained @ v[:, chosen].T, None
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [None, 5])
def test_ssteer_equals_the_oriented_reference(shape, r):
    weight, rng = weight_of(*shape), np.random.default_rng(3)
    plus, minus = rng.normal(size=(2, 11, shape[0]))
    plus += 0.5
    plus[0] -= 12  # one outlier: for some directions the mean and the majority disagree
    u, s, v = svd(weight, r or min(shape))
    wins = (plus @ u > minus @ u).mean(0)
    assert (wins < 0.5).any()
    assert (np.sign(((plus - minus) @ u).mean(0)) != np.where(wins < 0.5, -1, 1)).any()
    u, v = (m * np.where(wins < 0.5, -1, 1) for m in (u, v))
    # Reference: (U√S) (d ∘ (V√S)ᵀ x) in the oriented basis.
    d = ((plus - minus) @ (u * np.sqrt(s))).mean(0)
    d /= np.linalg.norm(d)
    method, view = SSteer(r), view_of(weight)
    stat = Pairs(
        difference=torch.as_tensor((plus - minus).mean(0)),
        majority=torch.as_tensor(np.where(wins < 0.5, -1.0, 1.0)),
        basis=torch.as_tensor(svd(weight, r or min(shape))[0]),
        count=len(plus),
    )
    train, fixed = leaves_of(method, view, stat)
    assert train == {}
    for c in STRENGTHS:
        scale = 1.0 if c is None else c
        dense = weight + scale * (u * np.sqrt(s)) @ np.diag(d) @ (v * np.sqrt(s)).T
        assert_same_map(method, fixed, view, dense, c)
    x = torch.randn(5, shape[1], dtype=F64)
    assert torch.equal(adapt(method, at_strength(fixed, 0.0), x, view.base), view.base(x))


def _data(case):
    return [case.x(64)]


LAWFUL = {
    "gain": (AntiPaSTO(4), 4),
    "rotation": (AntiPaSTORotation(4), 4 + 6),
    "rotation-both": (AntiPaSTORotation(8, 2, basis="both"), 8 + 2 * 4),
    "ablate-2": (AntiPaSTOAblate(4, 2), 4 * 2 + 2),
    "ablate-3": (AntiPaSTOAblate(4, 3), 4 * 3 + 3),
    "arrow": (AntiPaSTOArrow(4, 2), 4 + 2),
    "dplr": (AntiPaSTODPLR(4, 2), 4 + 2 * 4 * 2),
    "ssvd": (SSVD(4), 4 + 6),
    "ssvd-strict": (SSVD(4, "strict"), 4 + 6),
    "ssvd-free": (SSVD(3, "free"), 3 + 9),
    "wanda": (AntiPaSTO(4, "wanda"), 4),
    "corda": (AntiPaSTOCorDA(4), 4),
    "asvd": (AntiPaSTOASVD(4), 4),
}


@pytest.mark.parametrize("name", LAWFUL)
def test_every_law(name):
    """Identity in bf16 too, vmap, jvp, compile, save and load, gradients, strength, count."""
    method, count = LAWFUL[name]
    check_method(method, cases=[Case()], calib=_data, count=lambda out, inp: count)


QWEN_PER_LAYER_28 = {
    AntiPaSTO(256): 14_336,
    AntiPaSTORotation(256): 35_840,
    AntiPaSTOAblate(256): 14_392,
    AntiPaSTOArrow(256): 17_472,
    AntiPaSTODPLR(256): 243_712,
    SSVD(32): 29_568,
}


@pytest.mark.parametrize("method", QWEN_PER_LAYER_28, ids=str)
def test_published_trainable_counts(method):
    layer = nn.ModuleDict(
        {
            "q_proj": nn.Linear(1024, 2048, bias=False, device="meta"),
            "v_proj": nn.Linear(1024, 1024, bias=False, device="meta"),
        }
    )
    per_layer = sum(t.numel() for t in fadapt.trainable(fadapt.init(layer, method)))
    assert 28 * per_layer == QWEN_PER_LAYER_28[method]


def ablate_problem(floor: float):
    """Removing direction 0 hurts and removing direction 1 helps; C starts near direction 0."""
    weight = np.diag([3.0, 2, 1, 0.5])
    view, method = view_of(weight, bias=False), AntiPaSTOAblate(4, floor=floor)
    train, fixed = method.init(view, torch.Generator().manual_seed(0))
    fixed["C0"] = torch.tensor([[1.0], [0.2], [0], [0]], dtype=F64)
    train = {k: t.requires_grad_() for k, t in train.items()}
    optimiser = torch.optim.Adam(train.values(), lr=0.02)
    target = torch.diag(torch.tensor([4.0, 0, 1, 0.5], dtype=F64))
    for _ in range(300):
        optimiser.zero_grad()
        loss = (
            (adapt(method, {**train, **fixed}, torch.eye(4, dtype=F64), view.base) - target)
            .square()
            .sum()
        )
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for name, leaf in method.project(train).items():
                train[name].copy_(leaf)
    return float(loss.detach()), float(train["dC"].detach().abs().max())


def test_a_clipped_ablation_still_turns():
    stuck, moved = ablate_problem(floor=0.0)
    assert stuck == pytest.approx(5.0), "with the true gradient the wrong direction stays clipped"
    assert moved == 0
    assert ablate_problem(floor=1e-3)[0] == pytest.approx(1.0, abs=1e-2)


def test_the_floor_changes_no_value_and_only_the_gradient_of_c():
    view = view_of(weight_of(12, 8))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=F64, requires_grad=True)
    method = AntiPaSTOAblate(4, k=2, floor=0.01)
    train, fixed = leaves_of(method, view)
    for alpha in ([0.4, 0.7], [0.0, 0.7], [0.0, 0.0]):
        train["alpha"] = torch.tensor(alpha, dtype=F64)
        p = {k: t.requires_grad_() for k, t in train.items()}
        grads, outs = [], []
        for each in (method, method.true_gradient()):
            outs.append(adapt(each, {**p, **fixed}, x, view.base))
            grads.append(torch.autograd.grad(outs[-1].sin().sum(), [p["dC"], p["alpha"], x]))
        assert torch.equal(*outs)
        assert torch.equal(grads[0][1], grads[1][1])
        assert torch.equal(grads[0][2], grads[1][2])
        assert torch.equal(grads[0][0], grads[1][0]) == (min(alpha) > 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_projected_ablation_is_a_contraction(shape):
    weight = weight_of(*shape)
    view, method = view_of(weight), AntiPaSTOAblate(6, k=3)
    train, fixed = leaves_of(method, view)
    train["alpha"] = torch.tensor([-0.4, 0.3, 1.7], dtype=F64)

    def shrinkage(train):
        adapted = dense(method, {**train, **fixed}, view.base)[0].numpy()
        return np.linalg.eigvalsh(weight.T @ weight - adapted.T @ adapted).min()

    assert shrinkage(train) < -0.01
    projected = method.project(train)
    assert projected["alpha"].tolist() == [0, 0.3, 1]
    assert projected["dC"] is train["dC"]
    assert shrinkage(projected) > -1e-12


def test_suppress_only_projects_gains():
    g = torch.tensor([-0.2, 0.0, 0.3])
    assert AntiPaSTO(3, suppress_only=True).project({"g": g})["g"].tolist() == pytest.approx(
        [-0.2, 0, 0]
    )
    assert AntiPaSTO(3).project({"g": g})["g"] is g


def test_gains_in_bfloat16_keep_small_steps():
    view = view_of(weight_of(8, 12), dtype=torch.float32)
    method = AntiPaSTO(4)
    train, fixed = method.init(view, torch.Generator())
    p = {k: t.to(torch.bfloat16) for k, t in {"g": train["g"] + 1e-3, **fixed}.items()}
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    moved = adapt(method, p, x, view.base) - view.base(x)
    exact = adapt(method, {"g": train["g"] + 1e-3, **fixed}, x, view.base) - view.base(x)
    assert moved.dtype == torch.float32
    assert ((moved - exact).norm() / exact.norm()) < 0.02


def test_start_noise_is_an_option():
    view = view_of(weight_of(8, 12))
    noisy, _ = AntiPaSTORotation(8, noise=0.1).init(view, torch.Generator().manual_seed(0))
    assert 0.01 < noisy["d"].std() < 0.3
    quiet, _ = AntiPaSTORotation(8).init(view, torch.Generator().manual_seed(0))
    assert not quiet["d"].any()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AntiPaSTO(0), "r must be at least 1"),
        (lambda: AntiPaSTO(4, "best"), "'wanda' or None"),
        (lambda: AntiPaSTORotation(6), "write r=4"),
        (lambda: AntiPaSTORotation(4, max_angle=4.0), "max_angle"),
        (lambda: AntiPaSTORotation(4, basis="W"), "one of 'V', 'U', 'both'"),
        (lambda: AntiPaSTORotation(4, block_size=1), "block_size"),
        (lambda: AntiPaSTORotation(4, noise=-1.0), "noise"),
        (lambda: AntiPaSTOAblate(4, k=5), "k must be from 1 to r=4"),
        (lambda: AntiPaSTOAblate(4, floor=-1.0), "floor"),
        (lambda: AntiPaSTOArrow(4, b=4), "b must be from 1 to r-1=3"),
        (lambda: AntiPaSTODPLR(4), "k must be from 1 to r=4"),
        (lambda: AntiPaSTOCorDA(4, eps=-1.0), "eps"),
        (lambda: AntiPaSTOASVD(4, eps=-1.0), "eps"),
        (lambda: SSVD(4, kind="loose"), "strict"),
        (lambda: SSVD(1), "k must be at least 2"),
        (lambda: SSteer(0), "None or at least 1"),
    ],
)
def test_hyper_parameters_are_checked(make, match):
    with pytest.raises(fadapt.ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    "method", [AntiPaSTO(), AntiPaSTORotation(), AntiPaSTOAblate(), AntiPaSTOArrow(),
               AntiPaSTODPLR(), AntiPaSTOCorDA(), AntiPaSTOASVD(), SSVD(), SSteer(32)], ids=str
)  # fmt: skip
def test_a_rank_beyond_the_shape_names_the_largest(method):
    with pytest.raises(fadapt.ConfigError, match=r"weight .6 x 10.*=32 is more.*write [rk]=6 or"):
        fadapt.init(nn.Linear(10, 6), method)


CALIBRATED = {
    AntiPaSTO(4, "wanda"): (Statistic(Gram(), "in"), (12, 12)),
    AntiPaSTOCorDA(4): (Statistic(Gram(), "out"), (8, 8)),
    AntiPaSTOASVD(4): (Statistic(SumSq(), "in"), (12,)),
}


@pytest.mark.parametrize("method", CALIBRATED, ids=str)
def test_unfit_statistics_are_refused(method):
    kind, shape = CALIBRATED[method]
    assert method.statistic == kind
    view, rng = view_of(weight_of(8, 12)), torch.Generator()

    def init(stat):
        method.init(view, rng, stat)

    bad = torch.ones(shape)
    bad.view(-1)[3] = math.nan
    for stat, match in (
        (None, r"layers.0.proj.weight.*pass calib=batches \(or a Stats\) to fadapt.init"),
        (torch.ones(*shape[:-1], 7), r"needs a statistic of shape .* got \(.*7"),
        (bad, "NaN or Inf"),
        (torch.zeros(shape), "zero throughout"),
        ([1.0], "got list"),
    ):
        with pytest.raises(fadapt.CalibrationError, match=match):
            init(stat)
    assert AntiPaSTO(4).statistic is None


def test_steering_pairs_must_differ():
    view, basis = view_of(weight_of(8, 12)), torch.eye(8)[:, :4]
    difference = torch.eye(8)[7]  # nothing along the basis
    stat = Pairs(difference, torch.ones(4), basis, count=8)
    with pytest.raises(fadapt.CalibrationError, match="no mean difference over 8 pairs"):
        SSteer().init(view, torch.Generator(), stat)
    with pytest.raises(fadapt.CalibrationError, match="calib"):
        SSteer().init(view, torch.Generator())


def test_rescaled_calibration_data_give_the_same_directions():
    view = view_of(weight_of(8, 12))
    moment = torch.as_tensor(np.cov(samples(8).T))
    for method, stat in (
        (AntiPaSTOCorDA(3), moment),
        (AntiPaSTOASVD(3), torch.linspace(0.1, 2, 12, dtype=F64)),
    ):
        one, other = (method.init(view, torch.Generator(), f * stat)[1]["U"] for f in (1.0, 1e-6))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_they_stand_first_in_a_chain():
    weight = weight_of(8, 12)
    view, method = view_of(weight), fadapt.Chain((AntiPaSTO(4), fadapt.IA3()))
    train, fixed = leaves_of(method, view)
    gained = mutated(AntiPaSTO(4), weight, {"g": train["0.g"].numpy()}, 1.0)
    scale = 1 + train["1.d"].numpy()
    x = torch.randn(5, 12, dtype=F64)
    reference = (x.numpy() @ gained.T + view.base.bias.numpy()) * scale
    np.testing.assert_allclose(
        adapt(method, {**train, **fixed}, x, view.base).numpy(), reference, atol=1e-12
    )
    with pytest.raises(fadapt.ConfigError, match="put it first"):
        fadapt.Chain((fadapt.IA3(), SSVD(4)))
