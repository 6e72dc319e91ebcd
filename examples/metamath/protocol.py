"""How two published benchmarks turn rows into batches, and generations into right or wrong.

Both ask ``Question: {query} Think step by step.\\nAnswer:``. In everything else they differ, and each
is kept as it is, quirks included:

| | ``peft`` (method_comparison/MetaMathQA) | ``lora-lite`` (metamath_gsm8k_benchmark) |
|---|---|---|
| training text | prompt + response, no space between | prompt + " " + response + end token |
| labels | all tokens, and the first padding token, which is the end token | the response and its end token |
| long rows | left out above 1,300 characters; cut at the token limit | left out where the prompt alone fills the limit; cut |
| order | buckets of 20 batches in the data's order, each from long to short | shuffled by the seed |
| padding | right in training, left in generation | left |
| loss | sum over tokens / number of tokens that the attention mask counts | mean over the labels |
| schedule | cosine after 10 % of warm-up | cosine from the first step |
| validation | 50 of GSM8K's training rows, drawn by NumPy's seed 0 | 50, drawn by the seed |
| read from | prompt and continuation | the continuation |
| answer | what follows the last "The answer is: ", or else "#### ", as a decimal or fraction | the last number after the last "####", without commas |
"""  # noqa: E501 - a table

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, DivisionByZero, InvalidOperation
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
IGNORED = -100
VALIDATION_ROWS = 50


class DataError(Exception):
    """What is wrong with the data, in one line; the script ends with exit code 2."""


@dataclass(frozen=True)
class Example:
    """One training row: token ids, and how many of the first tokens have no label."""

    ids: list[int]
    unlabeled: int


@dataclass(frozen=True)
class Protocol:
    """The rules of one benchmark. Subclasses fill in what differs."""

    name: str
    reads_prompt: bool
    """Whether the answer is looked for in the prompt, too."""
    max_new_tokens: int = 300
    max_total_tokens: int | None = None

    def prepare(self, tokenizer: Any) -> Any:
        """The tokenizer as the protocol uses it."""
        if tokenizer.eos_token is None:
            raise DataError("the tokenizer has no eos token, which ends each answer")
        tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def examples(self, rows: Sequence[dict], tokenizer: Any, limit: int) -> list[Example]:
        """The usable training rows as tokens."""
        raise NotImplementedError

    def order(self, examples: list[Example], batch: int, steps: int, seed: int) -> list[list[int]]:
        """The rows of each training batch."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
        """One padded batch."""
        raise NotImplementedError

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """The training loss."""
        raise NotImplementedError

    def warmup(self, steps: int) -> int:
        """Updates over which the learning rate rises."""
        raise NotImplementedError

    def validation(self, count: int, seed: int) -> list[int]:
        """Which of so many rows validate."""
        raise NotImplementedError

    def parse(self, text: str) -> str | None:
        """The answer in a text, or None."""
        raise NotImplementedError

    def equal(self, predicted: str | None, wanted: str) -> bool:
        """Whether an answer is right."""
        raise NotImplementedError

    def prompt(self, query: str) -> str:
        """What the model is asked."""
        return TEMPLATE.format(query=query)

    def right(self, prediction: str, answer: str) -> bool:
        """Whether a generated text holds the answer of a GSM8K row."""
        wanted = self.parse(answer)
        if wanted is None:
            raise DataError(f"no number in the reference answer {answer!r}")
        return self.equal(self.parse(prediction), wanted)


def _pad(rows: Sequence[list[int]], value: int, left: bool) -> Tensor:
    longest = max(map(len, rows))
    padded = [
        [value] * (longest - len(row)) + row if left else row + [value] * (longest - len(row))
        for row in rows
    ]
    return torch.tensor(padded)


class PEFTProtocol(Protocol):
    """PEFT's method comparison."""

    CHARACTERS = 1300
    BUCKET = 20
    DELIMITERS = (
        *("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is "),
        "#### ",
    )

    def __init__(self) -> None:
        super().__init__("peft", reads_prompt=True, max_total_tokens=800)

    def examples(self, rows: Sequence[dict], tokenizer: Any, limit: int) -> list[Example]:
        short = [r for r in rows if len(f"{r['query']} {r['response']}") <= self.CHARACTERS]
        texts = [self.prompt(r["query"]) + r["response"] for r in short]
        return [Example(ids[:limit], 0) for ids in tokenizer(texts)["input_ids"]]

    def order(self, examples: list[Example], batch: int, steps: int, seed: int) -> list[list[int]]:
        found: list[list[int]] = []
        while len(found) < steps:
            for start in range(0, len(examples), batch * self.BUCKET):
                bucket = range(start, min(start + batch * self.BUCKET, len(examples)))
                ordered = sorted(bucket, key=lambda i: -len(examples[i].ids))
                found += [ordered[j : j + batch] for j in range(0, len(ordered), batch)]
        return found[:steps]

    def collate(self, examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
        rows = [e.ids for e in examples]
        ids = _pad(rows, pad, left=False)
        labels = ids.clone()
        for i, row in enumerate(rows):
            # The first padding token is the end token, which is to be learned; the longest row of
            # a batch has none.
            labels[i, len(row) + 1 :] = IGNORED
        mask = _pad([[1] * len(r) for r in rows], 0, left=False)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        return _nll(output.logits, batch["labels"]) / batch["attention_mask"].sum()

    def warmup(self, steps: int) -> int:
        return int(0.1 * steps)

    def validation(self, count: int, seed: int) -> list[int]:
        indices = np.arange(count)
        np.random.RandomState(0).shuffle(indices)
        return indices[:VALIDATION_ROWS].tolist()

    def parse(self, text: str) -> str | None:
        text = text.strip().rstrip(".!?")
        for delimiter in self.DELIMITERS:
            if delimiter in text:
                after = text.rpartition(delimiter)[2].strip()
                return after.split("\n", 1)[0].strip(" .!?$%")
        return None

    def equal(self, predicted: str | None, wanted: str) -> bool:
        if predicted is None:
            return False
        left, right = _decimal(predicted), _decimal(wanted)
        return (predicted if left is None else float(left)) == (
            wanted if right is None else float(right)
        )


class LoraLiteProtocol(Protocol):
    """lora-lite's benchmark."""

    NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")

    def __init__(self) -> None:
        super().__init__("lora-lite", reads_prompt=False)

    def examples(self, rows: Sequence[dict], tokenizer: Any, limit: int) -> list[Example]:
        def encode(texts: list[str]) -> list[list[int]]:
            return tokenizer(texts, add_special_tokens=False)["input_ids"]

        prompts = [self.prompt(r["query"]) for r in rows]
        texts = [
            f"{p} {r['response']}{tokenizer.eos_token}" for p, r in zip(prompts, rows, strict=True)
        ]
        return [
            Example(ids[:limit], len(asked))
            for asked, ids in zip(encode(prompts), encode(texts), strict=True)
            if len(asked) < limit
        ]

    def order(self, examples: list[Example], batch: int, steps: int, seed: int) -> list[list[int]]:
        rng, found = random.Random(seed), []
        while len(found) < steps:
            indices = list(range(len(examples)))
            rng.shuffle(indices)
            found += [indices[j : j + batch] for j in range(0, len(indices) - batch + 1, batch)]
        return found[:steps]

    def collate(self, examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
        return {
            "input_ids": _pad([e.ids for e in examples], pad, left=True),
            "attention_mask": _pad([[1] * len(e.ids) for e in examples], 0, left=True),
            "labels": _pad(
                [[IGNORED] * e.unlabeled + e.ids[e.unlabeled :] for e in examples],
                IGNORED,
                left=True,
            ),
        }

    def loss(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        return _nll(output.logits, batch["labels"]) / (batch["labels"][:, 1:] != IGNORED).sum()

    def warmup(self, steps: int) -> int:
        return 0

    def validation(self, count: int, seed: int) -> list[int]:
        return random.Random(seed).sample(range(count), min(VALIDATION_ROWS, count))

    def parse(self, text: str) -> str | None:
        found = self.NUMBER.findall(text.split("####")[-1])
        return found[-1].replace(",", "").strip().rstrip(".") if found else None

    def equal(self, predicted: str | None, wanted: str) -> bool:
        return predicted == wanted


PROTOCOLS: dict[str, Callable[[], Protocol]] = {
    "peft": PEFTProtocol,
    "lora-lite": LoraLiteProtocol,
}


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed negative log-likelihood of the next tokens, in float32."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def _decimal(text: str) -> Decimal | None:
    try:
        if "/" in text:
            above, below = (Decimal(part.strip()) for part in text.split("/"))
            return above / below
        return Decimal(text.strip())
    except (DivisionByZero, InvalidOperation, ValueError):
        return None
