"""Dropout of the adapter's input: its masks by their formula, alone and in company."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import LoRA
from fadapt.dropout import drop, dropout_key
from tests import models as zoo
from tests.test_laws import ROWS, Case, case_of

X = torch.randn(6, 3, 10, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 5)).train()


def lively(model: nn.Module, cfg: Any, seed: int = 0) -> fadapt.Params:
    params = fadapt.init(model, fadapt.Config(cfg, seed=seed))
    rng = torch.Generator().manual_seed(seed)
    for leaf in fadapt.trainable(params):
        leaf.data += 0.3 * torch.randn(leaf.shape, generator=rng)
    return params


def mask(key: int, draw: int, share: float, rows: int, width: int) -> Tensor:
    """The kept entries, in NumPy's unsigned arithmetic."""

    def mixed(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    step = -(-width // 4)
    count = round(share * 65536)
    with np.errstate(over="ignore"):
        start = mixed(np.array([draw], np.uint64) + mixed(np.array([key], np.uint64)))
        lanes = (
            mixed(start + np.arange(rows * step, dtype=np.uint64))
            .view("<u2")
            .reshape(rows, 4 * step)[:, :width]
        )
    return torch.from_numpy(lanes >= count)


def by_formula(layer: nn.Linear, adapter: fadapt.Adapter, x: Tensor, kept: Tensor) -> Tensor:
    a, b = adapter.train["A"], adapter.train["B"]
    real = round(adapter.method.dropout * 65536) / 65536
    dropped = x * kept.view(x.shape) / (1 - real)
    return layer(x) + adapter.method.scaling * (dropped @ a.mT @ b.mT)  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_pass_is_the_formula_with_the_masks_of_its_draw(share: float) -> None:
    model = net()
    params = lively(model, LoRA(r=3, dropout=share), seed=4)
    torch.manual_seed(5)
    draw = int(torch.randint(2**31, ()))
    x = X
    for name, layer in (("0.weight", model[0]), ("2.weight", model[2])):
        key = int(params[name].fixed["dropout_key"])
        kept = mask(key, draw, share, 18, x.shape[-1])
        x = by_formula(layer, params[name], x, kept)
        x = torch.tanh(x) if name == "0.weight" else x
    torch.manual_seed(5)
    out = fadapt.apply(model, params, X)
    torch.testing.assert_close(out, x)
    leaves = fadapt.trainable(params)
    grads = (torch.autograd.grad(one.square().sum(), leaves) for one in (out, x))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_masks_are_fair_and_independent() -> None:
    share, rows, width = 0.1, 400, 50
    ones = torch.ones(rows, width)
    drawn = torch.stack(
        [
            drop(ones, share, dropout_key("dropout", seed, "w"), torch.tensor(step)) > 0
            for seed in range(8)
            for step in range(8)
        ]
    ).double()
    n = drawn.numel()
    sd = (share * (1 - share)) ** 0.5
    assert abs(drawn.mean() - (1 - share)) < 5 * sd / n**0.5
    z = (drawn - (1 - share)) / sd
    pairs = (
        z[:-1] * z[1:],
        z[:, :-1] * z[:, 1:],
        z[:, :, :-1] * z[:, :, 1:],
        z[:, :, 4:] * z[:, :, :-4],
    )
    for product in (*pairs, z[:8] * z[8:16], z[:, ::2, :-1] * z[:, 1::2, 1:]):
        assert abs(product.mean()) < 5 / product.numel() ** 0.5
    for axis in (0, 1, 2):  # no row, column or mask is kept too often
        others = [i for i in range(3) if i != axis]
        means = z.mean(others)
        assert means.abs().max() < 5 / (n / z.shape[axis]) ** 0.5
    kept = drop(ones, share, None, torch.tensor(3))
    torch.testing.assert_close(kept.max(), torch.tensor(1 / (1 - round(share * 65536) / 65536)))


def test_each_method_with_a_product_of_the_input_drops() -> None:
    model = net()
    for method in (
        fadapt.DoRA(r=2, dropout=0.5),
        fadapt.RsLoRA(r=2, dropout=0.5),
        fadapt.PiSSA(r=2, dropout=0.5),
        fadapt.KaSA(r=2, dropout=0.5),
        fadapt.DeLoRA(r=2, dropout=0.5),
        fadapt.Full(dropout=0.5),
        fadapt.SSVD(k=2, dropout=0.5),
        fadapt.Chain((LoRA(r=2, dropout=0.5), fadapt.IA3())),
    ):
        params = lively(model.train(), method)
        one, other = fadapt.apply(model, params, X), fadapt.apply(model, params, X)
        assert not torch.equal(one, other), method
        alike = fadapt.apply(model.eval(), params, X)
        assert torch.equal(alike, fadapt.apply(model, params, X))
        assert "dropout=0.5" in repr(method)
    for method in (fadapt.IA3(dropout=0.1), fadapt.HRA(r=2, dropout=0.1), fadapt.ReFT(dropout=0.1)):
        with pytest.raises(fadapt.ConfigError, match="not made of its input"):
            fadapt.init(model, method)
    with pytest.raises(fadapt.ConfigError, match="give dropout to the methods in it"):
        fadapt.init(model, fadapt.Chain((LoRA(), fadapt.IA3()), dropout=0.1))
    assert repr(LoRA()) == "LoRA(r=8, alpha=16.0)"


def test_two_parts_of_a_chain_have_masks_of_their_own() -> None:
    layer = nn.Linear(10, 5).train()
    chain = fadapt.Chain((LoRA(r=2, dropout=0.5), LoRA(r=2, dropout=0.5)))
    params = lively(layer, chain)
    a = params["weight"]
    same = {k: a.train[k.replace("1.", "0.")] for k in a.train}
    params = params.map(lambda one: one.replace(same))
    single = params.map(
        lambda one: fadapt.Adapter(
            one.site, LoRA(r=2, dropout=0.5), {k: a.train[f"0.{k}"] for k in "AB"}, one.fixed
        )
    )
    torch.manual_seed(3)
    both = fadapt.apply(layer, params, X) - layer(X)
    torch.manual_seed(3)
    once = fadapt.apply(layer, single, X) - layer(X)
    assert not torch.allclose(both, 2 * once)


def loss(out: Tensor, _: Any) -> Tensor:
    return (out - 0.3).square().mean()


TRIALS = {
    "a": fadapt.Trial(LoRA(r=2, dropout=0.3), lr=0.05, seed=1, name="a"),
    "b": fadapt.Trial(LoRA(r=4, dropout=0.3), lr=0.02, seed=2, name="b"),
    "c": fadapt.Trial(fadapt.DeLoRA(r=2, dropout=0.1), lr=0.02, seed=3, name="c"),
    "d": fadapt.Trial(fadapt.IA3(), lr=0.02, seed=4, name="d"),
    "e": fadapt.Trial(LoRA(r=2, dropout=0.3), lr=0.02, seed=1, name="e"),
    "f": fadapt.Trial(fadapt.Chain((LoRA(r=2, dropout=0.3), fadapt.IA3())), seed=5, name="f"),
    "g": fadapt.Trial(fadapt.Sum((LoRA(r=2, dropout=0.3), fadapt.IA3())), seed=6, name="g"),
}


def final(names: str, **options: Any) -> dict[str, list[Tensor]]:
    trials = [TRIALS[name] for name in names]
    batches = [{"input": X + i} for i in range(3)]
    report = fadapt.sweep(net(), trials, batches, steps=6, loss_fn=loss, **options)
    return {name: fadapt.trainable(params) for name, params in report.final.items()}


def test_a_trial_is_the_same_alone_and_in_any_company() -> None:
    whole = final("abcdefg")
    for options in ({"names": "a"}, {"names": "c"}, {"names": "ea"}, {"names": "gdcba"},
                    {"names": "abcdefg", "max_adapters": 1}, {"names": "abcde", "max_adapters": 2},
                    {"names": "abcdefg", "seed": 77}):  # fmt: skip
        for name, leaves in final(**options).items():
            for a, b in zip(leaves, whole[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    params = fadapt.init(net(), fadapt.Config(LoRA(r=2, dropout=0.3), seed=1))
    batches = [{"input": X + i} for i in range(3)]
    alone = fadapt.fit(net(), params, batches, lr=0.05, steps=6, loss_fn=loss)
    for a, b in zip(fadapt.trainable(alone), whole["a"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_resumed_sweep_goes_on_with_the_same_masks(tmp_path: Path) -> None:
    trials = [TRIALS[name] for name in "ac"]
    batches = [{"input": X + i} for i in range(3)]
    calls, last = 0, None

    class StopError(Exception):
        pass

    def stop(out: Tensor, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == last:
            raise StopError
        return loss(out, batch)

    whole = fadapt.sweep(net(), trials, batches, steps=6, loss_fn=stop)
    calls, last = 0, calls - 2 * 2  # in the fourth step: the others are of looks at the model
    kept = fadapt.Checkpoints(tmp_path / "run", every=2)
    with pytest.raises(StopError):
        fadapt.sweep(net(), trials, batches, steps=6, loss_fn=stop, directory=kept)
    torch.manual_seed(999)
    kept = fadapt.Checkpoints(tmp_path / "run", every=2, resume="anyway")
    again = fadapt.sweep(net(), trials, batches, steps=6, loss_fn=loss, directory=kept)
    for name, params in whole.final.items():
        for a, b in zip(fadapt.trainable(params), fadapt.trainable(again.final[name]), strict=True):
            assert torch.equal(a, b)


def test_checkpointing_of_a_language_model_has_the_same_gradients() -> None:
    base = zoo.llama().train()
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "labels": ids}
    params = lively(base, LoRA(r=2, dropout=0.4))
    for source in (params, fadapt.stack([params, lively(base, fadapt.DoRA(r=2, dropout=0.2), 1)])):
        grads = []
        for checkpointing in (False, True):
            if checkpointing:
                base.gradient_checkpointing_enable()
            torch.manual_seed(5)
            losses = fadapt.run(base, source, batch)
            grads.append(torch.autograd.grad(losses.sum(), fadapt.trainable(source)))
        base.gradient_checkpointing_disable()
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_under_vmap_each_adapter_has_its_own_masks() -> None:
    model = net()
    members = [lively(model, LoRA(r=2, dropout=0.5), seed) for seed in (1, 2)]
    halves = [fadapt.split(p) for p in members]
    train = torch.utils._pytree.tree_map(lambda *t: torch.stack(t), *(h[0] for h in halves))

    def out(train: Any) -> Tensor:
        return fadapt.apply(model, fadapt.join(train, halves[0][1]), X)

    with pytest.raises(RuntimeError, match="random operation"):
        torch.func.vmap(out)(train)
    torch.manual_seed(7)
    same = torch.func.vmap(out, randomness="same")(train)
    torch.manual_seed(7)
    torch.testing.assert_close(same[0], fadapt.apply(model, members[0], X))
    twice = torch.utils._pytree.tree_map(lambda t: t[:1].expand(2, *t.shape[1:]), train)
    one, other = torch.func.vmap(out, randomness="different")(twice)
    assert not torch.allclose(one, other)
    grads = torch.func.grad(lambda t: out(t).sum())(halves[0][0])
    assert all(t.isfinite().all() for v in grads.values() for t in v.values())


@dataclass(frozen=True)
class Named(fadapt.Method):
    def init(self, site: Any, rng: Any) -> Any:
        return {"dropout_key": site.zeros(site.out_features)}, {}

    def delta(self, p: Any, x: Any, y: Any, base: Any) -> Any:
        return p["dropout_key"] * y


@dataclass(frozen=True)
class Mapped(fadapt.Method):
    """A full increment, of one adapter at a time: a stack maps over its members."""

    def init(self, site: Any, rng: Any) -> Any:
        return {"D": site.zeros(site.out_features, site.in_features)}, {}

    def delta(self, p: Any, x: Any, y: Any, base: Any) -> Any:
        return x @ p["D"].mT


def test_a_stack_under_vmap_has_masks_of_its_own() -> None:
    """Two stacks of two methods, one of which is itself mapped over its members."""
    model = net()
    stack = fadapt.stack(
        [lively(model, LoRA(r=2, dropout=0.5)), lively(model, Mapped(dropout=0.5))]
    )
    train, rest = stack.split()
    twice = torch.utils._pytree.tree_map(lambda t: torch.stack([t, t]).detach(), train)

    def losses(train: Any) -> Tensor:
        return fadapt.run(model, rest.join(train), X, loss, verify=False)

    with pytest.raises(RuntimeError, match="random operation"):
        torch.func.vmap(losses)(twice)
    one, other = torch.func.vmap(losses, randomness="different")(twice)
    assert (one != other).all()
    torch.manual_seed(7)
    one, other = torch.func.vmap(losses, randomness="same")(twice)
    assert torch.equal(one, other)
    torch.manual_seed(7)
    torch.testing.assert_close(one, losses(train))
    grads = torch.func.vmap(torch.func.grad(lambda t: losses(t).sum()), randomness="same")(twice)
    for leaf in torch.utils._pytree.tree_leaves(grads):
        assert torch.equal(leaf[0], leaf[1])
        assert leaf.abs().max() > 0


@pytest.mark.parametrize("members", [1, 2])
def test_compiled_passes_have_masks_and_gradients(members: int) -> None:
    """Through AOTAutograd, whose backward has to find the forward's masks again."""
    model = net()
    each = [lively(model, LoRA(r=3, dropout=0.5), seed=i) for i in range(members)]
    params = each[0] if members == 1 else fadapt.stack(each)
    torch.compiler.reset()

    def step(params: Any, x: Tensor) -> Tensor:
        return fadapt.run(model, params, x, loss).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = fadapt.trainable(params)
    seen = []
    for seed in (3, 4):
        found = []
        for function in (compiled, step):
            torch.manual_seed(seed)
            value = function(params, X)
            found.append((value, *torch.autograd.grad(value, leaves)))
        for ours, ref in zip(*found, strict=True):
            torch.testing.assert_close(ours, ref)
        seen.append(found[0][0])
    assert seen[0] != seen[1], "the masks of two passes are the same"


def test_the_key_is_kept(tmp_path: Path) -> None:
    model = net()
    params = lively(model, LoRA(r=2, dropout=0.5)).to(dtype=torch.bfloat16)
    fadapt.save(params, tmp_path / "a")
    stack = fadapt.stack(
        [params, lively(model, LoRA(r=4, dropout=0.5), 2).to(dtype=torch.bfloat16)]
    )
    for again in (fadapt.load(tmp_path / "a", model), fadapt.unstack(stack)[0]):
        for name, a in params.items():
            key = again[name].fixed["dropout_key"]
            assert key.dtype == torch.int64
            assert torch.equal(key, a.fixed["dropout_key"])
    keys = {int(a.fixed["dropout_key"]) for p in fadapt.unstack(stack) for a in p.values()}
    assert len(keys) == 4
    with pytest.raises(fadapt.ConfigError, match="leaf names must be distinct and not of"):
        fadapt.init(model, Named())


def test_combined_adapters_drop_as_one(tmp_path: Path) -> None:
    model = net()
    parts = [lively(model, LoRA(r=2, dropout=0.5)), lively(model, fadapt.IA3(), 1)]
    both = fadapt.combine([*parts, lively(model, LoRA(r=1, dropout=0.5), 2)], [0.5, 1.0, 1.0])
    fadapt.save(both, tmp_path / "both")
    found = []
    for params in (both, fadapt.load(tmp_path / "both", model), fadapt.combine([both], [1.0])):
        for company in (None, parts[0]):
            torch.manual_seed(3)
            if company is None:
                found.append(fadapt.apply(model, params, X))
            else:
                found.append(fadapt.apply(model, fadapt.stack([params, company]), X)[0])
    for out in found[1:]:
        torch.testing.assert_close(out, found[0])
    assert not torch.allclose(found[0], fadapt.apply(model, both, X))


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=3, lora_dropout=0.25, target_modules=["0", "2"]),
        peft.LoraConfig(r=3, lora_dropout=0.25, target_modules=["0"], bias="all"),
        peft.LoraConfig(r=3, lora_dropout=0.25, target_modules=["0"], use_dora=True),
        peft.DeloraConfig(r=3, module_dropout=0.25, target_modules=["0", "2"]),
        peft.AdaLoraConfig(lora_dropout=0.25, target_modules=["0", "2"], total_step=9),
        peft.HiraConfig(r=3, hira_dropout=0.25, target_modules=["0", "2"]),
        peft.GraloraConfig(r=2, gralora_k=1, gralora_dropout=0.25, target_modules=["0", "2"]),
        peft.MissConfig(r=4, miss_dropout=0.25, target_modules=["0", "2"]),
        peft.TinyLoraConfig(u=3, tinylora_dropout=0.25, target_modules=["0", "2"]),
        peft.TinyLoraConfig(u=3, tinylora_dropout=0.25, target_modules=["0"], weight_tying=1.0),
    ],
    ids="LoRA bias DoRA DeLoRA AdaLoRA HiRA GraLoRA MiSS TinyLoRA tied".split(),
)
def test_pefts_dropout_is_read_and_written(config: Any, tmp_path: Path) -> None:
    base = net()
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path / "in")
    params = fadapt.peft.load_peft(tmp_path / "in", base)
    method = params["0.weight"].method
    parts = method.methods if isinstance(method, fadapt.Chain) else (method,)
    assert parts[0].dropout == 0.25
    moved = params.map(lambda a: a.replace({k: t + 0.1 for k, t in a.train.items()}))
    assert not torch.equal(*(fadapt.apply(base, moved, X) for _ in range(2)))
    fadapt.peft.save_peft(base, params, tmp_path / "out")
    again = peft.PeftConfig.from_pretrained(tmp_path / "out")
    (field,) = [k for k, v in vars(config).items() if k.endswith("dropout") and v]
    assert getattr(again, field) == 0.25
    mixed = {"0": LoRA(r=2, dropout=0.1), "2": LoRA(r=2)}
    with pytest.raises(fadapt.CheckpointError, match="one dropout for all"):
        fadapt.peft.save_peft(base, fadapt.init(base, mixed), tmp_path / "mixed")


@pytest.mark.parametrize("row", [r for r in ROWS if not isinstance(ROWS[r], fadapt.Chain)])
def test_every_method_drops_or_refuses(row: str) -> None:
    """A share of dropout that drops nothing would be a silent lie."""
    if isinstance(ROWS[row], fadapt.Sum):
        return  # whose parts have their own
    case = case_of(row, Case((12, 16, 8), dtype=torch.float32))
    method, model = dataclasses.replace(ROWS[row], dropout=0.5), case.model()
    refused = ""
    try:
        params = case.trained(model, method)
    except fadapt.ConfigError as error:
        refused = str(error)
    if refused:
        assert "write dropout=0.0" in refused
        return
    model.train()
    torch.manual_seed(0)
    x = case.x(30)
    one, other = fadapt.apply(model, params, x), fadapt.apply(model, params, x)
    assert not torch.equal(one, other)
    torch.manual_seed(0)
    assert torch.equal(one, fadapt.apply(model, params, x))
    model.eval()
    assert torch.equal(fadapt.apply(model, params, x), fadapt.apply(model, params, x))
