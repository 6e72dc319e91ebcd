"""A base that is spread over two processes: FSDP2, and tensor parallelism. gloo, on CPUs.

The reference is the same model whole, in each process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fadapt
from fadapt import DoRA, LoRA
from fadapt.base import weights
from fadapt.base.fingerprint import fingerprint
from fadapt.base.sharded import full_at, full_rows
from fadapt.base.torch_private import StorageWeakRef
from fadapt.statistics.reduction import statistics_of
from tests import models, ranks
from tests.test_laws import ROWS


def sharded(model: nn.Module, **options) -> nn.Module:
    """A copy of a Hugging Face model, every layer and the rest in units of FSDP2."""
    model = copy.deepcopy(model).requires_grad_(False)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def moved(params: fadapt.Params, seed: int = 0) -> fadapt.Params:
    """As if trained."""
    rng = torch.Generator().manual_seed(seed)
    for leaf in params.trainable():
        leaf.data += 0.05 * torch.randn(leaf.shape, generator=rng).to(leaf)
    return params


def tokens(rows: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(1, models.VOCAB, (rows, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def gradients(losses: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(losses.sum(), leaves))


def close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1e-3, float(b.abs().max())), (
            (a - b).abs().max()
        )


def part(batch: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    return {k: t.chunk(world)[rank].contiguous() for k, t in batch.items()}


def every_method(rank: int, world: int, _: Path) -> None:
    """The start, bit for bit; loss and gradients, with the rows of the batch over the processes."""
    whole = models.qwen3().requires_grad_(False)
    model, batch = sharded(whole), tokens(4)
    for name, method in ROWS.items():
        rule = {"q_proj|down_proj": method} if method.usual_kind == "linear" else method
        config = fadapt.Config(rule, layers=[0] if method.usual_kind != "embedding" else None)
        calib = None if method.statistic is None else [tokens(8, 5), tokens(8, 6)]
        if any(statistic.reduction.paired for statistic in statistics_of(method.statistic)):
            calib = [(tokens(8, 5), tokens(8, 6)), (tokens(8, 7), tokens(8, 8))]
        want = fadapt.init(whole, config, calib)
        got = fadapt.init(model, config, calib)
        for site, adapter in want.items():
            assert adapter.site == got[site].site, name
            for key, leaf in adapter.leaves.items():
                assert torch.equal(leaf, got[site].leaves[key]), (name, site, key)
        same = fadapt.run(model, got, part(batch, rank, world))
        assert torch.equal(same, fadapt.run(whole, want, part(batch, rank, world))), name
        moved(got), moved(want)
        if not want.trainable():  # SSteer
            continue
        alone = gradients(fadapt.run(whole, want, batch), want.trainable())
        loss = fadapt.run(model, got, part(batch, rank, world))
        shared = [g.clone() for g in gradients(loss, got.trainable())]
        for g in shared:
            dist.all_reduce(g)
        close([g / world for g in shared], alone)


def mixed() -> list[fadapt.Config]:
    methods = [LoRA(r=2), LoRA(r=4), DoRA(r=2), fadapt.HRA(r=2), fadapt.IA3(), fadapt.OFT(4)]
    return [fadapt.Config({"proj": m}) for m in methods]


def mixed_stack(rank: int, world: int, _: Path, **options) -> None:
    """A stack of six, the rows over the processes; the loss in chunks, too."""
    from fadapt.fold import chunked_loss

    whole = models.qwen3().requires_grad_(False)
    batch = tokens(4)
    want = fadapt.stack([moved(fadapt.init(whole, c)) for c in mixed()])
    losses = fadapt.run(whole, want, batch)
    alone = gradients(losses, want.trainable())
    for heads in (False, True):
        model = copy.deepcopy(whole)
        if heads:
            fully_shard(model.lm_head)
            chunked_loss.CHUNKED_FROM = 1
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        got = fadapt.stack([moved(fadapt.init(model, c)) for c in mixed()])
        found = fadapt.run(model, got, part(batch, rank, world))
        shared = gradients(found, got.trainable())
        found = found.detach().clone()
        for t in (found, *shared):
            dist.all_reduce(t)
        close([found / world], [losses.detach()])
        close([g / world for g in shared], alone)
    chunked_loss.CHUNKED_FROM = 2**24


def precision_and_checkpoints(rank: int, world: int, _: Path) -> None:
    """A MixedPrecisionPolicy, checkpointing inside bound, outside of it, and generate."""
    whole = models.qwen3().requires_grad_(False)
    batch, config = tokens(4, rank), {"proj": DoRA(r=2)}
    want = moved(fadapt.init(whole, config))
    loss = fadapt.run(whole, want, batch)
    alone = gradients(loss, want.trainable())
    half = sharded(whole, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    got = moved(fadapt.init(half, config))
    assert abs(float(fadapt.run(half, got, batch)) - float(loss)) < 0.05
    again = fadapt.init(half, config)  # after a forward, whose weights were in bfloat16
    assert [a.site for a in again.values()] == [a.site for a in want.values()]
    away = sharded(whole, offload_policy=CPUOffloadPolicy(pin_memory=False))
    got = moved(fadapt.init(away, config))
    close(gradients(fadapt.run(away, got, batch), got.trainable()), alone)
    model = sharded(whole)
    got = moved(fadapt.init(model, config))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with fadapt.bound(model, got):
        inside = model(**batch).loss
        inside.backward()
    close([leaf.grad for leaf in got.trainable()], alone)
    close(gradients(fadapt.run(model, got, batch), got.trainable()), alone)
    model.eval()
    register_fsdp_forward_method(model, "generate")
    ids = {"input_ids": batch["input_ids"][:2], "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        fadapt.apply(model, got, method="generate", **ids),
        fadapt.apply(whole, want, method="generate", **ids),
    )
    assert torch.equal(model(**batch).logits, whole(**batch).logits)  # the base is as it was


def files(rank: int, world: int, directory: Path) -> None:
    """save, load, merge and observe; a base that is loaded meta-first."""
    whole = models.qwen3().requires_grad_(False)
    config = {"proj": DoRA(r=2)}
    params = moved(fadapt.init(whole, config))
    with torch.device("meta"):
        model = models.qwen3().requires_grad_(False)
    drawn = torch.default_generator.get_state()
    assert all(p.is_meta for p in fadapt.init(model, config).trainable())
    assert torch.equal(drawn, torch.default_generator.get_state())
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        p.to_local().copy_(q.chunk(world)[rank] if len(q.chunk(world)) > rank else q[:0])
    model.model.rotary_emb = copy.deepcopy(whole.model.rotary_emb)
    model.eval()
    path = directory / f"{rank}.safetensors"
    fadapt.save(fadapt.init(model, config), path)
    fadapt.load(path, whole)
    fadapt.save(params, path)
    loaded = fadapt.load(path, model)
    batch = tokens(2, rank)
    assert torch.equal(fadapt.run(model, loaded, batch), fadapt.run(whole, params, batch))
    merged, wanted = fadapt.merge(model, loaded), fadapt.merge(whole, params)
    for name, value in wanted.items():
        assert torch.equal(merged[name].full_tensor(), value), name
        assert merged[name].to_local().numel() <= value.numel() // 2 + value.shape[-1]
    model.load_state_dict(merged, strict=False)
    assert torch.isfinite(model(**batch).loss)
    from fadapt.calibration.distributed import all_reduce

    evas = {"q_proj": fadapt.EVA(r=2)}
    fresh = sharded(whole)
    one = all_reduce(fadapt.observe(fresh, evas, [tokens(8, rank)]))
    both = fadapt.observe(whole, evas, [tokens(8, 0), tokens(8, 1)])
    close(
        [t for p in fadapt.init(fresh, evas, one).values() for t in p.fixed.values()],
        [t for p in fadapt.init(whole, evas, both).values() for t in p.fixed.values()],
    )


def tensor_parallel(rank: int, world: int, _: Path) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    whole = models.llama().requires_grad_(False)
    plan = {n: ColwiseParallel() for n in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
    plan |= {n: RowwiseParallel() for n in ("o_proj", "down_proj")}
    mesh = init_device_mesh("cpu", (world,))
    model, batch = copy.deepcopy(whole), tokens(4)
    for layer in model.model.layers:
        homes = [layer.self_attn, layer.mlp]
        for home in homes:
            own = {n: style for n, style in plan.items() if hasattr(home, n)}
            parallelize_module(home, mesh, own)
    for method in (LoRA(r=2), DoRA(r=2), fadapt.IA3(), fadapt.IA3FF(), fadapt.RsLoRA(r=2)):
        want = fadapt.init(whole, {"proj": method})
        got = fadapt.init(model, {"proj": method})
        for site, adapter in want.items():
            for key, leaf in adapter.leaves.items():
                assert torch.equal(leaf, got[site].leaves[key])
        moved(want), moved(got)
        loss = fadapt.run(whole, want, batch)
        found = fadapt.run(model, got, batch)
        close([found.detach()], [loss.detach()])
        close(gradients(found, got.trainable()), gradients(loss, want.trainable()), 1e-4)
    with pytest.raises(fadapt.TargetError, match=r"tensor parallelism.*HRA"):
        fadapt.run(model, fadapt.init(model, {"proj": fadapt.HRA(r=2)}), batch)


class Gathered:
    """How many whole weights are made of shards, and how many of them are alive at once.

    Storages, not tensors: a view of a weight holds all of it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, values: int) -> None:
        self.count = self.most = self.largest = 0
        self._values = values
        self._storages: list[StorageWeakRef] = []
        for owner, name in ((DTensor, "full_tensor"), (weights, "full_rows")):
            monkeypatch.setattr(owner, name, self._seen(getattr(owner, name)))

    def _seen(self, gather: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def seen(*args, **options) -> Tensor:
            whole = gather(*args, **options)
            if whole.numel() >= self._values:
                self._storages.append(StorageWeakRef(whole.untyped_storage()))
                self.count += 1
                self.most = max(self.most, sum(not s.expired() for s in self._storages))
                self.largest = max(self.largest, whole.numel())
            return whole

        return seen


def one_weight_at_a_time(rank: int, world: int, _: Path) -> None:
    """What init gathers of a model whose weights do not fit together."""
    from tests.test_bases import GATE_UP, mixtral

    plain = models.mlp(widths=(70, 75, 81, 66, 70))  # odd numbers of rows: shards of two sizes
    moe = mixtral()
    for whole, units, rule, values in (
        (plain, [m for m in plain if isinstance(m, nn.Linear)], "weight", 66 * 70),
        (moe, moe.model.layers, "experts", 48 * 32),
    ):
        whole.requires_grad_(False)
        model = copy.deepcopy(whole)
        names = {m: n for n, m in whole.named_modules()}
        for unit in units:
            fully_shard(model.get_submodule(names[unit]))
        fully_shard(model)
        for method in (LoRA(r=2), fadapt.PiSSA(r=2), DoRA(r=2)):
            want = fadapt.init(whole, {rule: method})
            with pytest.MonkeyPatch.context() as monkeypatch:
                gathered = Gathered(monkeypatch, values)
                got = fadapt.init(model, {rule: method})
            if type(method) is LoRA:
                assert gathered.count == 0, gathered.count
            else:
                matrices = sum(a.site.experts or 1 for a in want.values())
                assert gathered.count >= matrices
                assert gathered.most <= 2, gathered.most
                largest = max(a.site.out_features * a.site.in_features for a in want.values())
                assert gathered.largest == largest  # one expert's, not the stack
            assert list(got) == list(want)
            for site, adapter in want.items():
                assert adapter.site == got[site].site
                for key, leaf in adapter.leaves.items():
                    assert torch.equal(leaf, got[site].leaves[key]), (site, key)
    assert GATE_UP in want


def parts_of_weights(rank: int, world: int, _: Path) -> None:
    """Rows and single values of a DTensor, to the last bit, whatever its placement."""
    mesh = init_device_mesh("cpu", (world,))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in ((5, 6, 8), (1, 4, 4), (12, 6)):
            whole = models.reals(*shape).to(dtype)
            whole.view(-1)[::3], whole.view(-1)[1] = -0.0, torch.nan
            index = torch.randperm(whole.numel(), generator=torch.Generator().manual_seed(0))[:9]
            for placement in (Shard(0), Shard(1), Shard(len(shape) - 1), Replicate()):
                spread = distribute_tensor(whole, mesh, [placement])
                for low in range(shape[0]):
                    high = min(low + 3, shape[0])
                    assert same_bits(full_rows(spread, low, high), whole[low:high])
                assert same_bits(full_at(spread, index), whole.view(-1)[index])
                assert fingerprint(spread) == fingerprint(whole)
    large = models.reals(81, 75)  # of which a fingerprint samples
    for placement in (Shard(0), Shard(1)):
        assert fingerprint(distribute_tensor(large, mesh, [placement])) == fingerprint(large)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def gathered_maps(rank: int, world: int, _: Path) -> None:
    """The map of a sharded weight is that of the whole one, with and without a bias."""
    for whole, x in ((models.mlp(), models.reals(3, 8)), (models.gpt2(), models.reals(3, 32))):
        model = fully_shard(copy.deepcopy(whole))
        ours, theirs = weights.weights_by_name(model), weights.weights_by_name(whole)
        for name, weight in theirs.items():
            got, want = ours[name].map, weight.map
            assert same_bits(got.weight(), want.weight()), name
            assert (got.bias is None) == (want.bias is None), name
            if got.bias is not None and want.bias is not None:
                assert same_bits(got.bias, want.bias), name
            if weight.shape[1] == x.shape[1] and weight.kind == "linear":
                assert same_bits(got(x), want(x)), name
                assert same_bits(got.linear(x), want.linear(x)), name


def unlike_batches(rank: int, world: int, _: Path) -> None:
    """Processes with batches of other sizes, or more of them: each forward needs both."""
    whole = models.qwen3().requires_grad_(False)
    model = sharded(whole)
    members = [moved(fadapt.init(whole, {"proj": LoRA(r=2)}), seed) for seed in range(3)]
    stack = fadapt.stack(members)
    for rows in ((2, 2), (1, 3), (3, 1)):
        batch = tokens(rows[rank])
        close([fadapt.run(model, stack, batch)], [fadapt.run(whole, stack, batch)])
    evas = {"q_proj": fadapt.EVA(r=2)}

    def fails():
        yield tokens(8)
        if rank:
            raise ZeroDivisionError("mine")
        yield tokens(8)

    for data in ([tokens(8)] * (2 + rank), iter([tokens(8)] * (2 - rank))):
        with pytest.raises(fadapt.CalibrationError, match="equally many"):
            fadapt.observe(model, evas, data)
    with pytest.raises(ZeroDivisionError if rank else fadapt.CalibrationError):
        fadapt.observe(model, evas, fails())
    got = fadapt.observe(model, evas, iter([tokens(8), tokens(8, 1)]))
    name = next(iter(fadapt.init(whole, evas, got)))
    assert got.tokens(name) == 2 * 8 * 6


def quantised_units(rank: int, world: int, _: Path) -> None:
    """Over bitsandbytes layers in a unit of FSDP2, whatever looks at them says so."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return
    whole = models.mlp().requires_grad_(False)
    whole[0] = bnb.nn.Linear4bit(64, whole[0].out_features, bias=False, quant_type="nf4")
    whole = whole.to("cpu").requires_grad_(False)
    config = {"^0": LoRA(r=2)}
    params = fadapt.init(whole, config)
    model = fully_shard(copy.deepcopy(whole))
    x = torch.ones(2, 64)
    for call in (
        lambda: fadapt.init(model, config),
        lambda: fadapt.init(model, {"^0": fadapt.PiSSA(r=2)}),
        lambda: fadapt.apply(model, params, x),
        lambda: fadapt.observe(model, {"^0": fadapt.EVA(r=2)}, [x]),
        lambda: fadapt.merge(model, params),
    ):
        with pytest.raises(fadapt.TargetError, match=r"0\.weight is a quantised layer.*FSDP2"):
            call()


def averaged_gradients(rank: int, world: int, _: Path) -> None:
    """What those who use DistributedDataParallel do instead."""
    from fadapt.distributed import all_reduce_gradients

    whole, batch = models.qwen3(), tokens(4)
    wrapped = nn.parallel.DistributedDataParallel(whole)
    params = moved(fadapt.init(whole, {"proj": LoRA(r=2)}))
    with pytest.raises(fadapt.TargetError, match="all_reduce_gradients"):
        fadapt.run(wrapped, params, batch)
    want = gradients(fadapt.run(whole, params, batch), params.trainable())
    fadapt.run(wrapped.module, params, part(batch, rank, world)).backward()
    all_reduce_gradients(params)
    close([leaf.grad for leaf in params.trainable()], want)
    fewer = params.trainable()[: 3 - rank]
    with pytest.raises(fadapt.ConfigError, match="other leaves"):
        all_reduce_gradients(fewer)


def several_merged(rank: int, world: int, _: Path) -> None:
    """Several adapters in the weights of a model that is spread, as in those of a whole one."""
    whole = models.llama().requires_grad_(False)
    model = sharded(whole)
    cfg = {"q_proj": LoRA(r=2), "down_proj": fadapt.Chain((LoRA(r=2), fadapt.BitFit()))}
    members = [moved(fadapt.init(whole, cfg), seed) for seed in (1, 2)]
    for rule, density in (("sum", 1.0), ("ties", 0.3), ("dare", 0.5), ("dare_ties", 0.5)):
        options = {"rule": rule, "density": density, "seed": 3}
        got = fadapt.merge_many(model, members, [0.5, -1.5], **options)
        want = fadapt.merge_many(whole, members, [0.5, -1.5], **options)
        assert list(got) == list(want)
        for name, value in want.items():
            own = model.get_parameter(name) if name in dict(model.named_parameters()) else None
            assert isinstance(got[name], DTensor) == isinstance(own, DTensor), name
            found = got[name].full_tensor() if isinstance(got[name], DTensor) else got[name]
            assert torch.equal(found, value), (rule, name)


FSDP = {
    f.__name__: f
    for f in (
        averaged_gradients,
        unlike_batches,
        quantised_units,
        gathered_maps,
        one_weight_at_a_time,
        several_merged,
        parts_of_weights,
        every_method,
        mixed_stack,
        precision_and_checkpoints,
        files,
        tensor_parallel,
    )
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ranks.run(2, FSDP, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("name", FSDP)
def test_sharded_base(name, found):
    assert not found[name], found[name]
