"""What only a GPU can show: ``tox run -e gpu``, or ``pytest tests/test_cuda.py`` there.

4-bit on CUDA is x W̃ᵀ up to the rounding of the dtype of its kernel. 8-bit on CUDA also rounds the
input to int8, row by row: the start is still bit-equal to the base, an additive method adds to that
output what it adds to that of a dense layer, and a trained model agrees with the dequantised one to
a few percent.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fadapt
from fadapt import Config, DoRA, LoRA, Params
from tests.models import perturb, reals, seeded, tokens

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

KINDS = ["nf4", "fp4", "nf4 double", "8bit"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = (128, 192, 128)
# Relative to the largest output: the kernel's rounding of 4-bit products in three dtypes.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}
INT8 = 5e-2


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes", exc_type=ImportError)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def quantized(kind: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    from tests.test_quantized import quantize

    a, b, c = WIDTHS
    model = seeded(nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c, bias=False)), seed)
    model = quantize(model, kind, device=DEVICE).to(DEVICE)
    for module in model:
        if getattr(module, "bias", None) is not None:
            module.bias.data = module.bias.data.to(dtype)
    return model.eval()


def every_method() -> dict[str, fadapt.Method]:
    from tests.test_quantized import METHODS

    return {n: m for n, m in METHODS.items() if getattr(m, "statistic", None) is None}


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return reals(*shape).to(DEVICE, dtype)


def trained(model: nn.Module, cfg: Any, seed: int = 1) -> Params:
    return perturb(fadapt.init(model, cfg).to("cpu"), seed, 0.1).to(DEVICE)


def loss(out: Any, _: Any = None) -> Tensor:
    out = getattr(out, "logits", out)
    return (out.float() ** 2).mean()


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_start_is_the_base_to_the_last_bit(bnb: Any, kind: str, dtype: torch.dtype) -> None:
    for name, method in every_method().items():
        for adapter_dtype in (None, torch.bfloat16):
            model, x = quantized(kind, dtype), inputs(2, 5, WIDTHS[0], dtype=dtype)
            params = fadapt.init(model, Config(method, dtype=adapter_dtype))
            with torch.no_grad():
                assert torch.equal(fadapt.apply(model, params, x), model(x)), name
            for train in (True, False):
                assert torch.equal(
                    fadapt.apply(model.train(train), params, x), model.train(train)(x)
                ), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_near_the_dequantised(bnb: Any, kind: str, dtype: torch.dtype) -> None:
    from tests.test_quantized import dequantize

    for name, method in every_method().items():
        model, x = quantized(kind, dtype), inputs(7, WIDTHS[0], dtype=dtype)
        params = trained(model, method)
        dense = dequantize(model).to(DEVICE, torch.float32)
        out = fadapt.apply(model, params, x)
        ref = fadapt.apply(dense, params, x.float())
        tol = INT8 if kind == "8bit" else ROUNDING[dtype]
        assert relative(out, ref) < tol, name
        leaves, weights = fadapt.trainable(params), inputs(7, WIDTHS[2]).cos()
        grads, refs = (torch.autograd.grad((y.float() * weights).sum(), leaves) for y in (out, ref))
        # As one vector: a leaf's own gradient may be a small difference of rounded numbers.
        difference, whole = (
            torch.cat([t.flatten() for t in ts]).norm()
            for ts in ([a - b for a, b in zip(grads, refs, strict=True)], refs)
        )
        assert difference < 2 * tol * whole, name


@pytest.mark.parametrize("kind", KINDS)
def test_additive_methods_add_the_same_over_8bit(bnb: Any, kind: str) -> None:
    """LoRA's increment does not go through the quantised kernel."""
    model, x = quantized(kind, torch.float32)[:1], inputs(7, WIDTHS[0])
    params = trained(model, LoRA(r=4))
    a, b = params["0.weight"].train["A"], params["0.weight"].train["B"]
    added = params["0.weight"].method.scaling * (x @ a.mT) @ b.mT
    torch.testing.assert_close(fadapt.apply(model, params, x), model(x) + added)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func_transforms(bnb: Any, kind: str) -> None:
    model, x = quantized(kind, torch.float32), inputs(5, WIDTHS[0])
    members = [trained(model, DoRA(r=2, detach_norm=False), seed=s) for s in (1, 2)]
    trains, rests = zip(*map(fadapt.split, members), strict=True)
    tree = torch.utils._pytree

    def f(train: Any) -> Tensor:
        return fadapt.run(model, fadapt.join(train, rests[0]), x, loss)

    refs = [
        torch.autograd.grad(fadapt.run(model, m, x, loss), fadapt.trainable(m)) for m in members
    ]
    for got in (torch.func.grad(f)(trains[0]), torch.func.jacrev(f)(trains[0])):
        for a, b in zip(tree.tree_leaves(got), refs[0], strict=True):
            assert relative(a, b) < 1e-4
    both = tree.tree_map(lambda *t: torch.stack(t), *trains)
    mapped = torch.func.vmap(torch.func.grad(f))(both)
    for i in range(2):
        for a, b in zip(tree.tree_leaves(mapped), refs[i], strict=True):
            assert relative(a[i], b) < 1e-3
    _, along = torch.func.jvp(f, (trains[0],), (trains[0],))
    inner = sum((g * t).sum() for g, t in zip(refs[0], tree.tree_leaves(trains[0]), strict=True))
    assert relative(along, inner) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_fold_and_merge(bnb: Any, kind: str) -> None:
    from tests.test_quantized import dequantize

    model, x = quantized(kind, torch.float32), inputs(5, WIDTHS[0])
    members = [trained(model, m, seed=s) for s, m in enumerate((LoRA(r=2), LoRA(r=4), DoRA(r=2)))]
    folded = fadapt.run(model, fadapt.stack(members), x, loss)
    alone = torch.stack([fadapt.run(model, m, x, loss) for m in members])
    assert relative(folded, alone) < (INT8 if kind == "8bit" else 1e-4)
    merged = fadapt.merge(model, members[2], dtype=torch.float32)
    ref = functional_call(dequantize(model), merged, (x,))
    assert relative(fadapt.apply(model, members[2], x), ref) < (INT8 if kind == "8bit" else 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_base_is_recognised_on_both_devices(bnb: Any, kind: str, tmp_path: Any) -> None:
    model = quantized(kind, torch.float32)
    fadapt.save(fadapt.init(model, LoRA(r=2)), tmp_path / "a.safetensors")
    back = copy.deepcopy(model).to("cpu")
    assert set(fadapt.load(tmp_path / "a.safetensors", back)) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "8bit"])
def test_one_dequantised_matrix_at_a_time(bnb: Any, kind: str) -> None:
    """The peak of a training step over eight layers is that of one dequantised matrix."""
    from tests.test_quantized import quantized_linear

    width, layers, rows = 2048, 8, 16
    model = nn.Sequential(
        *(
            quantized_linear(nn.Linear(width, width, bias=False), kind, DEVICE)
            for _ in range(layers)
        )
    )
    params = fadapt.init(model, Config(DoRA(r=4), dtype=torch.bfloat16))
    x = inputs(rows, width, dtype=torch.bfloat16)

    def step() -> None:
        fadapt.run(model, params, x, loss).backward()

    step()  # the adapters' gradients and the libraries' workspaces now exist
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    # DoRA's norm multiplies in float32; the activations are a few hundred kB.
    matrix = 4 * width * width
    print(f"{kind}: peak over the base {extra / 2**20:.1f} MiB, matrix {matrix / 2**20:.1f} MiB")
    assert extra < 1.6 * matrix


@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_compiled_with_inductor(bnb: Any, kind: str) -> None:
    model, x = quantized(kind, torch.float32), inputs(5, WIDTHS[0])
    params = trained(model, LoRA(r=2))

    def step(params: Params, x: Tensor) -> Tensor:
        return fadapt.run(model, params, x, loss)

    torch.compiler.reset()
    out = torch.compile(step, fullgraph=torch.__version__ >= (2, 13))(params, x)
    ref = step(params, x)
    assert relative(out, ref) < 1e-3
    leaves = fadapt.trainable(params)
    for a, b in zip(
        torch.autograd.grad(out, leaves), torch.autograd.grad(ref, leaves), strict=True
    ):
        assert relative(a, b) < 1e-3


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts(implementation: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers", minversion="5")
    from tests.test_bases import mixtral

    model = mixtral().to(DEVICE, dtype)
    model.set_experts_implementation(implementation)
    ids = tokens().to(DEVICE)
    fresh = fadapt.init(model, {"experts": DoRA(r=2)})
    with torch.no_grad():
        base = model(ids, use_cache=False).logits
        assert torch.equal(fadapt.apply(model, fresh, ids, use_cache=False).logits, base)
    if dtype == torch.bfloat16:
        return  # rounding may route a token to another expert
    params = trained(model, {"experts": DoRA(r=2)})
    out = fadapt.apply(model, params, ids, use_cache=False).logits
    merged = fadapt.merge(model, params)
    ref = functional_call(model, merged, (ids,), {"use_cache": False}, tie_weights=False).logits
    assert relative(out, ref) < 1e-3
    assert relative(out, base) > 1e-2
    for grad in torch.autograd.grad(loss(out), fadapt.trainable(params)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_mixed_precision(base: torch.dtype, autocast: torch.dtype | None) -> None:
    x = inputs(4, WIDTHS[0], dtype=base)
    for name, method in every_method().items():
        model = seeded(nn.Sequential(nn.Linear(128, 192), nn.Tanh(), nn.Linear(192, 128)))
        model = model.to(DEVICE, base)
        params = fadapt.init(model, method)
        with torch.autocast(DEVICE, autocast or torch.bfloat16, enabled=autocast is not None):
            assert torch.equal(fadapt.apply(model, params, x), model(x)), name
            fadapt.run(model, params, x, loss).backward()
        for leaf in fadapt.trainable(params):
            assert leaf.grad is not None, name
            assert leaf.grad.isfinite().all(), name


def test_generators_do_not_depend_on_the_device() -> None:
    model = seeded(nn.Sequential(nn.Linear(32, 32)))
    on_cpu, on_gpu = (
        fadapt.init(copy.deepcopy(model).to(d), Config(LoRA(r=2), seed=3)) for d in ("cpu", DEVICE)
    )
    a, b = (p["0.weight"] for p in (on_cpu, on_gpu))
    assert a.site == b.site
    assert torch.equal(a.train["A"], b.train["A"].cpu())


def language_batches(count: int, length: int = 12, rows: int = 4) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 64, (count, rows, length), generator=rng)
    return [{"input_ids": x, "labels": x} for x in ids]


RECORDED = [
    fadapt.Trial(LoRA(r=2), lr=1e-2, seed=1, schedule="cosine"),
    fadapt.Trial(LoRA(r=4), lr=2e-2, clip=0.1, accumulate=2),
    fadapt.Trial(DoRA(r=2), lr=1e-2, weight_decay=0.1),
    fadapt.Trial(LoRA(r=2), lr=3e38, name="wild"),
]


@pytest.mark.parametrize(("count", "chunked"), [(1, False), (4, False), (4, True)])
def test_recorded_sweep_equals_an_ordinary_one(count: int, chunked: bool, monkeypatch: Any) -> None:
    """CUDA graphs, over two forms of batches, give the losses and weights of the plain passes."""
    from fadapt.fold import chunked_loss as loss_module
    from fadapt.training.engine import cuda_graphs as graphs

    if chunked:
        monkeypatch.setattr(loss_module, "CHUNKED_FROM", 1)

    pytest.importorskip("transformers", minversion="5")
    made: list[Any] = []
    record = graphs.CUDAGraphed._record
    monkeypatch.setattr(
        graphs.CUDAGraphed, "_record", lambda *args: made.append(1) or record(*args)
    )
    from tests.models import qwen3

    model = qwen3().to(DEVICE).requires_grad_(False)
    batches = [
        b for pair in zip(language_batches(3), language_batches(3, 16), strict=True) for b in pair
    ]
    options: dict[str, Any] = dict(steps=16, log_every=4)
    plain = fadapt.sweep(model, RECORDED[:count], batches, **options)
    assert not made
    recorded = fadapt.sweep(
        model, RECORDED[:count], batches, compile={"mode": "reduce-overhead"}, **options
    )
    assert len(made) == 2
    assert [r.status for r in recorded.results] == [r.status for r in plain.results]
    for step, losses in plain.losses.items():
        torch.testing.assert_close(
            recorded.losses[step], losses, rtol=1e-3, atol=1e-3, equal_nan=True
        )
    for name, params in plain.params.items():
        a, b = (
            torch.cat([t.flatten() for t in fadapt.trainable(p)])
            for p in (recorded.params[name], params)
        )
        assert (a - b).norm() < 1e-2 * b.norm(), name


def test_recorded_dropout_is_drawn_anew() -> None:
    model = seeded(nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8))).to(DEVICE)
    report = fadapt.sweep(
        model.train(), [fadapt.Trial(LoRA(r=2), lr=1e-12, seed=s) for s in range(2)],
        [inputs(4, 8)], steps=10, loss_fn=loss, compile={"mode": "reduce-overhead"},
    )  # fmt: skip
    assert len({float(x[0]) for x in report.losses.values()}) == 10


def test_one_tensor_in_two_places_of_a_recorded_batch() -> None:
    """Compiled code relies on it; a copy of each would compile anew, in the midst of recording."""
    pytest.importorskip("transformers", minversion="5")
    from tests.models import qwen3

    ids = language_batches(1)[0]["input_ids"].to(DEVICE)
    model = qwen3().to(DEVICE).requires_grad_(False)
    options: dict[str, Any] = dict(steps=8, lr=1e-2)
    for batch in ({"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": ids.clone()}):
        params = fadapt.init(model, LoRA(r=2))
        a = fadapt.fit(model, params, [batch], compile={"mode": "reduce-overhead"}, **options)
        b = fadapt.fit(model, params, [batch], **options)
        for x, y in zip(fadapt.trainable(a), fadapt.trainable(b), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


def test_what_cannot_be_recorded_says_so_and_leaves_the_device_usable() -> None:
    from fadapt.training.engine.cuda_graphs import CUDAGraphed

    function = CUDAGraphed(lambda x: x * x.sum().item(), torch.device(DEVICE))
    x = torch.ones(2, device=DEVICE)
    assert [function(x).tolist() for _ in range(2)] == [[2, 2]] * 2
    with pytest.raises(RuntimeError, match="captur"):
        function(x)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert x.sum().item() == 2


def test_a_sweep_halves_when_memory_runs_out() -> None:
    """Really out of memory: the process may use only so much."""
    rows = 2**14
    model = seeded(nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))).to(DEVICE)
    x = inputs(rows, 512)
    trials = [fadapt.Trial(LoRA(r=2), lr=1e-3, seed=s) for s in range(8)]

    def mean(out: Tensor, _: Any) -> Tensor:
        return out.square().mean()

    free = fadapt.sweep(model, trials, [x], steps=3, loss_fn=mean)
    assert free.chunk == 8
    torch.compiler.reset()  # recorded graphs of earlier tests, which hold memory
    gc.collect()
    torch.cuda.empty_cache()
    each = rows * 512 * 4
    total = torch.cuda.get_device_properties(0).total_memory
    # What is reserved but not in use can be used as well.
    allowed = torch.cuda.memory_allocated() + 28 * each + 2**28
    assert allowed > torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        tight = fadapt.sweep(model, trials, [x], steps=3, loss_fn=mean)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tight.chunk < 8
    for name, params in free.params.items():
        for a, b in zip(
            fadapt.trainable(tight.params[name]), fadapt.trainable(params), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_calibration_moves_the_whole_batch_to_the_model() -> None:
    """A loss_fn reads labels, too; a gradient statistic calls it."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16)).cuda()
    batches = [{"x": torch.randn(40, 8), "labels": torch.randint(16, (40,))} for _ in range(2)]

    def loss_fn(out: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(out, batch["labels"])

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    params = fadapt.init(Net(), fadapt.LoRAGA(r=2), batches, loss_fn=loss_fn)
    assert all(t.is_cuda for t in fadapt.trainable(params))
