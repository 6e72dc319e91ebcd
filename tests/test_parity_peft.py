"""Outputs and gradients equal PEFT's for the same tensors, on layers with biases.

Each row makes a PEFT model, moves its adapter to trained-like values, writes the same values into
fresh fadapt leaves and compares. ``leaves`` maps PEFT's tensors to fadapt's leaves; it is affine,
so the Jacobian of the map carries PEFT's gradients over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.c3a import layer as c3a
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft.tuners.lora.config import KasaConfig
from torch import Tensor, nn

import fadapt
from fadapt import IA3, IA3FF, DoRA, LoRA, Method, RsLoRA
from fadapt.methods.delora import DeLoRA
from fadapt.methods.hra import HRA
from fadapt.methods.oft import OFT
from fadapt.methods.pissa import PiSSA
from fadapt.methods.road import RoAd

from .peft_table import BlockDiagonal

vars(peft.tuners.boft.layer)["_FBD_CUDA"] = BlockDiagonal
Tensors = dict[str, Tensor]
LAYERS = ("first", "second")


class Net(nn.Module):
    def __init__(self, d_in: int, hidden: int, d_out: int):
        super().__init__()
        self.first = nn.Linear(d_in, hidden)
        self.second = nn.Linear(hidden, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def lora_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    return {"A": p["lora_A"], "B": p["lora_B"]}


def dora_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    # PEFT trains the magnitude m = |W| (1 + mu) itself.
    mu = p["lora_magnitude_vector"] / weight.norm(dim=1) - 1
    return {"A": p["lora_A"], "B": p["lora_B"], "mu": mu}


def pissa_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    # PEFT replaces the base weight by its residual; the signs of singular vectors, which differ
    # between the two, drop out of the residual.
    return {"dA": p["lora_A"] - fresh["A0"], "dB": p["lora_B"] - fresh["B0"]}


def mica_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    # B is frozen on both sides, up to the signs of singular vectors.
    return {"A": (p["lora_B"] * fresh["B"]).sum(0).sign().unsqueeze(1) * p["lora_A"]}


def kasa_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    # PEFT cuts the smallest triplets off the base weight; which signs they have drops out.
    factors = {"dA": p["lora_A"] - fresh["A0"], "dB": p["lora_B"] - fresh["B0"]}
    return {**factors, "dd": p["lora_diag"] - fresh["d0"]}


def vera_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    # The shared factors come from the same key on both sides.
    return {"b": p["vera_lambda_b"], "d": p["vera_lambda_d"] - 0.1}


def adalora_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    return {"A": p["lora_A"], "B": p["lora_B"], "E": p["lora_E"].flatten()}


def boft_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    # Of PEFT's generator the skew part acts alone.
    full = p["boft_R"]
    i, j = torch.triu_indices(full.shape[-1], full.shape[-1], 1)
    return {"q": (full - full.mT)[..., i, j] / 2, "d": p["boft_s"].flatten() - 1}


def psoft_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    # PEFT's singular vectors have other signs, which the map between them takes on.
    r = len(fresh["A"])
    vectors = torch.linalg.svd(weight, full_matrices=False).Vh[:r]
    sign = (vectors * fresh["A"]).sum(1).sign()
    scales = {k: p[f"psoft_R.vector_{k}"] - 1 for k in "ab" if f"psoft_R.vector_{k}" in p}
    if p["psoft_R"].dim() == 2:
        return {"dR": (p["psoft_R"] - torch.eye(r)) * sign * sign.unsqueeze(1), **scales}
    i, j = torch.triu_indices(r, r, 1)
    return {"q": p["psoft_R"] * sign[i] * sign[j], **scales}


def delora_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    strength = p["delora_lambda"].reshape(()) - 1.5
    return {"A": p["delora_A"], "B": p["delora_B"], "dlambda": strength}


def hra_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    # PEFT trains the vectors themselves, which start in equal pairs.
    return {"dU": p["hra_u"].mT - fresh["U0"].repeat_interleave(2, 0)}


@dataclass(frozen=True)
class Row:
    method: Method
    config: Callable[..., Any]
    options: dict[str, Any]
    leaves: Callable[[Tensors, Tensor, Tensors], Tensors]
    shapes: tuple[tuple[int, int, int], ...]
    targets: dict[str, Any] = field(default_factory=lambda: {"target_modules": list(LAYERS)})


ODD = ((7, 13, 5), (12, 9, 17))
IN_BLOCKS = ((15, 21, 5), (6, 12, 7))
OUT_GROUPS = ((7, 18, 30), (5, 6, 12))
IN_OUT_BLOCKS = ((15, 21, 6), (6, 12, 9))


def lora_row(method: Method, leaves: Any = lora_leaves, **options: Any) -> Row:
    options = {"r": 3, "lora_alpha": 5, **options}
    return Row(method, peft.LoraConfig, options, leaves, ODD)


def road_row(variant: int) -> Row:
    return Row(
        # The bias is rotated with the output on both sides.
        RoAd(variant=variant, group_size=6),
        peft.RoadConfig,
        {"variant": f"road_{variant}", "group_size": 6},
        lambda p, w, f: {"theta": p["road_theta"], "a": p["road_alpha"] - 1},
        OUT_GROUPS,
    )


def oft_row(method: OFT, **options: Any) -> Row:
    return Row(
        method,
        peft.OFTConfig,
        {"r": 0, "oft_block_size": 3, **options},
        lambda p, w, f: {"q": p["oft_R"]},
        IN_BLOCKS,
    )


def boft_row(size: int, factors: int, shapes: Any) -> Row:
    return Row(
        fadapt.BOFT(block_size=size, n_butterfly_factor=factors),
        peft.BOFTConfig,
        {"boft_block_size": size, "boft_n_butterfly_factor": factors},
        boft_leaves,
        shapes,
    )


def psoft_row(method: fadapt.PSOFT, **options: Any) -> Row:
    options = {"r": method.r, "psoft_alpha": 5, **options}
    return Row(method, peft.PsoftConfig, options, psoft_leaves, ODD)


def randlora_row(**options: Any) -> Row:
    return Row(
        fadapt.RandLoRA(r=3, alpha=6, **options),
        peft.RandLoraConfig,
        {"r": 3, "randlora_alpha": 6, **options},
        lambda p, w, f: {
            "lambda": p["randlora_lambda"],
            "g": p["randlora_gamma"] - 1 / max(p["randlora_gamma"].shape),
        },
        ODD,
    )


def lokr_row(method: fadapt.LoKr, **options: Any) -> Row:
    return Row(
        method,
        peft.LoKrConfig,
        {"r": method.r, "alpha": 3, **options},
        lambda p, w, f: {name.removeprefix("lokr_"): t for name, t in p.items()},
        ((12, 20, 6), (18, 8, 10)),
    )


def loha_row(method: fadapt.LoHa, r: int) -> Row:
    return Row(
        method,
        peft.LoHaConfig,
        {"r": r, "alpha": 3},
        lambda p, w, f: {name.removeprefix("hada_"): t for name, t in p.items()},
        ODD,
    )


def gralora_leaves(p: Tensors, weight: Tensor, fresh: Tensors) -> Tensors:
    return {name.removeprefix("gralora_"): t for name, t in p.items()}


def miss_row(
    method: fadapt.MiSS, shapes: tuple[tuple[int, int, int], ...], r: int = 3, **options: Any
) -> Row:
    options = {"r": r, **options}
    return Row(method, peft.MissConfig, options, lambda p, w, f: {"D": p["miss_block"]}, shapes)


ROWS = {
    "LoRA": lora_row(LoRA(r=3, alpha=5)),
    "RsLoRA": lora_row(RsLoRA(r=3, alpha=5), use_rslora=True),
    # The bias is not scaled by the magnitude on either side.
    "DoRA": lora_row(DoRA(r=3, alpha=5), dora_leaves, use_dora=True),
    "PiSSA": lora_row(PiSSA(r=3, alpha=5), pissa_leaves, init_lora_weights="pissa"),
    "OLoRA": lora_row(fadapt.OLoRA(r=3, alpha=5), pissa_leaves, init_lora_weights="olora"),
    "MiCA": lora_row(fadapt.MiCA(r=3, alpha=5), mica_leaves, init_lora_weights="mica"),
    "KaSA": lora_row(fadapt.KaSA(r=3, alpha=5), kasa_leaves, kasa_config=KasaConfig()),
    "DeLoRA": Row(
        DeLoRA(r=3, lambda0=1.5, form="peft"),
        peft.DeloraConfig,
        {"r": 3, "delora_lambda": 1.5},
        delora_leaves,
        ODD,
    ),
    # PEFT's attention form scales the bias with the output, its feed-forward form leaves it.
    "IA3": Row(
        IA3(),
        peft.IA3Config,
        {"feedforward_modules": []},
        lambda p, w, f: {"d": p["ia3_l"].reshape(-1) - 1},
        ODD,
    ),
    "IA3FF": Row(
        IA3FF(),
        peft.IA3Config,
        {"feedforward_modules": list(LAYERS)},
        lambda p, w, f: {"d": p["ia3_l"].reshape(-1) - 1},
        ODD,
    ),
    "HRA2": Row(HRA(r=2), peft.HRAConfig, {"r": 2}, hra_leaves, ODD),
    "HRA6": Row(HRA(r=6), peft.HRAConfig, {"r": 6}, hra_leaves, ODD),
    "RoAd1": road_row(1),
    "RoAd2": road_row(2),
    "RoAd4": road_row(4),
    "OFT exact": oft_row(OFT(3), use_cayley_neumann=False),
    "BOFT": boft_row(3, 1, IN_BLOCKS),
    "BOFT butterfly": boft_row(2, 3, ((16, 24, 5), (8, 40, 7))),
    "PSOFT": psoft_row(fadapt.PSOFT(r=4)),
    "PSOFT series": psoft_row(
        fadapt.PSOFT(r=3, exact=False, ab_svd_init="pissa_init"),
        use_cayley_neumann=True,
        ab_svd_init="pissa_init",
    ),
    "PSOFT free": psoft_row(
        fadapt.PSOFT(r=4, orth=False, mag_b=False), psoft_orth=False, psoft_mag_b=False
    ),
    "VeRA": Row(
        fadapt.VeRA(r=3, projection_prng_key=5),
        peft.VeraConfig,
        {"r": 3, "projection_prng_key": 5},
        vera_leaves,
        ODD,
    ),
    # The shared factors come from the same key on both sides.
    "RandLoRA": randlora_row(projection_prng_key=5),
    "RandLoRA sparse": randlora_row(sparse=True),
    "RandLoRA very sparse": randlora_row(very_sparse=True),
    # The places come from the same seed on both sides.
    "SHiRA": Row(
        fadapt.SHiRA(r=2, random_seed=3),
        peft.ShiraConfig,
        {"r": 2, "random_seed": 3},
        lambda p, w, f: {"v": p["shira_weight"]},
        ODD,
    ),
    "AdaLoRA": Row(
        fadapt.AdaLoRA(r=3, alpha=5),
        peft.AdaLoraConfig,
        {"init_r": 3, "lora_alpha": 5, "total_step": 9},
        adalora_leaves,
        ODD,
    ),
    "OFT series": oft_row(OFT(3, exact=False), use_cayley_neumann=True),
    "LoKr": lokr_row(fadapt.LoKr(r=1, alpha=3)),
    "LoKr both": lokr_row(fadapt.LoKr(r=1, alpha=3, decompose_both=True), decompose_both=True),
    "LoKr factor": lokr_row(fadapt.LoKr(r=1, alpha=3, decompose_factor=3), decompose_factor=3),
    "LoKr whole": lokr_row(fadapt.LoKr(r=8, alpha=3), r=8),
    # The first applies its factors of rank r squared, the second the product.
    "LoHa r=1": loha_row(fadapt.LoHa(r=1, alpha=3), r=1),
    "LoHa r=3": loha_row(fadapt.LoHa(r=3, alpha=3), r=3),
    "HiRA": Row(
        fadapt.HiRA(r=3),
        peft.HiraConfig,
        {"r": 3},
        lambda p, w, f: {"A": p["hira_A"], "B": p["hira_B"]},
        ODD,
    ),
    "GraLoRA": Row(
        fadapt.GraLoRA(r=6, alpha=5, gralora_k=3),
        peft.GraloraConfig,
        {"r": 6, "alpha": 5, "gralora_k": 3},
        gralora_leaves,
        IN_OUT_BLOCKS,
    ),
    "GraLoRA hybrid": Row(
        fadapt.GraLoRA(r=6, alpha=5, gralora_k=3, hybrid_r=2),
        peft.GraloraConfig,
        {"r": 6, "alpha": 5, "gralora_k": 3, "hybrid_r": 2},
        gralora_leaves,
        IN_OUT_BLOCKS,
    ),
    # The widths of the second shape are no multiples of r: PEFT fills up with zeros, too.
    "MiSS": miss_row(fadapt.MiSS(r=3), ODD, init_weights=True),
    "MiSS bat": miss_row(fadapt.MiSS(r=3, mode="bat"), IN_OUT_BLOCKS, init_weights="bat"),
    "MiSS mini": miss_row(
        fadapt.MiSS(r=4, mode="mini", mini_r=3),
        IN_OUT_BLOCKS,
        r=4,
        init_weights="mini",
        mini_r=3,
    ),
    "C3A": Row(
        fadapt.C3A(block_size=3),
        peft.C3AConfig,
        {"block_size": 3},
        lambda p, w, f: {"w": p["c3a_kernel"]},
        IN_OUT_BLOCKS,
    ),
    "C3A even": Row(
        fadapt.C3A(block_size=4),
        peft.C3AConfig,
        {"block_size": 4, "init_weights": True},
        lambda p, w, f: {"w": p["c3a_kernel"]},
        ((8, 12, 4), (12, 8, 16)),
    ),
    "FourierFT": Row(
        fadapt.FourierFT(n_frequency=20, scaling=60, random_loc_seed=3),
        peft.FourierFTConfig,
        {"n_frequency": 20, "scaling": 60, "random_loc_seed": 3},
        lambda p, w, f: {"spectrum": p["fourierft_spectrum"]},
        ODD,
    ),
}


def peft_tensors(model: nn.Module, layer: str) -> Tensors:
    """The adapter's own parameters of one layer: {"lora_A": ..., ...}."""
    found = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        if layer in path and "default" in path:
            at = path.index("default")
            rest = [part for part in path[at + 1 :] if part != "weight"]
            found[".".join([path[at - 1], *rest])] = parameter
    assert found, f"no adapter parameters at {layer}"
    return found


def move(parameter: Tensor, rng: torch.Generator) -> None:
    parameter += 0.3 * torch.randn(parameter.shape, generator=rng)


def set_leaves(params: fadapt.Params, values: dict[str, Tensors]) -> None:
    with torch.no_grad():
        for layer, leaves in values.items():
            train = params[f"{layer}.weight"].train
            assert train.keys() == leaves.keys()
            for name, value in leaves.items():
                assert train[name].shape == value.shape, f"{layer} {name}"
                train[name].copy_(value)


def loss(out: Tensor) -> Tensor:
    return (out.sin() + 0.1 * out.square()).sum()


def assert_equal_to_reference(
    out: Tensor, grads: list[Tensor], ref_out: Tensor, ref_grads: list[Tensor]
) -> None:
    assert (out - ref_out).abs().max() <= 1e-5
    for grad, ref in zip(grads, ref_grads, strict=True):
        assert ref.abs().max() > 1e-3, "a reference gradient that vanishes compares nothing"
        assert (grad - ref).abs().max() <= 1e-4 * ref.abs().max()


class DifferentiatedConvolution:
    """PEFT's own forward of C3A, differentiated by autograd.

    Its backward gives another gradient of the input than the derivative of its forward.
    """

    @staticmethod
    def apply(x: Tensor, w: Tensor) -> Tensor:
        forward = BlockCircularConvolution.forward
        return forward(SimpleNamespace(save_for_backward=lambda *tensors: None), x, w)


@pytest.mark.parametrize("shape_index", [0, 1])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_outputs_and_gradients_equal_pefts(
    row: Row, shape_index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = row.shapes[shape_index]
    torch.manual_seed(0)
    model, x = Net(*shape), torch.randn(2, 4, shape[0])
    rng = torch.Generator().manual_seed(1)

    if row.config is peft.C3AConfig:
        monkeypatch.setattr(c3a, "BlockCircularConvolution", DifferentiatedConvolution)
    config = row.config(**row.options, **row.targets)
    reference = peft.get_peft_model(copy.deepcopy(model), config)
    theirs = {layer: peft_tensors(reference, layer) for layer in LAYERS}
    with torch.no_grad():
        for tensors in theirs.values():
            for parameter in tensors.values():
                if parameter.requires_grad:
                    move(parameter, rng)

    params = fadapt.init(model, row.method)

    def ours(tensors: dict[str, Tensors]) -> dict[str, Tensors]:
        return {
            layer: row.leaves(
                tensors[layer],
                model.get_submodule(layer).weight.detach(),
                params[f"{layer}.weight"].fixed,
            )
            for layer in LAYERS
        }

    set_leaves(params, ours(theirs))
    out, ref = fadapt.apply(model, params, x), reference(x)
    assert (out - model(x)).abs().max() > 1e-2, "the adapter does nothing"
    # Our gradients, pulled back through the affine map to PEFT's parameters.
    flat = [t for layer in LAYERS for t in theirs[layer].values() if t.requires_grad]
    mapped = ours(theirs)
    loss(out).backward()
    pairs = [
        (value, params[f"{layer}.weight"].train[name].grad)
        for layer in LAYERS
        for name, value in mapped[layer].items()
    ]
    grads = torch.autograd.grad([v for v, _ in pairs], flat, [g for _, g in pairs])
    assert_equal_to_reference(out, [*grads], ref, [*torch.autograd.grad(loss(ref), flat)])


def delora_official(
    weight: Tensor, a: Tensor, b: Tensor, strength: Tensor, a0: Tensor, b0: Tensor, lambda0: float
) -> Tensor:
    """W' = W + (E(A, B, λ) - E(A0, B0, λ0)) with E = B diag(λ / (r |a_k| |b_k|)) A diag(|W_:j|)."""

    def e(a: Tensor, b: Tensor, strength: Tensor | float) -> Tensor:
        diagonal = torch.diag(strength / (len(a) * a.norm(dim=1) * b.norm(dim=0)))
        return b @ diagonal @ a @ torch.diag(weight.norm(dim=0))

    return weight + e(a, b, strength) - e(a0, b0, lambda0)


@pytest.mark.parametrize("shape", ODD)
def test_delora_paper_form_equals_the_official_formula(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model, x = Net(*shape), torch.randn(8, shape[0])
    rng = torch.Generator().manual_seed(1)
    params = fadapt.init(model, DeLoRA(r=3, lambda0=1.5))
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            move(leaf, rng)

    weights, inputs = {}, []
    for name, adapter in params.items():
        p = {k: t.detach().clone() for k, t in adapter.fixed.items()}
        d = {k: t.detach().clone().requires_grad_() for k, t in adapter.train.items()}
        weights[name] = delora_official(
            model.get_parameter(name).detach(),
            p["A0"] + d["dA"],
            p["B0"] + d["dB"],
            1.5 + d["dlambda"],
            p["A0"],
            p["B0"],
            1.5,
        )
        inputs += d.values()
    out, ref = fadapt.apply(model, params, x), torch.func.functional_call(model, weights, (x,))
    grads = torch.autograd.grad(loss(out), fadapt.trainable(params))
    assert_equal_to_reference(out, [*grads], ref, [*torch.autograd.grad(loss(ref), inputs)])


def test_pissa_starts_from_the_factors_of_peft_up_to_signs() -> None:
    torch.manual_seed(0)
    model = Net(7, 13, 5)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["first"], init_lora_weights="pissa")
    reference = peft_tensors(peft.get_peft_model(copy.deepcopy(model), config), "first")
    fixed = fadapt.init(model, {"first": PiSSA(r=3, alpha=5)})["first.weight"].fixed
    signs = (fixed["A0"] * reference["lora_A"]).sum(1, keepdim=True).sign()
    torch.testing.assert_close(fixed["A0"], signs * reference["lora_A"])
    torch.testing.assert_close(fixed["B0"], reference["lora_B"] * signs.mT)


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_randomised_pissa_finds_the_best_low_rank_part(alpha: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    u, _, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    s = 0.8 ** torch.arange(30.0)
    with torch.no_grad():
        layer.weight.copy_(u * s @ vh)
    best = u[:, :4] * s[:4] @ vh[:4]
    model = nn.Sequential(layer)
    starts = [
        fadapt.init(model, fadapt.Config(PiSSA(r=4, alpha=alpha, niter=niter), seed=seed))
        for niter, seed in ((None, 0), (6, 0), (6, 0), (6, 1))
    ]
    fixed = [p["0.weight"].fixed for p in starts]
    for f in fixed:
        torch.testing.assert_close(alpha / 4 * f["B0"] @ f["A0"], best, atol=2e-4, rtol=0)
    assert torch.equal(fixed[1]["A0"], fixed[2]["A0"])
    assert not torch.equal(fixed[1]["A0"], fixed[3]["A0"])
