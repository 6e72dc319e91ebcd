"""The laws that every method passes, for the package's own methods and for yours.

    from fadapt.testing import check_method
    check_method(MyMethod(r=4))

Each law is a function of a method and a :class:`Case` (shapes, bias, dtype, seed) that raises
AssertionError. The references are the derived dense weights, loops, finite differences and the
untouched model; none is the code under test.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .adapted_map import ContractError, check_contract, increment_factors, says_last_product
from .arguments import check_function, listed
from .base.linear_map import DenseMap
from .config import Config
from .errors import ConfigError, FadaptError, FadaptWarning
from .fields import check_fields
from .init import init
from .io.adapters import load, save
from .merge import merge
from .method import Method
from .params.params import Params, join, project, scale, split, trainable
from .params.stack import stack, unstack
from .run import apply, run


@dataclass(frozen=True)
class Case:
    """One draw: a two-layer model, its dtype and the seed of everything.

    Attributes:
        widths: input, hidden and output width of the model.
        bias: whether its layers have biases.
        dtype: of the base weights and, through Config's default, of the arithmetic.
        seed: of weights, data, initial and trained-like values.
        calib: passed to ``fadapt.init``.
        rule: the parameters that the method adapts; "" for what it usually means.
    """

    widths: tuple[int, int, int] = (12, 16, 8)
    bias: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0
    calib: Callable[[Case], Any] | None = None
    rule: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        least = min(self.widths)
        if least < 1 or not self.dtype.is_floating_point:
            raise ConfigError(
                f"{self}: widths are ints from 1, and dtype is floating; write Case((12, 16, 8))"
            )
        check_function("calib", self.calib, "def calib(case)")

    @property
    def rng(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1)

    def model(self) -> nn.Module:
        d_in, hidden, d_out = self.widths
        model = nn.Sequential(
            nn.Linear(d_in, hidden, self.bias), nn.Tanh(), nn.Linear(hidden, d_out, self.bias)
        )
        rng = torch.Generator().manual_seed(self.seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5, generator=rng)
        return model.to(self.dtype).eval()

    def x(self, *lead: int) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn(*lead, self.widths[0], generator=rng).to(self.dtype)

    def fresh(self, model: nn.Module, method: Method, **config: Any) -> Params:
        calib = self.calib(self) if self.calib else None
        rules = {self.rule: method} if self.rule else method
        cfg = Config(rules, seed=self.seed, **config)
        return init(model, cfg, calib, loss_fn=lambda out, _: _loss(out))

    def trained(self, model: nn.Module, method: Method, offset: int = 0) -> Params:
        """Params as training leaves them: every trainable entry moved at random."""
        params = self.fresh(model, method)
        rng = torch.Generator().manual_seed(self.seed + 3 + offset)
        start = [leaf.detach().clone() for leaf in trainable(params)]
        noise = [0.3 * torch.randn(t.shape, generator=rng).to(t) for t in start]
        for sign in (1, -1):
            with torch.no_grad():
                for leaf, before, step in zip(trainable(params), start, noise, strict=True):
                    # The other direction where a constraint undid the first.
                    if torch.equal(leaf, before):
                        leaf += sign * step
            project(params)
        return params


def well_formed(method: Method, case: Case) -> None:
    """init returns two dicts, and shift and delta fit the layer."""
    model = case.model()
    apply(model, case.fresh(model, method), case.x(2, 3))


def exact_identity(method: Method, case: Case) -> None:
    """At the start the adapted model equals the base to the last bit, in three dtypes."""
    for dtype in (case.dtype, torch.float32, torch.bfloat16):
        here = replace(case, dtype=dtype)
        model, x = here.model(), here.x(2, 3)
        for adapter_dtype in (None, dtype):
            out = apply(model, here.fresh(model, method, dtype=adapter_dtype), x)
            assert torch.equal(out, model(x)), (
                f"not the identity at the start, where the base is {dtype} and the adapter "
                f"{adapter_dtype or 'as by default'}: they differ by "
                f"{(out - model(x)).abs().max()}. shift and delta must be exact zeros at the "
                "initial leaves in every dtype: write an increment, such as d * y, where two "
                "rounded terms would have to cancel, such as (1 + d) * y - y"
            )


def merged_equals_run(method: Method, case: Case) -> None:
    """run equals the plain model with the merged weights; the strength is merged too."""
    model, x = case.model(), case.x(2, 3)
    params = case.trained(model, method)
    for c in (1.0, 0.5):
        scaled = scale(params, c)
        out = apply(model, scaled, x)
        ref = functional_call(model, _merged(model, scaled), (x,))
        _close(
            out,
            ref,
            f"run against merged weights at strength {c}",
            advice="delta and shift must be affine in x and y: each row by itself, no tanh or "
            "softmax of them, no statistic over the tokens",
        )
    moved = (apply(model, params, x) - model(x)).abs().max()
    assert moved > 1e-6, (
        "leaves that were all moved at random leave the model unchanged: let shift or delta read "
        "the trainable leaves from p"
    )


def bias_as_declared(method: Method, case: Case) -> None:
    """The bias changes exactly where ``acts_on_bias`` says so."""
    model = replace(case, bias=True).model()
    for adapter in case.trained(model, method).at_sites().values():
        if adapter.site.bias is None:
            continue
        layer: Any = model.get_submodule(adapter.site.name.removesuffix(".weight"))
        _, bias = adapter.dense(layer.weight, layer.bias)
        assert bias is not None
        by = float((bias - layer.bias).detach().abs().max())
        changed = not torch.allclose(bias, layer.bias, rtol=1e-9, atol=1e-9)
        name = type(method).__name__
        assert not changed or method.acts_on_bias, (
            f"the layer's bias changes by up to {by:.3g}, and acts_on_bias is False: write "
            f"acts_on_bias = True in {name}, or work with y - base.bias where y is read"
        )
        assert changed or not method.acts_on_bias, (
            f"the layer's bias stays as it is, and acts_on_bias is True: leave that out of {name}"
        )


def gradients_equal_dense(method: Method, case: Case) -> None:
    """Gradients through the overlay equal those through the dense weights."""
    model, x = case.model(), case.x(4)
    params = case.trained(model, method)
    if not trainable(params):
        return
    grads = torch.autograd.grad(_loss(apply(model, params, x)), trainable(params))
    weights: dict[str, Tensor] = {}
    for name, adapter in params.at_sites().items():
        own = adapter.site.bias
        bias = None if own is None else model.get_parameter(own).detach()
        weights[name], new_bias = adapter.dense(model.get_parameter(name).detach(), bias)
        if own is not None and new_bias is not None:
            weights[own] = new_bias
    refs = torch.autograd.grad(_loss(functional_call(model, weights, (x,))), trainable(params))
    for grad, ref in zip(grads, refs, strict=True):
        _close(grad, ref, "gradient against the dense weights")


def vmap_equals_loop(method: Method, case: Case) -> None:
    """vmap over stacked adapters equals a loop, values and gradients."""
    model, x = case.model(), case.x(4)
    members = [case.trained(model, method, offset=i) for i in range(3)]
    trains, rests = zip(*(split(p) for p in members), strict=True)
    if not trainable(members[0]):
        return
    stacked = _tree_stack([*trains])

    def loss(train: Any) -> Tensor:
        return run(model, join(train, rests[0]), x, lambda out, _: _loss(out))

    losses = torch.func.vmap(loss)(stacked)
    grads = torch.func.vmap(torch.func.grad(loss))(stacked)
    for i, member in enumerate(members):
        ref = _loss(apply(model, member, x))
        _close(losses[i], ref, "vmapped loss")
        refs = iter(torch.autograd.grad(ref, trainable(member)))
        for name, adapter in member.items():
            for leaf in adapter.train:
                _close(grads[name][leaf][i], next(refs), f"vmapped gradient of {leaf}")


def fold_equals_loop(method: Method, case: Case) -> None:
    """A stack of three, at different strengths, equals a loop in values and gradients."""
    model, x = case.model(), case.x(4, 3)
    members = [case.trained(model, method, offset=i) for i in range(3)]
    members[1] = scale(members[1], 0.5)
    whole = stack(members)
    out = apply(model, whole, x)
    refs = [apply(model, member, x) for member in members]
    _close(out, torch.stack(refs), "folded output")
    if not trainable(members[0]):
        return
    torch.stack([_loss(part) for part in out]).sum().backward()

    def gradient(adapter: Any) -> Any:
        return adapter.replace({k: t.grad for k, t in adapter.train.items()})

    grads = unstack(whole.map(lambda params: params.map(gradient)))
    for member, ref, grad in zip(members, refs, grads, strict=True):
        expected = torch.autograd.grad(_loss(ref), trainable(member))
        for a, b in zip(trainable(grad), expected, strict=True):
            _close(a, b, "folded gradient")


def derivatives_equal_finite_differences(method: Method, case: Case) -> None:
    """grad and jvp agree with central differences in float64."""
    case, method = replace(case, dtype=torch.float64), method.true_gradient()
    model, x = case.model(), case.x(4)
    train, rest = split(case.trained(model, method))
    if not any(train.values()):
        return
    rng = case.rng
    direction = {
        n: {k: torch.randn(t.shape, generator=rng, dtype=t.dtype) for k, t in leaves.items()}
        for n, leaves in train.items()
    }

    def loss(train: Any) -> Tensor:
        return _loss(apply(model, join(train, rest), x))

    def moved(step: float) -> Tensor:
        new = {n: {k: t + step * direction[n][k] for k, t in v.items()} for n, v in train.items()}
        return loss(new)

    with torch.no_grad():
        h = 1e-4
        # Richardson extrapolation of the central difference: error O(h^4).
        coarse, fine = ((moved(s) - moved(-s)) / (2 * s) for s in (h, h / 2))
        reference = (4 * fine - coarse) / 3
    grad = torch.func.grad(loss)(train)
    inner = sum((grad[n][k] * direction[n][k]).sum() for n, v in train.items() for k in v)
    tangent = torch.func.jvp(loss, (train,), (direction,))[1]
    _close(inner, reference, "grad against finite differences", tol=1e-6)
    _close(tangent, reference, "jvp against finite differences", tol=1e-6)


def compiled_equals_eager(method: Method, case: Case) -> None:
    """A compiled step (fullgraph) equals the eager one; a second adapter does not recompile."""
    case = replace(case, dtype=torch.float64)
    model, x = case.model(), case.x(4)
    graphs = 0

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return gm.forward

    def step(params: Params, x: Tensor) -> Tensor:
        return run(model, params, x, lambda out, _: _loss(out))

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for offset in (0, 1):
        params = case.trained(model, method, offset)
        out, ref = compiled(params, x), step(params, x)
        _close(out, ref, "compiled loss")
        if trainable(params):
            for a, b in zip(
                torch.autograd.grad(out, trainable(params)),
                torch.autograd.grad(ref, trainable(params)),
                strict=True,
            ):
                _close(a, b, "compiled gradient")
    assert graphs == 1, f"{graphs} compilations for two adapters of the same shapes"


def saved_equals_loaded(method: Method, case: Case) -> None:
    """save and load keep every bit, every dtype, the method and the config."""
    for adapter_dtype in (None, torch.bfloat16):
        model, x = case.model(), case.x(4)
        params = case.trained(model, method)
        if adapter_dtype:
            params = params.to(dtype=adapter_dtype)
        params = scale(params, 0.7)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "adapter.safetensors"
            with warnings.catch_warnings():
                # A class without a name for files yet, which saving in earnest says.
                warnings.filterwarnings("ignore", "a file that holds __main__", FadaptWarning)
                save(params, path)
            loaded = load(path, model)
        assert loaded.config == params.config, f"{loaded.config} != {params.config}"
        for name, adapter in params.items():
            other = loaded[name]
            assert (other.method, other.site) == (adapter.method, adapter.site)
            assert other.leaves.keys() == adapter.leaves.keys()
            for leaf, tensor in adapter.leaves.items():
                assert other.leaves[leaf].dtype == tensor.dtype
                assert torch.equal(other.leaves[leaf], tensor), f"{leaf} changed on disk"
        assert torch.equal(apply(model, loaded, x), apply(model, params, x))


def base_untouched(method: Method, case: Case) -> None:
    """The model keeps its tensors, values, flags and hooks, also after an exception."""
    model, x = case.model(), case.x(4)
    before = copy.deepcopy(model)
    objects = dict(model.named_parameters())
    flags = {n: p.requires_grad for n, p in objects.items()}
    state = [(dict(m.__dict__["_forward_hooks"]), m.training) for m in model.modules()]

    def fail(out: Tensor, _: Any) -> Tensor:
        raise ZeroDivisionError

    params = case.trained(model, method)
    if trainable(params):
        run(model, params, x, lambda out, _: _loss(out)).backward()
    for bad_call in (
        lambda: run(model, params, x, fail),
        lambda: run(model, params, x[:, :-1]),
    ):
        try:
            bad_call()
        except (ZeroDivisionError, RuntimeError, ValueError):
            pass
        else:
            raise AssertionError("the failing call did not raise")
    _merged(model, params)
    for name, parameter in model.named_parameters():
        assert parameter is objects[name], f"{name} is another object"
        assert torch.equal(parameter, before.get_parameter(name)), f"{name} changed"
        assert parameter.requires_grad == flags[name]
        assert parameter.grad is None, f"{name} got a gradient"
    assert state == [(dict(m.__dict__["_forward_hooks"]), m.training) for m in model.modules()]


def every_leaf_learns(method: Method, case: Case) -> None:
    """Every trainable leaf gets a nonzero finite gradient within two steps."""
    model, x = case.model(), case.x(16)
    params = case.fresh(model, method)
    if not trainable(params):
        return
    optimiser = torch.optim.SGD(trainable(params), lr=0.05)
    live: set[int] = set()
    for _ in range(2):
        optimiser.zero_grad()
        _loss(apply(model, params, x)).backward()
        for i, leaf in enumerate(trainable(params)):
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
            if leaf.grad.abs().sum() > 0:
                live.add(i)
        optimiser.step()
        project(params)
    names = [f"{n}:{k}" for n, a in params.items() for k in a.train]
    dead = [name for i, name in enumerate(names) if i not in live]
    assert not dead, f"no gradient within two steps: {dead}"


def finite_on_degenerate_weights(method: Method, case: Case) -> None:
    """A zero row, a zero column and a repeated row give finite outputs and gradients."""
    model, x = case.model(), case.x(4)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
            layer.weight[0] = 0
            layer.weight[:, 0] = 0
            layer.weight[-1] = layer.weight[1]
    for params in (case.fresh(model, method), case.trained(model, method)):
        out = apply(model, params, x)
        assert out.isfinite().all(), "output is not finite"
        if trainable(params):
            for grad in torch.autograd.grad(_loss(out), trainable(params)):
                assert grad.isfinite().all(), "gradient is not finite"


def no_dense_fallback(method: Method, case: Case) -> None:
    """nn.Linear never needs the adapted weight itself."""
    model = case.model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FadaptWarning)
        apply(model, case.trained(model, method), case.x(4))


def local_seeded_init(method: Method, case: Case) -> None:
    """A site starts from (seed, name) alone; the global generator is neither read nor advanced."""
    model = case.model()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    both = case.fresh(model, method)
    assert torch.equal(state, torch.get_rng_state()), "init advanced the global generator"
    torch.manual_seed(1)
    calib = case.calib(case) if case.calib else None
    config = Config({"^2": method}, seed=case.seed)
    alone = init(model, config, calib, loss_fn=lambda out, _: _loss(out))
    own, others = alone["2.weight"], {**both["2.weight"].train, **both["2.weight"].fixed}
    for leaf, tensor in {**own.train, **own.fixed}.items():
        other = others[leaf]
        assert torch.equal(tensor, other), f"{leaf} depends on other sites or global state"


def strength_scales(method: Method, case: Case) -> None:
    """Strength 0 is the base exactly, 1 changes nothing, others differ from both."""
    model, x = case.model(), case.x(4)
    params = case.trained(model, method)
    out = apply(model, params, x)
    assert torch.equal(apply(model, scale(params, 0), x), model(x)), "strength 0 is not the base"
    assert torch.equal(apply(model, scale(params, 1), x), out), "strength 1 changed the output"
    for c in (-1.0, 0.5):
        other = apply(model, scale(params, c), x)
        assert other.isfinite().all()
        assert not torch.allclose(other, out), f"strength {c} has no effect"


def low_rank_is_the_increment(method: Method, case: Case) -> None:
    """What ``low_rank`` states is W' - W, at every strength; a method may state nothing."""
    model = case.model()
    params = case.trained(model, method)
    for c in (1.0, -0.5):
        for adapter in scale(params, c).at_sites().values():
            site = adapter.site
            own = model.get_parameter(site.name).detach()
            weight = site.matrix(own)
            bias = None if site.bias is None else model.get_parameter(site.bias).detach()
            p = {
                k: t.detach().to(weight.dtype) if t.is_floating_point() else t
                for k, t in adapter.leaves.items()
            }
            factors = increment_factors(method, p, DenseMap(weight, bias))
            if factors is not None:
                change = site.matrix(adapter.dense(own, bias)[0]) - weight
                _close(factors[1] @ factors[0], change, f"low_rank at strength {c}")


def last_product_is_delta(method: Method, case: Case) -> None:
    """What ``last_product`` states is ``delta``; a method may state nothing."""
    model = case.model()
    params = case.trained(model, method)
    if not says_last_product(type(method)):
        return
    for adapter in params.at_sites().values():
        site = adapter.site
        bias = None if site.bias is None else model.get_parameter(site.bias).detach()
        base = DenseMap(site.matrix(model.get_parameter(site.name).detach()), bias)
        x = torch.randn(5, site.in_features, generator=case.rng, dtype=case.dtype)
        product = method.last_product(adapter.leaves, x, base)
        if product is not None:
            h, b, c = product
            delta = method.delta(adapter.leaves, x, base(x), base)
            _close(c * h @ b.mT, delta, "last_product against delta")


# In the order in which they explain: the first that fails names the cause, not a consequence.
LAWS: tuple[Callable[[Method, Case], None], ...] = (
    well_formed,
    exact_identity,
    bias_as_declared,
    merged_equals_run,
    gradients_equal_dense,
    vmap_equals_loop,
    fold_equals_loop,
    derivatives_equal_finite_differences,
    compiled_equals_eager,
    saved_equals_loaded,
    base_untouched,
    every_leaf_learns,
    finite_on_degenerate_weights,
    no_dense_fallback,
    local_seeded_init,
    strength_scales,
    low_rank_is_the_increment,
    last_product_is_delta,
)

CASES = (
    Case(),
    Case(widths=(16, 8, 12), bias=False, seed=1),
    Case(widths=(8, 24, 8), dtype=torch.float32, seed=2),
)


def check_method(
    method: Method,
    cases: Iterable[Case] = CASES,
    calib: Callable[[Case], Any] | None = None,
    count: Callable[[int, int], int] | None = None,
) -> None:
    """Runs every law on a method, and prints how many held on how many cases.

    A case whose layers the method refuses by a ConfigError (no bias, a width that it does not
    divide) is left out and named; one case at least must remain.

    Args:
        method: with hyper-parameters that fit widths of 8 to 24, all multiples of 4.
        cases: the models to check it on.
        calib: a function of the case that returns the calibration data for ``fadapt.init``.
        count: the trainable count as a function of (out_features, in_features).

    Raises:
        AssertionError: a law does not hold; the message names the law, the case, the values and
            what to write.

    Example:
        >>> from fadapt.testing import Case, check_method
        >>> check_method(fadapt.LoRA(r=2), [Case()], count=lambda out, size: 2 * (out + size))
        LoRA(r=2, alpha=16.0): 18 laws hold in 1 of 1 cases
    """
    try:
        check_contract(method)
    except ConfigError as error:
        raise AssertionError(f"{method} is no method yet: {error}") from error
    check_function("calib", calib, "def calib(case)")
    check_function("count", count, "def count(out_features, in_features)")
    draws = listed("cases", cases, "cases=[fadapt.testing.Case()]")
    if odd := [c for c in draws if not isinstance(c, Case)]:
        raise ConfigError(f"cases must be fadapt.testing.Case objects, got {odd[0]!r:.80}")
    total, refusals = 0, []
    for case in draws:
        case, total = replace(case, calib=calib), total + 1
        try:
            _hold(method, case, well_formed)
        except _RefusedError as refusal:
            refusals.append(f"refused {case}: {refusal}")
            continue
        for law in LAWS[1:]:
            _hold(method, case, law)
        if count is not None:
            for name, adapter in case.fresh(case.model(), method).at_sites().items():
                found = sum(t.numel() for t in adapter.train.values())
                wanted = count(adapter.site.out_features, adapter.site.in_features)
                assert found == wanted, f"{method} at {name}: {found} trainable, not {wanted}"
    if len(refusals) == total:
        raise AssertionError("\n".join([f"{method} refuses every case, so no law ran", *refusals]))
    held = f"{method}: {len(LAWS)} laws hold in {total - len(refusals)} of {total} cases"
    print("\n".join([*refusals, held]))  # noqa: T201


class _RefusedError(Exception):
    """A case that the method does not take."""


def _hold(method: Method, case: Case, law: Callable[[Method, Case], None]) -> None:
    try:
        law(method, case)
    except Exception as error:
        refused = isinstance(error, ConfigError) and not isinstance(error, ContractError)
        if law is well_formed and refused:
            raise _RefusedError(str(error)) from error
        foreign = not isinstance(error, (AssertionError, FadaptError))
        what = f"{type(error).__name__}: {error}" if foreign else str(error)
        raise AssertionError(f"{law.__name__} fails for {method} at {case}: {what}") from error


def _merged(model: nn.Module, params: Params) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        # A new bias of a layer without one, which functional_call takes.
        warnings.simplefilter("ignore", FadaptWarning)
        return merge(model, params)


def _loss(out: Tensor) -> Tensor:
    return (out.sin() + 0.1 * out.square()).sum()


def _close(out: Any, ref: Any, what: str, tol: float = 1e-9, advice: str = "") -> None:
    out, ref = torch.as_tensor(out), torch.as_tensor(ref)
    if out.dtype == torch.float32:
        tol = max(tol, 2e-4)
    worst = float(((out - ref).abs().max() / ref.abs().max().clamp(min=1)).detach())
    advice = f". {advice}" if advice else ""
    assert worst <= tol, f"{what}: relative difference {worst:.3g} > {tol}{advice}"


def _tree_stack(trees: list[Any]) -> Any:
    if isinstance(trees[0], dict):
        return {k: _tree_stack([t[k] for t in trees]) for k in trees[0]}
    return torch.stack([t.detach() for t in trees])
