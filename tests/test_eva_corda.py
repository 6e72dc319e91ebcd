"""EVA, CorDA and Wanda against PEFT, scikit-learn and the papers' formulas."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from sklearn import decomposition
from torch import Tensor, nn

import fadapt
from fadapt import CalibrationError, Config, ConfigError, FadaptWarning
from fadapt.calibration import Gram, Statistic, wanda_scores
from fadapt.statistics.spectrum import Spectrum
from fadapt.testing import Case, check_method
from tests import models as zoo


def spread(*shape: int, seed: int = 0, decay: float = 0.7, mean: float = 0.0) -> Tensor:
    """Rows whose principal components are well separated, in a random rotation."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(shape[-1], shape[-1], generator=rng)).Q
    scale = decay ** torch.arange(shape[-1])
    return (torch.randn(*shape, generator=rng) * scale) @ turn + mean


def hidden(model: nn.Module, x: Tensor) -> Tensor:
    """The input of the second layer of ``zoo.mlp``."""
    return torch.tanh(model[0](x)).detach()  # type: ignore[index]


# EVA


@pytest.mark.parametrize("center", [True, False])
def test_eva_starts_from_the_principal_components(center: bool) -> None:
    model, x = zoo.mlp(widths=(24, 16, 8)).double(), spread(500, 24, mean=0.3).double()
    params = fadapt.init(model, fadapt.EVA(4, center=center, rho=1), x.split(100))
    for site, rows in (("0.weight", x), ("2.weight", hidden(model, x))):
        a = params[site].train["A"].detach()
        if center:
            reference = decomposition.PCA(4, svd_solver="full").fit(rows.numpy()).components_
        else:
            reference = np.linalg.svd(rows.numpy(), full_matrices=False)[2][:4]
        cosines = (a.numpy() * reference).sum(1)
        np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-9)
        assert (params[site].train["B"] == 0).all()


def peft_eva(
    model: nn.Module, batches: list[Any], language: bool = False, **eva: Any
) -> tuple[nn.Module, LoraConfig]:
    """PEFT's own EVA start of a copy of the model."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"] if language else ["0", "2"],
        init_lora_weights="eva",
        eva_config=EvaConfig(**eva),
    )
    peft_model = get_peft_model(copy.deepcopy(model), config)
    plain: dict[str, Any] = {
        "forward_fn": lambda m, x: m(x),
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": None,
    }
    initialize_lora_eva_weights(
        peft_model, batches, show_progress_bar=False, **({} if language else plain)
    )
    return peft_model, peft_model.peft_config["default"]


def peft_a(peft_model: nn.Module) -> dict[str, Tensor]:
    return {
        name.split("base_model.model.")[1].replace(".lora_A.default", ""): p.detach().double()
        for name, p in peft_model.named_parameters()
        if "lora_A" in name
    }


def agree(ours: Tensor, theirs: Tensor, spectrum: np.ndarray, least: int) -> None:
    """Cosine at least 0.99 for every component separated from its neighbours.

    Not for the others: PEFT's incremental PCA truncates at each batch and stops early.
    """
    k = len(ours)
    ratio = spectrum[:k] / spectrum[1 : k + 1]
    separated = [i for i in range(k) if ratio[i] > 1.3 and (i == 0 or ratio[i - 1] > 1.3)]
    assert len(separated) >= least
    norms = ours.norm(dim=1) * theirs.norm(dim=1)
    cosines = ((ours.double() * theirs).sum(1) / norms).abs()
    assert (cosines[separated] >= 0.99).all(), (cosines, separated)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_agrees_with_peft(rho: float, whiten: bool) -> None:
    model, x = (
        zoo.mlp(widths=(24, 16, 8)),
        spread(1200, 24, mean=0.5, decay=0.8 if rho > 1 else 0.6),
    )
    with torch.no_grad():
        model[0].weight.mul_(0.7 ** torch.arange(16).unsqueeze(1))  # type: ignore[index,operator]
    batches = list(x.split(200))
    peft_model, peft_config = peft_eva(model, batches, rho=rho, whiten=whiten, tau=0.999)
    params = fadapt.init(model, fadapt.EVA(4, 8.0, rho=rho, whiten=whiten), batches)
    theirs = peft_a(peft_model)
    assert set(params) == {f"{name}.weight" for name in ("0", "2")}
    for site, adapter in params.items():
        name = site.removesuffix(".weight")
        rows = x if name == "0" else hidden(model, x)
        a = adapter.train["A"].detach()
        assert a.shape == theirs[site].shape
        eigenvalues = np.linalg.eigvalsh(np.cov(rows.numpy().T))[::-1]
        agree(a, theirs[site], eigenvalues, least=len(a) - 2)
        scale = peft_config.alpha_pattern.get(name, 8) / peft_config.rank_pattern.get(name, 4)
        assert adapter.method.scaling == pytest.approx(scale)  # type: ignore[attr-defined]
        if whiten:
            # PEFT's IncrementalPCA stops where it has converged, so its singular values are those
            # of the batches it saw; they grow with √n, and A with n^-1/4.
            rel = (a.norm(dim=1) / theirs[site].norm(dim=1)).double()
            assert (rel / rel[0] - 1).abs().max() < 0.1
    if rho > 1:
        assert params["0.weight"].method.r != 4  # type: ignore[attr-defined]


def test_eva_agrees_with_peft_on_a_padded_language_model() -> None:
    model = zoo.qwen3()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Embeddings of few strong directions, as trained ones have.
        model.model.embed_tokens.weight.mul_(0.05).add_(
            spread(zoo.VOCAB, zoo.HIDDEN, seed=1, decay=0.5)
        )
    batches = []
    for _ in range(6):
        lengths = torch.randint(10, 33, (16, 1), generator=rng)
        ids = torch.randint(0, zoo.VOCAB, (16, 32), generator=rng)
        batches.append({"input_ids": ids, "attention_mask": (torch.arange(32) < lengths).long()})
    config = Config({"q_proj|v_proj|down_proj": fadapt.EVA(4, 8.0)})
    stats = fadapt.observe(model, config, batches)
    params = fadapt.init(model, config, stats)
    peft_model, _ = peft_eva(model, batches, language=True, rho=2.0, tau=0.999)
    theirs = peft_a(peft_model)
    assert theirs.keys() == params.keys()
    for site, adapter in params.items():
        values = stats.get(site, fadapt.EVA(8, rho=1).statistic).values.numpy()
        assert adapter.train["A"].shape == theirs[site].shape
        agree(adapter.train["A"].detach(), theirs[site], values, least=1)
    assert {a.method.r for _, a in params.items()} == {3, 4, 5}  # type: ignore[attr-defined]


def spectra(**values: list[float]) -> dict[str, tuple[fadapt.EVA, Spectrum]]:
    """Sites with the given explained variances (of a total of 1), all EVA(r=2, alpha=4)."""
    method = fadapt.EVA(2, 4.0)
    return {
        name: (method, Spectrum(torch.tensor(v).double(), torch.eye(9), torch.tensor(1.0), 99))
        for name, v in values.items()
    }


def ranks(sites: dict) -> dict[str, int]:
    plan = fadapt.EVA.plan_ranks(sites)
    return {name: 0 if m is None else m.r for name, m in plan.items()}  # type: ignore[attr-defined]


def test_ranks_go_where_the_variance_is() -> None:
    sites = spectra(a=[0.9, 0.05, 0.01, 0.0], b=[0.4, 0.3, 0.2, 0.1], c=[0.03, 0.02, 0.02, 0.02])
    assert ranks(sites) == {"a": 2, "b": 4, "c": 0}
    plan = fadapt.EVA.plan_ranks(sites)
    assert plan["b"] == fadapt.EVA(4, 8.0, rho=1.0)  # alpha / r stays 2
    assert plan["c"] is None


def test_ties_go_to_the_earlier_site_and_the_budget_is_kept() -> None:
    same = [0.3, 0.2, 0.2, 0.1]
    assert ranks(spectra(a=same, b=same)) == {"a": 2, "b": 2}
    assert ranks(spectra(a=same, b=same, c=same)) == {"a": 2, "b": 2, "c": 2}
    sites = spectra(a=same, b=same, c=same)
    sites["c"] = fadapt.EVA(1), sites["c"][1]  # 5 ranks for 3 equal sites; c offers 2
    assert ranks(sites) == {"a": 2, "b": 2, "c": 1}
    sites["a"], sites["c"] = sites["c"], sites["a"]
    assert ranks(sites) == {"a": 2, "b": 2, "c": 1}


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_kept_exactly_and_rho_bounds_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sites = {}
    for i in range(6):
        values = np.sort(rng.exponential(size=9))[::-1]
        r, rho = int(rng.integers(1, 5)), float(rng.choice([1.0, 1.5, 2.0]))
        spectrum = Spectrum(
            torch.tensor(values.copy()), torch.eye(9), torch.tensor(values.sum()), 99
        )
        sites[f"s{i}"] = fadapt.EVA(r, rho=rho), spectrum
    got = ranks(sites)
    assert sum(got.values()) == sum(m.r for m, _ in sites.values())
    # By the definition: sort all offers, take the best.
    offers = [
        (float(v) / float(s.total), name)
        for name, (m, s) in sites.items()
        for v in s.values[: round(m.r * m.rho)]
    ]
    best = sorted(offers, reverse=True)[: sum(got.values())]
    assert got == {name: sum(n == name for _, n in best) for name in sites}


def test_sites_of_rank_zero_are_dropped_and_named() -> None:
    x = spread(400, 24, decay=0.5)
    noise = torch.randn(400, 24, generator=torch.Generator().manual_seed(1))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sharp, self.flat = nn.Linear(24, 4), nn.Linear(24, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.sharp(a) + self.flat(b)

    batches = [(x, noise)]
    with pytest.warns(FadaptWarning, match=r"1 of 2 sites got rank 0 .*'flat.weight'"):
        params = fadapt.init(Two(), fadapt.EVA(1), batches)
    assert list(params) == ["sharp.weight"]
    assert params["sharp.weight"].method == fadapt.EVA(2, 32.0, rho=1.0)
    assert params["sharp.weight"].train["A"].shape == (2, 24)


def test_too_little_variance_is_an_error_not_a_random_start() -> None:
    flat = spread(3, 24).double().repeat(20, 1)  # 60 tokens, but only 3 different ones
    model = zoo.mlp(widths=(24, 16, 8)).double()
    with pytest.raises(CalibrationError, match=r"0.weight: .* only 2 directions.*rank 3"):
        fadapt.init(model, fadapt.EVA(3, rho=1), [flat])
    with pytest.raises(CalibrationError, match="only 4 directions, fewer than the 6 ranks"):
        fadapt.init(model, fadapt.EVA(3), [flat])


def test_eva_arguments() -> None:
    with pytest.raises(ConfigError, match="rho"):
        fadapt.EVA(2, rho=0.5)
    with pytest.raises(ConfigError, match="r must be"):
        fadapt.EVA(0)
    with pytest.raises(ConfigError, match=r"0.weight .*8 directions, fewer than r=9"):
        fadapt.init(zoo.mlp(), fadapt.EVA(9), [zoo.reals(99, 8)])


def test_sites_with_one_input_share_one_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = zoo.qwen3(), []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (calls.append(len(m)), eigh(m))[1])
    batch = {"input_ids": zoo.tokens(8, 30)}
    params = fadapt.init(model, {"q_proj|k_proj|v_proj": fadapt.EVA(2)}, [batch])
    assert len(params) == 3 * zoo.LAYERS
    assert len(calls) == zoo.LAYERS


# CorDA


def paper_corda(
    w: np.ndarray, c: np.ndarray, r: int, mode: str, s: float, damping: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """A0, B0 by the paper's formulas, with the inverse of C."""
    c = c / np.diag(c).mean()
    c = c + damping * np.eye(len(c))
    u, sigma, vt = np.linalg.svd(w @ c, full_matrices=False)
    pick = slice(0, r) if mode == "ipm" else slice(len(sigma) - r, len(sigma))
    root = np.sqrt(sigma[pick] / s)
    return root[:, None] * (vt @ np.linalg.inv(c))[pick], u[:, pick] * root


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("widths", [(12, 16, 8), (16, 8, 12)])
def test_corda_is_the_papers_formula(mode: str, widths: tuple[int, int, int]) -> None:
    model, x = zoo.mlp(widths=widths).double(), spread(300, widths[0], mean=0.4).double()
    params = fadapt.init(model, fadapt.CorDA(3, 6.0, mode=mode), x.split(50))  # type: ignore[arg-type]
    for layer, rows in ((0, x), (2, hidden(model, x))):
        w, n = model[layer].weight.detach(), rows.numpy()  # type: ignore[index]
        a, b = paper_corda(w.numpy(), n.T @ n / len(n), 3, mode, s=2.0)
        fixed = params[f"{layer}.weight"].fixed
        signs = np.sign((fixed["B0"].numpy() * b).sum(0))
        np.testing.assert_allclose(fixed["B0"].numpy() * signs, b, atol=1e-9)
        np.testing.assert_allclose(fixed["A0"].numpy() * signs[:, None], a, atol=1e-9)
        full = 2.0 * fixed["B0"] @ fixed["A0"]  # the selected part of W: a projection of W
        np.testing.assert_allclose(2.0 * b @ a, full.numpy(), atol=1e-9)


@pytest.fixture
def preprocess_corda(monkeypatch: pytest.MonkeyPatch) -> Callable:
    # PEFT imports attr.dataclass without depending on attrs; the standard one serves as well.
    if importlib.util.find_spec("attr") is None:
        monkeypatch.setitem(sys.modules, "attr", dataclasses)
    return importlib.import_module("peft.tuners.lora.corda").preprocess_corda


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_agrees_with_peft(mode: str, preprocess_corda: Callable) -> None:
    """One batch of one sequence, which is what PEFT's covariance hook takes."""
    model, x = zoo.mlp(widths=(12, 16, 8)), spread(1, 400, 12, mean=0.4, decay=0.85)
    peft_model = copy.deepcopy(model)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["0", "2"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),  # type: ignore[arg-type]
    )
    preprocess_corda(peft_model, config, run_model=lambda: peft_model(x))
    peft_model = get_peft_model(peft_model, config)
    params = fadapt.init(model, fadapt.CorDA(3, 6.0, mode=mode), [x])  # type: ignore[arg-type]
    parts = dict(peft_model.named_parameters())
    for site, adapter in params.items():
        prefix = f"base_model.model.{site.removesuffix('.weight')}"
        a, b = (parts[f"{prefix}.lora_{k}.default.weight"].detach() for k in "AB")
        a0, b0 = adapter.fixed["A0"], adapter.fixed["B0"]
        torch.testing.assert_close(b0 @ a0, b @ a, rtol=0, atol=2e-4 * float((b @ a).abs().max()))
        # PEFT's C has another scale, which moves weight between A and B: one factor for all.
        factor = (b0.norm(dim=0) / b.norm(dim=0)).double()
        assert (factor / factor[0] - 1).abs().max() < 1e-3
        torch.testing.assert_close(
            model.get_parameter(site) - 2 * b0 @ a0,
            parts[f"{prefix}.base_layer.weight"],
            rtol=1e-4,
            atol=1e-4,
        )


def test_corda_trained_equals_the_mutating_form() -> None:
    """y' = x W_resᵀ + s x Aᵀ Bᵀ + b with W_res = W - s B0 A0, A = A0 + dA, B = B0 + dB."""
    model, x = zoo.mlp(widths=(12, 16, 8)).double(), spread(200, 12).double()
    params = zoo.perturb(fadapt.init(model, {"0": fadapt.CorDA(3, 6.0)}, [x]))
    p, layer = params["0.weight"].leaves, model[0]  # type: ignore[index]
    residual = layer.weight - 2 * p["B0"] @ p["A0"]
    a, b = p["A0"] + p["dA"], p["B0"] + p["dB"]
    reference = model[2](torch.tanh(x @ residual.mT + 2 * x @ a.mT @ b.mT + layer.bias))  # type: ignore[index]
    out = fadapt.apply(model, params, x)
    torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
    assert (out - model(x)).abs().max() > 0.01


def test_corda_depends_neither_on_the_scale_nor_on_the_batches() -> None:
    model = zoo.mlp(widths=(12, 16, 8)).double()
    x = spread(200, 12).double()
    one = fadapt.init(model, {"0": fadapt.CorDA(3)}, [x])["0.weight"].fixed
    for batches in ([100 * x], x.split(1), x.flip(0).split([7, 150, 43])):
        other = fadapt.init(model, {"0": fadapt.CorDA(3)}, batches)["0.weight"].fixed
        for leaf in ("A0", "B0"):
            torch.testing.assert_close(other[leaf], one[leaf], rtol=1e-8, atol=1e-8)


def test_corda_of_a_singular_weight_is_finite() -> None:
    model, x = zoo.mlp(widths=(12, 16, 8)).double(), spread(200, 12).double()
    with torch.no_grad():
        model[0].weight[:, 2:] = 0  # type: ignore[index]
    for mode in ("ipm", "kpm"):
        fixed = fadapt.init(model, {"0": fadapt.CorDA(4, mode=mode)}, [x])["0.weight"].fixed  # type: ignore[arg-type]
        assert all(leaf.isfinite().all() for leaf in fixed.values())


def test_corda_arguments() -> None:
    for make, message in (
        (lambda: fadapt.CorDA(2, mode="both"), "mode"),  # type: ignore[arg-type]
        (lambda: fadapt.CorDA(2, damping=0.0), "damping"),
        (lambda: fadapt.CorDA(2, alpha=-1.0), "alpha"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    with pytest.raises(ConfigError, match="r=9 is more than the 8 singular directions"):
        fadapt.init(zoo.mlp(), fadapt.CorDA(9), [zoo.reals(99, 8)])
    with pytest.raises(CalibrationError, match="zero"):
        fadapt.init(zoo.mlp(), {"0": fadapt.CorDA(2)}, [torch.zeros(99, 8)])


# Wanda


def test_wanda_scores_are_the_papers() -> None:
    for model, site, transposed in (
        (zoo.llama().double(), "model.layers.0.mlp.up_proj.weight", False),
        (zoo.gpt2().double(), "transformer.h.0.mlp.c_fc.weight", True),
    ):
        batches = [{"input_ids": zoo.tokens(3, 9)}, {"input_ids": zoo.tokens(2, 4, seed=1)}]
        inputs: list[Tensor] = []
        layer = model.get_submodule(site.removesuffix(".weight"))
        handle = layer.register_forward_hook(lambda m, a, o, to=inputs: to.append(a[0]))
        for batch in batches:
            model(**batch)
        handle.remove()
        x = torch.cat([i.flatten(0, 1) for i in inputs]).detach()
        w = layer.weight.detach().mT if transposed else layer.weight.detach()
        reference = w.abs() * x.norm(dim=0)
        for method in (fadapt.CorDA(2), fadapt.EVA(2)):
            config = {"mlp": method}
            scores = wanda_scores(model, fadapt.observe(model, config, batches))
            torch.testing.assert_close(scores[site], reference, rtol=1e-10, atol=1e-12)
        assert wanda_scores(model, fadapt.observe(model, config, batches), [site]).keys() == {site}
        torch.testing.assert_close(wanda_scores(w, x.norm(dim=0)), reference)
        with pytest.raises(CalibrationError, match="norms of shape"):
            wanda_scores(w, x)


# Laws


def batches_of(case: Case) -> list[Tensor]:
    return [case.x(40, 3), case.x(9)]


LAWFUL: dict[str, tuple[fadapt.Method, Callable[[int, int], int]]] = {
    "EVA": (fadapt.EVA(3, rho=1.0), lambda o, i: 3 * (o + i)),
    "EVA whitened": (fadapt.EVA(2, rho=1.0, whiten=True, center=False), lambda o, i: 2 * (o + i)),
    "CorDA": (fadapt.CorDA(3, 4.0), lambda o, i: 3 * (o + i)),
    "CorDA kpm": (fadapt.CorDA(2, mode="kpm"), lambda o, i: 2 * (o + i)),
    "Chain": (
        fadapt.Chain((fadapt.CorDA(2), fadapt.EVA(1, rho=1.0))),
        lambda o, i: 3 * (o + i),
    ),
}


@pytest.mark.parametrize("name", LAWFUL)
def test_laws(name: str) -> None:
    method, count = LAWFUL[name]
    check_method(method, calib=batches_of, count=count)


def test_stacks_of_calibrated_methods_equal_the_loop() -> None:
    model, x = zoo.mlp(widths=(24, 16, 8)).double(), spread(200, 24).double()
    methods = [
        fadapt.EVA(4),
        fadapt.EVA(2, rho=1, whiten=True),
        fadapt.LoRA(3),
        fadapt.CorDA(2),
        fadapt.CorDA(5, 3.0, mode="kpm"),
    ]
    params = [zoo.perturb(fadapt.init(model, m, [x]), seed=i) for i, m in enumerate(methods)]
    stack = fadapt.stack(params)
    assert [g.index for g in stack.groups] == [(0, 1, 2), (3, 4)]
    losses = fadapt.run(model, stack, x[:9], lambda out, _: out.square().mean())
    for p, loss in zip(params, losses, strict=True):
        alone = fadapt.run(model, p, x[:9], lambda out, _: out.square().mean())
        torch.testing.assert_close(loss, alone, rtol=1e-10, atol=1e-12)
    assert losses.unique().numel() == len(methods)


def test_methods_on_a_meta_model_can_be_counted_from_statistics() -> None:
    model, x = zoo.mlp(), zoo.reals(50, 8)
    config = {"0": fadapt.EVA(2), "2": fadapt.CorDA(2)}
    stats = fadapt.observe(model, config, [x])
    params = fadapt.init(zoo.mlp().to("meta"), config, stats)
    assert all(leaf.is_meta for leaf in fadapt.trainable(params))
    assert stats.get("2.weight", Statistic(Gram())).shape == (32, 32)
