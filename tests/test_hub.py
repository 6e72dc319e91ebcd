"""Adapters of Hub repositories: from a local cache built by hand, with the network off."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fadapt
from fadapt.command import main
from fadapt.io.hub import HubId
from tests.models import qwen3, tokens, trained

huggingface_hub: Any = pytest.importorskip("huggingface_hub")

RULES = {"q_proj": fadapt.LoRA(r=2)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the present directory is another, empty one."""
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def snapshot(cache: Path, repo: str, digit: str = "a", ref: str = "main") -> Path:
    """The folder of a repository's files at one commit, in the layout of the cache."""
    root = cache / f"models--{repo.replace('/', '--')}"
    commit = digit * 40
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def same(a: fadapt.Params, b: fadapt.Params) -> bool:
    pairs = zip(fadapt.trainable(a), fadapt.trainable(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_an_adapter_by_its_id(cache: Path) -> None:
    model = qwen3()
    first, second = (trained(model, RULES, seed=i) for i in (1, 2))
    fadapt.save(first, snapshot(cache, "user/name") / "adapter.safetensors")
    fadapt.save(second, snapshot(cache, "user/name", "b", "v2") / "adapter.safetensors")
    fadapt.save(second, snapshot(cache, "user/name") / "other.safetensors")
    assert same(fadapt.load("user/name", model), first)
    assert same(fadapt.load("user/name@v2", model), second)
    assert same(fadapt.load("user/name/other.safetensors", model), second)


def test_the_one_file_of_another_name(cache: Path) -> None:
    model = qwen3()
    params = trained(model, RULES)
    folder = snapshot(cache, "user/name")
    fadapt.peft.save_peft(model, params, folder)
    fadapt.save(params, folder / "mine.safetensors")
    assert same(fadapt.load("user/name", model), params)
    fadapt.save(params, folder / "more.safetensors")
    with pytest.raises(fadapt.CheckpointError, match=r'write "user/name/mine\.safetensors"'):
        fadapt.load("user/name", model)


def test_pefts_adapters_by_their_ids(cache: Path) -> None:
    model = qwen3()
    first, second = (trained(model, RULES, seed=i) for i in (1, 2))
    folder = snapshot(cache, "user/name")
    fadapt.peft.save_peft(model, {"default": first, "style": second}, folder)
    fadapt.peft.save_peft(model, second, folder / "sub/deep")
    for path, adapter, want in (
        ("user/name", None, first),
        ("user/name", "default", first),
        ("user/name", "style", second),
        ("user/name@main", "style", second),
        ("user/name/sub/deep", None, second),
    ):
        found = fadapt.peft.load_peft(path, model, adapter=adapter)
        assert same(found, want), (path, adapter)
    with pytest.raises(fadapt.CheckpointError, match="other/adapter_config"):
        fadapt.peft.load_peft("user/name", model, adapter="other")


def test_a_path_that_exists_wins(cache: Path) -> None:
    model = qwen3()
    first, second = (trained(model, RULES, seed=i) for i in (1, 2))
    fadapt.save(first, snapshot(cache, "user/name") / "adapter.safetensors")
    Path("user").mkdir()
    # The folder alone makes it local: a file of it that is missing is missing.
    with pytest.raises(fadapt.CheckpointError, match="user/name is not a file"):
        fadapt.load("user/name", model)
    fadapt.save(second, "user/name")
    assert same(fadapt.load("user/name", model), second)


def test_what_cannot_be_had_is_said(cache: Path) -> None:
    model = qwen3()
    for call in (
        lambda: fadapt.load("user/none", model),
        lambda: fadapt.peft.load_peft("user/none", model),
    ):
        with pytest.raises(fadapt.CheckpointError, match="user/none is no path here") as caught:
            call()
        assert "adapter" in str(caught.value)
    fadapt.save(trained(model, RULES), snapshot(cache, "user/name") / "adapter.safetensors")
    with pytest.raises(fadapt.CheckpointError, match=r"gives no adapter_config\.json"):
        fadapt.peft.load_peft("user/name", model)
    snapshot(cache, "user/name").joinpath("adapter.safetensors").write_bytes(b"damaged")
    with pytest.raises(fadapt.CheckpointError, match="truncated"):
        fadapt.load("user/name", model)


def test_without_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for load in (fadapt.load, fadapt.peft.load_peft):
        with pytest.raises(fadapt.CheckpointError, match=r"pip install 'fadapt\[hub\]'"):
            load("user/name", qwen3())


LOCAL = (
    *("adapter", "out/adapter.safetensors", "./user/name", "../user/name", "/user/name"),
    *("user/../name", "user//name", "user/name/", "a b/c", "user/na\nme", "~/name", "user\\name"),
    *("user/name@", "user/name/../x", "user/na--me", "", "user/.hidden", "user/name@../x"),
)


@pytest.mark.parametrize("path", LOCAL)
def test_other_texts_are_no_ids(path: str, cache: Path) -> None:
    assert HubId.read(path) is None
    with pytest.raises(fadapt.CheckpointError) as caught:
        fadapt.load(path, qwen3())
    assert "Hub" not in str(caught.value)


def test_save_says_how_to_push(cache: Path) -> None:
    params = fadapt.init(qwen3(), RULES)
    with pytest.raises(fadapt.CheckpointError, match="upload_file") as caught:
        fadapt.save(params, "user/name")
    assert "fadapt.load(" in str(caught.value)
    assert not list(Path.cwd().iterdir())
    known = inspect.signature(huggingface_hub.upload_file).parameters
    assert {"path_or_fileobj", "path_in_repo", "repo_id"} <= known.keys()
    Path("user").mkdir()
    fadapt.save(params, "user/name")
    assert Path("user/name").is_file()


def test_the_command_takes_ids(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    model = qwen3()
    model.save_pretrained("base")
    params = trained(model, RULES)
    fadapt.save(params, snapshot(cache, "user/own") / "adapter.safetensors")
    fadapt.peft.save_peft(model, params, snapshot(cache, "user/theirs"))
    for i, repo in enumerate(("user/own", "user/theirs")):
        assert main(["convert", repo, f"{i}.safetensors", "--base", "base"]) == 0
        assert same(fadapt.load(f"{i}.safetensors", model), params)
    assert main(["convert", "user/none", "2.safetensors", "--base", "base"]) == 2
    assert "user/none is no path here" in capsys.readouterr().err


def test_outputs_are_the_same(cache: Path) -> None:
    model = qwen3()
    params = trained(model, RULES)
    fadapt.save(params, snapshot(cache, "user/name") / "adapter.safetensors")
    loaded = fadapt.load("user/name", model)
    want = fadapt.apply(model, params, tokens()).logits
    assert torch.equal(fadapt.apply(model, loaded, tokens()).logits, want)
