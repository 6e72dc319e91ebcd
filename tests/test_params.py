"""The pytree's verbs: split and join, scale, project, only and without, to, computed leaves."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from torch import Tensor, nn

import fadapt
from fadapt import ConfigError, LoRA, Params
from tests.models import gpt2, mlp, perturb, reals

X = reals(5, 8)


def trained(model: nn.Module, cfg=None, seed: int = 0) -> Params:
    return perturb(fadapt.init(model, cfg or LoRA(r=2)), seed=seed)


def loss(output: Tensor, batch: Tensor) -> Tensor:
    return output.square().mean()


# join


def changed(train, site: str, **leaves):
    return {**train, site: {k: t for k, t in {**train[site], **leaves}.items() if t is not None}}


BAD = {
    "a leaf is missing": lambda t: changed(t, "0.weight", A=None),
    "a leaf too many": lambda t: changed(t, "0.weight", Z=X),
    "another shape": lambda t: changed(t, "0.weight", A=torch.ones(3, 8)),
    "transposed": lambda t: changed(t, "0.weight", A=t["0.weight"]["A"].mT),
    "stacked": lambda t: changed(t, "0.weight", A=t["0.weight"]["A"][None]),
    "integers": lambda t: changed(t, "0.weight", A=torch.ones(2, 8, dtype=torch.int64)),
    "another dtype": lambda t: changed(t, "0.weight", A=t["0.weight"]["A"].double()),
    "another device": lambda t: changed(t, "0.weight", A=torch.ones(2, 8, device="meta")),
    "no tensor": lambda t: changed(t, "0.weight", A=[[1.0]]),
    "a site is missing": lambda t: {"0.weight": t["0.weight"]},
    "a site too many": lambda t: {**t, "9.weight": {}},
    "a site is no dict": lambda t: {**t, "0.weight": X},
    "None": lambda t: None,
    "a list": lambda t: list(t.values()),
}


@pytest.mark.parametrize("kind", BAD)
def test_join_takes_what_split_returned(kind) -> None:
    params = trained(mlp())
    train, rest = fadapt.split(params)
    with pytest.raises(ConfigError, match="join"):
        fadapt.join(BAD[kind](train), rest)


def test_join_of_a_stack() -> None:
    model = mlp()
    stack = fadapt.stack([trained(model), trained(model, fadapt.IA3())])
    train, rest = fadapt.split(stack)
    assert fadapt.run(model, fadapt.join(train, rest), X, loss).shape == (2,)
    for bad in (
        {},
        {"0": train["0"]},
        {**train, "2": {}},
        None,
        {"0": train["1"], "1": train["0"]},
    ):
        with pytest.raises(ConfigError, match="join"):
            fadapt.join(bad, rest)  # type: ignore[arg-type]


def test_the_rest_of_a_split_is_not_run() -> None:
    model = mlp()
    _, rest = fadapt.split(trained(model))
    for call in (
        lambda: fadapt.run(model, rest, X, loss),
        lambda: fadapt.apply(model, rest, X),
        lambda: fadapt.merge(model, rest),
        lambda: fadapt.stack([rest]),
        lambda: fadapt.scale(rest, 0.5),
        lambda: fadapt.project(rest),
        lambda: fadapt.split(rest),
        lambda: fadapt.save(rest, "nowhere"),
        lambda: rest.only("0"),
    ):
        with pytest.raises(ConfigError, match=r"join\(train, rest\)"):
            call()


def test_join_under_transforms_and_tree_maps() -> None:
    model, params = mlp(), trained(mlp())
    train, rest = fadapt.split(params)

    def value(train) -> Tensor:
        return fadapt.run(model, fadapt.join(train, rest), X, loss)

    stacked = torch.utils._pytree.tree_map(lambda t: torch.stack([t, 2 * t]), train)
    values = torch.func.vmap(value)(stacked)
    assert torch.allclose(values[0], value(train))
    doubled = torch.utils._pytree.tree_map(lambda t: t.double(), (train, rest))
    assert fadapt.join(*doubled)["0.weight"].train["A"].dtype == torch.float64
    copied = copy.deepcopy(rest)
    assert torch.equal(value(train), fadapt.run(model, fadapt.join(train, copied), X, loss))


# scale


@pytest.mark.parametrize(
    "c",
    [
        *(math.nan, math.inf, -math.inf, 1e39, 10**400, 1 + 2j, True, "1", b"1", None),
        *([1.0], (0.5,), {"q": 1.0}, object()),
        *(torch.ones(3), torch.ones(1), torch.tensor(1), torch.tensor(True), torch.tensor(1j)),
        *(torch.tensor(math.nan), torch.tensor(math.inf)),
    ],
    ids=lambda c: re.sub(" at 0x[0-9a-f]+", "", repr(c)),
)
def test_scale_refuses(c) -> None:
    with pytest.raises(ConfigError, match="strength"):
        fadapt.scale(trained(mlp()), c)


def test_scale_is_exact_in_the_adapters_dtype() -> None:
    model = mlp().double()
    params = trained(model)
    x = X.double()
    base, whole = model(x), fadapt.apply(model, params.only("2"), x)
    scaled = fadapt.apply(model, fadapt.scale(params.only("2"), 0.1), x)
    torch.testing.assert_close(scaled, base + 0.1 * (whole - base), rtol=1e-13, atol=1e-13)


def test_scale_of_a_stack_and_of_rows() -> None:
    model = mlp()
    members = [
        trained(model, seed=0),
        trained(model, LoRA(r=3), seed=1),
        trained(model, fadapt.HRA(2), seed=2),
    ]
    stack, c = fadapt.stack(members), [0.5, -1.0, 2.0]
    want = torch.stack(
        [fadapt.apply(model, fadapt.scale(p, s), X) for p, s in zip(members, c, strict=True)]
    )
    for given in (c, tuple(c), torch.tensor(c)):
        scaled = fadapt.scale(stack, given)
        torch.testing.assert_close(fadapt.apply(model, scaled, X), want)
        for i, member in enumerate(fadapt.unstack(scaled)):
            torch.testing.assert_close(fadapt.apply(model, member, X), want[i])
    rows = fadapt.scale(fadapt.select(stack, [2, None, 0, 1, 1]), [2.0, 9.0, 0.5, -1.0, -1.0])
    got = fadapt.apply(model, rows, X)
    plain = [want[2, 0], model(X)[1], want[0, 2], want[1, 3], want[1, 4]]
    torch.testing.assert_close(got, torch.stack(plain))
    for bad in ([1.0], [1.0] * 4, torch.ones(2), [1.0, "x", 2.0], [1.0, math.nan, 1.0], "abc", 0.5):
        with pytest.raises(ConfigError, match="strength"):
            fadapt.scale(stack, bad)


def test_gradients_reach_the_strengths_of_a_stack() -> None:
    model, params = mlp(), trained(mlp())
    c = torch.tensor([0.5, 2.0], requires_grad=True)
    fadapt.run(model, fadapt.scale(fadapt.stack([params, params]), c), X, loss).sum().backward()
    one = torch.tensor(0.5, requires_grad=True)
    fadapt.run(model, fadapt.scale(params, one), X, loss).backward()
    shared = torch.tensor(0.5, requires_grad=True)
    both = fadapt.stack([fadapt.scale(params, shared)] * 2)
    fadapt.run(model, both, X, loss).sum().backward()
    assert c.grad is not None
    torch.testing.assert_close(c.grad[0], one.grad)
    torch.testing.assert_close(shared.grad, 2 * one.grad)  # type: ignore[operator]


# stack of leaves that were computed


def generated(model: nn.Module, z: Tensor, net: nn.Linear, r: int = 2) -> Params:
    """Params whose B come from a hypernetwork."""
    train, rest = fadapt.split(fadapt.init(model, LoRA(r=r)))
    for leaves in train.values():
        b = leaves["B"]
        leaves["B"] = net(z)[: b.numel()].reshape(b.shape)
        leaves["A"] = leaves["A"].detach()
    return fadapt.join(train, rest)


@pytest.mark.parametrize("ranks", [(2, 2), (1, 3)])
def test_a_stack_keeps_the_graph_of_computed_leaves(ranks) -> None:
    model, net = mlp(), nn.Linear(3, 96)
    zs = reals(2, 3)

    def gradient(losses) -> Tensor:
        return torch.autograd.grad(losses.sum(), net.weight)[0]

    def members() -> list[Params]:
        return [generated(model, z, net, r) for z, r in zip(zs, ranks, strict=True)]

    want = gradient(torch.stack([fadapt.run(model, p, X, loss) for p in members()]))
    assert want.abs().max() > 0
    stack = fadapt.stack(members())
    torch.testing.assert_close(gradient(fadapt.run(model, stack, X, loss)), want)
    back = fadapt.unstack(fadapt.stack(members()))
    torch.testing.assert_close(
        gradient(torch.stack([fadapt.run(model, p, X, loss) for p in back])), want
    )
    moved = [p.to(torch.float64) for p in members()]
    assert gradient(torch.stack([fadapt.run(model, p, X, loss) for p in moved])).abs().max() > 0


def test_a_stack_under_grad() -> None:
    model, params = mlp(), trained(mlp())
    train, rest = fadapt.split(params)

    def alone(train) -> Tensor:
        return fadapt.run(model, fadapt.join(train, rest), X, loss)

    def stacked(train) -> Tensor:
        return fadapt.run(model, fadapt.stack([fadapt.join(train, rest), params]), X, loss)[0]

    want, got = torch.func.grad(alone)(train), torch.func.grad(stacked)(train)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_plain_leaves_are_new_ones() -> None:
    params = trained(mlp())
    stack = fadapt.stack([params, params])
    assert all(t.is_leaf and t.requires_grad for t in fadapt.trainable(stack))
    assert all(t.is_leaf and t.requires_grad for t in fadapt.trainable(fadapt.unstack(stack)[0]))
    assert all(t.is_leaf for t in fadapt.trainable(params.to(torch.bfloat16)))


def test_gradients_reach_the_stack_through_select() -> None:
    model = mlp()
    stack = fadapt.stack([trained(model, seed=i) for i in range(3)])
    fadapt.run(model, fadapt.select(stack, [2, None, 0, 2, None]), X, loss).sum().backward()
    (leaf,) = [g.params["2.weight"].train["B"] for g in stack.groups]
    assert leaf.grad is not None
    assert [bool(g.any()) for g in leaf.grad] == [True, False, True]


# select


@pytest.mark.parametrize("ids", [[0, None, 1, 2, None], [None] * 5, [None, 1, 1, None, 0]], ids=str)
def test_base_rows_are_the_base(ids) -> None:
    model = mlp()
    members = [
        trained(model, seed=0),
        trained(model, fadapt.IA3(), seed=1),
        trained(model, LoRA(r=3), seed=2),
    ]
    rows = fadapt.select(fadapt.stack(members), ids)
    assert len(rows) == 5
    got, base = fadapt.apply(model, rows, X), model(X)
    losses = fadapt.run(model, rows, X, loss)
    for b, i in enumerate(ids):
        if i is None:
            assert torch.equal(got[b], base[b])
        else:
            torch.testing.assert_close(got[b], fadapt.apply(model, members[i], X)[b])
        torch.testing.assert_close(losses[b], got[b].square().mean())


@pytest.mark.parametrize(
    "ids",
    [
        *(1, None, "01", [], {0: 1}, [True, False], [0.5], ["0"], [[0]], [2], [-1]),
        *(torch.tensor([True, False]), torch.tensor([0.0]), torch.tensor(0), torch.tensor([2])),
        *(torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([], dtype=torch.int64)),
        torch.tensor([0, 1], dtype=torch.complex64),
    ],
    ids=repr,
)
@pytest.mark.parametrize("groups", [1, 2])
def test_select_refuses(ids, groups) -> None:
    model = mlp()
    stack = fadapt.stack(
        [trained(model), trained(model, LoRA(r=2) if groups == 1 else fadapt.IA3())]
    )
    with pytest.raises(ConfigError, match="select"):
        fadapt.select(stack, ids)


@pytest.mark.parametrize(
    "keywords", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_beams_of_mixed_rows(keywords) -> None:
    model = gpt2().eval()
    members = [trained(model, seed=i) for i in range(2)]
    ids, order = torch.arange(12).reshape(3, 4), [1, None, 0]
    options = {**keywords, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    rows = fadapt.select(fadapt.stack(members), order)
    got = fadapt.apply(model, rows, ids, method="generate", eos_token_id=None, **options)
    want = []
    for b, i in enumerate(order):
        copied = copy.deepcopy(model)
        if i is not None:
            copied.load_state_dict(fadapt.merge(model, members[i]), strict=False)
        want.append(copied.generate(ids[b : b + 1], eos_token_id=None, **options))
    assert torch.equal(got, torch.cat(want))


# to, only, without, project, inference mode


def test_to_takes_what_a_tensor_takes() -> None:
    params = fadapt.scale(trained(mlp(), fadapt.DoRA(r=2)), 0.5)
    for moved in (
        params.to(torch.float64),
        params.to("cpu", torch.float64),
        params.to(torch.device("cpu"), torch.float64),
        params.to(dtype=torch.float64),
        params.to(torch.ones(1, dtype=torch.float64)),
        fadapt.stack([params]).to(torch.float64),
    ):
        assert {t.dtype for t in fadapt.trainable(moved)} == {torch.float64}
    for bad in ((torch.int32,), ("nowhere",), (None,), (1.5,), (torch.float32, torch.float64)):
        with pytest.raises(ConfigError):
            params.to(*bad)


def test_only_and_without() -> None:
    model = mlp()
    params = trained(model)
    assert list(params.only("0")) == list(params.without("2")) == ["0.weight"]
    got = fadapt.apply(model, params.without("0"), X)
    want = torch.func.functional_call(
        model, {"2.weight": fadapt.merge(model, params)["2.weight"]}, (X,)
    )
    torch.testing.assert_close(got, want)
    for call in (
        lambda: params.only("nothing"),
        lambda: params.without("."),
        lambda: params.only(),
        lambda: params.only("("),
        lambda: params.only(5),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError):
            call()


def test_project_of_a_stack_is_that_of_its_members() -> None:
    model = mlp()
    cfg = fadapt.OFT(block_size=4)
    params = trained(model, cfg)
    stack = fadapt.stack([params, trained(model, cfg, seed=1)])
    with pytest.raises(ConfigError, match=r"stack\.map\(fadapt\.project\)"):
        fadapt.project(stack)  # type: ignore[arg-type]
    before = fadapt.trainable(stack)
    projected = stack.map(fadapt.project)
    assert all(a is b for a, b in zip(before, fadapt.trainable(projected), strict=True))
    for one, member in zip(
        fadapt.unstack(projected), (params, trained(model, cfg, seed=1)), strict=True
    ):
        for a, b in zip(
            fadapt.trainable(one), fadapt.trainable(fadapt.project(member)), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", [LoRA(r=2), fadapt.DoRA(r=2), fadapt.PiSSA(r=2)], ids=str)
def test_params_made_without_gradients_can_be_trained(mode, method, tmp_path) -> None:
    model = mlp()
    with mode():
        params = fadapt.init(model, method)
        fadapt.save(params, tmp_path / "a")
        loaded = fadapt.load(tmp_path / "a", model)
        stack = fadapt.stack([params, params])
        (member, _) = fadapt.unstack(stack)
        moved = params.to(torch.float64).to(torch.float32)
    for p in (params, loaded, member, moved, stack):
        fadapt.run(model, p, X, loss).sum().backward()
        assert any(t.grad is not None for t in fadapt.trainable(p))


def test_a_tensor_returned_for_several_sites_is_one_leaf() -> None:
    bank: dict[int, Tensor] = {}

    class Shared(fadapt.Method):
        acts_on_bias = True

        def init(self, site, rng, stat=None):
            return {"v": bank.setdefault(0, site.zeros(1))}, {}

        def delta(self, p, x, y, base):
            return p["v"] * y

    params = fadapt.init(mlp(), Shared())
    assert len(fadapt.trainable(params)) == 1
    assert len(fadapt.trainable(fadapt.stack([params, params]))) == 1


def test_configs_as_plain_data() -> None:
    for config in (
        fadapt.Config(LoRA(r=3)),
        fadapt.Config({"q": fadapt.Chain((LoRA(r=2), fadapt.IA3())), ".": None}, seed=7),
        fadapt.Config(LoRA(), layers=[0, -1], roles=("writer",), exclude=(), dtype=torch.bfloat16),
    ):
        data = json.loads(json.dumps(config.to_dict()))
        assert fadapt.Config.from_dict(data) == config
        for key in data:
            with pytest.raises(ConfigError):
                fadapt.Config.from_dict({k: v for k, v in data.items() if k != key})
    good = fadapt.Config(LoRA()).to_dict()
    for bad in (None, 5, {}, {**good, "rules": 5}, {**good, "dtype": "int32"}, {**good, "z": 1}):
        with pytest.raises(ConfigError):
            fadapt.Config.from_dict(bad)  # type: ignore[arg-type]
