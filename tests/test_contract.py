"""The contract with a method's author: fields, what init returns, messages, names, constants."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

import fadapt
from fadapt import IA3, Chain, ConfigError, LoRA, Method
from fadapt.testing import Case, check_method


def net(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16, bias), nn.Tanh(), nn.Linear(16, 8, bias)).eval()


X = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1))


# ---- fields

PUBLIC = sorted(
    (
        cls
        for cls in vars(fadapt).values()
        if isinstance(cls, type) and issubclass(cls, Method) and cls is not Method
    ),
    key=lambda cls: cls.__name__,
)
HOSTILE = [
    True,
    False,
    None,
    "8",
    "",
    2.5,
    4.0,
    0,
    -1,
    10**9,
    10**30,
    1e300,
    -0.0,
    math.nan,
    math.inf,
    -math.inf,
    1j,
    [],
    [4],
    (4,),
    {"r": 4},
    {4},
    object(),
    LoRA,
    LoRA(),
    b"8",
    np.float32("nan"),
    torch.tensor(4),
    torch.tensor(float("nan")),
    Ellipsis,
]
SMALL: dict[str, dict[str, Any]] = {
    "AntiPaSTOAblate": {"r": 4},
    "AntiPaSTOArrow": {"r": 4, "b": 2},
    "AntiPaSTODPLR": {"r": 4, "k": 2},
    "AntiPaSTORotation": {"r": 4},
    "Chain": {"methods": (IA3(),)},
    "OFT": {"block_size": 4},
    "RoAd": {"group_size": 4},
    "SSVD": {"k": 4},
}


def untrained_is_base(method: Method) -> bool:
    model = net()
    params = fadapt.init(model, method, [X] if method.statistic is not None else None)
    return torch.equal(fadapt.apply(model, params, X), model(X))


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_any_value_in_any_field_is_refused_or_right(cls: type[Method]) -> None:
    """No foreign error, and nothing that is taken and then is not the base."""
    if cls is fadapt.SSteer:
        usual: dict[str, Any] = {}
    else:
        usual = SMALL.get(cls.__name__, {"r": 4} if "r" in cls.__dataclass_fields__ else {})
    for f in dataclasses.fields(cls):
        for value in HOSTILE:
            try:
                method = cls(**{**usual, f.name: value})
                fine = cls is fadapt.SSteer or untrained_is_base(method)
            except fadapt.FadaptError:
                continue
            else:
                assert fine or not method.starts_at_identity, (f.name, value)


@dataclass(frozen=True)
class Fields(IA3):
    count: int = 1
    share: float = 0.5
    on: bool = False
    word: str = "a"
    mode: Literal["x", "y"] = "x"
    sizes: tuple[int, ...] = (1,)
    pair: tuple[int, float] = (1, 2.0)
    inner: Method | None = None
    maybe: int | None = None
    free: Any = None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"count": True}, r"Fields.count must be an int, got True; write Fields\(count=1\)"),
        ({"count": 3.0}, r"write Fields\(count=3\)"),
        ({"count": "3"}, r"write Fields\(count=3\)"),
        ({"share": "a"}, "Fields.share must be a number"),
        ({"share": math.nan}, "finite"),
        ({"share": True}, "a number"),
        ({"on": 1}, "True or False"),
        ({"on": "no"}, "True or False"),
        ({"word": 3}, "a string"),
        ({"mode": "z"}, "one of 'x', 'y'"),
        ({"sizes": 3}, r"write Fields\(sizes=\(3,\)\)"),
        ({"sizes": (1, "b")}, "a tuple of int, each an int"),
        ({"sizes": {1, 2}}, "a tuple"),
        ({"pair": (1,)}, "a tuple of 2"),
        ({"inner": LoRA}, "an instance of Method, with brackets or None"),
        ({"inner": "LoRA"}, "an instance of Method"),
        ({"maybe": 1.5}, "an int or None"),
        ({"free": {}}, "a tuple of them"),
        ({"free": torch.ones(2)}, "a tuple of them"),
        ({"free": math.nan}, "NaN"),
    ],
)
def test_a_field_is_what_its_annotation_says(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Fields(**fields)


def test_values_become_what_python_and_files_know() -> None:
    method = Fields(
        count=np.int64(3),  # type: ignore[arg-type]
        share=np.float32(0.25),  # type: ignore[arg-type]
        sizes=[1, 2],  # type: ignore[arg-type]
        free=[1, [2]],
    )
    assert (type(method.count), type(method.share)) == (int, float)
    assert (method.sizes, method.free) == ((1, 2), (1, (2,)))
    assert Fields(share=1).share == 1
    hash(method)


def test_a_post_init_of_its_own_does_not_go_round_the_check() -> None:
    @dataclass(frozen=True)
    class Own(IA3):
        n: int = 1

        def __post_init__(self) -> None:
            if self.n < 1:
                raise ConfigError("n")

    with pytest.raises(ConfigError, match=r"Own.n must be an int"):
        Own(n="1")  # type: ignore[arg-type]
    changed = Own()
    object.__setattr__(changed, "n", "1")
    with pytest.raises(ConfigError, match=r"Own.n must be an int"):
        fadapt.init(net(), changed)


def test_a_bare_list_of_methods_and_a_single_one() -> None:
    assert Chain([LoRA(), IA3()]).methods == (LoRA(), IA3())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"write Chain\(methods=\(IA3\(\),\)\)"):
        Chain(IA3())  # type: ignore[arg-type]


# ---- what is no method yet


def made(name: str, **members: Any) -> Method:
    members.setdefault("init", lambda self, site, rng: ({"v": site.zeros(site.out_features)}, {}))
    return dataclass(frozen=True)(type(name, (Method,), members))()


def gate(self: Method, p: Any, x: Any, y: Any, base: Any) -> Any:
    return p["v"] * y


def _init(value: Any) -> Any:
    return lambda self, site, rng: value(site)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Method(), "has no init; write init"),
        (made("Nothing"), "neither shift nor delta"),
        (
            made("One", delta=gate, init=_init(lambda s: {"v": s.zeros(s.out_features)})),
            "two dicts",
        ),
        (made("No", delta=gate, init=_init(lambda s: None)), "NoneType; return two dicts"),
        (made("L", delta=gate, init=_init(lambda s: ([1], {}))), "two dicts"),
        (made("N", delta=gate, init=_init(lambda s: ({"v": 1.0}, {}))), "must be a tensor"),
        (made("I", delta=gate, init=_init(lambda s: ({"v": torch.ones(3).int()}, {}))), "second"),
        (
            made("S", delta=gate, init=_init(lambda s: ({"strength": s.zeros(1)}, {}))),
            "rename .'strength'.",
        ),
        (
            made("Z", delta=gate, init=_init(lambda s: ({"v": s.zeros(s.out_features) + 1}, {}))),
            "Z.delta at 0.weight is not zero.*increment that starts at zero",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else "",
)
def test_init_refuses_what_is_no_method(method: Method, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        fadapt.init(net(), method)


def test_a_forgotten_decorator_is_named() -> None:
    class Bare(IA3):
        n: int = 2

    with pytest.raises(ConfigError, match=r"write @dataclass\(frozen=True\) above"):
        fadapt.init(net(), Bare())


@pytest.mark.parametrize("stacked", [False, True])
def test_an_increment_of_another_shape_names_method_and_site(stacked: bool) -> None:
    for members in (
        {"delta": lambda self, p, x, y, base: x[:, :3]},
        {"shift": lambda self, p, x: x[:, :3]},
        {"delta": lambda self, p, x, y, base: p["v"]},
    ):
        model = net()
        params = fadapt.init(model, {"^0": made("Odd", **members)})
        with pytest.raises(ConfigError, match=r"Odd.\w+ at 0.weight returned \("):
            fadapt.apply(model, fadapt.stack([params, params]) if stacked else params, X)


# ---- check_method


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (made("NoFlag", delta=gate), "bias_as_declared.*write acts_on_bias = True in NoFlag"),
        (
            made("Idle", delta=lambda self, p, x, y, base: p["v"].expand_as(y), acts_on_bias=False),
            "write acts_on_bias = True in Idle",
        ),
        (
            made("Tanh", delta=lambda s, p, x, y, base: p["v"] * y.tanh(), acts_on_bias=True),
            "merged_equals_run.*not affine in its input",
        ),
        (made("Nothing"), "neither shift nor delta"),
        (made("One", delta=gate, init=_init(lambda s: {"v": s.zeros(1)})), "two dicts"),
        (made("Shape", delta=lambda s, p, x, y, base: x), "Shape.delta at 0.weight returned"),
        (made("Crash", delta=lambda s, p, x, y, base: p["w"]), "Crash.. at .*KeyError: 'w'"),
        (
            made("Unused", delta=lambda s, p, x, y, base: 0 * y, acts_on_bias=False),
            "read the trainable leaves",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else "",
)
def test_check_method_names_the_cause_and_the_cure(method: Method, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_method(method, [Case()])


@dataclass(frozen=True)
class NeedsBias(Method):
    acts_on_bias = True  # type: ignore[assignment]

    def check(self, site: Any) -> None:
        if site.bias is None:
            raise ConfigError(f"{site.name} has no bias")

    def init(self, site: Any, rng: Any) -> Any:
        return {"b": site.zeros(site.out_features)}, {}

    def delta(self, p: Any, x: Any, y: Any, base: Any) -> Any:
        return p["b"].expand_as(y)


def test_a_refused_case_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    check_method(NeedsBias())
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("refused Case(")
    assert "has no bias" in out[0]
    assert out[-1].endswith("hold in 2 of 3 cases")
    with pytest.raises(AssertionError, match="refuses every case"):
        check_method(NeedsBias(), [Case(bias=False)])


# ---- a bias for a layer without one


def test_merge_gives_a_layer_the_bias_that_a_method_adds() -> None:
    model = net(bias=False)
    params = fadapt.init(model, {"^0": fadapt.BitFit()})
    params["0.weight"].train["d"].data.normal_()
    with pytest.warns(fadapt.FadaptWarning, match="0.bias is new"):
        merged = fadapt.merge(model, params)
    want = fadapt.apply(model, params, X)
    got = torch.func.functional_call(model, merged, (X,), tie_weights=False)
    torch.testing.assert_close(got, want)
    model[0].bias = nn.Parameter(merged["0.bias"])  # type: ignore[index]
    assert not model.load_state_dict(merged, strict=False).unexpected_keys
    torch.testing.assert_close(model(X), want)


# ---- names in files


def _saved_class(**members: Any) -> type[Method]:
    body = {"init": IA3.init, "delta": IA3.delta, "acts_on_bias": True, **members}
    cls = dataclass(frozen=True)(type("Mine", (Method,), body))
    cls.__module__ = "__main__"
    return cls


def test_a_named_class_may_move(tmp_path: Any) -> None:
    model = net()
    old = _saved_class(name="project:Mine-1")
    fadapt.save(fadapt.init(model, old()), tmp_path / "a")
    old.name = "project:forgotten"  # type: ignore[misc]
    with pytest.raises(fadapt.CheckpointError, match="unknown method 'project:Mine-1'"):
        fadapt.load(tmp_path / "a", model)
    new = _saved_class(name="project:Mine-2", aliases=("project:Mine-1",))
    assert type(fadapt.load(tmp_path / "a", model)["0.weight"].method) is new


def test_a_class_of_main_without_a_name_warns_on_saving(tmp_path: Any) -> None:
    cls = _saved_class()
    with pytest.warns(fadapt.FadaptWarning, match='name = "my_project:Mine"'):
        fadapt.save(fadapt.init(net(), cls()), tmp_path / "a")
    taken = _saved_class(name="LoRA")
    with pytest.raises(ConfigError, match="fadapt's own"):
        fadapt.save(fadapt.init(net(), taken()), tmp_path / "b")
    taken.name = "project:free"  # type: ignore[misc]
    assert "project:free" in sys.modules["fadapt.method_json"]._classes()


# ---- constants that are no floats


@dataclass(frozen=True)
class Permuted(Method):
    """y' = y + d ∘ x[perm] where mask, for square layers."""

    r: int = 4

    def init(self, site: Any, rng: torch.Generator) -> Any:
        order = torch.randperm(site.in_features, generator=rng)[: site.out_features]
        mask = torch.arange(site.out_features) % 3 > 0
        fixed = {"order": order.to(site.device), "mask": mask.to(site.device)}
        return {"d": site.zeros(site.out_features)}, fixed

    def delta(self, p: Any, x: Any, y: Any, base: Any) -> Any:
        return torch.where(p["mask"], x.index_select(-1, p["order"]) * p["d"], 0)


def test_integer_and_boolean_constants_pass_the_laws() -> None:
    check_method(Permuted(), [Case(widths=(16, 12, 8)), Case((12, 8, 4), False, torch.float32)])


def test_integer_constants_keep_their_dtype(tmp_path: Any) -> None:
    model = net()
    params = fadapt.init(model, Permuted()).to(dtype=torch.bfloat16)
    fadapt.save(params, tmp_path / "a")
    stack = fadapt.stack([params, fadapt.init(model, Permuted()).to(dtype=torch.bfloat16)])
    for each in (params, fadapt.load(tmp_path / "a", model), *fadapt.unstack(stack)):
        fixed = each["0.weight"].fixed
        assert (fixed["order"].dtype, fixed["mask"].dtype) == (torch.int64, torch.bool)
        assert torch.equal(fixed["order"], params["0.weight"].fixed["order"])


# ---- dropout and the training flag

DROPPED = LoRA(r=4, dropout=0.5)


def lively(model: nn.Module, method: Method, seed: int = 0) -> fadapt.Params:
    params = fadapt.init(model, method)
    rng = torch.Generator().manual_seed(seed)
    for leaf in fadapt.trainable(params):
        leaf.data += 0.3 * torch.randn(leaf.shape, generator=rng)
    return params


def test_dropout_passes_the_laws() -> None:
    check_method(DROPPED, [Case()])


@pytest.mark.parametrize("method", [DROPPED, Chain((DROPPED, IA3())), fadapt.DoRA(4, dropout=0.5)])
def test_dropout_acts_in_training_mode_alone(method: Method) -> None:
    model = net()
    params = lively(model, method)
    still = fadapt.apply(model, params, X)
    assert torch.equal(still, fadapt.apply(model, params, X))
    merged = torch.func.functional_call(model, fadapt.merge(model, params), (X,))
    torch.testing.assert_close(still, merged)
    model.train()
    one, other = (fadapt.apply(model, params, X) for _ in range(2))
    assert not torch.allclose(one, other)
    with fadapt.bound(model, params):
        assert not torch.equal(model(X), model(X))
        model.eval()
        assert torch.equal(model(X), still)


def test_dropout_is_that_of_peft_in_the_mean_and_the_variance() -> None:
    model = nn.Linear(16, 8).train()
    params, draws = lively(model, DROPPED), 4000
    x = X[0, :1].expand(draws, -1)
    out = fadapt.apply(model, params, x) - model(x)
    a, b = (params["weight"].train[k].detach() for k in "AB")
    want = 4.0 * (nn.functional.dropout(x, 0.5) @ a.mT @ b.mT)
    error = (out.var(0) / draws).sqrt()
    assert ((out.mean(0) - 4.0 * x[0] @ a.mT @ b.mT).abs() < 5 * error).all()
    torch.testing.assert_close(out.var(0), want.var(0), rtol=0.2, atol=0)


@pytest.mark.parametrize("vmapped", [False, True])
def test_a_stack_draws_for_each_adapter_apart(vmapped: bool) -> None:
    @dataclass(frozen=True)
    class Slow(LoRA):
        """Without batch axes of its own."""

        @property
        def supports_batch_dims(self) -> bool:
            return False

    model = net().train()
    params = lively(model, Slow(4, dropout=0.5) if vmapped else DROPPED)
    one, other = fadapt.apply(model, fadapt.stack([params, params]), X)
    assert not torch.allclose(one, other)


def test_checkpointing_recomputes_the_same_draws() -> None:
    from torch.utils.checkpoint import checkpoint

    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: torch.Tensor) -> Any:
            return checkpoint(self.inner, x, use_reentrant=False)

    model = Saved().train()
    params = lively(model, DROPPED)
    grads = []
    for whole in (model, model.inner):
        torch.manual_seed(5)
        with fadapt.bound(model, params):
            loss = whole(X).square().sum()
            grads.append(torch.autograd.grad(loss, fadapt.trainable(params)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_sweep_with_dropout_is_repeatable_and_drops() -> None:
    def loss(out: torch.Tensor, _: Any) -> torch.Tensor:
        return out.square().mean()

    def final(dropout: float) -> list[torch.Tensor]:
        trials = [fadapt.Trial(LoRA(4, dropout=dropout), lr=0.1, seed=s) for s in (0, 1)]
        model = net().train()
        report = fadapt.sweep(model, trials, [{"input": X}], steps=4, loss_fn=loss)
        return [leaf for p in report.final.values() for leaf in fadapt.trainable(p)]

    torch.manual_seed(3)
    one = final(0.5)
    torch.manual_seed(3)
    again, without = final(0.5), final(0.0)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, without, strict=True))


def test_dropout_compiles_and_follows_the_mode() -> None:
    model = net()
    params = lively(model, DROPPED)
    step = torch.compile(lambda p, x: fadapt.apply(model, p, x), fullgraph=True, backend="eager")
    assert torch.equal(step(params, X), step(params, X))
    model.train()
    assert not torch.equal(step(params, X), step(params, X))


def test_dropout_is_refused_where_it_would_do_nothing() -> None:
    with pytest.raises(ConfigError, match=r"dropout must be at least 0 and less than 1"):
        LoRA(dropout=1.0)
    with pytest.raises(ConfigError, match=r"this is embedding; write dropout=0.0"):
        fadapt.init(nn.Sequential(nn.Embedding(8, 4)), {"0": LoRA(r=2, dropout=0.1)})


@dataclass(frozen=True)
class Noisy(Method):
    """Told of training mode: doubles its increment there."""

    scale: float = field(default=2.0)

    def init(self, site: Any, rng: Any) -> Any:
        return {"B": site.zeros(site.out_features, site.in_features)}, {}

    def delta(self, p: Any, x: Any, y: Any, base: Any, training: bool = False) -> Any:
        return (self.scale if training else 1.0) * (x @ p["B"].mT)


def test_a_delta_that_asks_is_told_whether_the_layer_trains() -> None:
    model = nn.Linear(16, 8).eval()
    params = lively(model, Noisy())
    for source in (params, fadapt.stack([params, params])):
        base, still = model(X), fadapt.apply(model, source, X) - model(X)
        model.train()
        torch.testing.assert_close(fadapt.apply(model, source, X) - base, 2 * still)
        model.eval()
    check_method(Noisy(), [Case()])
