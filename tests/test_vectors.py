"""Parameters of one axis as sites: the weights of norms, and biases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fadapt
from tests import models as zoo


@dataclass(frozen=True)
class Add(fadapt.Method):
    """w' = w + d, for a vector."""

    adapts_vectors = True  # type: ignore[assignment]

    def init(self, site, rng):
        return {"d": site.zeros(site.out_features)}, {}

    def delta(self, p, x, y, base):
        return x * p["d"]


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.group = nn.LayerNorm(8), nn.GroupNorm(2, 8)
        self.rms, self.batch = nn.RMSNorm(8), nn.BatchNorm1d(8)
        self.proj, self.out = nn.Linear(8, 8), nn.Linear(8, 4)
        self.gain = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch(self.group(self.layer(x))) + self.rms(x) * self.gain
        return self.out(F.gelu(self.proj(x)))


def model() -> Norms:
    torch.manual_seed(0)
    made = Norms().eval()
    for p in made.parameters():
        nn.init.normal_(p)
    return made


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
ALL = {r"layer|group|rms|batch|gain|bias": Add()}


def lively(base: nn.Module, rules: Any, **config: Any) -> fadapt.Params:
    params = fadapt.init(base, fadapt.Config(rules, **config))
    rng = torch.Generator().manual_seed(0)
    for leaf in fadapt.trainable(params):
        leaf.data += 0.3 * torch.randn(leaf.shape, generator=rng)
    return params


def plain(base: nn.Module, params: fadapt.Params) -> dict[str, Tensor]:
    """The vectors themselves, by their definition."""
    own = dict(base.named_parameters())
    return {
        name: own[name].detach() + a.train["d"]
        if isinstance(a.method, Add)
        else own[name].detach() * (1 + a.train["d"])
        for name, a in params.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [Add(), fadapt.IA3(), fadapt.Chain((fadapt.IA3(), Add()))])
def test_untrained_is_the_base_to_the_last_bit(method: Any, dtype: torch.dtype) -> None:
    base = model().to(dtype)
    params = fadapt.init(base, {next(iter(ALL)): method})
    assert len(params) == 10
    assert torch.equal(fadapt.apply(base, params, X.to(dtype)), base(X.to(dtype)))


@pytest.mark.parametrize("method", [Add(), fadapt.IA3()], ids=str)
def test_values_and_gradients_are_those_of_the_vectors(method: Any, tmp_path: Path) -> None:
    base = model()
    params = lively(base, {next(iter(ALL)): method})
    out = fadapt.apply(base, params, X)
    want = functional_call(base, plain(base, params), (X,))
    torch.testing.assert_close(out, want)
    leaves = fadapt.trainable(params)
    for a, b in zip(
        torch.autograd.grad(out.sin().sum(), leaves),
        torch.autograd.grad(want.sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        assert a.any()
    merged = fadapt.merge(base, params)
    torch.testing.assert_close(functional_call(base, merged, (X,)), want)
    assert {k: t.shape for k, t in merged.items()} == {
        k: t.shape for k, t in plain(base, params).items()
    }
    fadapt.save(params, tmp_path / "a")
    assert torch.equal(fadapt.apply(base, fadapt.load(tmp_path / "a", base), X), out)
    assert torch.equal(fadapt.apply(base, fadapt.scale(params, 0.0), X), base(X))
    compiled = torch.compile(lambda p, x: fadapt.apply(base, p, x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, X), out)


def test_matrices_and_vectors_together() -> None:
    base = model()
    params = lively(base, {"bias": Add(), "": fadapt.LoRA(r=2)})
    assert params["proj.weight"].site.bias == "proj.bias"
    out = fadapt.apply(base, params, X)
    torch.testing.assert_close(functional_call(base, fadapt.merge(base, params), (X,)), out)
    with pytest.raises(fadapt.ConfigError, match=r"proj.bias has an adapter of its own"):
        fadapt.init(base, {"bias": Add(), "": fadapt.IA3()})


def test_bound_follows_an_optimizer() -> None:
    base = model()
    params = fadapt.init(base, {"rms": Add()})
    optimizer = torch.optim.SGD(fadapt.trainable(params), lr=1e-4)
    losses = []
    with fadapt.bound(base, params):
        for _ in range(3):
            loss = base(X).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


class Shifted(nn.Module):
    """A norm whose gain is 1 + w, cast before it is used, as Gemma's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.Parameter(torch.randn(8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True))
        return self.out((x * (1.0 + self.norm.float())).type_as(self.norm))


STACKS: dict[str, tuple[Any, list[Any]]] = {
    "norms, gains and biases": (
        model,
        [
            {r"layer|rms|gain|proj\.bias|out\.bias": Add()},
            {r"layer|rms\.weight": fadapt.IA3()},
            {"layer": fadapt.Chain((fadapt.IA3(), Add())), "proj.weight": fadapt.LoRA(r=2)},
            {"proj.weight|out.weight": fadapt.LoRA(r=1), "gain": Add()},
        ],
    ),
    "1 + w": (Shifted, [{"norm": Add()}, {"norm": fadapt.IA3()}, {"out": fadapt.LoRA(r=1)}]),
}


def square(out: Tensor, _: Any) -> Tensor:
    return out.square().mean()


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_gives_each_rows_its_own_vectors(name: str) -> None:
    make, rules = STACKS[name]
    torch.manual_seed(0)
    base = make().double()
    members = [lively(base, rule) for rule in rules]
    x = X.double().reshape(5, 1, 8).expand(5, 3, 8) if name == "1 + w" else X.double()
    losses = fadapt.run(base, fadapt.stack(members), (x,), square)
    refs = torch.stack([fadapt.run(base, member, (x,), square) for member in members])
    torch.testing.assert_close(losses, refs)
    train, rest = fadapt.stack(members).split()
    leaves = [t for group in train.values() for site in group.values() for t in site.values()]
    fadapt.run(base, rest.join(train), (x,), square).sum().backward()
    total = sum(t.grad.square().sum() for t in leaves)
    refs.sum().backward()
    expected = sum(t.grad.square().sum() for m in members for t in fadapt.trainable(m))
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_stack_is_the_base(dtype: torch.dtype) -> None:
    base, x = model().to(dtype), X.to(dtype)
    rules = {r"layer|rms|gain|proj\.bias|out\.bias": Add()}
    out = fadapt.apply(base, fadapt.stack([fadapt.init(base, rules)] * 2), x)
    # The base on as many rows: the kernels that processors choose depend on how many there are.
    assert torch.equal(out, base(torch.cat([x, x])).unflatten(0, (2, -1)))


def test_a_sweep_of_norms_is_one_pass(recwarn: pytest.WarningsRecorder) -> None:
    base, batch = model(), {"x": X}
    rule = {"layer|rms": fadapt.LNTuning()}
    trials = [fadapt.Trial(rule, lr=lr) for lr in (0.1, 0.2)]
    report = fadapt.sweep(base, trials, [batch], steps=2, loss_fn=square)
    assert not [w for w in recwarn if issubclass(w.category, fadapt.OneByOneWarning)]
    for lr, found in zip((0.1, 0.2), report.final.values(), strict=True):
        fresh = fadapt.init(base, rule)
        alone = fadapt.fit(base, fresh, [batch], lr=lr, steps=2, loss_fn=square)
        for a, b in zip(fadapt.trainable(found), fadapt.trainable(alone), strict=True):
            torch.testing.assert_close(a, b)


def test_a_compiled_stack_of_rms_norms_is_right_or_refused() -> None:
    base = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4))
    whole = fadapt.stack([lively(base, {"0": Add()}), lively(base, {"0": fadapt.IA3()})])
    torch.compiler.reset()
    step = torch.compile(lambda p, x: fadapt.apply(base, p, x), backend="eager", fullgraph=True)
    if torch.__version__ < "2.13":
        with pytest.raises(Exception, match=r"0.weight is of an nn.RMSNorm.*with torch 2.13"):
            step(whole, X)
    else:
        torch.testing.assert_close(step(whole, X), fadapt.apply(base, whole, X))


def test_a_compiled_stack_of_norms() -> None:
    base = model()
    # Not rms, through which Dynamo of torch 2.11 cannot trace a tensor subclass.
    stack = fadapt.stack([lively(base, {r"layer|gain|out\.bias": Add()}) for _ in range(2)])
    torch.compiler.reset()
    step = torch.compile(
        lambda stack, x: fadapt.run(base, stack, (x,), square), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(step(stack, X), fadapt.run(base, stack, (X,), square))


def test_where_a_vector_has_no_rows_of_its_own_a_sweep_goes_one_by_one() -> None:
    base, batch = model(), {"x": X}
    params = lively(base, {"group": Add()})
    with pytest.raises(fadapt.FadaptError, match=r"group\.(weight|bias).*without a rule"):
        fadapt.run(base, fadapt.stack([params, params]), batch, square)
    trials = [fadapt.Trial({"group": Add()}, lr=lr) for lr in (0.1, 0.2)]
    with pytest.warns(fadapt.OneByOneWarning):
        report = fadapt.sweep(base, trials, [batch], steps=2, loss_fn=square)
    for lr, found in zip((0.1, 0.2), report.final.values(), strict=True):
        fresh = fadapt.init(base, {"group": Add()})
        alone = fadapt.fit(base, fresh, [batch], lr=lr, steps=2, loss_fn=square)
        assert torch.equal(fadapt.trainable(found)[0], fadapt.trainable(alone)[0])


def test_a_language_model_with_checkpointing() -> None:
    base = zoo.llama()
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "labels": ids}
    params = lively(base, {"norm": Add()})
    assert all(n.endswith("norm.weight") for n in params)
    grads = []
    for checkpointing in (False, True):
        base.train(checkpointing)
        if checkpointing:
            base.gradient_checkpointing_enable()
        loss = fadapt.run(base, params, batch)
        grads.append(torch.autograd.grad(loss, fadapt.trainable(params)))
    merged = functional_call(base.eval(), plain(base, params), (), batch).loss
    grads.append(torch.autograd.grad(merged, fadapt.trainable(params)))
    for a, b, c in zip(*grads, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_is_said() -> None:
    base = model()
    with pytest.raises(fadapt.TargetError, match=r"only vectors.*LoRA adapts matrices; write"):
        fadapt.init(base, {"rms": fadapt.LoRA(r=2)})
    assert "rms.weight" not in fadapt.init(base, fadapt.IA3())
    with pytest.raises(fadapt.ConfigError, match="is a vector, and a LoRA has matrices only"):
        fadapt.as_lora(base, fadapt.init(base, {"rms": Add()}))
    with pytest.raises(fadapt.TargetError, match="excluded weights"):
        fadapt.init(base, fadapt.Config({"rms": Add()}, exclude=("rms",)))
    base.scalar = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(fadapt.TargetError, match="a single number"):
        fadapt.init(base, {"scalar": Add()})


@pytest.mark.parametrize("count", [1, 2])
def test_a_layer_with_adapted_weight_and_bias_is_compiled(count: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4).double(), torch.randn(6, 5, dtype=torch.float64)
    rules = {"weight": fadapt.LoRA(r=2), "bias": fadapt.IA3()}
    configs = [fadapt.Config(rules, seed=i, dtype=torch.float64) for i in range(count)]
    made = [fadapt.init(model, config) for config in configs]
    params = made[0] if count == 1 else fadapt.stack(made)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf += 0.1

    def losses(params: Any) -> torch.Tensor:
        return fadapt.run(model, params, x, lambda out, _: out.square().mean(), verify=False)

    torch.compiler.reset()
    compiled = torch.compile(losses, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(params), losses(params), rtol=1e-12, atol=1e-12)
