"""observe: the rows it counts are those that plain forward hooks see; the model stays as it was."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import fadapt
from fadapt import CalibrationError, CheckpointError, Config, FadaptWarning
from fadapt.base.device import to_device
from fadapt.calibration import (
    PCA,
    CenteredGram,
    Gram,
    MaxAbs,
    PairedSums,
    Reduction,
    Sketch,
    Statistic,
    Stats,
    SumSq,
    combine_all,
    text_batches,
)
from tests import models as zoo

GRAM_IN, GRAM_OUT = Statistic(Gram()), Statistic(Gram(), "out")
PROJ = {"_proj": fadapt.LoRA()}


def padded(lengths: list[int], width: int, seed: int = 0) -> dict[str, Tensor]:
    """Token ids of the given lengths, padded on the right to ``width``."""
    ids = zoo.tokens(len(lengths), 40, seed=seed)[:, :width].clone()
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask + 3 * (1 - mask), "attention_mask": mask}


def hooked(model: nn.Module, batches: Iterable[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """{parameter: (inputs, bias-free outputs)} of the unmasked tokens, by ordinary hooks."""
    seen: dict[str, list] = {}
    mask: Tensor | None = None
    handles = []

    def hook(name: str) -> Callable:
        def record(module: nn.Module, args: tuple, out: Tensor) -> None:
            if args[0].dim() < 3:
                return
            bias = getattr(module, "bias", None)
            u = out if bias is None else out - bias
            keep = slice(None) if mask is None else mask.bool()
            rows = [t.detach()[keep].flatten(0, -2).double() for t in (args[0], u)]
            seen.setdefault(f"{name}.weight", []).append(rows)

        return record

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            handles.append(module.register_forward_hook(hook(name)))
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask")
            model(**batch)
    for handle in handles:
        handle.remove()
    return {k: tuple(map(torch.cat, zip(*v, strict=True))) for k, v in seen.items()}  # type: ignore[misc]


def close(a: Any, b: Any, tol: float = 1e-10) -> None:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert (a - b).abs().max() <= tol * b.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "bert"])
def test_statistics_are_those_of_hooked_rows(name: str) -> None:
    model = zoo.HF[name]().double()
    batches = [padded([9, 4, 1], 9), padded([6, 7], 8, seed=1)]
    pattern = {"gpt2": "c_|attn", "bert": "dense|query|key|value"}.get(name, "_proj")
    exclude = ("pooler", "classifier") if name == "bert" else ()
    config = Config({pattern: fadapt.LoRA()}, exclude=exclude)
    reference = hooked(model, batches)
    stats = fadapt.observe(
        model, config, batches, statistics=[GRAM_IN, GRAM_OUT, Statistic(MaxAbs())]
    )
    assert len(stats.streams) == {"gpt2": 8, "bert": 12, "qwen3": 14, "llama": 14}[name]
    for site in stats.streams:
        x, u = reference[site]
        assert stats.tokens(site) == len(x) == 27
        close(stats.get(site, GRAM_IN), x.mT @ x / len(x))
        close(stats.get(site, GRAM_OUT), u.mT @ u / len(u))
        close(stats.get(site, Statistic(MaxAbs())), x.abs().amax(0))


def test_padding_batching_and_order_do_not_matter() -> None:
    model = zoo.qwen3().double()
    lengths = [3, 8, 5, 1, 6]
    whole = padded(lengths, 8)
    ids, mask = whole["input_ids"], whole["attention_mask"]
    longer = padded(lengths, 20)
    longer["input_ids"][:, :8] = ids
    singles = [{"input_ids": ids[i : i + 1, :n]} for i, n in enumerate(lengths)]
    cuts = [[whole], [longer], singles, singles[::-1]]
    cuts.append([{"input_ids": ids[s], "attention_mask": mask[s]} for s in ([4, 0], [2, 1, 3])])
    wanted = [Statistic(CenteredGram()), GRAM_OUT, Statistic(Sketch(4))]
    observed = [fadapt.observe(model, PROJ, cut, statistics=wanted) for cut in cuts]
    for stats in observed[1:]:
        for stream, kinds in observed[0].states.items():
            for reduction, state in kinds.items():
                for leaf, tensor in state.items():
                    close(stats.states[stream][reduction][leaf], tensor)


def test_sites_fed_by_one_tensor_share_one_state() -> None:
    model, batches = zoo.qwen3().double(), [padded([9, 4], 9)]
    one, many = (
        fadapt.observe(model, PROJ, batches, statistics=[GRAM_IN], share=share)
        for share in (True, False)
    )
    suffixes = [[n.split(".")[-2] for n in group] for group in one.shared]
    assert suffixes == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * zoo.LAYERS
    assert (len(one.states), len(many.states)) == (4 * zoo.LAYERS, 7 * zoo.LAYERS)
    assert not many.shared
    for site in one.streams:
        assert torch.equal(one.get(site, GRAM_IN), many.get(site, GRAM_IN))


class Forked(nn.Module):
    """Two linear maps of the same input, which some batches change in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, how: str = "same") -> Tensor:
        y = self.a(x)
        if how == "in place":
            x += 1
        if how == "skip":
            return y
        if how == "twice":
            y = self.a(x)
        return y + self.b(x.clone() if how == "clone" else x)


@pytest.mark.parametrize("how", ["in place", "skip", "clone", "twice"])
def test_sites_that_part_later_are_refused_and_never_mixed(how: str) -> None:
    model = Forked().double()
    same = {"x": zoo.reals(5, 4).double()}
    other = {"x": zoo.reals(5, 4, seed=1).double(), "how": how}
    with pytest.raises(CalibrationError, match="share=False"):
        fadapt.observe(
            model, fadapt.LoRA(), [same, dict(other, x=other["x"].clone())], statistics=[GRAM_IN]
        )
    stats = fadapt.observe(
        model,
        fadapt.LoRA(),
        [dict(other, x=other["x"].clone()), same],
        statistics=[GRAM_IN],
        share=False,
    )
    x = {"in place": other["x"] + 1, "skip": other["x"][:0]}.get(how, other["x"])
    rows = torch.cat([x, same["x"]])
    close(stats.get("b.weight", GRAM_IN), rows.mT @ rows / len(rows))


def test_the_first_batch_decides_what_is_shared_also_in_place() -> None:
    batch = {"x": zoo.reals(5, 4).double(), "how": "clone"}
    stats = fadapt.observe(Forked().double(), fadapt.LoRA(), [batch], statistics=[GRAM_IN])
    assert not stats.shared


def snapshot(model: nn.Module) -> list:
    modules = [(m.training, dict(m._forward_hooks), dict(m.__dict__)) for m in model.modules()]
    return [
        [(t, h, set(d)) for t, h, d in modules],
        [
            (n, id(p), p.requires_grad, p.grad, p.detach().clone())
            for n, p in model.named_parameters()
        ],
    ]


def unchanged(model: nn.Module, before: list) -> None:
    after = snapshot(model)
    assert before[0] == after[0]
    for a, b in zip(before[1], after[1], strict=True):
        assert a[:4] == b[:4]
        assert torch.equal(a[4], b[4])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = zoo.qwen3().train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = snapshot(model)
    seen = []
    handle = model.model.norm.register_forward_hook(
        lambda *_: seen.append((model.training, torch.is_grad_enabled()))
    )
    bad = {"input_ids": torch.tensor([[zoo.VOCAB + 5]])}
    batches = [padded([3, 2], 3), *([bad] if fails else [])]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    if fails:
        batches[0].pop("attention_mask")
        with pytest.raises(IndexError):
            fadapt.observe(model, PROJ, batches, statistics=[GRAM_IN])
    else:
        fadapt.observe(model, PROJ, batches, statistics=[GRAM_IN])
    handle.remove()
    assert seen
    assert set(seen) == {(False, False)}
    assert torch.equal(state, torch.get_rng_state())
    unchanged(model, before)
    assert model(**padded([3], 3)).logits.requires_grad


def test_an_iterator_of_batches_may_run_the_model_itself() -> None:
    model = zoo.qwen3().double()

    def batches() -> Iterator[dict]:
        for seed in range(2):
            batch = padded([5], 5, seed)
            model(**padded([7], 7, seed + 9))
            yield batch

    stats = fadapt.observe(model, PROJ, batches(), statistics=[GRAM_IN])
    plain = fadapt.observe(model, PROJ, [padded([5], 5, s) for s in range(2)], statistics=[GRAM_IN])
    for site in stats.streams:
        assert torch.equal(stats.get(site, GRAM_IN), plain.get(site, GRAM_IN))


def test_one_pass_serves_all_methods() -> None:
    model = zoo.qwen3().double()
    config = {
        "q_proj|k_proj": fadapt.EVA(2),
        "v_proj": fadapt.CorDA(2),
        "o_proj": fadapt.EVA(2, center=False),
        "mlp": fadapt.Chain((fadapt.CorDA(2), fadapt.LoRA(2), fadapt.EVA(2))),
    }
    batches = [padded([9, 4], 9), padded([5, 6], 6, seed=1)]
    calls = []
    handle = model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    stats = fadapt.observe(model, config, batches)
    handle.remove()
    assert len(calls) == 1 + len(batches)  # the first batch once more, to see what is shared
    kinds = {site.split(".")[-2]: set(k) for (site, _), k in stats.states.items()}
    assert kinds == {
        "q_proj": {CenteredGram()},
        "o_proj": {Gram()},
        "gate_proj": {CenteredGram()},
        "down_proj": {CenteredGram()},
    }
    at_once, reused = fadapt.init(model, config, batches), fadapt.init(model, config, stats)
    for name, adapter in at_once.items():
        assert adapter.method == reused[name].method
        for leaf, tensor in adapter.leaves.items():
            assert torch.equal(tensor, reused[name].leaves[leaf])


def test_labels_can_choose_the_tokens() -> None:
    model = zoo.llama().double()
    batch = padded([9, 4], 9)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 2:5] = labels[1, 3:7] = 1  # tokens 4 to 6 of the second are padding
    batch["labels"] = labels
    wanted = torch.zeros_like(labels)
    wanted[0, 2:5] = wanted[1, 3] = 1
    site = "model.layers.1.mlp.down_proj.weight"
    stats = fadapt.observe(model, PROJ, [batch], statistics=[GRAM_IN], label_mask=True)
    assert stats.tokens(site) == 4
    inputs: list[Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, args, out: inputs.append(args[0][wanted.bool()])
    )
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    close(stats.get(site, GRAM_IN), inputs[0].mT @ inputs[0] / 4)
    del batch["labels"]
    with pytest.raises(CalibrationError, match="label_mask"):
        fadapt.observe(model, PROJ, [batch], statistics=[GRAM_IN], label_mask=True)


def test_tensors_tuples_and_lists_are_batches() -> None:
    model, x = zoo.mlp().double(), zoo.reals(6, 8).double()
    site = "0.weight"
    for batch in (x, (x,), [x], {"input": x}, x.reshape(2, 3, 8)):
        stats = fadapt.observe(model, fadapt.LoRA(2), [batch], statistics=[GRAM_IN])
        close(stats.get(site, GRAM_IN), x.mT @ x / 6)
    for batch in ("text", 3, None):
        with pytest.raises(CalibrationError, match="text_batches"):
            fadapt.observe(model, fadapt.LoRA(2), [batch], statistics=[GRAM_IN])
    for batches in (x, {"input": x}, "text", 3):
        with pytest.raises(CalibrationError, match=r"\[batch\]"):
            fadapt.observe(model, fadapt.LoRA(2), batches, statistics=[GRAM_IN])  # type: ignore[arg-type]


class TimeFirst(nn.Module):
    """Its layers see (tokens, batch, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1))


def test_rows_that_do_not_match_the_mask_are_refused() -> None:
    model, x = TimeFirst(), zoo.reals(2, 3, 4)
    full, holes = torch.ones(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    fadapt.observe(model, fadapt.LoRA(), [{"x": x, "attention_mask": full}], statistics=[GRAM_IN])
    with pytest.raises(CalibrationError, match=r"layer.weight: batch 0 .*\(3, 2, 4\).*no mask"):
        fadapt.observe(
            model, fadapt.LoRA(), [{"x": x, "attention_mask": holes}], statistics=[GRAM_IN]
        )
    with pytest.raises(CalibrationError, match="shape"):
        fadapt.observe(
            model, fadapt.LoRA(), [{"x": x, "attention_mask": holes[:, None]}], statistics=[GRAM_IN]
        )


def test_padding_without_a_mask_is_refused() -> None:
    model = zoo.qwen3(pad_token_id=3)
    batch = padded([9, 4], 9)
    del batch["attention_mask"]
    with pytest.raises(CalibrationError, match="pad token 3"):
        fadapt.observe(model, PROJ, [batch], statistics=[GRAM_IN])
    with pytest.raises(CalibrationError, match="batch 1 has no attention_mask"):
        fadapt.observe(
            model, PROJ, [padded([9], 9), {"input_ids": zoo.tokens()}], statistics=[GRAM_IN]
        )


@pytest.mark.parametrize("batches", [[], iter([]), (b for b in ())])
@pytest.mark.parametrize("share", [True, False])
def test_no_batches_is_an_error(batches: Iterable, share: bool) -> None:
    with pytest.raises(CalibrationError, match="exhausted"):
        fadapt.observe(zoo.mlp(), fadapt.EVA(2), batches, share=share)


def test_too_few_tokens_names_the_site_and_the_numbers() -> None:
    model = zoo.mlp().double()
    with pytest.raises(CalibrationError, match=r"0.weight: 4 tokens .* at least 5"):
        fadapt.init(model, fadapt.EVA(4), [zoo.reals(4, 8).double()])
    fadapt.init(model, fadapt.EVA(4), [zoo.reals(5, 8).double()])


def test_bad_rows_are_refused_above_the_tolerance() -> None:
    model, x = zoo.mlp().double(), zoo.reals(50, 8).double()
    x[3, 2], x[9, 0] = float("nan"), float("inf")
    with pytest.raises(CalibrationError, match=r"0.weight: 2 of 50 tokens hold NaN or Inf"):
        fadapt.init(model, fadapt.EVA(2), [x])
    stats = fadapt.observe(model, fadapt.EVA(2), [x], tolerance=0.03)
    with pytest.raises(CalibrationError, match=r"0.weight"):
        stats.get("0.weight", GRAM_IN)
    stats = fadapt.observe(model, fadapt.LoRA(), [x], tolerance=0.04, statistics=[GRAM_IN])
    good = torch.cat([x[:3], x[4:9], x[10:]])
    close(stats.get("0.weight", GRAM_IN), good.mT @ good / 48)
    assert stats.combine(
        fadapt.observe(model, fadapt.LoRA(), [good], statistics=[GRAM_IN])
    ) is not (None)


def test_calibration_never_sees_an_adapted_model() -> None:
    model, x = zoo.mlp(), zoo.reals(20, 8)
    params = fadapt.init(model, fadapt.LoRA(2))
    with fadapt.bound(model, params):
        with pytest.raises(fadapt.FadaptError, match="bound"):
            fadapt.observe(model, fadapt.EVA(2), [x])
        with pytest.raises(fadapt.FadaptError, match="bound"):
            fadapt.init(model, fadapt.EVA(2), [x])


def test_asking_for_nothing_or_the_unknown() -> None:
    model, x = zoo.mlp(), zoo.reals(20, 8)
    with pytest.raises(CalibrationError, match=r"nothing to observe: \['LoRA'\]"):
        fadapt.observe(model, fadapt.LoRA(), [x])
    stats = fadapt.observe(model, {"0": fadapt.EVA(2)}, [x])
    with pytest.raises(CalibrationError, match=r"no statistics for 2.weight"):
        stats.get("2.weight", GRAM_IN)
    with pytest.raises(CalibrationError, match="not observed"):
        stats.get("0.weight", Statistic(MaxAbs()))
    with pytest.raises(CalibrationError, match=r"EVA.* at 0.weight starts from data"):
        fadapt.init(model, fadapt.EVA(2))
    with pytest.raises(CalibrationError, match="meta"):
        fadapt.observe(zoo.mlp().to("meta"), fadapt.EVA(2), [x])


def test_a_layer_that_never_ran_says_so() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(CalibrationError, match=r"unused.weight: 0 tokens.*did not run"):
        fadapt.init(Unused(), fadapt.EVA(1), [zoo.reals(9, 4)])


# Stats


ALL = [
    *map(Statistic, (SumSq(), MaxAbs(), CenteredGram(), Sketch(3))),
    Statistic(PairedSums(2), "out"),
]


def paired_batches(seed: int) -> list[tuple[dict, dict]]:
    return [(padded([5, 3], 6, seed + i), padded([4, 6], 7, seed + i + 50)) for i in (0, 1)]


def test_save_and_load_keep_every_bit(tmp_path) -> None:
    model, path = zoo.llama(), tmp_path / "stats.safetensors"
    stats = fadapt.observe(model, PROJ, paired_batches(0), statistics=ALL, tolerance=0.25)
    stats.save(path)
    loaded = Stats.load(path, model)
    assert (loaded.streams, loaded.base) == (stats.streams, stats.base)
    assert loaded.tolerance == 0.25
    assert loaded.states.keys() == stats.states.keys()
    for stream, kinds in stats.states.items():
        assert set(kinds) == set(loaded.states[stream])
        for reduction, state in kinds.items():
            for leaf, tensor in state.items():
                assert torch.equal(tensor, loaded.states[stream][reduction][leaf])
                assert tensor.dtype == loaded.states[stream][reduction][leaf].dtype
    site = next(iter(stats.streams))
    assert loaded.tokens(site) == stats.tokens(site) == 36


def test_files_of_parts_combine_to_the_whole(tmp_path) -> None:
    model = zoo.llama().double()
    whole = fadapt.observe(model, PROJ, paired_batches(0) + paired_batches(7), statistics=ALL)
    for i, seed in enumerate((0, 7)):
        part = fadapt.observe(model, PROJ, paired_batches(seed), statistics=ALL)
        part.save(tmp_path / f"{i}.safetensors")
    parts = [Stats.load(tmp_path / f"{i}.safetensors") for i in (1, 0)]
    for combined in (parts[0].combine(parts[1]), combine_all(parts)):
        for stream, kinds in whole.states.items():
            for reduction, state in kinds.items():
                for leaf, tensor in state.items():
                    close(combined.states[stream][reduction][leaf], tensor)


def test_another_base_is_refused(tmp_path) -> None:
    model, other = zoo.llama(), zoo.llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    stats = fadapt.observe(model, {"q_proj": fadapt.EVA(2)}, [padded([9, 4], 9)])
    stats.save(tmp_path / "s.safetensors")
    with pytest.raises(CalibrationError, match=r"another base model: lm_head.weight differs"):
        Stats.load(tmp_path / "s.safetensors", other)
    with pytest.raises(CalibrationError, match=r"lm_head.weight differs"):
        fadapt.init(other, {"q_proj": fadapt.EVA(2)}, stats)
    with pytest.raises(CalibrationError, match="different base models"):
        stats.combine(fadapt.observe(other, {"q_proj": fadapt.EVA(2)}, [padded([9, 4], 9)]))
    with pytest.raises(CalibrationError, match="different sites or kinds"):
        stats.combine(fadapt.observe(model, {"k_proj": fadapt.EVA(2)}, [padded([9, 4], 9)]))


def test_a_damaged_or_foreign_file_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "s.safetensors"
    with pytest.raises(CheckpointError, match="is not a file"):
        Stats.load(path)
    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(CheckpointError, match="not written by fadapt"):
        Stats.load(path)
    fadapt.observe(zoo.mlp(), fadapt.EVA(2), [zoo.reals(9, 8)]).save(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="is truncated"):
        Stats.load(path)


# Memory


class Counted(list):
    """A list of batches that counts how often it is read."""

    reads = 0

    def __iter__(self) -> Iterator:
        self.reads += 1
        return super().__iter__()


def test_max_memory_makes_several_passes_that_change_nothing() -> None:
    model, batches = zoo.llama().double(), Counted([padded([9, 4], 9), padded([5], 5, 1)])
    exact = fadapt.observe(model, PROJ, batches, statistics=[GRAM_IN, GRAM_OUT])
    budget = 2 * Gram().nbytes(48) + 100
    assert exact.nbytes > 3 * budget
    before = batches.reads
    with pytest.warns(FadaptWarning, match=r"passes over the batches") as caught:
        split = fadapt.observe(
            model, PROJ, batches, statistics=[GRAM_IN, GRAM_OUT], max_memory=budget
        )
    passes = int(str(caught[0].message).split("max_memory=")[1].split(": ")[1].split(" passes")[0])
    assert batches.reads - before == passes + 1
    assert passes >= exact.nbytes / budget
    for stream, kinds in exact.states.items():
        for reduction, state in kinds.items():
            for leaf, tensor in state.items():
                assert torch.equal(split.states[stream][reduction][leaf], tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fadapt.observe(model, PROJ, batches, statistics=[GRAM_IN], max_memory=10**9)


def test_what_cannot_be_read_again_is_sketched_or_refused() -> None:
    model = zoo.mlp(widths=(64, 64, 8)).double()
    rng = torch.Generator().manual_seed(0)
    scale = 0.5 ** torch.arange(64, dtype=torch.float64)
    x = [torch.randn(200, 64, generator=rng, dtype=torch.float64) * scale for _ in range(3)]
    exact = fadapt.observe(model, {"0": fadapt.EVA(2)}, x)
    wanted = Statistic(PCA(4))
    with pytest.warns(FadaptWarning, match=r"Nyström sketches .* at .'0.weight'"):
        sketched = fadapt.observe(model, {"0": fadapt.EVA(2)}, iter(x), max_memory=20_000)
    assert sketched.nbytes < 20_000 < exact.nbytes
    a, b = (s.get("0.weight", wanted) for s in (exact, sketched))
    assert (a.vectors * b.vectors).sum(0).min() > 0.9999
    close(b.values, a.values, 1e-3)
    with pytest.raises(CalibrationError, match="only principal components can be sketched"):
        fadapt.observe(model, {"0": fadapt.CorDA(2)}, x, max_memory=20_000)
    with pytest.raises(CalibrationError, match="only once"):
        fadapt.observe(model, fadapt.CorDA(2), iter(x), max_memory=Gram().nbytes(64) + 100)


# Pairs


def test_pairs_are_the_last_tokens_of_both_halves() -> None:
    model = zoo.llama().double()
    batches = paired_batches(3)
    statistic = Statistic(PairedSums(), "out")
    stats = fadapt.observe(model, {"o_proj": fadapt.LoRA()}, batches, statistics=[statistic])
    layer = model.model.layers[1].self_attn.o_proj
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, a, out: outputs.append(out - m.bias))
    z: list[list[Tensor]] = [[], []]
    for pair in batches:
        for half, batch in enumerate(pair):
            model(**batch)
            last = batch["attention_mask"].sum(1) - 1
            z[half] += [outputs[-1][i, n] for i, n in enumerate(last)]
    handle.remove()
    plus, minus = (torch.stack(half).detach() for half in z)
    pairs = stats.get("model.layers.1.self_attn.o_proj.weight", statistic)
    close(pairs.difference, (plus - minus).mean(0))
    ahead = ((plus - minus) @ pairs.basis > 0).sum(0)
    decided = 2 * ahead != len(plus)
    assert decided.sum() > zoo.HIDDEN // 3
    wanted = torch.where(2 * ahead < len(plus), -1.0, 1.0).double()
    assert torch.equal(pairs.majority[decided], wanted[decided])
    u = np.linalg.svd(layer.weight.detach().numpy())[0]
    close((u * pairs.basis.numpy()).sum(0).__abs__(), np.ones(zoo.HIDDEN))
    assert stats.tokens("model.layers.1.self_attn.o_proj.weight", "out") == 4


def test_pairs_must_be_pairs() -> None:
    model, statistic = zoo.llama(), Statistic(PairedSums(2), "out")
    for batches, message in (
        ([padded([3], 3)], "paired statistics need two"),
        ([(padded([3], 3), padded([3, 2], 3))], "1 and 2 sequences"),
        ([(padded([3, 0], 3), padded([3, 2], 3))], "without any counted token"),
    ):
        with pytest.raises(CalibrationError, match=message):
            fadapt.observe(model, {"o_proj": fadapt.LoRA()}, batches, statistics=[statistic])


# Texts


def tokenizer(pad: str | None = "[PAD]") -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{w: i + 2 for i, w in enumerate("a b c d e".split())}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, unk_token="[UNK]")


TEXTS = ["a b c", "d", "e d c b a a a", "b b"]


@pytest.mark.parametrize(
    "texts",
    [
        TEXTS,
        iter(TEXTS),
        datasets.Dataset.from_dict({"text": TEXTS}),
        datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    ],
    ids=["list", "iterator", "dataset", "streamed"],
)
def test_texts(texts: Iterable) -> None:
    batches = text_batches(texts, tokenizer(), batch_size=3, max_length=5)
    assert len(batches) == len(list(batches)) == 2
    assert [int(b["attention_mask"].sum()) for b in batches] == [3 + 1 + 5, 2]
    model = zoo.qwen3().double()
    stats = fadapt.observe(model, PROJ, batches, statistics=[GRAM_IN])
    site = "model.layers.0.self_attn.q_proj.weight"
    assert stats.tokens(site) == 11
    singles = text_batches(TEXTS, tokenizer(None), batch_size=1, max_length=5)
    close(
        stats.get(site, GRAM_IN),
        fadapt.observe(model, PROJ, singles, statistics=[GRAM_IN]).get(site, GRAM_IN),
    )


def test_texts_that_cannot_be_used() -> None:
    good = tokenizer()
    for make, message in (
        (lambda: text_batches("a b", good), r"\[text\]"),
        (lambda: text_batches([], good), "no texts"),
        (lambda: text_batches(TEXTS, tokenizer(None)), "pad token"),
        (lambda: text_batches([{"body": "a"}], good), r"columns \['body'\]"),
        (lambda: text_batches([3], good), "text 0 is 3"),
    ):
        with pytest.raises(CalibrationError, match=message):
            make()
    rows = [{"body": text} for text in TEXTS]
    assert len(text_batches(rows, good, column="body", limit=3, batch_size=2)) == 2


def test_every_reduction_can_be_asked_for() -> None:
    model, x = zoo.mlp().double(), zoo.reals(30, 8).double()
    reductions: list[Reduction] = [Sketch(2), PCA(2), Gram(), SumSq()]
    stats = fadapt.observe(model, fadapt.LoRA(), [x], statistics=[Statistic(r) for r in reductions])
    assert set(stats.states["0.weight", "in"]) == {Sketch(2), CenteredGram()}


def test_batches_keep_their_type_on_the_way_to_the_device():
    class Encoding(UserDict):
        pass

    batch = Encoding(x=torch.ones(2), deep={"y": [torch.ones(1)]}, text="a")
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is Encoding
    assert moved["x"].is_meta
    assert moved["deep"]["y"][0].is_meta
    assert moved["text"] == "a"
    assert not batch["x"].is_meta
