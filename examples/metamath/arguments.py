"""The command line: what is given is checked before anything is loaded."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from .protocol import PROTOCOLS, DataError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; --help says what there is")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


Scores = dict[str, dict[float, list[float]]]
"""{method: {rate: validation accuracies of the seeds}}."""


def grid(text: str) -> str | Path:
    """Rates with commas, factors after an x (:func:`rates`), or an earlier file (:func:`tuned`)."""
    if text.endswith(".json"):
        try:
            tuned(Path(text))
        except DataError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return Path(text)
    values = []
    for word in text.removeprefix("x").split(","):
        try:
            values.append(float(word))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{word!r} in {text!r} is no number; write 1e-4,3e-4 or x0.3,1,3, or the "
                "validation.json of an earlier run"
            ) from None
    if wrong := [v for v in values if not 0 < v < math.inf]:
        raise argparse.ArgumentTypeError(f"{wrong[0]} in {text!r} is no finite rate above 0")
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} names a rate twice")
    return text


def tuned(path: Path) -> Scores:
    """The validation accuracies in a file of an earlier run, NaN for what diverged.

    Raises:
        DataError: no such file, or one that holds something else.
    """
    try:
        found = json.loads(path.read_text())["validation"]
        return {
            method: {
                float(rate): [math.nan if v is None else float(v) for v in values]
                for rate, values in by_rate.items()
            }
            for method, by_rate in found.items()
            if by_rate
        }
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no validation.json or table.json of an earlier run ({error!r})"
        ) from error


def best_rate(by_rate: Mapping[float, Sequence[float]]) -> float:
    """The rate with the best mean accuracy; last come those at which a seed diverged."""
    return max(by_rate, key=lambda rate: mean(by_rate[rate]))


def mean(values: Sequence[float]) -> float:
    """The mean, -inf where one of them is missing (a trial that diverged or was stopped)."""
    return sum(values) / len(values) if all(map(math.isfinite, values)) else -math.inf


def rates(spec: str | None, own: float) -> list[float]:
    """The learning rates of a method: its own, a list, or factors of its own."""
    if spec is None:
        return [own]
    values = [float(v) for v in spec.removeprefix("x").split(",")]
    return [own * v for v in values] if spec.startswith("x") else values


def seeds(text: str) -> list[int]:
    """Numbers with commas."""
    words = [word.strip() for word in text.split(",")]
    if wrong := [w for w in words if not w.isdecimal() or int(w) >= 2**32]:
        raise argparse.ArgumentTypeError(
            f"{wrong[0]!r} in {text!r} is no whole number from 0 to 2**32 - 1; write 0,1,2"
        )
    found = [int(word) for word in words]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return found


def names(text: str) -> str:
    """Names with commas."""
    if not any(name.strip() for name in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} names none; write all, or LoRA,DoRA")
    return text


def device(text: str) -> str:
    """A device that is there."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {reason:.120}") from None
    return text


def arguments(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The parsed command line.

    Raises:
        DataError: what is wrong with it.
    """
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="hub id or directory; the embedded base without it")
    add("--train", help="hub id, or a JSONL or parquet file, with query and response")
    add("--eval", help="hub id, file, or directory with train and test, question and answer")
    add("--kept", help="texts (column text) whose loss tells what is forgotten")
    add("--protocol", choices=sorted(PROTOCOLS), default="lora-lite")
    add("--methods", type=names, default="all", help="all, or names with commas")
    add(
        "--lr",
        type=grid,
        help="rates with commas, or a factor grid such as x0.3,1,3 around each method's own, or "
        "an earlier run's validation.json: each method's best rate there",
    )
    add(
        "--seeds",
        type=seeds,
        default="0",
        help="with commas; of the initial values and the order of the data",
    )
    add("--targets", default="", help="a regex of weights; all linear maps without it")
    add("--quantize", choices=("none", "4bit", "8bit"), default="none")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the base; float32 for the embedded one, else bfloat16",
    )
    add("--rank", "--r", dest="r", type=count, help="8 for the embedded base, else 32")
    add("--steps", type=count, help="150 for the embedded base (40 on a CPU), else 5000")
    add("--batch", type=count, help="12 for the embedded base (6 on a CPU), else 4")
    add("--max-length", type=count, default=768, help="tokens of a training row, or of a prompt")
    add("--new-tokens", type=count, help="of an answer; 300, or 64 when embedded")
    add("--train-rows", type=count, default=4000, help="of the embedded data")
    add("--test-rows", type=count, help="the first of the test set; 200 embedded (60 on a CPU)")
    add("--eval-every", type=count, help="steps; a twentieth of all, or at the end only")
    add("--halving", type=count, metavar="RUNG", help="at these steps, the best third")
    add("--one-by-one", action="store_true", help="one adapter to a pass, to compare with")
    add("--max-adapters", type=count, help="the most adapters in one pass")
    add("--compile", action="store_true")
    add("--no-full", action="store_true", help="leave out the full fine-tuning")
    add("--probe", action="store_true", help="a few steps of each method instead")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("out/metamath_gsm8k"))
    return parser.parse_args(argv)
