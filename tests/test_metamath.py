"""The benchmark of examples/metamath_gsm8k.py: its protocols by hand-made cases, and the script."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fadapt
from fadapt import Method
from fadapt.training import checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import metamath_gsm8k  # noqa: E402
from metamath import costs, data, recipes, results  # noqa: E402
from metamath.generate import interval  # noqa: E402
from metamath.protocol import DataError, Example, LoraLiteProtocol, PEFTProtocol  # noqa: E402
from word_problems import gsm8k_rows, metamath_rows, stories  # noqa: E402

PEFT, LITE = PEFTProtocol(), LoraLiteProtocol()


class Words:
    """A tokenizer of whitespace-separated words, numbered as they come; 0 ends."""

    eos_token, pad_token_id = "<end>", 0

    def __init__(self):
        self.known = {"<end>": 0}

    def __call__(self, texts, **_):
        split = [t.replace("<end>", " <end>").split() for t in texts]
        return {
            "input_ids": [[self.known.setdefault(w, len(self.known)) for w in t] for t in split]
        }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x #### 5\nThe answer is: 7", "7"),  # the earlier delimiter of the list wins
        ("The answer is: 3. The answer is: 4.", "4"),  # its last place
        ("The answer is 12 apples", "12 apples"),
        ("The final answer is: $50%", "50"),
        ("#### 1,000", "1,000"),
        ("The answer is: 9\n\nNext question: The 8", "9"),
        ("nothing", None),
    ],
)
def test_peft_finds_the_answer(text, wanted):
    assert PEFT.parse(text) == wanted


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("20/40", "0.5", True),
        ("7.0", "7", True),
        ("1,000", "1000", False),  # commas are not understood
        ("12 apples", "12", False),
        ("a", "a", True),
        ("1/0", "1", False),
        (None, "1", False),
    ],
)
def test_peft_compares_decimals(left, right, same):
    assert PEFT.equal(left, right) is same


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a 3 #### 1,234.", "1234"),
        ("first 5, then -6.50", "-6.50"),
        ("#### 4 of 7", "7"),
        ("2 #### none", None),
        ("", None),
    ],
)
def test_lora_lite_finds_the_answer(text, wanted):
    assert LITE.parse(text) == wanted


def test_what_each_protocol_learns():
    row = {"query": "q", "response": "r1 r2"}
    tokenizer = Words()
    (one,) = PEFT.examples([row], tokenizer, 100)
    (two,) = LITE.examples([row], tokenizer, 100)
    # No space before PEFT's response: "Answer:r1" is one word, and nothing ends it.
    assert (len(one.ids), one.unlabeled) == (8, 0)
    assert (len(two.ids), two.unlabeled, two.ids[-1]) == (10, 7, 0)

    other = Example([5, 6, 7, 8, 9, 10], 4)
    batch = PEFT.collate([Example([5, 6, 7], 0), other], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0, 0], [5, 6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[5, 6, 7, 0, -100, -100], [5, 6, 7, 8, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    batch = LITE.collate([Example([5, 6, 0], 1), other], 0)
    assert batch["input_ids"].tolist() == [[0, 0, 0, 5, 6, 0], [5, 6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[-100] * 4 + [6, 0], [-100] * 4 + [9, 10]]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]


def test_the_losses_are_the_protocols():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 9)
    labels = torch.tensor([[-100, 1, 2, -100], [3, 4, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    nll = -logits[:, :-1].log_softmax(-1)
    total = nll[0, 0, 1] + nll[0, 1, 2] + nll[1, 0, 4] + nll[1, 1, 5] + nll[1, 2, 6]
    output, batch = SimpleNamespace(logits=logits), {"labels": labels, "attention_mask": mask}
    torch.testing.assert_close(PEFT.loss(output, batch), total / 7)
    torch.testing.assert_close(LITE.loss(output, batch), total / 5)


def test_long_rows():
    rows = [
        {"query": "x" * 1299, "response": ""},
        {"query": "x" * 1300, "response": ""},
        {"query": " ".join("a" * 9), "response": "r"},
    ]
    assert [len(e.ids) for e in PEFT.examples(rows, Words(), 6)] == [6, 6]
    # The prompt of the last row alone has 15 words.
    assert len(LITE.examples(rows[2:], Words(), 15)) == 0
    assert [len(e.ids) for e in LITE.examples(rows[2:], Words(), 16)] == [16]


def test_order_of_the_batches():
    examples = [Example([1] * n, 0) for n in (3, 9, 5, 7, 1)]
    assert PEFT.order(examples, 2, 4, 0) == [[1, 3], [2, 0], [4], [1, 3]]
    order = LITE.order(examples, 2, 3, 0)
    assert order == LITE.order(examples, 2, 3, 0) != LITE.order(examples, 2, 3, 1)
    assert all(len(b) == 2 for b in order)
    assert PEFT.warmup(250) == 25
    assert LITE.warmup(250) == 0


def test_word_problems_are_disjoint_and_right():
    train, test = (list(stories(400, 0, test=side)) for side in (False, True))
    assert not {s.template for s in train} & {s.template for s in test}
    assert not {s.numbers for s in train} & {s.numbers for s in test}
    assert set(metamath_rows(iter(train))[0]) == {"query", "response", "type", "original_question"}
    for story, row in zip(test, gsm8k_rows(iter(test)), strict=True):
        value = story.numbers[0]
        for line, k in zip(row["answer"].split("\n"), story.numbers[1:], strict=False):
            expression, _, result = line.rpartition(" = ")
            assert eval(expression) == int(result)
            assert expression.split()[0] == str(value)
            assert expression.split()[2] == str(k)
            value = int(result)
        for protocol in (PEFT, LITE):
            assert protocol.right(f"so {row['answer']}", row["answer"])
            assert not protocol.right(f"#### {value + 1}", row["answer"])


def test_interval_is_wilsons():
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611.
    assert interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def run(*arguments: str, out: Path) -> int:
    return metamath_gsm8k.main([*arguments, "--out", str(out), "--device", "cpu"])


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A tiny Qwen3 with a tokenizer built here, and data in both kinds of files."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("local")
    train = metamath_rows(stories(40, 0, test=False))
    test = gsm8k_rows(stories(60, 0, test=True))
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in train))
    datasets.Dataset.from_list(test).to_parquet(folder / "test.parquet")

    words = sorted({w for r in train for w in (r["query"] + " " + r["response"]).split()})
    vocabulary = {w: i for i, w in enumerate(["<end>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    for name, eos in (("model", "<end>"), ("endless", None)):
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=eos, unk_token="<unk>"
        ).save_pretrained(folder / name)
        Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(vocabulary),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
            )
        ).save_pretrained(folder / name)
    return folder


def of(folder: Path, **changed: str) -> list[str]:
    options = {
        "model": folder / "model",
        "train": folder / "train.jsonl",
        "eval": folder / "test.parquet",
        "methods": "LoRA,IA3",
        "lr": "1e-3,1e-2",
        "steps": "4",
        "batch": "2",
        "r": "2",
        "dtype": "float32",
        "new-tokens": "3",
        "eval-every": "2",
        "seeds": "0,1",
        **changed,
    }
    return [a for k, v in options.items() for a in (f"--{k}", str(v))]


def losses_of(out: Path) -> dict[str, list[float]]:
    """The losses of every trial that was tested, in PEFT's result files."""
    files = sorted((out / "results").glob("*.json"))
    runs = [json.loads(f.read_text())["train_info"]["metrics"] for f in files]
    return {f.name: [m["train loss"] for m in run] for f, run in zip(files, runs, strict=True)}


@pytest.fixture(scope="module")
def undisturbed(local, tmp_path_factory) -> dict[str, list[float]]:
    """The losses of the run that the next tests disturb."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(*of(local), out=out) == 0
    return losses_of(out)


SCRIPT = [str(EXAMPLES / "metamath_gsm8k.py"), "--device", "cpu"]


def test_under_torchrun_the_table_is_the_same(local, tmp_path, undisturbed):
    """With torchrun's own parser in front, which takes --r for one of its options."""
    given = [a.replace("--r", "--rank") if a == "--r" else a for a in of(local)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", *SCRIPT, *given, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| method |") == 1
    assert losses_of(tmp_path) == undisturbed


def test_a_run_that_is_told_to_end_goes_on(local, tmp_path, undisturbed):
    """SIGTERM, as schedulers send it: no checkpoint is due, and no step is lost."""
    command = [sys.executable, *SCRIPT, *of(local), "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "sweep" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    with checkpoint.opened(tmp_path / "sweep") as file:
        assert file is not None
        assert file.meta["step"] >= 1
    assert not (tmp_path / "table.json").exists()
    assert run(*of(local), out=tmp_path) == 0
    assert losses_of(tmp_path) == undisturbed


def test_the_best_rates_of_an_earlier_run(local, tmp_path, capsys):
    first, second, third = (tmp_path / name for name in "abc")
    assert run(*of(local), out=first) == 0
    tuned = json.loads((first / "validation.json").read_text())["validation"]
    assert {m: len(by_rate) for m, by_rate in tuned.items()} == {"LoRA": 2, "IA3": 2}
    assert run(*of(local, lr=first / "validation.json"), out=second) == 0
    table, again = (json.loads((p / "table.json").read_text()) for p in (first, second))
    assert again["trials"] == 4
    for row in again["rows"]:
        (old,) = [r for r in table["rows"] if r["method"] == row["method"]]
        for what in ("accuracy", "seeds", "lr", "valid"):
            assert row.get(what) == old.get(what), (row["method"], what)
    assert again["validation"] == table["validation"]  # the whole grid, for the picture
    assert run(*of(local, lr=first / "validation.json", methods="DoRA"), out=third) == 2
    assert "has no rates of DoRA, only of LoRA, IA3" in capsys.readouterr().err


def test_one_by_one_is_the_same_within_rounding(local, tmp_path, undisturbed):
    assert run(*of(local), "--one-by-one", out=tmp_path) == 0
    found = losses_of(tmp_path)
    assert found.keys() == undisturbed.keys()
    for name, values in found.items():
        assert values == pytest.approx(undisturbed[name], rel=1e-4), name


def test_a_method_that_diverges_is_in_the_table(local, tmp_path, capsys):
    assert run(*of(local, lr="1e38", seeds="0", methods="LoRA"), out=tmp_path) == 0
    assert "LoRA-lr1e+38-seed0 diverged" in capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    (row,) = [r for r in table["rows"] if r["method"] == "LoRA"]
    assert (row["accuracy"], row["valid"], row["forgetting"]) == (0, None, None)
    assert table["validation"] == {"LoRA": {"1e+38": [None]}}
    (file,) = (tmp_path / "results").glob("*.json")
    result = json.loads(file.read_text())
    assert result["train_info"]["status"] == "failed"
    assert result["run_info"]["error_msg"].startswith("diverged: ")
    assert results.check_schema(result) == []
    result["train_info"]["status"] = "success"
    assert "train_info.metrics.0.valid accuracy is missing" in results.check_schema(result)


def test_other_settings_in_the_same_place_are_refused(local, tmp_path, capsys):
    assert run(*of(local), out=tmp_path) == 0
    assert run(*of(local, lr="1e-3,2e-2"), out=tmp_path) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert str(tmp_path) in line


def test_calibrated_methods_of_all_seeds_share_one_pass(monkeypatch, tmp_path):
    options = ["--batch", "2", "--steps", "2", "--methods", "EVA,LoRAGA,LoRA", "--seeds", "0,1"]
    given = [*options, "--device", "cpu", "--out", str(tmp_path)]
    bench = metamath_gsm8k.prepare(metamath_gsm8k.arguments(given))
    starts = []
    monkeypatch.setattr(fadapt, "sweep", lambda *a, calib, **k: starts.append(calib))
    metamath_gsm8k.train(bench)
    metamath_gsm8k.train(bench)
    assert isinstance(starts[0], fadapt.Stats)
    assert starts[0] is starts[1]
    for name in ("EVA", "LoRAGA"):
        fadapt.init(bench.model, bench.configs[name], starts[0])


@pytest.mark.parametrize("protocol", ["peft", "lora-lite"])
def test_the_script_on_local_files(local, tmp_path, protocol):
    assert run(*of(local, protocol=protocol), out=tmp_path) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["trials"] == 8
    assert table["test_rows"] == 10  # 50 of the 60 validate
    assert {r["method"] for r in table["rows"]} == {"base", "LoRA", "IA3"}
    files = list((tmp_path / "results").glob("*.json"))
    assert len(files) == 4  # the best rate of two methods, two seeds
    for file in files:
        assert results.check_schema(json.loads(file.read_text())) == []
    assert len(list(tmp_path.glob("*.png"))) == 2
    # A second call finds the finished sweep, and trains nothing.
    assert run(*of(local, protocol=protocol), out=tmp_path) == 0
    assert json.loads((tmp_path / "table.json").read_text())["validation"] == table["validation"]


def test_every_method_that_trains_has_a_recipe():
    """SSteer trains nothing; the others are made of, or from, other methods."""
    public = {n for n, v in vars(fadapt).items() if isinstance(v, type) and issubclass(v, Method)}
    assert set(recipes.recipes(8)) == public - {"Method", "SSteer", "Chain", "Sum", "TruncatedLoRA"}
    assert list(recipes.small(8)) == list(recipes.recipes(8))


def test_targets_leave_out_what_adapts_no_linear_map(capsys):
    args = metamath_gsm8k.arguments(["--batch", "2", "--targets", "q_proj"])
    left = set(recipes.recipes(8)) - set(metamath_gsm8k.prepare(args).methods)
    assert left == {"LNTuning", "TrainableTokens"}
    assert capsys.readouterr().out.startswith("without LNTuning, TrainableTokens, which")


def test_products_that_add_in_place_are_counted(tmp_path):
    """LoRA multiplies each of its numbers once a token."""
    given = ["--batch", "1", "--steps", "1", "--methods", "LoRA", "--out", str(tmp_path)]
    bench = metamath_gsm8k.prepare(metamath_gsm8k.arguments([*given, "--device", "cpu"]))
    cost = costs.measure(
        bench.model, bench.configs["LoRA"], bench.first[0], bench.protocol.loss, []
    )
    assert cost.macs == cost.parameters == 108_544


def test_names_in_a_picture_are_spread_as_little_as_needed():
    assert results.spread([], 2.0) == []
    assert results.spread([1.0, 5.0], 2.0) == [1.0, 5.0]
    assert results.spread([5.0, 5.0, 20.0], 2.0) == [4.0, 6.0, 20.0]
    assert results.spread([1.0, 2.0, 2.0, 5.0], 2.0) == pytest.approx([-0.5, 1.5, 3.5, 5.5])


def test_every_method_is_alive(tmp_path, capsys):
    assert run("--probe", "--batch", "1", "--steps", "2", out=tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes.recipes(8))


BAD_FILES = {
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "broken.jsonl": '{"query": "a", "resp\n',
    "partial.jsonl": '{"query": "a", "response": "b"}\n{"query": "a"}\n',
    "numbers.jsonl": '{"query": 1, "response": 2}\n',
    "rows.csv": "query,response\na,b\n",
    "words.jsonl": '{"question": "a", "answer": "many"}\n' * 60,
    "few.jsonl": '{"question": "a", "answer": "#### 1"}\n' * 20,
    "broken.parquet": "hello",
    "nothing/notes.txt": "no data",
    "other.json": '{"validation": {"LoRA": [1, 2]}}',
    "twice/train.jsonl": "{}\n",
    "twice/train.parquet": "hello",
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": "LoRA,Nonsense"}, "unknown methods"),
        ({"methods": ","}, "--methods: ',' names none"),
        ({"model": "no/where"}, "cannot load"),
        ({"model": "nothing"}, "cannot load"),
        ({"model": "endless"}, "no eos token"),
        ({"train": "missing.jsonl"}, "does not exist"),
        ({"train": "test.parquet"}, "lacks the column 'query'"),
        ({"train": "empty.jsonl"}, "is empty"),
        ({"train": "blank.jsonl"}, "is empty"),
        ({"train": "broken.jsonl"}, "ArrowInvalid: JSON parse error"),
        ({"train": "broken.parquet"}, "ArrowInvalid: Parquet file size is 5 bytes"),
        ({"train": "partial.jsonl"}, "row 1 has no text in 'response', but None"),
        ({"train": "numbers.jsonl"}, "row 0 has no text in 'query', but 1"),
        ({"train": "rows.csv"}, "is none of .jsonl, .json, .parquet"),
        ({"train": "nothing"}, "no JSONL or parquet file called train"),
        ({"train": "twice"}, "has train twice: ['train.jsonl', 'train.parquet']"),
        ({"eval": "nothing"}, "no JSONL or parquet file called test"),
        ({"eval": "words.jsonl"}, "no number in the answer 'many'"),
        ({"eval": "few.jsonl"}, "too few to validate"),
        ({"kept": "train.jsonl"}, "lacks the column 'text'"),
        ({"max-length": "3"}, "tokens, more than --max-length 3"),
        ({"max-length": "3", "protocol": "peft"}, "tokens, more than --max-length 3"),
        ({"new-tokens": "99999"}, "positions; lower --new-tokens"),
        ({"batch": "1000"}, "rows are usable within --max-length 768, fewer than --batch"),
        ({"lr": "0"}, "--lr: 0.0 in '0' is no finite rate above 0"),
        ({"lr": "nan"}, "--lr: nan in 'nan' is no finite rate above 0"),
        ({"lr": "x1,0"}, "--lr: 0.0 in 'x1,0' is no finite rate above 0"),
        ({"lr": "fast"}, "--lr: 'fast' in 'fast' is no number"),
        ({"lr": ""}, "--lr: '' in '' is no number"),
        ({"lr": "1e-3,1e-3"}, "names a rate twice"),
        ({"lr": "none.json"}, "--lr: cannot read none.json: No such file"),
        ({"lr": "other.json"}, "other.json is no validation.json or table.json"),
        ({"seeds": ""}, "--seeds: '' in '' is no whole number"),
        ({"seeds": "a"}, "--seeds: 'a' in 'a' is no whole number"),
        ({"seeds": "0,0"}, "names a seed twice"),
        ({"targets": "nonsense"}, "rule 'nonsense' matches no weight"),
        ({"targets": "("}, "is not a regular expression"),
        ({"quantize": "3bit"}, "invalid choice: '3bit'"),
        ({"dtype": "int8"}, "invalid choice: 'int8'"),
        ({"device": "nowhere"}, "no device 'nowhere' here"),
        ({"r": "0"}, "--r: '0' is no whole number of at least 1"),
        ({"steps": "0"}, "--steps: '0' is no whole number of at least 1"),
        ({"steps": "2.5"}, "--steps: '2.5' is no whole number of at least 1"),
        ({"halving": "5"}, "--halving 5 is after the last of --steps 4"),
        ({"nonsense": "5"}, "unrecognized arguments: --nonsense 5"),
    ],
)
def test_bad_input_is_one_clear_line(local, tmp_path, changed, message, capsys):
    for name, text in BAD_FILES.items():
        (local / name).parent.mkdir(exist_ok=True)
        (local / name).write_text(text)
    changed = {k: str(local / v) if (local / v).exists() and v else v for k, v in changed.items()}
    assert metamath_gsm8k.main(of(local, out=str(tmp_path), **{"device": "cpu", **changed})) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert message in line
    assert not list(tmp_path.iterdir())  # nothing is left that looks like a result


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--model", "here"), "--model needs --train and --eval"),
        (("--train", "here"), "--train and --eval need --model"),
    ],
)
def test_a_model_and_its_data_go_together(tmp_path, given, message, capsys):
    assert run(*given, out=tmp_path) == 2
    assert message in capsys.readouterr().err


def test_quantized_bases_need_bitsandbytes(local, tmp_path, monkeypatch, capsys):
    import transformers.quantizers.quantizer_bnb_4bit as quantizer

    monkeypatch.setattr(quantizer, "is_bitsandbytes_available", lambda: False)
    assert run(*of(local, quantize="4bit"), out=tmp_path) == 2
    assert "requires bitsandbytes" in capsys.readouterr().err


def test_split_files_are_read_whole(local, tmp_path):
    import datasets

    rows = gsm8k_rows(stories(60, 0, test=True))
    for i in range(2):
        part = datasets.Dataset.from_list(rows[30 * i : 30 * (i + 1)])
        part.to_parquet(tmp_path / f"test-0000{i}-of-00002.parquet")
    assert data.read(str(tmp_path), "test") == rows


def test_an_output_that_is_no_directory(local, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(*of(local), out=tmp_path / "file") == 2
    assert "error:" in capsys.readouterr().err


def test_too_few_rows_to_validate():
    few = [{"question": "q", "answer": "#### 1"}] * 20
    with pytest.raises(DataError, match="too few to validate"):
        data.split_evaluation(few, LITE, 0, "few.jsonl")
