"""Degenerate weights, leaves and hyper-parameters: finite and right, or a clear refusal."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import ConfigError, DoRA, LoRA, Method
from fadapt.adapted_map import compute_dtype, has_delta, has_shift
from fadapt.methods.delora import DeLoRA
from fadapt.methods.hra import HRA
from fadapt.methods.oft import OFT
from fadapt.methods.pissa import PiSSA
from fadapt.methods.road import RoAd


def layer(d_in: int = 12, d_out: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d_in, d_out))


def move(params: fadapt.Params, seed: int = 1) -> fadapt.Params:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf += 0.3 * torch.randn(leaf.shape, generator=rng)
    return params


def leaf(params: fadapt.Params, name: str) -> Tensor:
    return params["0.weight"].train[name]


def finite(model: nn.Module, params: fadapt.Params, grad_below: float = 1e3) -> Tensor:
    """The output on fixed data, after a check of it and of all gradients."""
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    out = fadapt.apply(model, params, x)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.square().sum(), fadapt.trainable(params)):
        assert grad.isfinite().all()
        assert grad.abs().max() < grad_below
    return out


def dense_reflections(u: Tensor) -> Tensor:
    r = torch.eye(u.shape[1], dtype=u.dtype)
    for row in u:
        r = r @ (torch.eye(u.shape[1], dtype=u.dtype) - 2 * torch.outer(row, row) / row.dot(row))
    return r


def test_dora_keeps_a_zero_row_zero() -> None:
    model = layer()
    with torch.no_grad():
        model[0].weight[3] = 0
    params = move(fadapt.init(model, DoRA(r=2)))
    out = finite(model, params)
    assert torch.equal(out[:, 3], model[0].bias[3].expand(5))


def test_dora_where_the_update_cancels_a_row() -> None:
    model = layer()
    params = fadapt.init(model, DoRA(r=1, alpha=1))
    with torch.no_grad():
        leaf(params, "A").copy_(model[0].weight[2:3])
        leaf(params, "B")[2] = -1
    finite(model, params, grad_below=1e8)


def vectors(params: fadapt.Params) -> torch.Tensor:
    """HRA's reflection vectors (r, in)."""
    leaves = params["0.weight"].leaves
    return (leaves["U0"].repeat_interleave(2, 0) + leaves["dU"]).detach()


def set_vectors(params: fadapt.Params, u: torch.Tensor) -> None:
    with torch.no_grad():
        start = params["0.weight"].fixed["U0"].repeat_interleave(2, 0)
        leaf(params, "dU").copy_(u - start)


@pytest.mark.parametrize("zero", [[0], [1], [2, 3], [0, 3], [0, 1, 2, 3]])
def test_hra_takes_a_zero_vector_for_no_reflection(zero: list[int]) -> None:
    model = layer()
    params = move(fadapt.init(model, HRA(r=4)))
    u = vectors(params)
    u[zero] = 0
    set_vectors(params, u)
    out = finite(model, params)
    rest = vectors(params)[[k for k in range(4) if k not in zero]]
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(out, model(x @ dense_reflections(rest).mT), atol=1e-5, rtol=0)


def test_hra_takes_vectors_of_very_different_lengths() -> None:
    model = layer()
    params = move(fadapt.init(model, HRA(r=4)))
    set_vectors(params, vectors(params) * torch.tensor([[1e3], [1.0], [1e-3], [1e-2]]))
    out = finite(model, params, grad_below=1e5)
    u = vectors(params).double()
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    ref = model(x @ dense_reflections(u).float().mT)
    torch.testing.assert_close(out, ref, atol=2e-3, rtol=0)


def test_hra_is_accurate_for_small_steps() -> None:
    """The increment keeps its relative accuracy, where a difference of unit vectors would not."""
    model = layer().double()
    params = fadapt.init(model, HRA(r=4))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        step = torch.randn(4, 12, generator=rng, dtype=torch.float64)
        leaf(params, "dU").add_(1e-3 * step)
    single = params.to(dtype=torch.float32)
    u = vectors(single.to(dtype=torch.float64))
    x = torch.randn(5, 12, generator=rng)
    exact = x.double() @ (dense_reflections(u) - torch.eye(12, dtype=torch.float64)).mT
    adapter = single["0.weight"]
    shift = adapter.method.shift(adapter.leaves, x)
    assert (shift - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("form", ["paper", "peft"])
@pytest.mark.parametrize("which", ["A", "B", "both"])
def test_delora_with_zero_vectors(form: str, which: str) -> None:
    model = layer()
    params = move(fadapt.init(model, DeLoRA(r=2, lambda0=0.5, form=form)))
    fixed = params["0.weight"].fixed
    with torch.no_grad():
        for name in "AB" if which == "both" else which:
            vector = leaf(params, name if form == "peft" else f"d{name}")
            vector.copy_(torch.zeros_like(vector) if form == "peft" else -fixed[f"{name}0"])
    # The clamp at 1e-4 multiplies the gradient of a zero vector by up to 1e4, as in PEFT.
    out = finite(model, params, grad_below=1e6)
    # A zero vector contributes no update, so what is left is W, less the paper form's E0.
    if form == "peft":
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
        assert torch.equal(out, model(x))


def test_delora_with_a_zero_weight() -> None:
    model = layer()
    with torch.no_grad():
        model[0].weight.zero_()
    for form in ("paper", "peft"):
        finite(model, move(fadapt.init(model, DeLoRA(r=2, form=form))))


@pytest.mark.parametrize("niter", [None, 2])
@pytest.mark.parametrize("weight", ["orthogonal", "zero", "identity"])
def test_pissa_with_equal_singular_values(weight: str, niter: int | None) -> None:
    model = layer(12, 12)
    with torch.no_grad():
        if weight == "orthogonal":
            nn.init.orthogonal_(model[0].weight)
        else:
            model[0].weight.copy_(torch.eye(12) * (weight == "identity"))
    params = fadapt.init(model, PiSSA(r=4, alpha=8, niter=niter))
    fixed = params["0.weight"].fixed
    # Any four directions will do: all have the same singular value, shared by A and B.
    size = 0.0 if weight == "zero" else 0.5
    for gram in (fixed["A0"] @ fixed["A0"].mT, fixed["B0"].mT @ fixed["B0"]):
        torch.testing.assert_close(gram, size * torch.eye(4), atol=1e-5, rtol=0)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(finite(model, params), model(x))
    finite(model, move(params))


DECOMPOSED = {
    "OLoRA": fadapt.OLoRA(r=4, alpha=8),
    "MiCA": fadapt.MiCA(r=4),
    "KaSA": fadapt.KaSA(r=4, alpha=8),
    "PSOFT": fadapt.PSOFT(r=4, ab_svd_init="pissa_init"),
    "AdaLoRA": fadapt.AdaLoRA(r=4),
    "VeRA": fadapt.VeRA(r=4),
    "SHiRA": fadapt.SHiRA(r=2),
    "RandLoRA": fadapt.RandLoRA(r=4, alpha=4.0),
    "BOFT": fadapt.BOFT(block_size=2, n_butterfly_factor=2),
    "LoRAXS": fadapt.LoRAXS(r=4),
    "LoRAXS randomised": fadapt.LoRAXS(r=4, niter=2),
    "TinyLoRA": fadapt.TinyLoRA(r=4, u=5),
}


@pytest.mark.parametrize("weight", ["orthogonal", "zero", "identity", "rank 1"])
@pytest.mark.parametrize("method", DECOMPOSED.values(), ids=DECOMPOSED.keys())
def test_starts_from_a_decomposition_of_any_weight(method: Method, weight: str) -> None:
    model = layer(12, 12)
    with torch.no_grad():
        if weight == "orthogonal":
            nn.init.orthogonal_(model[0].weight)
        elif weight == "rank 1":
            model[0].weight.copy_(torch.outer(model[0].weight[0], model[0].weight[1]))
        else:
            model[0].weight.copy_(torch.eye(12) * (weight == "identity"))
    params = fadapt.init(model, method)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(finite(model, params), model(x))
    finite(model, move(params))


def test_oft_far_from_the_identity_is_still_orthogonal() -> None:
    model = layer()
    params = fadapt.init(model, OFT(4))
    with torch.no_grad():
        leaf(params, "q").normal_(std=100.0, generator=torch.Generator().manual_seed(0))
    finite(model, params)
    adapter = params["0.weight"]
    r = torch.eye(12) + adapter.method.shift(adapter.leaves, torch.eye(12))
    torch.testing.assert_close(r @ r.mT, torch.eye(12), atol=1e-4, rtol=0)


def test_oft_projects_to_its_radius() -> None:
    params = move(fadapt.init(layer(), OFT(4, coft=0.2)))
    with torch.no_grad():
        leaf(params, "q")[1].mul_(1e-3)
        leaf(params, "q")[2].zero_()
    before = leaf(params, "q").detach().clone()
    fadapt.project(params)
    after = leaf(params, "q").detach()
    # |Q|_F counts each entry of q twice; three blocks share the radius.
    norm = (2 * after.square().sum(-1)).sqrt()
    assert norm[0].item() == pytest.approx(0.2 / 3**0.5, rel=1e-5)
    torch.testing.assert_close(after[0] / after[0].norm(), before[0] / before[0].norm())
    assert torch.equal(after[1:], before[1:])


REFUSALS = [
    (lambda: PiSSA(r=0), "at least 1"),
    (lambda: PiSSA(r=-3), "at least 1"),
    (lambda: PiSSA(r=9), r"r=9 is more than the 8 singular directions.*write r=8"),
    (lambda: PiSSA(r=9, niter=2), "write r=8 or less"),
    (lambda: PiSSA(r=2, alpha=0.0), "alpha"),
    (lambda: PiSSA(r=2, niter=-1), "niter"),
    (lambda: fadapt.OLoRA(r=9), "write r=8"),
    (lambda: fadapt.MiCA(r=9), "write r=8"),
    (lambda: fadapt.KaSA(r=9), "write r=8"),
    (lambda: fadapt.KaSA(r=2, alpha=0.0), "alpha"),
    (lambda: fadapt.PSOFT(r=9), "write r=8"),
    (lambda: fadapt.PSOFT(r=1, mag_a=False, mag_b=False), "nothing would train"),
    (lambda: fadapt.VeRA(r=2, d_initial=0.0), "d_initial"),
    (lambda: fadapt.VeRA(r=2, projection_prng_key=-1), "projection_prng_key"),
    (lambda: fadapt.RandLoRA(r=4, projection_prng_key=-1), "projection_prng_key"),
    (lambda: fadapt.SHiRA(r=9), r"more than the 96 of a \d+ x \d+ weight; write r=4"),
    (lambda: fadapt.SHiRA(r=1, random_seed=-1), "random_seed"),
    (lambda: fadapt.AdaLoRA(r=0), "at least 1"),
    (lambda: fadapt.BOFT(block_size=1), "cannot rotate"),
    (lambda: fadapt.BOFT(block_size=5), "does not divide the 12 inputs"),
    (lambda: fadapt.BOFT(block_size=3, n_butterfly_factor=2), "is odd"),
    (lambda: fadapt.BOFT(block_size=4, n_butterfly_factor=3), "times 2\\^2"),
    (lambda: fadapt.LoKr(decompose_factor=0), "decompose_factor=-1"),
    (lambda: fadapt.GraLoRA(r=3), "write r=4"),
    (lambda: fadapt.GraLoRA(r=6, gralora_k=3), "choose from"),
    (lambda: fadapt.GraLoRA(r=2, hybrid_r=-1), "write hybrid_r=0"),
    (lambda: fadapt.MiSS(r=1000), "or less"),
    (lambda: fadapt.MiSS(r=7, mode="bat"), "choose from"),
    (lambda: fadapt.MiSS(r=2, mode="mini", mini_r=7), "write mini_r=1"),
    (lambda: fadapt.C3A(block_size=0), "write 32"),
    (lambda: fadapt.C3A(block_size=7), "choose from"),
    (lambda: fadapt.FourierFT(n_frequency=0), "n_frequency"),
    (lambda: fadapt.FourierFT(), "or less"),
    (lambda: fadapt.LoRAXS(r=9), "write r=8"),
    (lambda: fadapt.TinyLoRA(r=9), "write r=8"),
    (lambda: fadapt.TinyLoRA(u=0), "write u=64"),
    (lambda: LoRA(r=0), "at least 1"),
    (lambda: DoRA(r=-1), "at least 1"),
    (lambda: DeLoRA(r=0), "at least 1"),
    (lambda: DeLoRA(lambda0=0.0), "lambda0"),
    (lambda: DeLoRA(form="other"), "one of 'paper', 'peft'"),
    (lambda: HRA(r=3), r"HRA\(r=4\)"),
    (lambda: HRA(r=0), r"HRA\(r=2\)"),
    (lambda: HRA(r=-2), r"HRA\(r=2\)"),
    (lambda: RoAd(variant=3), "one of 1, 2, 4"),
    (lambda: RoAd(group_size=0), "even"),
    (lambda: RoAd(group_size=5), "even"),
    (lambda: RoAd(group_size=6), "group_size=4"),
    (lambda: RoAd(group_size=64), "group_size=8"),
    (lambda: OFT(block_size=0), "at least 2"),
    (lambda: OFT(block_size=1), "at least 2"),
    (lambda: OFT(block_size=5), r"does not divide the 12 inputs.*\[2, 3, 4, 6, 12\]"),
    (lambda: OFT(block_size=32), r"\[2, 3, 4, 6, 12\]"),
    (lambda: OFT(block_size=4, coft=0.0), "coft"),
]


@pytest.mark.parametrize(("make", "words"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals_name_a_value_that_fits(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fadapt.init(layer(12, 8), make())


def test_road_refuses_an_odd_number_of_outputs() -> None:
    with pytest.raises(ConfigError, match="7 outputs is an odd number"):
        fadapt.init(layer(12, 7), RoAd(group_size=2))


FUSED = [
    *((method, torch.float32) for method in (PiSSA(r=3), DeLoRA(r=3), HRA(r=4), HRA(r=20))),
    *((method, torch.float32) for method in (RoAd(variant=4, group_size=4), OFT(6))),
    *((method, torch.bfloat16) for method in (DeLoRA(r=3), HRA(r=4))),
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize(("method", "dtype"), FUSED, ids=str)
def test_the_start_is_exact_when_compiled_to_fused_code(method: Method, dtype: torch.dtype) -> None:
    """With Inductor: fused multiply-adds must not turn exact zeros into rounding errors."""
    model, x = layer().to(dtype), torch.randn(5, 12).to(dtype)
    params = fadapt.init(model, method)
    adapter = params["0.weight"]
    y, base = model(x), _Base(model[0])

    def increments(leaves: dict[str, Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        method = adapter.method
        x, y = x.to(compute_dtype(method, leaves)), y.to(compute_dtype(method, leaves))
        found = [method.shift(leaves, x)] if has_shift(method) else []
        return found + ([method.delta(leaves, x, y, base)] if has_delta(method) else [])

    torch.compiler.reset()
    for increment in torch.compile(increments, fullgraph=True)(adapter.leaves, x, y):
        assert increment.abs().max() == 0


class _Base:
    def __init__(self, module: nn.Module):
        self.bias = module.bias


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("method", [LoRA(r=2), fadapt.IA3()])
def test_a_weight_without_values_is_merged(method: Method) -> None:
    """As MobileBERT's head has one, where its embedding is as wide as its layers."""
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3))
    merged = fadapt.merge(model, fadapt.init(model, {"0": method}))
    assert merged["0.weight"].shape == (0, 4)
