"""bitsandbytes' 4-bit and 8-bit layers, real library: every method over every quantisation.

References: the untouched layer's own output (bit-equal at the start), and a dense copy of the model
that holds W̃ as bitsandbytes itself dequantises it.
"""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

import fadapt
from fadapt import Config, ConfigError, FadaptError, LoRA, Params, TargetError
from fadapt.base.quantized import QuantizedMap, quantized_map
from tests.models import perturb, qwen3, reals, seeded, tokens

bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)

KINDS = ["nf4", "fp4", "nf4 double", "8bit"]
WIDTHS = (64, 96, 64)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def quantized_linear(dense: nn.Linear, kind: str, device: str = "cpu", **kwargs: Any) -> nn.Module:
    sizes = dense.in_features, dense.out_features, dense.bias is not None
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, **kwargs)
    else:
        layer = bnb.nn.Linear4bit(
            *sizes, quant_type=kind[:3], compress_statistics="double" in kind, **kwargs
        )
    layer.load_state_dict(dense.state_dict())
    return layer.to(device).train(dense.training)


def quantize(model: nn.Module, kind: str, **kwargs: Any) -> nn.Module:
    """A copy with quantised linear layers, except ``lm_head``."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, quantized_linear(module, kind, **kwargs))
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """A copy with nn.Linear layers that hold what bitsandbytes dequantises."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            state = copy.copy(module.weight.quant_state)
            state.dtype = torch.float32
            weight = bnb.functional.dequantize_4bit(module.weight.data, state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            where = module.weight if module.weight.CB is not None else module.state
            weight = where.CB.float() * where.SCB[:, None] / 127
        else:
            continue
        dense = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None)
        dense.weight.data = weight
        dense.bias = module.bias
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, dense)
    return model


def two_layers(kind: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    a, b, c = WIDTHS
    model = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c, bias=False))
    # In training mode the 8-bit kernel of the CPU does not quantise its input.
    return quantize(seeded(model, seed), kind, **kwargs).train()


def methods() -> dict[str, fadapt.Method]:
    """Every method of the package, at sizes that fit WIDTHS."""
    special: dict[str, Any] = {
        "Chain": {"methods": (fadapt.DoRA(r=2), fadapt.IA3FF(), LoRA(r=1), fadapt.IA3())},
        "Sum": {"methods": (LoRA(r=2), fadapt.IA3())},
        "OFT": {"block_size": 8},
        "RoAd": {"group_size": 16},
        "C3A": {"block_size": 8},
        "FourierFT": {"n_frequency": 50},
        # Of two directions, which the rounding of the 8-bit kernel does not turn into others.
        "LoRAGA": {"r": 1},
        "SSVD": {"k": 4},
        "AntiPaSTORotation": {"r": 4, "block_size": 2},
        "AntiPaSTOAblate": {"r": 4, "k": 1},
        "AntiPaSTOArrow": {"r": 6, "b": 2},
        "AntiPaSTODPLR": {"r": 4, "k": 2},
    }
    found = {}
    for name, cls in sorted(vars(fadapt).items()):
        if isinstance(cls, type) and issubclass(cls, fadapt.Method) and cls is not fadapt.Method:
            fields = cls.__dataclass_fields__
            found[name] = cls(**special.get(name, {"r": 4} if "r" in fields else {}))
    return found


EVERY = methods()
METHODS = {name: method for name, method in EVERY.items() if method.usual_kind == "linear"}
"""Those for linear maps, the only weights that bitsandbytes quantises."""


def calibration(method: Any) -> list[Any] | None:
    if getattr(method, "statistic", None) is None:
        return None
    if type(method).__name__ == "SSteer":
        shift = reals(WIDTHS[0], seed=99)
        pairs = [reals(2, 1, WIDTHS[0], seed=s) for s in range(20)]
        return [({"input": x + shift}, {"input": x}) for x in pairs]
    return [reals(6, WIDTHS[0], seed=s) for s in range(40)]


def fresh(model: nn.Module, method: Any, **config: Any) -> Params:
    return fadapt.init(model, Config(method, **config), calibration(method), loss_fn=loss)


def trained(model: nn.Module, method: Any, seed: int = 1) -> Params:
    params = perturb(fresh(model, method), seed)
    with torch.no_grad():
        for adapter in params.values():
            if "alpha" in adapter.train:  # project clips it to [0, 1]
                adapter.train["alpha"].abs_()
    return fadapt.project(params)


def loss(out: Tensor, _: Any = None) -> Tensor:
    return (out * out.detach().cos()).sum() + out.square().mean()


def close(a: Tensor, b: Tensor, tol: float = 2e-4) -> None:
    error = (a - b).abs().max() / b.abs().max().clamp(min=1e-6)
    assert error <= tol, f"relative difference {error:.2e} > {tol}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", sorted(EVERY.keys() - METHODS.keys()))
def test_methods_for_other_weights_are_refused(row: str, kind: str) -> None:
    with pytest.raises(TargetError, match=f"{row} for (norms|embeddings), but the model has none"):
        fadapt.init(two_layers(kind), EVERY[row])
    if EVERY[row].usual_kind == "norm":
        with pytest.raises(ConfigError, match=f"{row} .*; write fadapt"):
            fadapt.init(two_layers(kind), Config({r"0\.weight": EVERY[row]}))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", METHODS)
def test_start_is_the_base_to_the_last_bit(row: str, kind: str, mode: str) -> None:
    method = METHODS[row]
    for dtype in (torch.float32, torch.bfloat16):
        model = two_layers(kind).to(dtype).train(mode == "train")
        x = reals(2, 3, WIDTHS[0]).to(dtype)
        model(x)  # on CPUs with AVX512-BF16 a layer's first inference repacks its weight
        params = fresh(model, method)
        if row == "SSteer":  # it steers from the start, unless at strength 0
            params = fadapt.scale(params, 0)
        out = fadapt.apply(model, params, x)
        assert torch.equal(out, model(x))
        assert out.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", METHODS)
def test_output_and_gradient_equal_the_dequantised_reference(row: str, kind: str) -> None:
    model = two_layers(kind)
    dense, x = dequantize(model), reals(5, WIDTHS[0])
    params = trained(model, METHODS[row])
    out, ref = fadapt.apply(model, params, x), fadapt.apply(dense, params, x)
    assert (out - model(x)).abs().max() > 1e-3, "the adapter leaves the quantised layers unchanged"
    close(out, ref)
    leaves = fadapt.trainable(params)
    if leaves:
        for a, b in zip(
            torch.autograd.grad(loss(out), leaves),
            torch.autograd.grad(loss(ref), leaves),
            strict=True,
        ):
            close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", METHODS)
def test_starts_of_both_bases_agree(row: str, kind: str) -> None:
    """init reads W̃, not the codes."""
    model = two_layers(kind)
    dense = dequantize(model)
    ours, ref = trained(model, METHODS[row]), trained(dense, METHODS[row])
    x = reals(5, WIDTHS[0])
    # Calibration runs in eval mode, where the 8-bit kernel quantises the second layer's input.
    rounded = kind == "8bit" and calibration(METHODS[row]) is not None
    close(fadapt.apply(model, ours, x), fadapt.apply(dense, ref, x), 2e-2 if rounded else 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [row for row in METHODS if row != "SSteer"])  # trains nothing
def test_torch_func_transforms(row: str, kind: str) -> None:
    model = two_layers(kind)
    method = METHODS[row].true_gradient()
    dense, x = dequantize(model), reals(4, WIDTHS[0])
    members = [trained(model, method, seed=seed) for seed in (1, 2)]
    trains, rests = zip(*map(fadapt.split, members), strict=True)

    def of(base: nn.Module) -> Any:
        return lambda train: fadapt.run(base, fadapt.join(train, rests[0]), x, loss)

    tree = torch.utils._pytree
    for transform in (
        torch.func.grad(of(model)),
        torch.func.jacrev(of(model)),
        lambda t: torch.func.jvp(of(model), (t,), (t,))[1],
    ):
        got = transform(trains[0])
        ref = (
            torch.func.jvp(of(dense), (trains[0],), (trains[0],))[1]
            if isinstance(got, Tensor)
            else torch.func.grad(of(dense))(trains[0])
        )
        for a, b in zip(tree.tree_leaves(got), tree.tree_leaves(ref), strict=True):
            close(a, b)
    both = tree.tree_map(lambda *t: torch.stack(t), *trains)
    grads = torch.func.vmap(torch.func.grad(of(model)))(both)
    for i, train in enumerate(trains):
        ref = torch.func.grad(of(dense))(train)
        for a, b in zip(tree.tree_leaves(grads), tree.tree_leaves(ref), strict=True):
            close(a[i], b)


@pytest.mark.filterwarnings("ignore:.* is new:fadapt.FadaptWarning")  # BitFit
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", METHODS)
def test_merge_is_dense_in_the_stated_dtype(row: str, kind: str) -> None:
    model, x = two_layers(kind), reals(5, WIDTHS[0])
    params = trained(model, METHODS[row])

    def merge(dtype: torch.dtype) -> dict[str, Tensor]:
        if row != "BitFit":
            return fadapt.merge(model, params, dtype=dtype)
        with pytest.warns(fadapt.FadaptWarning, match="2.bias is new"):
            return fadapt.merge(model, params, dtype=dtype)

    merged, dense = merge(torch.float32), dequantize(model)
    if "2.bias" in merged:
        dense[2].bias = nn.Parameter(torch.zeros(WIDTHS[2]))  # type: ignore[index]
    assert {t.dtype for t in merged.values()} == {torch.float32}
    assert merged["0.weight"].shape == (WIDTHS[1], WIDTHS[0])
    close(functional_call(dense, merged, (x,)), fadapt.apply(model, params, x))
    assert {t.dtype for t in merge(torch.bfloat16).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_merge_defaults_to_the_compute_dtype(kind: str) -> None:
    model = two_layers(kind).to(torch.bfloat16)
    merged = fadapt.merge(model, trained(model, {"^0": LoRA(r=2)}))
    assert merged["0.weight"].dtype in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_fold_equals_loop(kind: str) -> None:
    model, x = two_layers(kind), reals(5, WIDTHS[0])
    rows = [LoRA(r=2), LoRA(r=4), fadapt.DoRA(r=2), fadapt.IA3(), fadapt.IA3FF()]
    members = [trained(model, m, seed=i) for i, m in enumerate(rows)]
    stack = fadapt.stack(members)
    losses = fadapt.run(model, stack, x, loss)
    grads = torch.autograd.grad(losses.sum(), fadapt.trainable(stack))
    stacked = iter(grads)
    for group in stack.groups:
        of_group = {n: {k: next(stacked) for k in a.train} for n, a in group.params.items()}
        for place, i in enumerate(group.index):
            alone = fadapt.run(model, members[i], x, loss)
            close(losses[i], alone)
            refs = iter(torch.autograd.grad(alone, fadapt.trainable(members[i])))
            for name, adapter in members[i].items():
                for leaf, tensor in adapter.train.items():
                    part = of_group[name][leaf][place][tuple(slice(0, n) for n in tensor.shape)]
                    close(part, next(refs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", METHODS)
def test_saved_equals_loaded(row: str, kind: str, tmp_path: Any) -> None:
    model, x = two_layers(kind), reals(5, WIDTHS[0])
    params = trained(model, METHODS[row])
    fadapt.save(params, tmp_path / "a.safetensors")
    model(x)  # the first forward of an 8-bit layer moves its codes
    loaded = fadapt.load(tmp_path / "a.safetensors", model)
    assert torch.equal(fadapt.apply(model, loaded, x), fadapt.apply(model, params, x))
    with pytest.raises(FadaptError, match="other values"):
        fadapt.load(tmp_path / "a.safetensors", two_layers(kind, seed=5))


@pytest.mark.parametrize("kind", KINDS)
def test_unadapted_layers_are_transformed_too(kind: str) -> None:
    """The second layer's input depends on the differentiated leaves of the first."""
    model, x = two_layers(kind), reals(5, WIDTHS[0])
    train, rest = fadapt.split(trained(model, {"^0": LoRA(r=2)}))

    def f(train: Any, base: nn.Module = model) -> Tensor:
        return fadapt.run(base, fadapt.join(train, rest), x, loss)

    dense = dequantize(model)
    grad = torch.func.grad(f)(train)
    ref = torch.func.grad(lambda t: f(t, dense))(train)
    for leaf in ref["0.weight"]:
        close(grad["0.weight"][leaf], ref["0.weight"][leaf])


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_left_as_they_were(kind: str) -> None:
    model, x = two_layers(kind).to(torch.bfloat16), reals(5, WIDTHS[0])
    before = copy.deepcopy(model)

    def state() -> list[dict[str, Any]]:
        """All attributes, also of an 8-bit layer's state, which its own forward changes."""
        parts = [part for m in model for part in (m, getattr(m, "state", None))]
        parts += [m.weight for m in model if hasattr(m, "weight")]
        return [dict(vars(part)) for part in parts if part is not None]

    at_start = state()
    params = trained(model, LoRA(r=2))

    def fail(out: Tensor, _: Any) -> Tensor:
        raise ZeroDivisionError

    fadapt.run(model, params, x, loss).backward()
    with pytest.raises(ZeroDivisionError):
        fadapt.run(model, params, x, fail)
    with pytest.raises(RuntimeError):
        fadapt.apply(model, params, x[:, :-1])
    with pytest.raises(ZeroDivisionError), fadapt.bound(model, params):
        fail(model(x), None)
    for now, then in zip(state(), at_start, strict=True):
        assert now.keys() == then.keys()
        assert all(now[k] is then[k] for k in now)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        assert a.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_bound_and_gradient_checkpointing(kind: str) -> None:
    model = quantize(qwen3(head_dim=16), kind).train()
    ids = tokens()
    params = trained_lm(model, {"q_proj|down_proj": fadapt.DoRA(r=2)})
    batch = {"input_ids": ids, "labels": ids}
    leaves = fadapt.trainable(params)
    plain = fadapt.run(model, params, batch)
    refs = torch.autograd.grad(plain, leaves)
    with fadapt.bound(model, params):
        inside = model(**batch, use_cache=False).loss
        assert torch.equal(inside, plain)
        for a, b in zip(torch.autograd.grad(inside, leaves), refs, strict=True):
            assert torch.equal(a, b)
    model.activation_checkpointing_enable()
    again = fadapt.run(model, params, batch)
    assert torch.equal(again, plain)
    for a, b in zip(torch.autograd.grad(again, leaves), refs, strict=True):
        close(a, b, 1e-6)

    model = Checkpointed(two_layers(kind))
    with pytest.raises(FadaptError, match="bound"):
        fadapt.apply(model, trained(model, LoRA(r=2)), reals(3, WIDTHS[0]))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def trained_lm(model: nn.Module, cfg: Any) -> Params:
    return perturb(fadapt.init(model, cfg))


@pytest.mark.parametrize("kind", KINDS)
def test_language_model_under_torch_func(kind: str) -> None:
    model = quantize(qwen3(head_dim=16), kind).train()
    ids = tokens()
    train, rest = fadapt.split(trained_lm(model, {"q_proj|v_proj": LoRA(r=2)}))
    dense = dequantize(model)

    def f(train: Any, base: nn.Module) -> Tensor:
        return fadapt.run(base, fadapt.join(train, rest), {"input_ids": ids, "labels": ids})

    got, ref = (torch.func.grad(f)(train, base) for base in (model, dense))
    for name in ref:
        for leaf in ref[name]:
            close(got[name][leaf], ref[name][leaf], 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind: str) -> None:
    model = quantize(qwen3(head_dim=16), kind).eval()
    params = trained_lm(model, {"q_proj|down_proj": fadapt.IA3()})
    kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    out = fadapt.apply(model, params, tokens(1), method="generate", **kwargs)
    with fadapt.bound(model, params):
        assert torch.equal(model.generate(tokens(1), **kwargs), out)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_step_equals_eager(kind: str) -> None:
    model, x = two_layers(kind), reals(5, WIDTHS[0])
    params = trained(model, fadapt.DoRA(r=2))

    def step(params: Params, x: Tensor) -> Tensor:
        return fadapt.run(model, params, x, loss)

    torch.compiler.reset()
    whole = torch.__version__ >= (2, 13)
    if not whole:
        with pytest.raises(Exception, match=r"torch 2\.13 or later"):
            torch.compile(step, fullgraph=True, backend="aot_eager")(params, x)
    out = torch.compile(step, fullgraph=whole, backend="aot_eager")(params, x)
    ref = step(params, x)
    close(out, ref, 1e-6)
    leaves = fadapt.trainable(params)
    for a, b in zip(
        torch.autograd.grad(out, leaves), torch.autograd.grad(ref, leaves), strict=True
    ):
        close(a, b, 1e-5)
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_one_dequantised_matrix_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most, made = 0, 0

    def watch(cls: type) -> None:
        weight = cls.dequantize

        def watched(self: Any, *args: Any) -> Tensor:
            nonlocal most, made
            result = weight(self, *args)
            alive.append(weakref.ref(result))
            most = max(most, sum(r() is not None for r in alive))
            made += 1
            return result

        monkeypatch.setattr(cls, "dequantize", watched)

    for cls in QuantizedMap.__subclasses__():
        watch(cls)
    widths = [64] * 7
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    model = quantize(seeded(model), kind).train()
    params = perturb(fadapt.init(model, fadapt.DoRA(r=2)))
    gc.collect()
    most = made = 0
    alive.clear()
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(t.shape), t)[1], lambda t: t
    ):
        out = fadapt.run(model, params, reals(5, 64), loss)
    assert sum(r() is not None for r in alive) == 0, "a dequantised matrix outlives the forward"
    assert torch.Size([64, 64]) not in saved, "a dense matrix is saved for backward"
    out.backward()
    assert made >= 6 + 5, "the watch saw fewer matrices than the step needs"
    assert most == 1


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4"])
def test_layout_of_avx512_cpus(kind: str) -> None:
    """bitsandbytes repacks 4-bit weights there at the first forward in eval mode."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = quantize(seeded(nn.Sequential(nn.Linear(128, 64))), kind)
    base = quantized_map(model[0])
    assert base is not None
    before, mark = base.weight(), base.fingerprint()
    weight = model[0].weight
    packed, state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    weight.data, weight.quant_state = packed, state
    assert base.packed_for_cpu
    close(base.weight(), before, 2**-8)  # its scales are bfloat16
    assert base.fingerprint() == mark


@pytest.mark.parametrize("kind", KINDS)
def test_one_backward_matches_bitsandbytes(kind: str) -> None:
    """A frozen layer gives the gradient that bitsandbytes' own autograd function gives."""
    layer = two_layers(kind)[0]
    base, theirs = quantized_map(layer), copy.deepcopy(layer)
    grads = []
    for f in (base, theirs):
        x = reals(2, 3, WIDTHS[0]).requires_grad_()
        grads.append(torch.autograd.grad(loss(f(x)), x)[0])
    assert torch.equal(*grads)


def test_unquantised_layers_are_refused_by_name() -> None:
    four = nn.Sequential(bnb.nn.Linear4bit(64, 64))
    with pytest.raises(TargetError, match=r"0\.weight.*not quantised yet.*model\.to"):
        fadapt.init(four, LoRA(r=2))
    eight = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))
    with pytest.raises(TargetError, match=r"0\.weight.*not quantised yet.*model\.to"):
        fadapt.init(eight, LoRA(r=2))
    floating = nn.Sequential(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True))
    with pytest.raises(TargetError, match="has_fp16_weights=False"):
        fadapt.init(floating, LoRA(r=2))


def test_nan_in_the_scales_is_refused_by_name() -> None:
    dense = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        dense[0].weight[0, 0] = float("nan")
    for kind in ("nf4", "8bit"):
        model = quantize(dense, kind)
        state = model[0].weight
        (state.quant_state.absmax if kind == "nf4" else state.SCB)[0] = float("nan")
        with pytest.raises(TargetError, match=r"0\.weight holds 1 NaN"):
            fadapt.init(model, LoRA(r=2))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_storage_dtype_of_4bit_codes_does_not_matter(storage: torch.dtype) -> None:
    dense = seeded(nn.Sequential(nn.Linear(64, 96)))
    models = [quantize(dense, "nf4", quant_storage=s) for s in (torch.uint8, storage)]
    a, b = (fadapt.init(m, LoRA(r=2)) for m in models)
    assert a["0.weight"].site == b["0.weight"].site
    x = reals(5, 64)
    outs = [fadapt.apply(m, perturb(p), x) for m, p in zip(models, (a, b), strict=True)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_the_start_alone(kind: str, autocast: bool) -> None:
    model, x = two_layers(kind), reals(5, WIDTHS[0])
    params = fresh(model, fadapt.DoRA(r=2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(fadapt.apply(model, params, x), model(x))


def test_4bit_training_lowers_the_loss_and_leaves_the_codes() -> None:
    model, x = two_layers("nf4"), reals(16, WIDTHS[0])
    target = reals(16, WIDTHS[2], seed=3)
    codes = [p.clone() for p in model.parameters()]
    params = fresh(model, fadapt.DoRA(r=4))
    optimiser = torch.optim.Adam(fadapt.trainable(params), lr=0.03)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        value = fadapt.run(model, params, x, lambda out, _: (out - target).square().mean())
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert losses[-1] < 0.5 * losses[0]
    for a, b in zip(model.parameters(), codes, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_params_train_through_fit_and_sweep(kind: str) -> None:
    """Params that were made before the sweep belong to this base; on another they are refused."""
    model, other = two_layers(kind), two_layers(kind, seed=1)
    params = fadapt.init(model, LoRA(r=2))
    x = reals(8, WIDTHS[0])
    options: dict[str, Any] = {"steps": 3, "lr": 1e-2, "loss_fn": lambda y, _: y.square().mean()}
    trained = fadapt.fit(model, params, [x], **options)

    byhand = fadapt.init(model, LoRA(r=2))
    optimizer = torch.optim.AdamW(fadapt.trainable(byhand), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        fadapt.run(model, byhand, x, options["loss_fn"]).backward()
        optimizer.step()
    assert any(
        not t.eq(0).all() for _, a in trained.items() for k, t in a.train.items() if k == "B"
    )
    for site, adapter in trained.items():
        torch.testing.assert_close(adapter.train, byhand[site].train, rtol=1e-5, atol=1e-7)

    del options["lr"]
    trials = [fadapt.Trial(params, lr=1e-2), fadapt.Trial(LoRA(r=4), lr=1e-2)]
    report = fadapt.sweep(model, trials, [x], **options)
    assert {r.status for r in report.results} == {"finished"}
    with pytest.raises(fadapt.ConfigError, match="another base model"):
        fadapt.fit(other, params, [x], lr=1e-2, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_autograd_without_torch_func(kind: str) -> None:
    """First, second, batched and forward-mode ones, of a product that is tanh's argument."""
    layer = quantized_linear(seeded(nn.Linear(64, 64)), kind)
    base = quantized_map(layer)
    assert base is not None
    weight = base.weight()
    x, g = torch.randn(3, 64, requires_grad=True), torch.randn(3, 64)

    def own(x: Tensor) -> Tensor:
        return base.linear(x).tanh()

    def dense(x: Tensor) -> Tensor:
        return (x @ weight.mT).tanh()

    found, wanted = (
        (
            (first := torch.autograd.grad(f(x), x, g, create_graph=True)[0]).detach(),
            torch.autograd.grad(first.square().sum(), x)[0],
            torch.autograd.grad(f(x), x, torch.stack([g, 2 * g]), is_grads_batched=True)[0],
            _along(f, x.detach(), g),
        )
        for f in (own, dense)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not base.linear(x.detach()).requires_grad
    with torch.no_grad():
        assert not base.linear(x).requires_grad


def _along(f: Any, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dora_is_that_of_the_dequantised_weight_and_pefts_where_it_reads_that(
    training: bool, tmp_path: Path
) -> None:
    """In eval mode bitsandbytes repacks its codes on some CPUs, which PEFT's norm does not know."""
    peft = pytest.importorskip("peft")
    model = quantize(seeded(nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 64))), "nf4")
    model.train(training)
    dense, x = dequantize(model).train(training), reals(4, 128)
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0", "2"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config).train(training)
    reference = peft.get_peft_model(copy.deepcopy(dense), config).train(training)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, leaf in theirs.named_parameters():
            if "lora_" in name:
                leaf.add_(torch.randn(leaf.shape, generator=rng) * 0.1)
                reference.get_parameter(name).copy_(leaf)
    theirs.save_pretrained(str(tmp_path))
    params = fadapt.peft.load_peft(tmp_path, model)
    with torch.no_grad():
        want = reference(x)
        torch.testing.assert_close(fadapt.apply(model, params, x), want, rtol=1e-5, atol=1e-5)
        found = theirs(x)
    repacked = any(
        getattr(m.weight.quant_state, "packing_format_for_cpu", False)
        for m in theirs.modules()
        if isinstance(m, bnb.nn.Linear4bit)
    )
    assert not (training and repacked)
    if repacked:
        assert (found - want).abs().max() > 0.1  # its norm is of codes in another order
    else:
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
