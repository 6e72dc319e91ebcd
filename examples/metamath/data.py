"""Rows to train on, to validate and to test with: from the hub, from files, or made here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fadapt

from .protocol import DataError, Example, Protocol

Row = dict[str, Any]


@dataclass
class Data:
    """Rows in the two datasets' schemas.

    Attributes:
        train: with ``query`` and ``response``.
        valid: with ``question`` and ``answer``.
        test: likewise.
        kept: texts that the base is good at; their loss tells what is forgotten.
    """

    train: list[Row]
    valid: list[Row]
    test: list[Row]
    kept: list[str]


def embedded(protocol: Protocol, train: int, test: int, seed: int) -> Data:
    """The word problems of ``word_problems.py``."""
    from itertools import islice

    from word_problems import gsm8k_rows, metamath_rows, pretraining_texts, stories

    # The same side as the training set, and none of its problems.
    side = list(stories(train + 200, 0, test=False))
    pool = gsm8k_rows(iter(side[train:]))
    return Data(
        train=metamath_rows(iter(side[:train])),
        valid=[pool[i] for i in protocol.validation(len(pool), seed)],
        test=gsm8k_rows(stories(test, 0, test=True)),
        kept=list(islice(pretraining_texts(1_000_003), 100)),
    )


def load(train: str, evaluation: str, kept: str | None, protocol: Protocol, seed: int) -> Data:
    """Datasets by hub id, file (JSON lines or parquet) or directory of files by split.

    Raises:
        DataError: an empty split, a missing column, a row without text or a number for an answer,
            nothing at that place.
    """
    rows = _checked(read(train, "train"), ("query", "response"), train)
    tests = _checked(read(evaluation, "test", "main"), ("question", "answer"), evaluation)
    one = Path(evaluation).is_file()
    pool = None if one else read(evaluation, "train", "main", optional=True)
    if pool is None:
        valid, tests = split_evaluation(tests, protocol, seed, evaluation)
    else:
        pool = _checked(pool, ("question", "answer"), f"{evaluation} (train)")
        valid = [pool[i] for i in protocol.validation(len(pool), seed)]
    for row in (*valid, *tests):
        if protocol.parse(row["answer"]) is None:
            raise DataError(f"{evaluation}: no number in the answer {row['answer']!r:.120}")
    texts = _checked(read(kept, "train"), ("text",), kept)[:100] if kept else []
    return Data(rows, valid, tests, [row["text"] for row in texts])


SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read(
    source: str, split: str, config: str | None = None, *, optional: bool = False
) -> list[Row] | None:
    """The rows of a split.

    Args:
        source: a hub id, a directory of files whose names begin with the split, or a file, which
            has one split only.
        optional: whether a directory may be without it; None is returned then.

    Raises:
        DataError: what is wrong with it.
    """
    from datasets import load_dataset  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetGenerationError  # type: ignore[import-untyped]

    path = Path(source)
    files = [path]
    if path.is_dir():
        of_split = re.compile(rf"{split}([-_.].*)?")
        files = [
            p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES and of_split.fullmatch(p.stem)
        ]
        if not files and optional:
            return None
        if not files:
            raise DataError(f"{source} has no JSONL or parquet file called {split}")
        if len({p.suffix for p in files}) > 1:
            raise DataError(f"{source} has {split} twice: {[p.name for p in files]}")
    elif path.is_file() and path.suffix not in SUFFIXES:
        raise DataError(f"{source} is none of {', '.join(SUFFIXES)}")
    elif path.suffix in SUFFIXES and not path.is_file():
        raise DataError(f"{source} does not exist")
    try:
        if not path.exists():
            return list(load_dataset(source, config, split=split))
        if not any(p.stat().st_size for p in files):
            return []
        kind = SUFFIXES[files[0].suffix]
        return list(load_dataset(kind, data_files=list(map(str, files)), split="train"))
    except Exception as error:
        # That of datasets says only that there was one.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        why = cause or error
        text = " ".join(str(why).split())
        if "corresponds to no data" in text:
            return []
        raise DataError(f"cannot read {source}: {type(why).__name__}: {text:.300}") from error


def _checked(rows: list[Row] | None, columns: Sequence[str], where: str) -> list[Row]:
    """The rows, each of which has text in these columns."""
    if not rows:
        raise DataError(f"{where} is empty: it has no rows")
    if missing := [c for c in columns if c not in rows[0]]:
        raise DataError(
            f"{where} lacks the column {missing[0]!r}; it has {sorted(rows[0])}, and "
            f"{list(columns)} are needed"
        )
    for i, row in enumerate(rows):
        for column in columns:
            if not isinstance(row[column], str) or not row[column].strip():
                raise DataError(
                    f"{where}: row {i} has no text in {column!r}, but {row[column]!r:.80}"
                )
    return rows


def check_lengths(
    protocol: Protocol,
    data: Data,
    tokenizer: Any,
    limit: int,
    new_tokens: int | None,
    positions: int | None,
) -> None:
    """Refuses questions that would have to be cut, or answered beyond what the model knows.

    Args:
        limit: tokens of a prompt.
        new_tokens: of an answer; None takes the protocol's.
        positions: that the model has; None where it does not say.
    """
    for name, rows in (("validation", data.valid), ("test", data.test)):
        prompts = tokenizer([protocol.prompt(r["question"]) for r in rows])["input_ids"]
        lengths = list(map(len, prompts))
        longest = max(lengths)
        row = lengths.index(longest)
        if longest > limit:
            raise DataError(
                f"the prompt of {name} row {row} has {longest} tokens, more than --max-length "
                f"{limit}: {rows[row]['question']!r:.80}"
            )
        whole = longest + (new_tokens or protocol.max_new_tokens)
        if protocol.max_total_tokens:
            whole = min(whole, max(protocol.max_total_tokens, longest + 1))
        if positions is not None and whole > positions:
            raise DataError(
                f"the prompt of {name} row {row} and its answer take up to {whole} tokens, and the "
                f"model has {positions} positions; lower --new-tokens"
            )


def split_evaluation(
    rows: list[Row], protocol: Protocol, seed: int, where: str
) -> tuple[list[Row], list[Row]]:
    """Rows of one evaluation file: some validate, the others test.

    Raises:
        DataError: too few for both.
    """
    chosen = protocol.validation(len(rows), seed)
    if len(chosen) >= len(rows):
        raise DataError(
            f"{where} has {len(rows)} rows: too few to validate with {len(chosen)} of them and to "
            "test with the rest; give a directory with train and test files"
        )
    left = sorted(set(range(len(rows))) - set(chosen))
    return [rows[i] for i in chosen], [rows[i] for i in left]


class Batches:
    """The training batches of a protocol, padded when they are asked for; a sequence.

    Args:
        examples: tokens of the usable rows.
        order: the rows of each batch.
        pad: the padding token.
    """

    def __init__(
        self, protocol: Protocol, examples: list[Example], order: list[list[int]], pad: int
    ):
        self.protocol, self.examples, self.rows, self.pad = protocol, examples, order, pad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.protocol.collate([self.examples[i] for i in self.rows[index]], self.pad)

    def tokens(self) -> int:
        """Tokens of all batches, without padding, with end tokens as PEFT counts them."""
        return sum(len(self.examples[i].ids) + 1 for rows in self.rows for i in rows)


def training_batches(
    protocol: Protocol, data: Data, tokenizer: Any, *, steps: int, batch: int, limit: int, seed: int
) -> Batches:
    """The batches of a training run.

    Raises:
        DataError: no row is short enough.
    """
    examples = protocol.examples(data.train, tokenizer, limit)
    if len(examples) < batch:
        raise DataError(
            f"{len(examples)} of {len(data.train)} training rows are usable within "
            f"--max-length {limit}, fewer than --batch {batch}"
        )
    return Batches(
        protocol, examples, protocol.order(examples, batch, steps, seed), tokenizer.pad_token_id
    )


@torch.no_grad()
def loss_on_texts(model: Any, stack: Any, texts: list[str], tokenizer: Any, limit: int) -> Tensor:
    """The mean loss per token on texts: (n,) for a stack of n adapters, a scalar without one."""
    encoded = [tokenizer(t, truncation=True, max_length=limit)["input_ids"] for t in texts]
    device, total, count = next(model.parameters()).device, torch.zeros(()), 0
    for start in range(0, len(encoded), 10):
        rows = encoded[start : start + 10]
        longest, pad = max(map(len, rows)), tokenizer.pad_token_id
        ids = torch.tensor([r + [pad] * (longest - len(r)) for r in rows], device=device)
        real = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows], device=device)
        inputs = dict(input_ids=ids, attention_mask=real)
        out = model(**inputs) if stack is None else fadapt.apply(model, stack, **inputs)
        chances = out.logits[..., :-1, :].float().log_softmax(-1)
        next_ids = ids[:, 1:, None].expand(*chances.shape[:-1], 1)
        nll = -chances.gather(-1, next_ids)[..., 0] * real[:, 1:]
        total = total + nll.sum((-1, -2)).cpu()
        count += int(real[:, 1:].sum())
    return total / count
