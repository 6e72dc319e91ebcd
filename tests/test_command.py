"""The command: in this process but once, over a small language model in a directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fadapt
from fadapt.command import main
from fadapt.command.texts import TextFile, text_batches
from tests.models import perturb, qwen3, qwen3_tied, tokens

pytest.importorskip("tyro")
transformers = pytest.importorskip("transformers")

TINY = Path(__file__).parents[1] / "examples/tiny_base"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(model: Any, name: str = "base") -> Any:
    """Writes a base, and reads it as the command does."""
    model.save_pretrained(name)
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()


def adapter(model: nn.Module, cfg: Any, path: str = "a.safetensors") -> fadapt.Params:
    params = perturb(fadapt.init(model, cfg))
    fadapt.save(params, path)
    return params


def run(capsys: Any, *argv: str) -> str:
    """A call that must succeed; what it prints."""
    capsys.readouterr()
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys: Any, *argv: str) -> str:
    """A call that must fail: exit code 2, one line on stderr, nothing on stdout."""
    capsys.readouterr()
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("fadapt: error: ")
    assert err.index("\n") == len(err) - 1, err
    assert "Traceback" not in err
    return err


# ---- inspect


def test_inspect_says_what_a_file_holds(here: Path, capsys: Any) -> None:
    model = qwen3()
    params = adapter(model, {"q_proj": fadapt.LoRA(r=2), "down_proj": fadapt.DoRA(r=3)})
    out = run(capsys, "inspect", "a.safetensors")
    for line in fadapt.summary(params).splitlines()[:5]:  # the table, and the count below it
        assert line in out
    assert "base: fingerprint " in out
    assert "float32" in out
    for site, one in params.items():
        long = run(capsys, "inspect", "a.safetensors", "--sites")
        assert f"{site}  " in long
        assert one.site.fingerprint in long


def test_inspect_reads_no_values(here: Path, capsys: Any) -> None:
    adapter(qwen3(), {"q_proj": fadapt.LoRA(r=2)})
    before = run(capsys, "inspect", "a.safetensors")
    path = Path("a.safetensors")
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = bytes(len(data) - start)
    path.write_bytes(data)
    assert run(capsys, "inspect", "a.safetensors") == before
    with pytest.raises(fadapt.CheckpointError, match="checksum"):
        fadapt.load(path, qwen3())


def test_the_fingerprint_is_the_bases(here: Path, capsys: Any) -> None:
    def said(model: nn.Module, rank: int) -> str:
        adapter(model, {"q_proj": fadapt.LoRA(r=rank)})
        return run(capsys, "inspect", "a.safetensors").partition("fingerprint ")[2]

    assert said(qwen3(), 2) == said(qwen3(), 4)
    assert said(qwen3(), 2) != said(qwen3(seed=1), 2)


def test_inspect_shows_methods_that_this_process_does_not_know(here: Path, capsys: Any) -> None:
    adapter(qwen3(), {"q_proj": fadapt.LoRA(r=2)})
    path = Path("a.safetensors")
    # The name is as long, and the header is not under the checksum.
    path.write_bytes(path.read_bytes().replace(rb"\"method\": \"LoRA\"", rb"\"method\": \"Mine\""))
    assert "Mine(alpha=16.0, " in run(capsys, "inspect", "a.safetensors")


def test_inspect_of_pefts_directory_statistics_and_a_checkpoint(here: Path, capsys: Any) -> None:
    model = qwen3()
    params = adapter(model, {"q_proj": fadapt.LoRA(r=8)})
    fadapt.peft.save_peft(model, params, "peft")
    out = run(capsys, "inspect", "peft")
    assert "LORA" in out
    assert "r: 8" in out
    assert "served by vLLM: yes" in out
    assert "served by SGLang: no" in out
    fadapt.peft.save_peft(model, {"a": params, "b": params}, "two")
    assert "'b' of ['a', 'b']" in run(capsys, "inspect", "two", "--adapter", "b")
    assert "write --adapter" in refused(capsys, "inspect", "two")
    stats = fadapt.observe(model, {"q_proj": fadapt.EVA(r=2)}, [{"input_ids": tokens(4, 8)}])
    stats.save("s.safetensors")
    assert "statistics" in run(capsys, "inspect", "s.safetensors")
    ids = tokens()
    batch = {"input_ids": ids, "labels": ids}
    fadapt.sweep(model, [fadapt.Trial({"q_proj": fadapt.IA3()})], [batch], directory="out")
    assert "after step 1 of 1" in run(capsys, "inspect", "out/checkpoint.safetensors")
    assert "fadapt report out" in refused(capsys, "inspect", "out")


# ---- merge


def test_merge_writes_the_model(here: Path, capsys: Any) -> None:
    model = saved(qwen3())
    params = adapter(model, {"q_proj|down_proj": fadapt.HRA(r=2)})
    run(capsys, "merge", "a.safetensors", "merged", "--base", "base")
    again = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    want = fadapt.apply(model, params, tokens()).logits
    torch.testing.assert_close(again(tokens()).logits, want, rtol=1e-5, atol=1e-5)
    assert "exists" in refused(capsys, "merge", "a.safetensors", "merged", "--base", "base")


def test_merge_brings_the_tokenizer(here: Path, capsys: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype="auto").eval()
    adapter(model, {"q_proj": fadapt.LoRA(r=2)})
    run(capsys, "merge", "a.safetensors", "merged", "--base", str(TINY))
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    assert transformers.AutoTokenizer.from_pretrained("merged")("one two") == theirs("one two")


@pytest.mark.parametrize("rule", ["lm_head", "embed_tokens"])
def test_merge_unties(rule: str, here: Path, capsys: Any) -> None:
    model = saved(qwen3_tied())
    params = adapter(model, fadapt.Config({rule: fadapt.LoRA(r=2)}, exclude=()))
    capsys.readouterr()
    assert main(["merge", "a.safetensors", "merged", "--base", "base"]) == 0
    assert "written untied" in capsys.readouterr().err
    again = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    want = fadapt.apply(model, params, tokens()).logits
    torch.testing.assert_close(again(tokens()).logits, want, rtol=1e-5, atol=1e-5)


def test_merge_keeps_what_stays_tied(here: Path, capsys: Any) -> None:
    model = saved(qwen3_tied())
    params = adapter(model, {"embed_tokens": fadapt.TrainableTokens((1, 2))})
    run(capsys, "merge", "a.safetensors", "merged", "--base", "base")
    again = transformers.AutoModelForCausalLM.from_pretrained("merged").eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    want = fadapt.apply(model, params, tokens()).logits
    torch.testing.assert_close(again(tokens()).logits, want, rtol=1e-5, atol=1e-5)


def test_merge_loses_no_bias(here: Path, capsys: Any) -> None:
    from safetensors.torch import load_file

    model = saved(qwen3())
    params = adapter(model, {"o_proj": fadapt.BitFit()})
    said = refused(capsys, "merge", "a.safetensors", "merged", "--base", "base")
    assert "o_proj.bias is new" in said
    assert ".safetensors" in said
    assert sorted(os.listdir(".")) == ["a.safetensors", "base"]
    run(capsys, "merge", "a.safetensors", "w.safetensors", "--base", "base")
    with pytest.warns(fadapt.FadaptWarning):
        want = fadapt.merge(model, params)
    found = load_file("w.safetensors")
    assert found.keys() == want.keys()
    assert all(torch.equal(found[k], want[k]) for k in want)


def test_merge_dtypes(here: Path, capsys: Any) -> None:
    from safetensors.torch import load_file

    saved(qwen3().bfloat16())
    wide = transformers.AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    adapter(wide, {"q_proj": fadapt.LoRA(r=2)})
    said = refused(capsys, "merge", "a.safetensors", "w.safetensors", "--base", "base")
    assert "--base-dtype" in said
    assert "--allow-other-base" in said
    same = ["--base", "base", "--base-dtype", "float32"]
    run(capsys, "merge", "a.safetensors", "w.safetensors", *same, "--dtype", "bfloat16")
    assert {t.dtype for t in load_file("w.safetensors").values()} == {torch.bfloat16}
    run(capsys, "merge", "a.safetensors", "w.safetensors", *same)
    assert {t.dtype for t in load_file("w.safetensors").values()} == {torch.float32}
    run(capsys, "merge", "a.safetensors", "w.safetensors", "--base", "base", "--allow-other-base")
    assert {t.dtype for t in load_file("w.safetensors").values()} == {torch.bfloat16}


# ---- convert


def test_convert_there_and_back(here: Path, capsys: Any) -> None:
    import peft

    model = saved(qwen3())
    params = adapter(model, {"q_proj|v_proj": fadapt.DoRA(r=2)})
    want = fadapt.apply(model, params, tokens()).logits
    run(capsys, "convert", "a.safetensors", "peft", "--base", "base")
    run(capsys, "convert", "peft", "back.safetensors", "--base", "base")
    back = fadapt.load("back.safetensors", model)
    torch.testing.assert_close(fadapt.apply(model, back, tokens()).logits, want)
    theirs = peft.PeftModel.from_pretrained(model, "peft").eval()
    torch.testing.assert_close(theirs(tokens()).logits, want, rtol=1e-5, atol=1e-5)


def test_convert_as_lora_and_for_servers(here: Path, capsys: Any) -> None:
    model = saved(qwen3())
    params = adapter(model, {"q_proj|v_proj": fadapt.HRA(r=2)})
    want = fadapt.apply(model, params, tokens()).logits
    run(capsys, "convert", "a.safetensors", "l.safetensors", "--base", "base", "--as-lora")
    lora = fadapt.load("l.safetensors", model)
    assert {type(a.method) for a in lora.values()} == {fadapt.LoRA}
    torch.testing.assert_close(
        fadapt.apply(model, lora, tokens()).logits, want, rtol=1e-5, atol=1e-5
    )
    run(capsys, "convert", "a.safetensors", "served", "--base", "base", "--serving")
    assert run(capsys, "inspect", "served").count(": yes") == 3
    served = fadapt.peft.load_peft("served", model)
    torch.testing.assert_close(
        fadapt.apply(model, served, tokens()).logits, want, rtol=1e-5, atol=1e-5
    )


def test_convert_cuts_to_a_rank_only_when_told(here: Path, capsys: Any) -> None:
    model = saved(qwen3())
    adapter(model, {"q_proj": fadapt.DoRA(r=2)})
    to_lora = ["convert", "a.safetensors", "l.safetensors", "--base", "base", "--as-lora"]
    said = refused(capsys, *to_lora)
    assert "--rank" in said
    assert "as_lora(" not in said
    assert not Path("l.safetensors").exists()
    out = run(capsys, *to_lora, "--rank", "4")
    found = fadapt.load("l.safetensors", model)
    worst = max(a.method.error for a in found.values())  # type: ignore[attr-defined]
    assert f"relative errors up to {worst:.2g}" in out


# ---- sweep and report

SETTINGS = """
base = "base"
directory = "out"
[data]
train = "data:batches"
eval = "data:batches"
[sweep]
steps = 4
eval_every = 2
[[trials]]
method = "LoRA"
target = "q_proj|v_proj"
r = [2, 4]
lr = [1e-3, 1e-2]
[[trials]]
method = "IA3"
layers = [0]
lr = 1e-1
schedule = "cosine"
name = "the third kind"
"""
DATA = """
import torch
def batches():
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (2, 5), generator=rng)
    return [{"input_ids": ids, "labels": ids}] * 2
"""


@pytest.fixture
def sweep(here: Path) -> Iterator[Path]:
    saved(qwen3())
    Path("data.py").write_text(DATA)
    Path("c.toml").write_text(SETTINGS)
    yield here
    sys.modules.pop("data", None)


def test_a_sweep_is_what_the_function_makes_of_the_same_trials(sweep: Path, capsys: Any) -> None:
    checked = run(capsys, "sweep", "c.toml", "--check")
    assert len(checked.splitlines()) == 5
    assert not Path("out").exists()
    out = run(capsys, "sweep", "c.toml")
    model = transformers.AutoModelForCausalLM.from_pretrained("base", dtype="auto").eval()
    import importlib

    sys.path.insert(0, str(sweep))
    batches = importlib.import_module("data").batches()
    sys.path.remove(str(sweep))
    trials = [
        fadapt.Trial({"q_proj|v_proj": fadapt.LoRA(r=r)}, lr=lr)
        for r in (2, 4)
        for lr in (1e-3, 1e-2)
    ]
    ia3 = fadapt.Config(fadapt.IA3(), layers=[0])
    trials.append(fadapt.Trial(ia3, lr=0.1, schedule="cosine", name="the third kind"))
    want = fadapt.sweep(model, trials, batches, eval=batches, steps=4, eval_every=2)
    assert out.splitlines()[:6] == str(want).splitlines()[:6]
    for i, name in enumerate(want.names):
        (path,) = Path("out/adapters").glob(f"{i:03d}-*")
        found = fadapt.load(path, model)
        for a, b in zip(fadapt.trainable(found), fadapt.trainable(want.params[name]), strict=True):
            assert torch.equal(a, b)


def test_report_is_the_sweeps_own_table(sweep: Path, capsys: Any) -> None:
    table = run(capsys, "sweep", "c.toml").splitlines()[:6]
    found = run(capsys, "report", "out")
    assert found.splitlines()[:6] == table
    assert "step 4 of 4" in found
    first = next(Path("out/adapters").glob("*")).parent
    assert f"best: {first}" in found
    # It goes on where it was: nothing is left to do.
    assert run(capsys, "sweep", "c.toml").splitlines()[:6] == table
    assert "of another sweep" in refused_after(capsys, "steps = 4", "steps = 8")
    run(capsys, "sweep", "c.toml", "--anew")
    assert "step 8 of 8" in run(capsys, "report", "out")


def refused_after(capsys: Any, old: str, new: str) -> str:
    path = Path("c.toml")
    path.write_text(path.read_text().replace(old, new))
    said = refused(capsys, "sweep", "c.toml")
    assert "--anew" in said
    return said


def test_report_of_stopped_and_diverged_trials(here: Path, capsys: Any) -> None:
    model = qwen3()
    ids = tokens()
    batch = {"input_ids": ids, "labels": ids}
    rules = {"q_proj": fadapt.LoRA(r=2)}
    trials = [fadapt.Trial(rules, lr=lr) for lr in (1e-3, 1e-2, 1e38)]
    options: dict[str, Any] = {"steps": 6, "eval": [batch], "directory": "out"}
    for goal in ("min", "max"):
        wanted = fadapt.sweep(
            model, trials, [batch], goal=goal, halving=fadapt.Halving(first=2),
            **{**options, "directory": goal},
        )  # fmt: skip
        assert {r.status for r in wanted.results} >= {"stopped", "diverged"}
        lines = str(wanted).splitlines()[:-1]
        assert run(capsys, "report", goal).splitlines()[: len(lines)] == lines
    assert run(capsys, "report", "max", "--goal", "min") != run(capsys, "report", "max")


def test_report_of_a_sweep_that_runs_or_was_killed(sweep: Path, capsys: Any) -> None:
    run(capsys, "sweep", "c.toml")
    log = Path("out/log.jsonl")
    whole = log.read_text()
    for path in Path("out/adapters").iterdir():
        path.unlink()
    Path("out/checkpoint.safetensors").unlink()
    log.write_text(whole.splitlines(keepends=True)[0] + '{"step": 2, "lo')
    out = run(capsys, "report", "out")
    assert out.count("running at step 1") == 5
    assert "step 1\n" in out
    assert "best:" not in out
    log.write_text('{"step": 1, "lo\n' + whole)
    assert "line 1 is damaged" in refused(capsys, "report", "out")
    log.write_text("")
    assert "no trial yet" in refused(capsys, "report", "out")


BAD = {
    "no TOML": ("base = ", "not TOML"),
    "no base": ('directory = "o"', "lacks base"),
    "no trials": ('base = "b"\ndirectory = "o"\n[data]\ntrain = "t.txt"', "lacks trials"),
    "no train": ('base = "b"\ndirectory = "o"\n[data]\n[[trials]]\nmethod = "LoRA"', "lacks train"),
    "unknown key": ('bas = "b"', "near keys are ['base'"),
    "wrong kind": ("base = 3", "base must be a string"),
    "unknown option": (SETTINGS.replace("steps", "step"), "near keys are ['steps'"),
    "unknown method": (SETTINGS.replace('"LoRA"', '"LoRa"'), "near names are"),
    "unknown field": (SETTINGS.replace("r = [2", "rank = [2"), "no key 'rank' for LoRA"),
    "bad value": (SETTINGS.replace("r = [2", "r = [0"), "[[trials]] 1"),
    "no such method": (SETTINGS.replace('"LoRA"', '"data:Mine"'), "cannot be imported"),
    "bad dtype": ('dtype = "int8"' + SETTINGS, "dtype must be one of"),
    "bad pattern": (SETTINGS.replace("q_proj|v_proj", "("), "[[trials]] 1"),
    "one name twice": (SETTINGS.replace("lr = 1e-1", "lr = [1e-1, 1e-2]"), "two trials are called"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit(case: str, here: Path, capsys: Any) -> None:
    text, said = BAD[case]
    Path("c.toml").write_text(text)
    message = refused(capsys, "sweep", "c.toml")
    assert said in message
    assert "c.toml" in message
    assert os.listdir(".") == ["c.toml"]


def test_what_settings_name_but_is_not_there(sweep: Path, capsys: Any) -> None:
    for old, new, said in (
        ("data:batches", "data:rows", "data has no rows"),
        ("data:rows", "no_such_module:rows", "cannot be imported"),
        ("no_such_module:rows", "rows.txt", "cannot be read"),
        ('base = "base"', 'base = "nothing"', "cannot be loaded"),
    ):
        path = Path("c.toml")
        path.write_text(path.read_text().replace(old, new))
        assert said in refused(capsys, "sweep", "c.toml")


def test_texts_become_batches(here: Path) -> None:
    rows: list[dict[str, str]] = [{"prompt": "one two", "completion": " three"}, {"text": "four"}]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (batch,) = text_batches(TextFile(Path("t.jsonl"), 64, 8), str(TINY))
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    prompt = tokenizer("one two")["input_ids"]
    whole = [*prompt, *tokenizer(" three", add_special_tokens=False)["input_ids"]]
    whole.append(tokenizer.eos_token_id)
    n = len(whole)
    assert batch["input_ids"][0, :n].tolist() == whole
    assert batch["labels"][0].tolist() == (
        [-100] * len(prompt) + whole[len(prompt) :] + [-100] * (batch["labels"].shape[1] - n)
    )
    second = batch["attention_mask"][1].bool()
    assert torch.equal(batch["labels"][1][second], batch["input_ids"][1][second])
    assert (batch["labels"][1][~second] == -100).all()
    with pytest.warns(fadapt.FadaptWarning, match="2 of 2 rows have more than 2 tokens"):
        (cut,) = text_batches(TextFile(Path("t.jsonl"), 2, 8), str(TINY))
    assert cut["input_ids"].shape == (2, 2)


# ---- help and errors


def test_help(capsys: Any) -> None:
    out = run(capsys, "--help")
    for command in ("inspect", "merge", "convert", "sweep", "report"):
        assert command in out
        assert f"usage: fadapt {command}" in run(capsys, command, "--help")


ERRORS = {
    "nothing": ([], "inspect, merge, convert, sweep, report"),
    "an unknown command": (["inpsect"], "Unrecognized"),
    "an unknown option": (["inspect", "a", "--site"], "--sites"),
    "a lacking option": (["merge", "a", "b"], "--base"),
    "a value of another kind": (["convert", "a", "b", "--base", "c", "--rank", "x"], "rank"),
    "a file that is not there": (["inspect", "nothing.safetensors"], "does not exist"),
    "settings that are not there": (["sweep", "nothing.toml"], "cannot be read"),
    "a directory that is not there": (["report", "nothing"], "not a directory"),
    "a directory of something else": (["inspect", "."], "adapter_config.json"),
    "no sweep's directory": (["report", "."], "no log.jsonl"),
    "a base that is not there": (["merge", "a", "b", "--base", "nothing"], "cannot be loaded"),
    "a base that is no model": (["merge", "a", "b", "--base", "os:getcwd"], "not a model"),
    "serving to a file": (
        ["convert", "a", "b.safetensors", "--base", "c", "--serving"], "a directory"
    ),
    "a rank for nothing": (["convert", "a", "b", "--base", "c", "--rank", "2"], "--as-lora"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_exit_code_2(case: str, here: Path, capsys: Any) -> None:
    argv, said = ERRORS[case]
    assert said in refused(capsys, *argv)
    assert os.listdir(".") == []


def test_files_that_are_damaged_or_foreign(here: Path, capsys: Any) -> None:
    from safetensors.torch import save_file

    Path("text").write_text("hello")
    save_file({"a": torch.ones(2)}, "foreign.safetensors")
    adapter(qwen3(), {"q_proj": fadapt.LoRA(r=2)})
    data = Path("a.safetensors").read_bytes()
    Path("short.safetensors").write_bytes(data[:-1])
    for name in ("text", "foreign.safetensors", "short.safetensors"):
        assert name in refused(capsys, "inspect", name)


@pytest.mark.parametrize("odd", ["\x1b[31m", "\ud800", "a\nb", "\u202e"])
def test_what_files_say_does_nothing_to_a_terminal(odd: str, here: Path, capsys: Any) -> None:
    adapter(qwen3(), {"q_proj": fadapt.LoRA(r=2)})
    data = Path("a.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    meta = json.loads(header["__metadata__"]["fadapt"])
    name = next(iter(meta["sites"]))
    meta["sites"][name]["site"]["note"] = odd
    header["__metadata__"]["fadapt"] = json.dumps(meta)
    text = json.dumps(header).encode()
    Path("a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    out = run(capsys, "inspect", "a.safetensors")
    assert all(c.isprintable() or c == "\n" for c in out)
    out.encode()


def test_convert_writes_nothing_from_a_damaged_source(here: Path, capsys: Any) -> None:
    model = saved(qwen3())
    params = adapter(model, {"q_proj": fadapt.LoRA(r=2)})
    fadapt.peft.save_peft(model, params, "peft")
    for path in ("a.safetensors", "peft/adapter_model.safetensors"):
        os.truncate(path, os.path.getsize(path) - 8)
    for source in ("a.safetensors", "peft"):
        for target in ("b.safetensors", "other"):
            refused(capsys, "convert", source, target, "--base", "base")
    assert sorted(os.listdir(".")) == ["a.safetensors", "base", "peft"]


def test_without_tyro(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert "pip install 'fadapt[cli]'" in refused(capsys, "inspect", "a.safetensors")


def test_without_transformers(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "fadapt[hf]" in refused(capsys, "merge", "a", "b", "--base", "c")


def test_as_a_process(here: Path) -> None:
    command = [sys.executable, "-m", "fadapt", "inspect", "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fadapt: error: b does not exist\n"
