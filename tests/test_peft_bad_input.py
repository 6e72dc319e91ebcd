"""Directories that are damaged, foreign or hostile, and params that PEFT's format cannot hold."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fadapt
from fadapt import CheckpointError, FadaptWarning, LoRA
from fadapt.peft import adapters_in, from_peft_dict, load_peft, peft_dict, save_peft
from fadapt.peft.formats import FORMATS
from tests.models import SharedModule, TiedLinear, mlp, perturb, qwen3, seeded
from tests.peft_table import Net, tied

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.layers.0.up.lora_A.weight"


@pytest.fixture
def net() -> nn.Module:
    return seeded(Net())


@pytest.fixture
def folder(net, tmp_path) -> Path:
    path = tmp_path / "adapter"
    save_peft(net, perturb(fadapt.init(net, {"up|down": LoRA(r=2)})), path)
    return path


def config(**fields: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps({**data, **fields}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        found = load_file(path / WEIGHTS)
        change(found)
        save_file(found, path / WEIGHTS)

    return apply


def text(content: str) -> Callable[[Path], None]:
    return lambda path: (path / CONFIG).write_text(content) and None


def renamed(key: str) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({key: t.pop(FIRST)}))


def replaced(key: str, value: torch.Tensor) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({key: value}))


def bad_value(value: float) -> Callable[[Path], None]:
    return tensors(lambda t: t[FIRST].view(-1)[3:4].fill_(value))


def pickled(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Path))


def large(path: Path) -> None:
    with (path / CONFIG).open("a") as file:
        file.write(" " * (9 << 20))


def large_header(path: Path) -> None:
    data = bytearray((path / WEIGHTS).read_bytes())
    data[:8] = (1 << 40).to_bytes(8, "little")
    (path / WEIGHTS).write_bytes(data)


def shortened(path: Path) -> None:
    os.truncate(path / WEIGHTS, (path / WEIGHTS).stat().st_size - 40)


def named_twice(path: Path) -> None:
    said = (path / CONFIG).read_text()
    (path / CONFIG).write_text(said.replace('"r": 2', '"r": 8, "r": 2'))


HUGE = "9" * 5000
BAD: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": (lambda p: (p / CONFIG).unlink(), (CONFIG,)),
    "no tensors": (lambda p: (p / WEIGHTS).unlink(), (WEIGHTS,)),
    "pickle": (pickled, ("adapter_model.bin", "pickle")),
    "large config": (large, (CONFIG, "bytes")),
    "large header": (large_header, (WEIGHTS, "header")),
    "truncated": (shortened, (WEIGHTS,)),
    "empty tensors file": (lambda p: (p / WEIGHTS).write_bytes(b""), (WEIGHTS,)),
    "not JSON": (text("{"), (CONFIG,)),
    "a name twice": (named_twice, (CONFIG, "'r' occurs twice")),
    "a module to save of another type": (config(modules_to_save=[None]), ("modules_to_save",)),
    "parameters of another type": (config(target_parameters={"a": 1}), ("target_parameters",)),
    "a parameter without a match": (config(target_parameters=["no.w"]), ("'no.w'", "matches no")),
    "unknown bias": (config(bias="some"), ("bias is 'some'", "none, all")),
    "deep JSON": (text("[" * 200_000), (CONFIG,)),
    "a list": (text("[]"), (CONFIG, "list")),
    "huge number": (text(f'{{"peft_type": "LORA", "r": {HUGE}}}'), (CONFIG,)),
    "not UTF-8": (lambda p: (p / CONFIG).write_bytes(b'{"r": "\xff"}'), (CONFIG,)),
    "no peft_type": (config(peft_type=None), ("peft_type", "None", "LORA")),
    "unknown peft_type": (config(peft_type="TOMORROW"), ("TOMORROW", "LORA")),
    "a gate over adapters": (config(peft_type="XLORA"), ("XLORA", "gate", "LORA")),
    "a prompt": (config(peft_type="PREFIX_TUNING"), ("PREFIX_TUNING", "no weight", "LORA")),
    "r of another type": (config(r="2"), ("r is '2'",)),
    "r true": (config(r=True), ("r is True",)),
    "r other than the tensors": (config(r=3), ("layers.0.up", "(2, 12)", "(3, 12)")),
    "r negative": (config(r=-1), ("r is -1",)),
    "alpha NaN": (config(lora_alpha=float("nan")), ("lora_alpha",)),
    "alpha infinite": (text('{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}'), ("lora_alpha",)),
    "flag of another type": (config(use_rslora="yes"), ("use_rslora",)),
    "patterns of another type": (config(rank_pattern=["up"]), ("rank_pattern",)),
    "pattern without a match": (config(rank_pattern={"nothing": 2}), ("rank_pattern", "nothing")),
    "pattern behind another": (
        config(alpha_pattern={"up": 3, "0.up": 4}),
        ("alpha_pattern", "0.up"),
    ),
    "pattern that does not compile": (config(alpha_pattern={"(": 2}), ("alpha_pattern", "(")),
    "target regex that does not compile": (config(target_modules="*"), ("target_modules", "*")),
    "pattern that takes forever": (config(rank_pattern={"((a|[b-z.])+)+#": 2}), ("forever",)),
    "target that takes forever": (config(target_modules=r"(?:.*(?:\w+\.)*)*#"), ("forever",)),
    "long pattern": (config(target_modules="x" * 30_000), ("forever", "longer")),
    "target of another type": (config(target_modules=[1]), ("target_modules", "1")),
    "target without a match": (
        config(target_modules=["up", "down", "left"]),
        ("target_modules", "left"),
    ),
    "targets mean more": (tensors(lambda t: [t.pop(k) for k in list(t) if "1.up" in k]), ("1.up",)),
    "targets mean less": (config(target_modules=["up"]), ("layers.0.down",)),
    "layers mean less": (config(layers_to_transform=[1]), ("layers.0.down",)),
    "layers of another type": (config(layers_to_transform="1"), ("layers_to_transform",)),
    "key without prefix": (renamed("layers.0.up.lora_A.weight"), ("layers.0.up.lora_A.weight",)),
    "key of no module": (
        renamed("base_model.model.layers.7.up.lora_A.weight"),
        ("layers.7.up", "near"),
    ),
    "key with dots": (renamed("base_model.model...lora_A.weight"), ("...lora_A.weight",)),
    "key with a path": (renamed("base_model.model.../../etc.lora_A.weight"), ("../../etc",)),
    "key of no tensor": (renamed("base_model.model.layers.0.up.lora_C"), ("lora_C",)),
    "one factor alone": (tensors(lambda t: t.pop(FIRST)), ("layers.0.up.lora_A.weight",)),
    "another base's shape": (replaced(FIRST, torch.zeros(2, 13)), ("(2, 13)", "(2, 12)", "base")),
    "a vector": (replaced(FIRST, torch.zeros(24)), ("(24,)", "(2, 12)")),
    "integers": (replaced(FIRST, torch.zeros(2, 12, dtype=torch.int8)), ("int8", FIRST)),
    "NaN": (bad_value(float("nan")), (FIRST, "NaN")),
    "Inf": (bad_value(-float("inf")), (FIRST, "Inf")),
    "saved module": (
        replaced("base_model.model.layers.0.up.base_layer.weight", torch.zeros(16, 12)),
        ("layers.0.up.weight", "replaces"),
    ),
    "saved module of another shape": (
        replaced("base_model.model.layers.0.up.base_layer.weight", torch.zeros(16, 13)),
        ("(16, 13)", "another base"),
    ),
    "trained tokens": (config(trainable_token_indices=[1]), ("trainable_token_indices", "0 mod")),
    "repeated layers": (config(layer_replication=[[0, 2]]), ("layer_replication",)),
    "CorDA without its start": (config(init_lora_weights="corda"), ("corda", "initial=")),
    "PiSSA of niter": (config(init_lora_weights="pissa_niter_4"), ("pissa_niter_4", "initial=")),
    "LoftQ": (config(init_lora_weights="loftq"), ("loftq",)),
    "unknown start": (config(init_lora_weights="tomorrow"), ("tomorrow",)),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name, net, folder):
    change, words = BAD[name]
    change(folder)
    before = {n: p.clone() for n, p in net.named_parameters()}
    with pytest.raises(CheckpointError) as error:
        load_peft(folder, net)
    for word in (*words, "adapter"):
        assert word in str(error.value), f"{word!r} not in {error.value}"
    assert len(str(error.value)) < 1500
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_the_unchanged_directory_is_read(net, folder):
    assert len(load_peft(folder, net)) == 4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_a_byte_are_read_as_they_are(net, folder, dtype):
    tensors(lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))(folder)
    values = load_file(folder / WEIGHTS)
    params = load_peft(folder, net)
    assert torch.equal(params["layers.0.up.weight"].train["A"], values[FIRST].float())


def test_another_model(net, folder):
    with pytest.raises(CheckpointError, match=r"layers\.0\.down\.lora_A.*matches no weight"):
        load_peft(folder, mlp())
    with torch.device("meta"), pytest.raises(CheckpointError, match="meta tensor"):
        load_peft(folder, Net())


@pytest.mark.parametrize("path", [None, 3, "", "nowhere"])
def test_no_directory(path, net):
    with pytest.raises(CheckpointError):
        load_peft(path, net)


def test_unknown_fields_are_named(net, folder):
    config(new_field={"x": 1}, unset=None, off=False)(folder)
    with pytest.warns(FadaptWarning, match=r"\['new_field'\]"):
        load_peft(folder, net)


def test_oft_of_another_series(net, tmp_path):
    save_peft(net, perturb(fadapt.init(net, fadapt.OFT(4, exact=False))), tmp_path / "oft")
    for version in ("0.17.1", None, "new"):
        config(peft_version=version)(tmp_path / "oft")
        with pytest.raises(CheckpointError, match=r"changed with PEFT 0\.18"):
            load_peft(tmp_path / "oft", net)


# ---- several adapters


ODD: list[Any] = [5, -1, 0, 2.5, True, "x", "", [], {}, [1], {"a": 1}, 10**400, [[]], {"up": None}]
FORMS = {
    "LORA": LoRA(r=2),
    "DELORA": fadapt.DeLoRA(r=2, form="peft"),
    "IA3": fadapt.IA3(),
    "HRA": fadapt.HRA(r=2),
    "ROAD": fadapt.RoAd(1, 4),
    "OFT": fadapt.OFT(4),
    "LOHA": fadapt.LoHa(r=2),
    "LOKR": fadapt.LoKr(r=1),
    "HIRA": fadapt.HiRA(r=2),
    "GRALORA": fadapt.GraLoRA(r=2),
    "MISS": fadapt.MiSS(r=4),
    "C3A": fadapt.C3A(block_size=4),
    "FOURIERFT": fadapt.FourierFT(n_frequency=9),
    "TINYLORA": fadapt.TinyLoRA(u=3),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::fadapt.FadaptWarning")
def test_odd_values_of_any_field(net, form):
    """They end in a CheckpointError or, where the field does not matter, in the same adapter."""
    made, values = peft_dict(net, perturb(fadapt.init(net, FORMS[form])))
    own = next(f for f in FORMATS if f.peft_type == form)
    for field in (*made, *own.fields, *own.refused, "layers_pattern", "exclude_modules"):
        for value in ODD:
            try:
                params = from_peft_dict(net, {**made, field: value}, values)
            except CheckpointError:
                continue
            assert len(params) == 4


def other_places(net: nn.Module) -> Any:
    params = fadapt.init(net, fadapt.FourierFT(n_frequency=9))
    for adapter in params.values():
        adapter.fixed["indices"].copy_(adapter.fixed["indices"].flip(1))
    return params


MORE_REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "dropout of C3A": (
        lambda net: fadapt.init(net, fadapt.C3A(block_size=4, dropout=0.1)),
        "C3A has no dropout",
    ),
    "dropout of MiSS bat": (
        lambda net: fadapt.init(net, fadapt.MiSS(r=4, mode="bat", dropout=0.1)),
        "drops no input of mode='bat'",
    ),
    "two modes of MiSS": (
        lambda net: fadapt.init(
            net, {"up": fadapt.MiSS(r=4), "down": fadapt.MiSS(r=4, mode="bat")}
        ),
        "one mode",
    ),
    "two ranks of GraLoRA": (
        lambda net: fadapt.init(net, {"up": fadapt.GraLoRA(r=2), "down": fadapt.GraLoRA(r=4)}),
        "one r for all",
    ),
    "two ranks of TinyLoRA": (
        lambda net: fadapt.init(net, {"up": fadapt.TinyLoRA(r=2), "down": fadapt.TinyLoRA(r=3)}),
        "one r for all",
    ),
    "two seeds of FourierFT": (
        lambda net: fadapt.init(
            net,
            {
                "up": fadapt.FourierFT(n_frequency=9, random_loc_seed=1),
                "down": fadapt.FourierFT(n_frequency=9, random_loc_seed=2),
            },
        ),
        "one random_loc_seed",
    ),
    "other places of FourierFT": (other_places, "other places"),
    "bias of HiRA": (
        lambda net: fadapt.init(net, fadapt.Chain((fadapt.BitFit(), fadapt.HiRA(r=2)))),
        "HIRA trains no bias",
    ),
}


@pytest.mark.parametrize("name", MORE_REFUSED)
def test_what_a_format_cannot_hold(name, net):
    make, words = MORE_REFUSED[name]
    with pytest.raises(CheckpointError, match=words):
        peft_dict(net, make(net))


def test_kernels_that_peft_multiplies_otherwise():
    kernel = seeded(nn.Sequential(nn.Conv1d(6, 8, 3)))
    whole = fadapt.init(kernel, {"0.weight": fadapt.LoKr(r=8)})
    with pytest.raises(CheckpointError, match="another product"):
        peft_dict(kernel, whole)
    made, values = peft_dict(kernel, fadapt.init(kernel, {"0.weight": fadapt.LoKr(r=1)}))
    with pytest.raises(CheckpointError, match="another product"):
        from_peft_dict(kernel, {**made, "r": 8}, values)
    for method, core in ((fadapt.LoKr(r=1), "lokr_t2"), (fadapt.LoHa(r=2), "hada_t1")):
        made, values = peft_dict(kernel, fadapt.init(kernel, {"0.weight": method}))
        values[f"base_model.model.0.{core}"] = torch.zeros(1, 1, 3, 1)
        with pytest.raises(CheckpointError, match=f"use_effective_conv2d.*{core}"):
            from_peft_dict(kernel, made, values)
    solid = seeded(nn.Sequential(nn.Conv3d(2, 4, 2)))
    with pytest.raises(CheckpointError, match="three axes"):
        peft_dict(solid, fadapt.init(solid, {"0.weight": fadapt.LoHa(r=2)}))


def test_tensors_that_modules_share(net):
    made, values = peft_dict(net, fadapt.init(net, fadapt.TinyLoRA(u=3)))
    name = "base_model.tinylora_v"
    halves = {k: t for k, t in values.items() if k not in (f"{name}.2", f"{name}.3")}
    with pytest.raises(CheckpointError, match=r"weight_tying=0\.5 shares numbers among some"):
        from_peft_dict(net, {**made, "weight_tying": 0.5}, halves)
    with pytest.raises(CheckpointError, match=r"lacks base_model\.tinylora_v\.1"):
        from_peft_dict(net, made, {k: t for k, t in values.items() if k != f"{name}.1"})
    with pytest.raises(CheckpointError, match=r"tinylora_v\.7 belongs to none of its 4"):
        from_peft_dict(net, made, {**values, f"{name}.7": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"tinylora_v\.0 has shape \(5,\)"):
        from_peft_dict(net, made, {**values, f"{name}.0": torch.zeros(5)})
    tied = fadapt.TinyLoRA(u=3, weight_tying=True)
    both = {"up": tied, "down": fadapt.TinyLoRA(u=3, weight_tying=True, dropout=0.1)}
    with pytest.raises(CheckpointError, match="one"):
        peft_dict(net, fadapt.init(net, both))


def test_modules_saved_as_a_whole(net):
    """PEFT's modules_to_save is Full on all that a module holds, and nothing else."""
    cfg: dict[str, Any] = {"up": LoRA(r=2), "1.down.weight": fadapt.Full()}
    made, values = peft_dict(net, perturb(fadapt.init(net, cfg)))
    assert made["modules_to_save"] == ["layers.1.down"]
    again = from_peft_dict(net, made, values)
    assert again["layers.1.down.weight"].method == fadapt.Full()
    name = "base_model.model.layers.1.down.bias"
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.1\.down\.bias"):
        from_peft_dict(net, made, {k: t for k, t in values.items() if k != name})
    with pytest.raises(CheckpointError, match="another base"):
        from_peft_dict(net, made, {**values, name: torch.zeros(3)})
    doubled = {**values, "base_model.model.layers.1.down.modules_to_save.bias": torch.ones(12)}
    with pytest.raises(CheckpointError, match="twice, with other values"):
        from_peft_dict(net, made, doubled)
    for words, cfg in {
        "has another adapter": {"0.up.bias": fadapt.Full(), "up": LoRA(r=2)},
        "bias=all": {"up": LoRA(r=2), "0.down": fadapt.BitFit(), "1.down.weight": fadapt.Full()},
        "beside another adapter": {"down.weight": fadapt.Full()},
    }.items():
        with pytest.raises(CheckpointError, match=words):
            peft_dict(net, fadapt.init(net, cfg))


def test_modules_that_cannot_be_saved_as_a_whole():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.last_head, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
            self.norm.register_buffer("count", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last_head(self.norm(self.head(x)))

    model = seeded(Two())
    cfg: dict[str, Any] = {"last_head.weight": LoRA(r=1), "^head.weight": fadapt.Full()}
    with pytest.raises(CheckpointError, match=r"\['head'\] would mean last_head too"):
        peft_dict(model, fadapt.init(model, cfg))
    cfg = {"last_head.weight": LoRA(r=1), "norm.weight": fadapt.Full()}
    made, values = peft_dict(model, fadapt.init(model, cfg))
    values["base_model.model.norm.count"] = torch.ones(4)
    with pytest.raises(CheckpointError, match=r"norm\.count.*is no parameter"):
        from_peft_dict(model, made, values)


def test_rows_of_embeddings(tmp_path):
    model, tokens = tied(), (4, 47)
    method = fadapt.TrainableTokens(token_indices=tokens)
    rules: dict[str, Any] = {"q_proj": LoRA(r=2), "": method}
    for cfg in (method, rules):
        params = perturb(fadapt.init(model, cfg))
        made, values = peft_dict(model, params)
        again = from_peft_dict(model, made, values)
        assert again.keys() == params.keys()  # the head's rows, too, and one d for both
        one, two = (p["shared:TrainableTokens"].train["d"] for p in (again, params))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    field, name = "trainable_token_indices", "model.embed_tokens"
    key = f"base_model.model.{name}.token_adapter.trainable_tokens_delta"
    for tokens, words in (
        ({name: [4, 64]}, "64 rows, and a token is 64"),
        ({name: [4]}, "for 1 tokens"),
        ({name: [4, 4]}, "not distinct"),
        ({name: [4, True]}, "not distinct"),
        ({"lm_head": [4, 47]}, "0 lists of tokens"),
        ([4, 47, 5], "for 3 tokens"),
    ):
        with pytest.raises(CheckpointError, match=words):
            from_peft_dict(model, {**made, field: tokens}, values)
    with pytest.raises(CheckpointError, match="rows of 0 modules"):
        from_peft_dict(model, made, {k: t for k, t in values.items() if k != key})
    made, values = peft_dict(model, fadapt.init(model, method))
    head = "base_model.model.lm_head.trainable_tokens_delta"
    with pytest.raises(CheckpointError, match="its rows are not the embedding's"):
        from_peft_dict(model, made, {**values, head: values[head] + 1})


def test_rows_that_peft_moves_otherwise():
    model = tied()
    rows = fadapt.init(model, fadapt.TrainableTokens(token_indices=(4,)))
    alone = fadapt.Params({k: a for k, a in rows.items() if k != "lm_head.weight"})
    with pytest.raises(CheckpointError, match="adapt all of them by one"):
        peft_dict(model, alone)
    every = fadapt.init(model, fadapt.TrainableTokens())
    with pytest.raises(CheckpointError, match="names its tokens"):
        peft_dict(model, every)
    cfg = {"q_proj": fadapt.HRA(r=2), "": fadapt.TrainableTokens(token_indices=(4,))}
    with pytest.raises(CheckpointError, match="HRA trains no rows of an embedding"):
        peft_dict(model, fadapt.init(model, cfg))
    cfg = {"q_proj": fadapt.Full(), "": fadapt.TrainableTokens(token_indices=(4,))}
    with pytest.raises(CheckpointError, match="saves no whole modules"):
        peft_dict(model, fadapt.init(model, cfg))
    head = seeded(nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6)))
    with pytest.raises(CheckpointError, match="has a bias, which PEFT leaves out"):
        peft_dict(head, fadapt.init(head, {"1.weight": fadapt.TrainableTokens((2,))}))


def test_norms_are_copied_as_a_whole():
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    made, values = peft_dict(model, perturb(fadapt.init(model, {"1.weight": fadapt.LNTuning()})))
    name = "base_model.model.1.ln_tuning_layers.bias"
    assert torch.equal(values[name], model[1].bias)
    with pytest.raises(CheckpointError, match=r"lacks 1\.ln_tuning_layers\.bias, of the same"):
        from_peft_dict(model, made, {k: t for k, t in values.items() if k != name})
    copied = {**values, "base_model.model.0.ln_tuning_layers.weight": torch.zeros(4, 4)}
    with pytest.raises(CheckpointError, match="matches no weight"):
        from_peft_dict(model, made, copied)


@pytest.mark.parametrize(
    "sizes", [{"up": 2, "a.up": 4, "b.up": 8, "b.a.up": 16, "x": 4}, {"up": 2}]
)
def test_patterns_after_a_dot(sizes):
    from fadapt.peft.matching import patterns_after_dot, value_after_dot

    for default in (2, 4, 8, 16):
        patterns = patterns_after_dot(sizes, default)
        for name, size in sizes.items():
            found = value_after_dot(patterns, name)
            assert (default if found is None else found[1]) == size


def test_several_adapters(net, tmp_path):
    made = {n: perturb(fadapt.init(net, {"up": LoRA(r=r)}), seed=r) for r, n in enumerate("abc", 1)}
    save_peft(net, {"default": made["a"], "style": made["b"]}, tmp_path / "both")
    assert adapters_in(tmp_path / "both") == ["default", "style"]
    assert load_peft(tmp_path / "both", net)["layers.0.up.weight"].method.r == 1
    assert load_peft(tmp_path / "both", net, adapter="style")["layers.0.up.weight"].method.r == 2
    assert load_peft(tmp_path / "both" / "style", net)["layers.0.up.weight"].method.r == 2
    with pytest.raises(CheckpointError, match=r"no adapter 'x'.*default.*style"):
        load_peft(tmp_path / "both", net, adapter="x")
    save_peft(net, {"one": made["a"], "two": made["b"]}, tmp_path / "named")
    with pytest.raises(CheckpointError, match='adapter="one"'):
        load_peft(tmp_path / "named", net)
    # What lies in a directory already stays.
    save_peft(net, made["c"], tmp_path / "both")
    assert adapters_in(tmp_path / "both") == ["default", "style"]
    assert load_peft(tmp_path / "both", net)["layers.0.up.weight"].method.r == 3


@pytest.mark.parametrize("name", ["..", "../up", "a/b", "", ".", "a\\b", "nul\0"])
def test_names_that_leave_the_directory(name, net, folder, tmp_path):
    params = fadapt.init(net, {"up": LoRA(r=1)})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="name of an adapter"):
        load_peft(folder, net, adapter=name)
    with pytest.raises(CheckpointError, match="name of an adapter"):
        save_peft(net, {name: params}, tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


# ---- writing


def refused_params() -> dict[str, tuple[Callable[[nn.Module], Any], str]]:
    def make(cfg: Any) -> Callable[[nn.Module], Any]:
        return lambda net: fadapt.init(net, cfg)

    def nan(net: nn.Module) -> Any:
        params = fadapt.init(net, {"up": LoRA(r=2)})
        with torch.no_grad():
            params["layers.0.up.weight"].train["A"][0, 0] = float("nan")
        return params

    def scaled(cfg: Any) -> Callable[[nn.Module], Any]:
        return lambda net: fadapt.scale(fadapt.init(net, cfg), 0.5)

    def mixed_stack(net: nn.Module) -> Any:
        params = fadapt.init(net, {"up": LoRA(r=2)})
        return fadapt.stack([params, params])

    return {
        "no format": (make(fadapt.AntiPaSTO(r=2)), "as_lora"),
        "two formats": (make({"up": LoRA(r=2), "down": fadapt.HRA(r=2)}), "one kind of adapter"),
        "DoRA beside LoRA": (make({"up": LoRA(r=2), "down": fadapt.DoRA(r=2)}), "use_dora"),
        "DeLoRA of the paper": (make(fadapt.DeLoRA(r=2)), "as_lora"),
        "two variants": (make({"up": fadapt.RoAd(1, 4), "down": fadapt.RoAd(2, 4)}), "one variant"),
        "two group sizes": (
            make({"up": fadapt.RoAd(1, 4), "down": fadapt.RoAd(1, 2)}),
            "one group_size",
        ),
        "two signs": (
            make({"up": fadapt.OFT(4), "down": fadapt.OFT(4, exact=False)}),
            "one sign",
        ),
        "strength of DoRA": (scaled(fadapt.DoRA(r=2)), "strength"),
        "strength of HRA": (scaled(fadapt.HRA(r=2)), "strength"),
        "strength of OFT": (scaled(fadapt.OFT(4)), "strength"),
        "strength of RoAd": (scaled(fadapt.RoAd(1, 4)), "strength"),
        "bias alone": (make(fadapt.BitFit()), "biases alone"),
        "bias beside IA3": (
            make(fadapt.Chain((fadapt.BitFit(), fadapt.IA3()))),
            "IA3 trains no bias",
        ),
        "chain": (make(fadapt.Chain((LoRA(r=1), fadapt.IA3()))), "no format"),
        "NaN": (nan, "NaN"),
        "stack": (mixed_stack, "unstack"),
        "nothing": (lambda net: fadapt.Params({}), "nothing to save"),
        "no names": (lambda net: {}, "nothing to save"),
        "meta": (lambda net: fadapt.init(Net().to("meta"), {"up": LoRA(r=2)}), "meta"),
        "another base": (
            lambda net: fadapt.init(seeded(nn.Sequential(nn.Linear(3, 3))), LoRA(r=2)),
            "another base",
        ),
    }


@pytest.mark.parametrize("name", refused_params())
def test_not_written(name, net, tmp_path):
    make, words = refused_params()[name]
    with pytest.raises(CheckpointError, match=words):
        save_peft(net, make(net), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


class Doubled(LoRA):
    """A LoRA of another increment."""

    def delta(self, p, x, y, base):
        return 2 * super().delta(p, x, y, base)


def test_a_subclass_with_another_increment_is_not_written_as_its_parent(net, tmp_path):
    with pytest.raises(CheckpointError, match="no format for Doubled"):
        save_peft(net, fadapt.init(net, Doubled(r=2)), tmp_path / "adapter")


def test_attention_of_torch_is_refused_with_the_reason(tmp_path):
    model = seeded(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
    params = fadapt.init(model, {"out_proj": LoRA(r=2)})
    with pytest.raises(CheckpointError, match="does not adapt this"):
        save_peft(model, params, tmp_path / "adapter")


def test_a_module_under_two_names(tmp_path):
    model = seeded(SharedModule())
    params = fadapt.init(model, LoRA(r=2))
    with pytest.raises(CheckpointError, match="does not adapt this Linear"):
        save_peft(model, params, tmp_path / "adapter")
    plain = seeded(TiedLinear())
    made = peft_dict(plain, fadapt.init(plain, {"first": LoRA(r=2)}))
    with pytest.raises(CheckpointError, match="in other ways"):
        from_peft_dict(model, *made)


def test_a_trained_bias_of_a_norm(tmp_path):
    model = seeded(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    config, values = peft_dict(model, fadapt.init(model, {"0": LoRA(r=1)}))
    values["base_model.model.1.bias"] = torch.ones(4)
    with pytest.raises(CheckpointError, match=r"replaces 1\.bias.*linear layers"):
        from_peft_dict(model, {**config, "bias": "all"}, values)


def test_convolutions_that_peft_runs_otherwise(tmp_path):
    for options in ({"dilation": 2}, {"groups": 2}, {"padding_mode": "circular", "padding": 1}):
        model = seeded(nn.Sequential(nn.Conv2d(4, 4, 3, **options)))
        params = fadapt.init(model, {"0.weight": LoRA(r=2)})
        with pytest.raises(CheckpointError, match="does not adapt this Conv2d"):
            save_peft(model, params, tmp_path / "adapter")


def test_interrupted_save_leaves_no_mixture(net, folder, monkeypatch):
    """Whatever rename fails, what is left is the old adapter, the new one, or refused."""
    new = perturb(fadapt.init(net, {"up|down": LoRA(r=5)}), seed=9)
    replace, calls = os.replace, []

    def failing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == fail_at:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    for one in (1, 2):
        fail_at = one
        calls.clear()
        with pytest.raises(CheckpointError, match="no space left"):
            save_peft(net, new, folder)
        with pytest.raises(CheckpointError, match=CONFIG):
            load_peft(folder, net)
        assert not [p for p in folder.parent.iterdir() if p.name.endswith(".tmp")]
    fail_at = 3
    calls.clear()
    save_peft(net, new, folder)
    assert load_peft(folder, net)["layers.0.up.weight"].method.r == 5


def test_a_failed_new_directory_leaves_nothing(net, tmp_path, monkeypatch):
    def failing(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", failing)
    params = fadapt.init(net, {"up": LoRA(r=2)})
    with pytest.raises(CheckpointError, match="disk full"):
        save_peft(net, params, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="is a file"):
        save_peft(net, params, tmp_path / "file")
    for path in ("", None, 3):
        with pytest.raises(CheckpointError, match="path"):
            save_peft(net, params, path)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(?:up|down)",
        r"(?:\w+\.)*(?:up|down)",
        r"(?:[^.]+\.)+(?:up|down)",
        r"layers\.(?:[0-9]|1[0-9])\.(?:up|down)",
        r"(?:.*?(?:layers|blocks).*?(?:mlp|\d).*?(?:up|down).*?)|(?:\bmodel\.[\d]{1,}\.(?:(?:up)))",
    ],
)
def test_expressions_that_files_have(pattern, net, folder):
    config(target_modules=pattern)(folder)
    assert len(load_peft(folder, net)) == 4


def test_in_memory(net):
    params = perturb(fadapt.init(net, {"up|down": LoRA(r=2)}))
    made = peft_dict(net, params)
    json.dumps(made[0])
    again = from_peft_dict(net, *made)
    for name, adapter in params.items():
        assert torch.equal(again[name].train["B"], adapter.train["B"])
        assert again[name].site == adapter.site
    with pytest.raises(CheckpointError, match="no tensors"):
        from_peft_dict(net, made[0], {})


def test_targets_name_exactly_the_adapted_modules():
    model = qwen3()
    for pattern, expected in {
        "q_proj": ["q_proj"],
        "layers.1.*q_proj": ["model.layers.1.self_attn.q_proj"],
    }.items():
        config, _ = peft_dict(model, fadapt.init(model, {pattern: LoRA(r=2)}))
        assert config["target_modules"] == expected
    # "a" is the end of "b.a" too, so that only an expression means it alone.
    inner = nn.Sequential()
    inner.add_module("a", nn.Linear(4, 4))
    outer = nn.Module()
    outer.a, outer.b = nn.Linear(4, 4), inner
    config, _ = peft_dict(seeded(outer), fadapt.init(outer, {"^a.weight": LoRA(r=2)}))
    assert config["target_modules"] == "a"


UP, INDICES = "base_model.model.layers.0.up", "base_model.model.layers.0.up.shira_indices"
OTHERS = {
    "a row too far": (fadapt.SHiRA(r=1), INDICES, lambda t: t.index_fill(1, FEW, 99), "outside of"),
    "half a row": (fadapt.SHiRA(r=1), INDICES, lambda t: t + 0.5, "outside of"),
    "a place twice": (fadapt.SHiRA(r=1), INDICES, lambda t: t[:, :1].repeat(1, 28), "twice"),
    "no places": (fadapt.SHiRA(r=1), INDICES, lambda t: None, "lacks"),
    "whole numbers": (fadapt.SHiRA(r=1), f"{UP}.shira_weight", lambda t: t.int(), "not a floating"),
    "a small factor": (fadapt.VeRA(r=2), "base_model.vera_A", lambda t: t[:, :3], "another base"),
    "no factor": (fadapt.VeRA(r=2), "base_model.vera_B", lambda t: None, "lacks base_model.vera_B"),
    "a copy that differs": (
        fadapt.RandLoRA(r=3),
        f"{UP}.randlora_A",
        lambda t: t + 1,
        "differs from base_model.randlora_A",
    ),
    "small factors": (
        fadapt.RandLoRA(r=3),
        "base_model.randlora_B",
        lambda t: t[:, :2],
        "another base",
    ),
}
FEW = torch.tensor([0, 5])


@pytest.mark.parametrize("name", OTHERS)
def test_tensors_of_other_formats(name, net, tmp_path):
    method, key, change, reason = OTHERS[name]
    settings, found = peft_dict(net, fadapt.init(net, {"up|down": method}))
    value = change(found.pop(key))
    if value is not None:
        found[key] = value.contiguous()
    with pytest.raises(CheckpointError, match=reason):
        from_peft_dict(net, settings, found)


def test_factors_that_modules_do_not_share(net):
    params = fadapt.init(net, {"up": fadapt.VeRA(r=2), "down": fadapt.VeRA(r=2, d_initial=0.2)})
    with pytest.raises(CheckpointError, match=r"one A for all modules.*as_lora"):
        peft_dict(net, params)
