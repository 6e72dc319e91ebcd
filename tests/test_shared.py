"""Leaves that several sites share: one tensor, one gradient, held once everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fadapt
from fadapt.testing import Case, check_method


@dataclass(frozen=True)
class VeRA(fadapt.Method):
    """Frozen A and B for all sites, two trained vectors for each."""

    r: int = 4

    def shared(self, sites, rng):
        wide_in = max(s.in_features for s in sites)
        wide_out = max(s.out_features for s in sites)
        one = sites[0]
        fixed = {"A": one.normal(rng, (self.r, wide_in)), "B": one.normal(rng, (wide_out, self.r))}
        return {}, fixed

    def init(self, site, rng):
        return {"b": site.zeros(site.out_features), "d": site.zeros(self.r)}, {}

    def delta(self, p, x, y, base):
        a, b = p["A"][:, : x.shape[-1]], p["B"][: y.shape[-1]]
        return ((x @ a.mT) * (0.1 + p["d"])) @ b.mT * p["b"]


@dataclass(frozen=True)
class Bank(fadapt.Method):
    """One trained core for all sites, between frozen random ends of each."""

    r: int = 4
    n: int = 1

    def shared(self, sites, rng):
        return {"C": sites[0].zeros(self.r, self.r)}, {"count": torch.tensor(len(sites))}

    def init(self, site, rng):
        a = site.normal(rng, (self.r, site.in_features), site.in_features**-0.5)
        return {}, {"A": a, "B": site.normal(rng, (site.out_features, self.r), 1.0)}

    def delta(self, p, x, y, base):
        return x @ p["A"].mT @ p["C"].mT @ p["B"].mT


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).eval()


X = torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(1))
METHODS = [VeRA(), Bank(), fadapt.Chain((Bank(), fadapt.IA3()))]


def lively(model: nn.Module, method: Any, seed: int = 0, **config: Any) -> fadapt.Params:
    params = fadapt.init(model, fadapt.Config(method, seed=seed, **config))
    rng = torch.Generator().manual_seed(seed)
    for leaf in fadapt.trainable(params):
        leaf.data += 0.3 * torch.randn(leaf.shape, generator=rng)
    return params


def loss(out: Tensor, _: Any = None) -> Tensor:
    return out.sin().square().mean()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_laws_hold(method: fadapt.Method) -> None:
    check_method(method, [Case(), Case((8, 24, 8), False, torch.float32, 2)])


def bank_of(params: fadapt.Params, leaf: str) -> set[int]:
    return {a.leaves[leaf].data_ptr() for a in params.values() if leaf in a.leaves}


@pytest.mark.parametrize(("method", "leaf"), [(VeRA(), "A"), (Bank(), "C")], ids=str)
def test_it_is_one_tensor_everywhere(method: fadapt.Method, leaf: str, tmp_path: Path) -> None:
    model = net()
    params = lively(model, method)
    fadapt.save(params, tmp_path / "a")
    loaded = fadapt.load(tmp_path / "a", model)
    stacked = fadapt.stack([params, lively(model, method, 1)])
    train, rest = fadapt.split(params)
    for each in (
        params,
        loaded,
        *fadapt.unstack(stacked),
        fadapt.join(train, rest),
        params.to(dtype=torch.float64),
        fadapt.scale(params, 0.5),
        params.only("2"),
    ):
        assert len(bank_of(each, leaf)) == 1
    out = fadapt.apply(model, params, X)
    assert torch.equal(fadapt.apply(model, loaded, X), out)
    folded = fadapt.apply(model, stacked, X)
    torch.testing.assert_close(folded[0], out)
    assert not torch.allclose(folded[1], out)
    merged = functional_call(model, fadapt.merge(model, params), (X,))
    torch.testing.assert_close(merged, out)
    size = (tmp_path / "a").stat().st_size
    values = sum(t.numel() for a in params.values() for t in (*a.train.values(), *a.fixed.values()))
    assert size < 4 * values + 4000


def test_its_gradient_is_the_sum_over_the_sites() -> None:
    model = net().double()
    params = lively(model, Bank(), dtype=torch.float64)
    (core,) = fadapt.trainable(params)
    x = X.double()
    (grad,) = torch.autograd.grad(loss(fadapt.apply(model, params, x)), [core])
    total = torch.zeros_like(grad)
    for name in params.at_sites():
        # The core of the other site held still: merged into its weight.
        other = params.without(name)
        held = net().double()
        held.load_state_dict(fadapt.merge(model, other), strict=False)
        part = params.only(name)
        (each,) = torch.autograd.grad(loss(fadapt.apply(held, part, x)), fadapt.trainable(part))
        total += each
    torch.testing.assert_close(grad, total)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_fit_trains_what_a_loop_trains(method: fadapt.Method, optimizer: Any) -> None:
    model, batch = net(), {"input": X}
    params = lively(model, method)
    fitted = fadapt.fit(model, params, [batch], lr=0.01, steps=3, loss_fn=loss, optimizer=optimizer)
    mine = fadapt.stack([params])
    mine = fadapt.unstack(mine)[0]
    steps = optimizer(fadapt.trainable(mine), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        steps.zero_grad()
        fadapt.run(model, mine, batch, loss).backward()
        steps.step()
    for a, b in zip(fadapt.trainable(fitted), fadapt.trainable(mine), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    moved = zip(fadapt.trainable(params), fadapt.trainable(fitted), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)


def test_a_sweep_of_shared_and_other_methods() -> None:
    model, batch = net(), {"input": X}
    methods = [VeRA(), VeRA(), Bank(), fadapt.LoRA(r=2)]
    trials = [fadapt.Trial(method, lr=0.01, seed=i) for i, method in enumerate(methods)]
    report = fadapt.sweep(model, trials, [batch], steps=3, loss_fn=loss)
    for i, params in enumerate(report.final.values()):
        alone = fadapt.init(model, fadapt.Config(methods[i], seed=i))
        alone = fadapt.fit(model, alone, [batch], lr=0.01, steps=3, loss_fn=loss)
        for a, b in zip(fadapt.trainable(params), fadapt.trainable(alone), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_experts_share_too() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([nn.functional.linear(x, self.weight[e]) for e in range(3)])

    model, x = Experts(), torch.randn(5, 8)
    params = lively(model, {"weight": Bank()})
    merged = functional_call(model, fadapt.merge(model, params), (x,))
    torch.testing.assert_close(fadapt.apply(model, params, x), merged)


def test_two_methods_have_a_bank_each(tmp_path: Path) -> None:
    model = net()
    params = lively(model, {"^0": VeRA(2), "^2": VeRA(3)})
    assert [n for n in params if n.startswith("shared")] == ["shared:VeRA", "shared:VeRA#1"]
    fadapt.save(params, tmp_path / "a")
    assert torch.equal(
        fadapt.apply(model, fadapt.load(tmp_path / "a", model), X), fadapt.apply(model, params, X)
    )
    assert [n for n in params.only("^0") if n.startswith("shared")] == ["shared:VeRA"]


def test_the_bank_stands_in_the_summary_and_no_weight_is_looked_for() -> None:
    params = lively(net(), Bank())
    text = fadapt.summary(params, net())
    assert "shared:Bank" in text
    assert "2 sites, 16 trainable" in text


STORE: dict[Any, Tensor] = {}


@dataclass(frozen=True)
class Cached(fadapt.Method):
    """Shares by a store of its own."""

    acts_on_bias = True  # type: ignore[assignment]
    trains: bool = True
    some: bool = False

    def init(self, site, rng):
        key = site.name if self.some and not site.name.startswith("2") else 0
        v = STORE.setdefault(key, site.zeros(8) + 1)
        mine = {"a": site.zeros(1)}
        return ({**mine, "v": v}, {}) if self.trains else (mine, {"v": v})

    def delta(self, p, x, y, base):
        return p["a"] * p["v"].sum() * y


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_tensor_that_init_returns_at_all_sites_is_shared(
    trains: bool, dtype: Any, tmp_path: Path
) -> None:
    STORE.clear()
    model = net()
    params = fadapt.init(model, fadapt.Config(Cached(trains), dtype=dtype))
    fadapt.save(params, tmp_path / "a")
    for each in (
        params,
        fadapt.load(tmp_path / "a", model),
        fadapt.unstack(fadapt.stack([params]))[0],
    ):
        assert len(bank_of(each, "v")) == 1
        assert len(fadapt.trainable(each)) == 2 + trains
    # The store is not trained: another init starts as this one did.
    fadapt.trainable(params)[-1].data += 1
    assert STORE[0].eq(1).all()


def test_a_tensor_at_some_sites_only_is_refused() -> None:
    STORE.clear()
    deep = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    rules = {"^[023]": Cached(some=True), "^1": Cached()}
    with pytest.raises(fadapt.ConfigError, match=r"one tensor twice.*shared\(self, sites, rng\)"):
        fadapt.init(deep, rules)

    @dataclass(frozen=True)
    class Both(fadapt.IA3):
        def init(self, site, rng):
            d = site.zeros(site.out_features)
            return {"d": d, "e": d}, {}

    with pytest.raises(fadapt.ConfigError, match=r"one tensor twice, as 'd' of 0.weight and 'e'"):
        fadapt.init(deep, Both())

    @dataclass(frozen=True)
    class Parts(fadapt.IA3):
        def init(self, site, rng):
            d, e = site.zeros(2 * site.out_features).chunk(2)
            return {"d": d, "e": e}, {}

    assert len(fadapt.trainable(fadapt.init(deep, Parts()))) == 8


def test_what_comes_apart_is_refused(tmp_path: Path) -> None:
    model = net()
    params = lively(model, Bank())
    with pytest.raises(fadapt.ConfigError, match="share leaves"):
        fadapt.combine([params, params], [0.5, 0.5])
    lora = fadapt.as_lora(model, params, r=4)
    assert not [n for n in lora if n.startswith("shared")]
    torch.testing.assert_close(fadapt.apply(model, lora, X), fadapt.apply(model, params, X))

    @dataclass(frozen=True)
    class Twice(Bank):
        def init(self, site, rng):
            train, fixed = super().init(site, rng)
            return {"C": site.zeros(self.r, self.r), **train}, fixed

    with pytest.raises(fadapt.ConfigError, match=r"init and shared both return \['C'\]"):
        fadapt.init(model, Twice())


def test_init_sees_all_sites_and_the_models_config() -> None:
    seen = []

    @dataclass(frozen=True)
    class Looks(fadapt.IA3):
        def init(self, site, rng):
            seen.append(([s.name for s in site.sites], site.model_config))
            return super().init(site, rng)

    model = net()
    model.config = "the config"  # type: ignore[assignment]
    fadapt.init(model, Looks())
    assert seen == [(["0.weight", "2.weight"], "the config")] * 2
