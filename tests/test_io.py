"""save and load: bit-equal in a new process, whole or not at all; damage and mix-ups refused."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fadapt
from fadapt import CheckpointError, FadaptError, LoRA, Params
from fadapt.io.tensors import write_tensors
from tests.models import (
    gpt2,
    mlp,
    perturb,
    qwen3,
    reals,
    tokens,
    trained,
)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Gain(fadapt.Method):
    """y' = y + gain a y: a method from outside the package."""

    acts_on_bias = True
    gain: float = 1.0
    tags: tuple[Any, ...] = ()

    def init(self, site, rng, stat=None):
        return {"a": site.zeros(1)}, {"one": site.zeros(site.out_features) + 1}

    def delta(self, p, x, y, base):
        return self.gain * p["a"] * p["one"] * y


def chain() -> fadapt.Chain:
    return fadapt.Chain((fadapt.DoRA(r=2), fadapt.Chain((fadapt.IA3FF(), LoRA(r=1))), fadapt.IA3()))


def special(model: nn.Module, cfg: Any) -> Params:
    """Every kind of bit pattern: -0.0, subnormal, infinite, two NaNs."""
    params = trained(model, cfg)
    with torch.no_grad():
        for leaf in fadapt.trainable(params):
            leaf.view(-1)[:4] = torch.tensor([-0.0, 1e-42, float("inf"), float("nan")])
    return params


def bf16_config(method: fadapt.Method) -> fadapt.Config:
    return fadapt.Config(method, dtype=torch.bfloat16, layers=(0, -1), seed=3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "qwen3": qwen3,
    "gpt2": gpt2,
    "bf16 mlp": lambda: mlp().bfloat16(),
    "fp64 mlp": lambda: mlp().double(),
}
CASES: dict[str, tuple[str, Callable[[nn.Module], Params]]] = {
    "LoRA": ("qwen3", lambda m: trained(m, LoRA(r=3, alpha=0.1))),
    "RsLoRA": ("mlp", lambda m: trained(m, fadapt.RsLoRA(r=3, alpha=1e-300))),
    "DoRA": ("gpt2", lambda m: trained(m, fadapt.DoRA(r=3, detach_norm=False))),
    "IA3": ("qwen3", lambda m: trained(m, {"k_proj|v_proj": fadapt.IA3(), "mlp": fadapt.IA3FF()})),
    "Chain": ("mlp", lambda m: trained(m, chain())),
    "scaled": ("mlp", lambda m: fadapt.scale(trained(m, chain()), torch.tensor(-0.3).double())),
    "bf16 adapter": ("mlp", lambda m: trained(m, bf16_config(fadapt.DoRA(r=2)))),
    "bf16 base": ("bf16 mlp", lambda m: trained(m, fadapt.DoRA(r=2))),
    "fp64 base": ("fp64 mlp", lambda m: trained(m, fadapt.DoRA(r=2))),
    "special": ("mlp", lambda m: special(m, LoRA(r=2))),
    "own": ("mlp", lambda m: trained(m, Gain(gain=2.5, tags=(1, None, ("x", True))))),
}


def probe(model: nn.Module, params: Params) -> Tensor:
    with torch.no_grad():
        if hasattr(model, "config"):
            return fadapt.apply(model, params, tokens()).logits
        return fadapt.apply(model, params, reals(3, 8).to(next(model.parameters()).dtype))


def bits(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, tuple(t.shape), t.detach().reshape(-1).view(torch.uint8).tolist()


def leaf_bits(params: Params) -> dict[str, Any]:
    return {
        f"{name} {part} {key}": bits(leaf)
        for name, adapter in params.items()
        for part, leaves in (("train", adapter.train), ("fixed", adapter.fixed))
        for key, leaf in leaves.items()
    }


def describe(params: Params) -> str:
    statics = {name: (repr(a.site), repr(a.method)) for name, a in params.items()}
    flags = [
        [(k, t.requires_grad, t.is_leaf) for k, t in a.leaves.items()] for _, a in params.items()
    ]
    return repr((statics, flags, params.config))


def python(script: str, *args: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def small(tmp_path: Path) -> tuple[nn.Module, Params, Path]:
    model = mlp(widths=(8, 4, 8))
    params = trained(model, fadapt.DoRA(r=1))
    fadapt.save(params, tmp_path / "a.safetensors")
    return model, params, tmp_path / "a.safetensors"


def refused(path: Any, model: nn.Module, *words: str, **kwargs: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        fadapt.load(path, model, **kwargs)
    for word in (*words, str(path)):
        assert word in str(error.value), f"{word!r} not in {error.value}"


# ---- round trip


NEW_PROCESS = """
import importlib, json, sys
from pathlib import Path
import torch, fadapt
from safetensors.torch import save_file
from tests.models import mlp
folder, module = Path(sys.argv[1]), sys.argv[2]
try:
    fadapt.load(folder / "own", mlp())
    unknown = "loaded"
except fadapt.CheckpointError as error:
    unknown = str(error)
here = importlib.import_module(module)
said, output = {}, {}
for name, (model, _) in here.CASES.items():
    base = here.MODELS[model]()
    params = fadapt.load(folder / name, base)
    said[name] = here.describe(params), repr(here.leaf_bits(params)), str(fadapt.summary(params))
    output[name] = here.probe(base, params)
save_file(output, folder / "output")
(folder / "said").write_text(json.dumps({"unknown": unknown, "said": said}))
"""


@pytest.fixture(scope="module")
def new_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("io")
    before = {}
    for name, (model, make) in CASES.items():
        base = MODELS[model]()
        params = make(base)
        fadapt.save(params, folder / name)
        said = describe(params), repr(leaf_bits(params)), fadapt.summary(params)
        before[name] = said, probe(base, params)
    done = python(NEW_PROCESS, folder, __name__)
    assert done.returncode == 0, done.stderr
    answer = json.loads((folder / "said").read_text())
    output = load_file(folder / "output")
    after = {name: (tuple(answer["said"][name]), output[name]) for name in CASES}
    return {"before": before, "after": after, "unknown": answer["unknown"]}


@pytest.mark.parametrize("name", CASES)
def test_new_process_is_bit_equal(new_process, name):
    said, output = new_process["before"][name]
    said_after, output_after = new_process["after"][name]
    assert said_after == said
    assert bits(output_after) == bits(output)


def test_unknown_method_says_what_to_import(new_process):
    for word in (Gain.__module__, "Gain", "mport", "LoRA"):
        assert word in new_process["unknown"]


def test_load_is_ready_for_training(small):
    model, params, path = small
    loaded = fadapt.load(path, model)
    for adapter in loaded.values():
        assert all(t.requires_grad and t.is_leaf for t in adapter.train.values())
        assert not any(t.requires_grad for t in adapter.fixed.values())
    fadapt.run(model, loaded, reals(3, 8), lambda y, _: y.square().sum()).backward()
    assert all(t.grad is not None for t in fadapt.trainable(loaded))
    assert torch.utils._pytree.tree_structure(loaded) == torch.utils._pytree.tree_structure(params)


def test_str_and_path(tmp_path, monkeypatch):
    model = mlp()
    params = trained(model, LoRA(r=2))
    monkeypatch.chdir(tmp_path)
    for path in ("a.safetensors", Path("b"), str(tmp_path / "c"), tmp_path / "ключ é"):
        fadapt.save(params, path)
        assert leaf_bits(fadapt.load(path, model)) == leaf_bits(params)
    assert len(list(tmp_path.iterdir())) == 4


def test_longest_file_name(tmp_path):
    model = mlp()
    params = trained(model, LoRA(r=2))
    path = tmp_path / ("n" * 255)  # the limit of ext4, xfs, tmpfs, APFS
    fadapt.save(params, path)
    assert leaf_bits(fadapt.load(path, model)) == leaf_bits(params)


def test_filtered_params(tmp_path):
    model = qwen3()
    params = trained(model, LoRA(r=2))
    some = Params({k: a for k, a in params.items() if "q_proj" in k}, params.config)
    fadapt.save(some, tmp_path / "some")
    assert leaf_bits(fadapt.load(tmp_path / "some", model)) == leaf_bits(some)
    bare = Params(dict(some.items()))
    fadapt.save(bare, tmp_path / "bare")
    loaded = fadapt.load(tmp_path / "bare", model)
    assert loaded.config is None
    assert leaf_bits(loaded) == leaf_bits(bare)


ODD_NAMES = [
    "a|b",
    "|train|",
    "fixed",
    "a/b",
    "/a",
    "a b",
    "é—ключ",
    'quo"te',
    "back\\slash",
    "new\nline",
    "#1",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_site_names(tmp_path, name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(8, 8))
    params = trained(model, fadapt.DoRA(r=2))
    fadapt.save(params, tmp_path / "a")
    loaded = fadapt.load(tmp_path / "a", model)
    assert leaf_bits(loaded) == leaf_bits(params)
    assert bits(probe(model, loaded)) == bits(probe(model, params))
    assert fadapt.summary(loaded) == fadapt.summary(params)


class Nested(nn.Module):
    """One site's name is a prefix of another's tensor keys."""

    def __init__(self):
        super().__init__()
        for name in ("w", "w|train|A", "w|fixed|w2"):
            self.register_parameter(name, nn.Parameter(reals(8, 8)))


def test_site_names_that_look_like_keys(tmp_path):
    model = Nested()
    params = trained(model, {"w": fadapt.DoRA(r=2)})
    fadapt.save(params, tmp_path / "a")
    assert leaf_bits(fadapt.load(tmp_path / "a", model)) == leaf_bits(params)


@dataclass(frozen=True)
class OddLeaves(Gain):
    """Leaf names with the separators of the file's keys in them."""

    def init(self, site, rng, stat=None):
        return {"a|b": site.zeros(1), "a|c": site.zeros(2), "x/y.z": site.zeros(3)}, {}

    def delta(self, p, x, y, base):
        return p["a|b"] * y


def test_odd_leaf_names(tmp_path):
    model = mlp()
    params = trained(model, OddLeaves())
    fadapt.save(params, tmp_path / "a")
    assert leaf_bits(fadapt.load(tmp_path / "a", model)) == leaf_bits(params)


# ---- the fields of methods


@dataclass(frozen=True)
class NamedMethod(Gain):
    """A field whose name the JSON uses itself."""

    method: str = "LoRA"


@dataclass(frozen=True)
class Derived(Gain):
    """A field that is no argument."""

    twice: float = field(init=False, default=0.0)

    def __post_init__(self):
        object.__setattr__(self, "twice", 2 * self.gain)


@dataclass(frozen=True)
class AnyField(Gain):
    """A field of any type."""

    value: Any = None


VALUES = [None, True, 3, -1e300, float("inf"), "text", (), (1, (2.5, ("x",))), LoRA(r=1), chain()]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_fields_survive(tmp_path, value):
    model = mlp()
    params = trained(model, AnyField(value=value))
    fadapt.save(params, tmp_path / "a")
    loaded = fadapt.load(tmp_path / "a", model)
    assert [a.method for _, a in loaded.items()] == [a.method for _, a in params.items()]
    assert loaded.config == params.config


@pytest.mark.parametrize("method", [NamedMethod(), Derived(gain=3.0)], ids=repr)
def test_awkward_dataclasses_survive(tmp_path, method):
    model = mlp()
    params = trained(model, method)
    fadapt.save(params, tmp_path / "a")
    assert all(a.method == method for _, a in fadapt.load(tmp_path / "a", model).items())


@pytest.mark.parametrize(
    "value", [torch.float16, object(), {1}, 1j, b""], ids=lambda v: type(v).__name__
)
def test_a_field_that_json_cannot_hold_is_refused_by_name(tmp_path, value):
    path = tmp_path / "a"
    with pytest.raises(FadaptError, match="AnyField") as error:
        fadapt.save(trained(mlp(), AnyField(value=value)), path)
    assert "value" in str(error.value)
    assert list(tmp_path.iterdir()) == []


# ---- damage


def test_truncated_anywhere(small):
    model, _, path = small
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        refused(path, model)
    path.write_bytes(whole)
    fadapt.load(path, model)


def test_bytes_appended(small):
    model, _, path = small
    whole = path.read_bytes()
    for tail in (b"\0", b" ", whole):
        path.write_bytes(whole + tail)
        refused(path, model)


def test_any_flipped_bit(small):
    model, _, path = small
    whole = path.read_bytes()
    for i, byte in enumerate(whole):  # every byte, the bit by turns
        path.write_bytes(whole[:i] + bytes([byte ^ 1 << i % 8]) + whole[i + 1 :])
        refused(path, model)


def test_blocks_zeroed(small):
    model, _, path = small
    whole = path.read_bytes()
    for i in range(0, len(whole), 64):
        block = whole[i : i + 64]
        if any(block):
            path.write_bytes(whole[:i] + bytes(len(block)) + whole[i + 64 :])
            refused(path, model)


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


KEY = "0.weight|train|B"
EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(KEY), KEY),
    "extra": (lambda t: t.update({"0.weight|train|C": torch.zeros(1)}), "0.weight|train|C"),
    "shape": (lambda t: t.update({KEY: torch.zeros(1, 4)}), KEY),
    "rows": (lambda t: t.update({KEY: torch.zeros(9, 1)}), KEY),
    "dtype": (lambda t: t.update({KEY: t[KEY].double()}), KEY),
    "same size dtype": (lambda t: t.update({KEY: t[KEY].view(torch.int32)}), KEY),
}


@pytest.mark.parametrize("kind", EDITS)
def test_edited_tensors_name_the_key(small, kind):
    model, _, path = small
    tensors, header = contents(path)
    edit, key = EDITS[kind]
    edit(tensors)
    save_file(tensors, path, header)
    refused(path, model, key)


@pytest.mark.parametrize("kind", ["missing", "shape", "rows", "same size dtype"])
def test_tensors_that_do_not_fit_their_method(small, kind):
    # Consistent in itself, as a version of the method with other leaves would have written it.
    # Another floating dtype alone is legal: Params.to makes it.
    model, _, path = small
    tensors, header = contents(path)
    edit, key = EDITS[kind]
    edit(tensors)
    write_tensors(tensors, json.loads(header["fadapt"]), path)
    refused(path, model, key.split("|")[0])


def set_at(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(meta: dict[str, Any]) -> None:
        for key in keys[:-1]:
            meta = meta[key]
        meta[keys[-1]] = value

    return edit


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def edit(meta: dict[str, Any]) -> None:
        for key in keys[:-1]:
            meta = meta[key]
        del meta[keys[-1]]

    return edit


def method_field(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(meta: dict[str, Any]) -> None:
        method = meta["sites"]["0.weight"]["method"]
        method.get("fields", method)[name] = value

    return edit


S = ("sites", "0.weight")
METADATA: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer": (set_at("format_version", value=2), "version 2"),
    "much newer": (set_at("format_version", value="3.1"), "3.1"),
    "no version": (drop("format_version"), ""),
    "no sites": (drop("sites"), "sites"),
    "sites a list": (set_at("sites", value=[1]), ""),
    "sites null": (set_at("sites", value=None), ""),
    "one site less": (drop(*S), "0.weight"),
    "no method": (drop(*S, "method"), "method"),
    "method null": (set_at(*S, "method", value=None), ""),
    "unknown method": (set_at(*S, "method", "method", value="NoRA"), "NoRA"),
    "unknown field": (method_field("beta", 1), "beta"),
    "bad value": (method_field("r", 0), "at least 1"),
    "bad type": (method_field("r", "one"), "one"),
    "fields of another": (set_at(*S, "method", "method", value="IA3"), ""),
    "site field": (set_at(*S, "site", "colour", value="red"), "colour"),
    "site shape": (set_at(*S, "site", "out_features", value=5), "0.weight"),
    "other site": (set_at(*S, "site", "name", value="9.weight"), "9.weight"),
    "no config": (drop("config"), "config"),
    "config a string": (set_at("config", value="x"), ""),
    "config dtype": (set_at("config", "dtype", value="nn"), "dtype"),
    "config dtype unknown": (set_at("config", "dtype", value="float33"), "float33"),
    "config roles": (set_at("config", "roles", value=["reeder"]), "reeder"),
    "config rules": (set_at("config", "rules", value=[["(", None]]), "("),
    "config rules shape": (set_at("config", "rules", value=[1]), ""),
}


@pytest.mark.parametrize("kind", METADATA)
def test_consistent_file_with_wrong_metadata(small, kind):
    model, _, path = small
    tensors, header = contents(path)
    meta = json.loads(header["fadapt"])
    edit, word = METADATA[kind]
    edit(meta)
    write_tensors(tensors, meta, path)
    refused(path, model, word)


def test_newer_version_is_named_whatever_else_changed(small):
    model, _, path = small
    tensors, _ = contents(path)
    save_file(tensors, path, {"fadapt": json.dumps({"format_version": 7}), "digest": "blake3"})
    refused(path, model, "version 7", "update")


JUNK = ["", "null", "1", "[]", "{}", "nonsense", '{"format_version": 1}', "[" * 10_000]
JUNK += ['{"format_version": 1, "leaves": %s}' % v for v in ("null", "[]", "1", '{"a": 1}', "{}")]  # noqa: UP031


@pytest.mark.parametrize("text", JUNK, ids=lambda t: t[:40])
def test_junk_metadata(small, text):
    model, _, path = small
    tensors, header = contents(path)
    save_file(tensors, path, {**header, "fadapt": text})
    refused(path, model)


# ---- other files, other bases


def test_files_that_are_not_ours(small, tmp_path):
    model, _, _ = small
    path = tmp_path / "b"
    refused(path, model)
    refused(tmp_path, model)
    path.write_bytes(b"")
    refused(path, model)
    path.write_text("hello, this is not a safetensors file at all\n" * 20)
    refused(path, model)
    save_file({"base_model.model.0.lora_A.weight": torch.zeros(2, 8)}, path, {"format": "pt"})
    refused(path, model, "base_model.model.0.lora_A.weight", "fadapt")
    save_file({}, path)
    refused(path, model)
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", model)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_is_refused_and_never_run(small, tmp_path):
    model, _, _ = small
    mark = tmp_path / "ran"
    path = tmp_path / "b"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Bomb(mark))),
        lambda: torch.save({"a": Bomb(mark)}, path),
        lambda: torch.save({"a": torch.zeros(2)}, path),
    ):
        write()
        refused(path, model)
    assert not mark.exists()


def test_no_pickle_anywhere(small, monkeypatch, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, never)
    model, params, _ = small
    fadapt.save(params, tmp_path / "b")
    fadapt.load(tmp_path / "b", model)
    for source in (ROOT / "fadapt").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [a.name for a in getattr(node, "names", []) if isinstance(a, ast.alias)]
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & set(names), source
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}


def test_another_base(small):
    model, _, path = small
    refused(path, mlp(1, (8, 4, 8)), "0.weight", "allow_other_base=True")
    for dtype in (torch.float64, torch.bfloat16):
        refused(path, mlp(widths=(8, 4, 8)).to(dtype), "0.weight", str(dtype))
    refused(path, mlp(widths=(8, 5, 8)), "0.weight", "(5, 8)", "(4, 8)", allow_other_base=True)
    refused(path, nn.Linear(8, 4), "0.weight", allow_other_base=True)
    one_ulp = mlp(widths=(8, 4, 8))
    with torch.no_grad():
        w = one_ulp[2].weight
        w[3, 2] = torch.nextafter(w[3, 2], torch.tensor(9.0))
    refused(path, one_ulp, "2.weight")
    with torch.no_grad():
        model[0].bias.add_(1)  # not an adapted weight
    fadapt.load(path, model)


def test_allow_other_base(small):
    _, params, path = small
    for other in (mlp(1, (8, 4, 8)), mlp(widths=(8, 4, 8)).double()):
        loaded = fadapt.load(path, other, allow_other_base=True)
        assert leaf_bits(loaded) == leaf_bits(params)
        probe(other, loaded)


def test_a_base_without_the_bias(small):
    # The bias is part of the adapted map: merge and IA3 need it.
    _, _, path = small
    refused(path, mlp(widths=(8, 4, 8), bias=False), "0.bias")
    refused(path, mlp(widths=(8, 4, 8), bias=False), "0.bias", allow_other_base=True)


def test_adopted_base_is_the_base_of_the_next_save(small):
    _, _, path = small
    other = mlp(1, (8, 4, 8))
    loaded = perturb(fadapt.load(path, other, allow_other_base=True))
    fadapt.save(loaded, path)
    assert leaf_bits(fadapt.load(path, other)) == leaf_bits(loaded)


@pytest.mark.parametrize("allow", [False, True])
def test_meta_model_keeps_no_values(small, allow):
    _, _, path = small
    refused(path, mlp(widths=(8, 4, 8)).to("meta"), "meta", allow_other_base=allow)


def test_load_while_the_weights_are_overlaid(small):
    model, params, path = small
    with fadapt.bound(model, params), pytest.raises(FadaptError, match="bound"):
        fadapt.load(path, model)
    fadapt.load(path, model)


def test_wrapped_models_and_swapped_arguments(small):
    model, params, path = small
    with pytest.raises(FadaptError, match="_orig_mod"):
        fadapt.load(path, torch.compile(model))
    with pytest.raises(FadaptError, match=r"model\.module"):
        fadapt.load(path, nn.DataParallel(model))
    with pytest.raises(FadaptError, match="path"):
        fadapt.load(model, path)  # every other function takes the model first
    with pytest.raises(FadaptError, match="Module"):
        fadapt.load(path, "gpt2")
    with pytest.raises(FadaptError, match="params"):
        fadapt.save(str(path), params)
    fadapt.load(path, model)


def test_loaded_values_are_not_a_view_of_the_file(small):
    model, params, path = small
    loaded = fadapt.load(path, model)
    with open(path, "r+b") as file:  # in place: the same inode
        file.write(bytes(path.stat().st_size))
    assert leaf_bits(loaded) == leaf_bits(params)


def test_nothing_to_save(tmp_path):
    params = fadapt.init(mlp(), LoRA(r=2))
    meta = fadapt.init(mlp().to("meta"), LoRA(r=2))
    for nothing in (Params({}), None, {}, dict(params.items()), fadapt.split(params)[0], meta):
        with pytest.raises(CheckpointError):
            fadapt.save(nothing, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# ---- whole or not at all


def test_directories_that_refuse(tmp_path):
    params = fadapt.init(mlp(), LoRA(r=2))
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    paths = [tmp_path / "file" / "a", tmp_path / "absent" / "a", tmp_path / "folder", "", "/"]
    if Path("/proc/self").exists():
        paths.append("/proc/a.safetensors")
    for path in paths:
        with pytest.raises(CheckpointError) as error:
            fadapt.save(params, path)
        assert str(path) in str(error.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "x"


FULL = """
import resource, sys, fadapt
from pathlib import Path
from tests.models import mlp
path = Path(sys.argv[1])
fadapt.save(fadapt.init(mlp(), fadapt.LoRA(r=2)), path)
big = fadapt.init(mlp(widths=(8, 512, 8)), fadapt.LoRA(r=40))
for limit in (0, 1, 4096, 20_000, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        fadapt.save(big, path)
    except fadapt.CheckpointError as error:
        assert str(path) in str(error), error
    else:
        raise AssertionError("no error at the limit")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    fadapt.load(path, mlp())
"""


def test_full_disk(tmp_path):
    pytest.importorskip("resource")
    done = python(FULL, tmp_path / "a")
    assert done.returncode == 0, done.stderr


PROCESSES = """
import os, random, signal, sys, time, torch, fadapt
from pathlib import Path
from tests.models import mlp, perturb
folder = Path(sys.argv[1])
random.seed(0)
model = mlp(widths=(64, 512, 64))
two = [perturb(fadapt.init(model, fadapt.LoRA(r=64)), seed=s) for s in (1, 2)]
values = [[t.detach().clone() for t in fadapt.trainable(p)] for p in two]

def which(path):
    found = fadapt.trainable(fadapt.load(path, model))
    return [all(map(torch.equal, found, v)) for v in values].index(True)

def fork(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)

def forever():
    while True:
        for p in two:
            fadapt.save(p, path)

path = folder / "killed"
fadapt.save(two[0], path)
inode, changed = os.stat(path).st_ino, 0
interrupted = 0
for _ in range(40):
    pid = fork(forever)
    time.sleep(random.uniform(0.005, 0.05))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    which(path)
    changed += os.stat(path).st_ino != inode
    inode = os.stat(path).st_ino
    interrupted += len(list(folder.iterdir())) > 1
    for p in folder.iterdir():
        if p != path:
            p.unlink()
assert changed > 5, changed
assert interrupted > 5, interrupted

path = folder / "shared"
fadapt.save(two[0], path)
writers = [fork(lambda p=p: [fadapt.save(p, path) for _ in range(30)]) for p in two]
reads = 0
while writers:
    which(path)
    reads += 1
    for pid in list(writers):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, status
            writers.remove(pid)
assert reads > 5, reads
assert sorted(p.name for p in folder.iterdir()) == ["killed", "shared"]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_in_the_middle_and_two_processes_at_once(tmp_path):
    done = python(PROCESSES, tmp_path)
    assert done.returncode == 0, done.stderr


def test_threads_save_to_one_path_at_once(tmp_path):
    model = mlp()
    many = [perturb(fadapt.init(model, LoRA(r=2)), seed=s) for s in range(4)]
    path = tmp_path / "a"
    start, errors = threading.Barrier(len(many)), []

    def work(params: Params) -> None:
        start.wait()
        for _ in range(40):
            try:
                fadapt.save(params, path)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(p,)) for p in many]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert leaf_bits(fadapt.load(path, model)) in [leaf_bits(p) for p in many]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_load_during_a_run_in_another_thread(small):
    # The run sees other weights, and load must not.
    model, params, path = small
    inside, go = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        go.wait(20)

    results: list[Any] = []

    def load() -> None:
        try:
            results.append(leaf_bits(fadapt.load(path, model)))
        except Exception as error:
            results.append(error)

    handle = model[0].register_forward_hook(hold)
    runner = threading.Thread(target=fadapt.apply, args=(model, params, reals(1, 8)))
    loader = threading.Thread(target=load)
    runner.start()
    assert inside.wait(20)
    loader.start()
    loader.join(0.3)
    go.set()
    loader.join(20)
    runner.join(20)
    handle.remove()
    assert results == [leaf_bits(params)]


def test_written_flushed_then_renamed(tmp_path, monkeypatch):
    did: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (did.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (did.append("replace"), replace(a, b))[1])
    fadapt.save(fadapt.init(mlp(), LoRA(r=2)), tmp_path / "a")
    assert did == ["fsync", "replace", "fsync"]  # the file, the rename, its directory


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_late_failures_leave_the_old_file(small, tmp_path, monkeypatch, fails):
    model, params, path = small

    def fail(*args: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, fail)
        with pytest.raises(CheckpointError, match="Input/output"):
            fadapt.save(perturb(fadapt.load(path, model)), path)
    assert leaf_bits(fadapt.load(path, model)) == leaf_bits(params)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_interrupted_by_the_user_leaves_nothing(small, tmp_path, monkeypatch):
    model, params, path = small

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fadapt.save(perturb(fadapt.load(path, model)), path)
    assert leaf_bits(fadapt.load(path, model)) == leaf_bits(params)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dangling", [False, True])
def test_symlink_is_followed(tmp_path, dangling):
    # As open() and torch.save do: "latest" stays a link, and the file it names is the one written.
    model = mlp()
    params = trained(model, LoRA(r=2))
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    real, link = tmp_path / "real" / "a", tmp_path / "links" / "latest"
    if not dangling:
        fadapt.save(fadapt.init(model, LoRA(r=2)), real)
    link.symlink_to(real)
    fadapt.save(params, link)
    assert link.is_symlink()
    assert leaf_bits(fadapt.load(real, model)) == leaf_bits(params)
    assert leaf_bits(fadapt.load(link, model)) == leaf_bits(params)
    assert len(list(real.parent.iterdir())) == len(list(link.parent.iterdir())) == 1


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_umask(tmp_path, umask):
    params = fadapt.init(mlp(), LoRA(r=2))
    before = os.umask(umask)
    try:
        fadapt.save(params, tmp_path / "a")
        fadapt.save(params, tmp_path / "a")
        (tmp_path / "plain").write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_save_changes_nothing(small, tmp_path):
    _, params, _ = small
    before = leaf_bits(params), describe(params)
    leaves = fadapt.trainable(params)
    fadapt.save(params, tmp_path / "b")
    assert (leaf_bits(params), describe(params)) == before
    assert all(a is b for a, b in zip(fadapt.trainable(params), leaves, strict=True))


def test_views_and_shared_storage(tmp_path):
    model = mlp()
    big = reals(40, 40)
    params = fadapt.init(model, LoRA(r=2)).map(
        lambda a: a.replace(
            train={k: big.T[: t.shape[0], : t.shape[1]] for k, t in a.train.items()}
        )
    )
    fadapt.save(params, tmp_path / "a")
    assert leaf_bits(fadapt.load(tmp_path / "a", model)) == leaf_bits(params)
    assert (tmp_path / "a").stat().st_size < 40 * 40 * 4
