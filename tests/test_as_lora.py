"""as_lora equals the merged weight, for every method and kind of weight; or it says why not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import ConfigError, LoRA, Method, TargetError, TruncatedLoRA
from tests.models import (
    gpt2,
    mlp,
    qwen3,
    reals,
    seeded,
    tokens,
    trained,
)

# Method, and the rank of its increment.
EXACT: dict[str, tuple[Method, int]] = {
    "LoRA": (LoRA(r=3, alpha=5), 3),
    "RsLoRA": (fadapt.RsLoRA(r=4, alpha=5), 4),
    "PiSSA": (fadapt.PiSSA(r=2), 4),
    "DeLoRA": (fadapt.DeLoRA(r=2, lambda0=0.5), 4),
    "DeLoRA peft": (fadapt.DeLoRA(r=2, lambda0=0.5, form="peft"), 2),
    "HRA": (fadapt.HRA(r=4), 4),
    "SSVD": (fadapt.SSVD(k=4), 4),
    "SSVD strict": (fadapt.SSVD(k=4, kind="strict"), 4),
    "AntiPaSTO": (fadapt.AntiPaSTO(r=4), 4),
    "AntiPaSTORotation": (fadapt.AntiPaSTORotation(r=4, block_size=2, basis="both"), 4),
    "AntiPaSTOAblate": (fadapt.AntiPaSTOAblate(r=4, k=2), 2),
    "AntiPaSTOArrow": (fadapt.AntiPaSTOArrow(r=4, b=2), 4),
    "AntiPaSTODPLR": (fadapt.AntiPaSTODPLR(r=4, k=2), 4),
    "LoKr": (fadapt.LoKr(r=1, alpha=2, decompose_factor=2), 2),
    "LoHa": (fadapt.LoHa(r=2, alpha=3), 4),
    "GraLoRA": (fadapt.GraLoRA(r=2, alpha=3), 4),
    "GraLoRA hybrid": (fadapt.GraLoRA(r=2, hybrid_r=1), 5),
    "MiSS": (fadapt.MiSS(r=3), 3),
    "MiSS mini": (fadapt.MiSS(r=4, mode="mini", mini_r=2), 2),
    "FourierFT": (fadapt.FourierFT(n_frequency=2), 4),
    "LoRAXS": (fadapt.LoRAXS(r=3), 3),
    "TinyLoRA": (fadapt.TinyLoRA(r=2, u=3), 2),
    "VeRA": (fadapt.VeRA(r=3), 3),
    "Chain": (fadapt.Chain((fadapt.AntiPaSTO(r=2), fadapt.HRA(r=2), LoRA(r=1))), 5),
}
CALIBRATED: dict[str, tuple[Method, int]] = {
    "CorDA": (fadapt.CorDA(r=2), 4),
    "EVA": (fadapt.EVA(r=2, rho=1.0), 2),
    "AntiPaSTOCorDA": (fadapt.AntiPaSTOCorDA(r=3), 3),
    "AntiPaSTOASVD": (fadapt.AntiPaSTOASVD(r=3), 3),
}
FULL: dict[str, Method] = {
    "DoRA": fadapt.DoRA(r=2),
    "OFT": fadapt.OFT(block_size=4),
    "IA3FF": fadapt.IA3FF(),
    "HiRA": fadapt.HiRA(r=2),
    "MiSS bat": fadapt.MiSS(r=4, mode="bat"),
    "C3A": fadapt.C3A(block_size=4),
    "SHiRA": fadapt.SHiRA(r=2),
    "RandLoRA": fadapt.RandLoRA(r=2, alpha=10.0),
}


def increments(model: nn.Module, params: fadapt.Params) -> dict[str, Tensor]:
    """W' - W in float64, from the definition by which a merge makes it."""
    merged = fadapt.merge(model, params, dtype=torch.float64)
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: merged[name] - named[name].detach().double() for name in params.at_sites()}


def assert_same_map(model: nn.Module, params: fadapt.Params, lora: fadapt.Params) -> None:
    expected, found = increments(model, params), increments(model, lora)
    assert lora.keys() == params.at_sites().keys()
    for name, change in expected.items():
        assert change.norm() > 1e-2, "an increment that vanishes compares nothing"
        assert (found[name] - change).norm() <= 2e-6 * change.norm(), name


@pytest.mark.parametrize("strength", [None, -0.7])
@pytest.mark.parametrize("widths", [(10, 6), (6, 10)], ids=["in>out", "in<out"])
@pytest.mark.parametrize("name", [*EXACT, *CALIBRATED])
def test_exact(name, widths, strength):
    method, rank = {**EXACT, **CALIBRATED}[name]
    model = mlp(widths=widths)
    calib = [reals(40, widths[0])] if name in CALIBRATED else None
    params = trained(model, method, calib)
    if strength is not None:
        params = fadapt.scale(params, strength)
    lora = fadapt.as_lora(model, params)
    assert lora["0.weight"].method == LoRA(r=rank, alpha=float(rank))
    assert_same_map(model, params, lora)


def test_ssteer():
    model = mlp(widths=(10, 6))
    calib = [({"input": reals(8, 10, seed=1)}, {"input": reals(8, 10, seed=2)})]
    pairs = fadapt.init(model, fadapt.SSteer(r=3), calib)
    lora = fadapt.as_lora(model, pairs)
    assert lora["0.weight"].method.r == 3
    assert_same_map(model, pairs, lora)


@pytest.mark.parametrize("name", FULL)
def test_full_rank_is_cut_with_its_error(name):
    model = mlp(widths=(12, 8))
    params = trained(model, FULL[name])
    with pytest.raises(ConfigError, match=r"0\.weight.*rank 8 of 8.*r=\.\.\."):
        fadapt.as_lora(model, params)
    change = increments(model, params)["0.weight"]
    best = torch.linalg.svdvals(change)
    for r in (1, 3):
        lora = fadapt.as_lora(model, params, r=r)
        method = lora["0.weight"].method
        assert isinstance(method, TruncatedLoRA)
        assert (method.r, method.alpha) == (r, float(r))
        error = (increments(model, lora)["0.weight"] - change).norm() / change.norm()
        assert error == pytest.approx((best[r:].norm() / best.norm()).item(), abs=1e-5)
        assert method.error == pytest.approx(error.item(), abs=1e-5)


def test_exact_factors_of_more_than_r_are_cut_optimally():
    model = mlp(widths=(12, 8))
    params = trained(model, fadapt.PiSSA(r=3))
    lora = fadapt.as_lora(model, params, r=4)
    change = increments(model, params)["0.weight"]
    best = torch.linalg.svdvals(change)
    error = (increments(model, lora)["0.weight"] - change).norm() / change.norm()
    assert error == pytest.approx((best[4:].norm() / best.norm()).item(), rel=1e-4)
    assert lora["0.weight"].method.error == pytest.approx(error.item(), rel=1e-4)


def test_numerical_rank_is_found_in_the_factors_and_in_the_matrix():
    model = mlp(widths=(12, 8))
    twice = fadapt.Chain((LoRA(r=2), LoRA(r=2)))
    params = fadapt.init(model, twice)
    with torch.no_grad():
        train = params["0.weight"].train
        train["0.B"].normal_()
        train["1.A"].copy_(train["0.A"])
        train["1.B"].normal_()
    lora = fadapt.as_lora(model, params, r=2)
    assert lora["0.weight"].method == LoRA(r=2, alpha=2.0)
    assert_same_map(model, params, lora)
    # An IA3-FF that moves two inputs alone has an increment of rank 2.
    sparse = fadapt.init(model, fadapt.IA3FF())
    with torch.no_grad():
        sparse["0.weight"].train["d"][[1, 5]] = torch.tensor([0.5, -0.25])
    lora = fadapt.as_lora(model, sparse)
    assert lora["0.weight"].method.r == 2
    assert_same_map(model, sparse, lora)


def test_untrained_is_a_lora_of_zeros():
    model = mlp(widths=(12, 8))
    lora = fadapt.as_lora(model, fadapt.init(model, fadapt.OFT(block_size=4)))
    assert lora["0.weight"].method == LoRA(r=1, alpha=1.0)
    assert not increments(model, lora)["0.weight"].any()


def test_bias_effects_are_refused_by_name():
    model = mlp(widths=(12, 8, 12))
    params = trained(model, fadapt.IA3())
    with pytest.raises(ConfigError, match=r"0\.weight.*moves the bias.*drop_bias="):
        fadapt.as_lora(model, params, r=8)
    with pytest.raises(ConfigError, match=r"2\.weight"):
        fadapt.as_lora(model, params, r=8, drop_bias=r"^0\.weight$")
    with pytest.raises(ConfigError, match="matches no site"):
        fadapt.as_lora(model, params, r=8, drop_bias=("0", "nothing"))
    lora = fadapt.as_lora(model, params, r=8, drop_bias=".")
    change, found = increments(model, params), increments(model, lora)
    for name in params:
        assert (found[name] - change[name]).norm() <= 1e-5 * change[name].norm()
    assert not lora["0.weight"].acts_on_bias


def test_methods_on_the_bias_pass_where_there_is_none():
    model = mlp(widths=(12, 8), bias=False)
    params = trained(model, fadapt.RoAd(group_size=4))
    lora = fadapt.as_lora(model, params, r=8)
    assert_same_map(model, params, lora)


def test_a_trained_bias_alone_is_refused_and_dropped():
    model = mlp(widths=(12, 8))
    params = trained(model, fadapt.Chain((LoRA(r=2), fadapt.BitFit())))
    with pytest.raises(ConfigError, match="moves the bias"):
        fadapt.as_lora(model, params)
    lora = fadapt.as_lora(model, params, drop_bias="0.weight")
    assert lora["0.weight"].method.r == 2
    assert_same_map(model, params, lora)


class Experts(nn.Module):
    def __init__(self, transposed: bool):
        super().__init__()
        self.is_transposed = transposed
        self.W = nn.Parameter(torch.zeros(3, *((10, 6) if transposed else (6, 10))))

    def forward(self, x: Tensor) -> Tensor:
        return sum(x @ (w if self.is_transposed else w.T) for w in (self.W[e] for e in range(3)))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", [fadapt.PiSSA(r=2), fadapt.HRA(r=2)], ids=["PiSSA", "HRA"])
def test_experts(method, transposed):
    model = seeded(Experts(transposed))
    params = trained(model, {"W": method})
    lora = fadapt.as_lora(model, params)
    assert lora["W"].train["A"].shape[0] == 3
    assert_same_map(model, params, lora)
    x = reals(4, 10)
    assert (fadapt.apply(model, lora, x) - fadapt.apply(model, params, x)).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*is tied to:fadapt.FadaptWarning")
def test_transposed_and_embedding():
    model = gpt2()
    cfg = fadapt.Config({"c_attn|wte": fadapt.PiSSA(r=3)}, exclude=())
    params = trained(model, cfg)
    lora = fadapt.as_lora(model, params)
    assert_same_map(model, params, lora)
    ids = tokens()
    out = [fadapt.apply(model, p, ids).logits for p in (params, lora)]
    assert (out[0] - out[1]).abs().max() < 2e-5


def test_convolution():
    model = seeded(nn.Sequential(nn.Conv2d(3, 8, 3)))
    params = trained(model, {"0.weight": fadapt.AntiPaSTO(r=4)})
    lora = fadapt.as_lora(model, params)
    assert_same_map(model, params, lora)


def test_quantized_base():
    bnb = pytest.importorskip("bitsandbytes")
    plain = mlp(widths=(64, 32))
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(plain[0].state_dict())
    model = nn.Sequential(layer).to("cpu")
    params = trained(model, fadapt.HRA(r=4))
    lora = fadapt.as_lora(model, params)
    found = fadapt.merge(model, lora, dtype=torch.float64)["0.weight"]
    expected = fadapt.merge(model, params, dtype=torch.float64)["0.weight"]
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_other_base_and_stacks_are_refused():
    params = trained(mlp(widths=(12, 8)), LoRA(r=2))
    with pytest.raises(TargetError, match=r"0\.weight has shape \(8, 10\)"):
        fadapt.as_lora(mlp(widths=(10, 8)), params)
    with pytest.raises(TargetError, match="missing"):
        fadapt.as_lora(nn.Sequential(nn.Tanh()), params)
    model = mlp(widths=(12, 8))
    with pytest.raises(ConfigError, match="unstack"):
        fadapt.as_lora(model, fadapt.stack([params, params]))
    for r in (0, 2.0, True, "4"):
        with pytest.raises(ConfigError, match="r must be"):
            fadapt.as_lora(model, params, r=r)


class Doubled(LoRA):
    """Another increment than the class that it inherits the factors from."""

    def delta(self, p, x, y, base):
        return 2 * super().delta(p, x, y, base)


def test_a_subclass_with_another_increment_is_measured():
    model = mlp(widths=(12, 8))
    params = trained(model, Doubled(r=2))
    lora = fadapt.as_lora(model, params)
    assert lora["0.weight"].method.r == 2
    assert_same_map(model, params, lora)


def test_result_trains_and_saves(tmp_path):
    model = qwen3()
    params = trained(model, {"q_proj|down_proj": fadapt.DoRA(r=2)})
    lora = fadapt.as_lora(model, params, r=4)
    assert all(t.requires_grad for t in fadapt.trainable(lora))
    fadapt.save(lora, tmp_path / "lora")
    again = fadapt.load(tmp_path / "lora", model, allow_other_base=True)
    assert [a.method for a in again.values()] == [a.method for a in lora.values()]
