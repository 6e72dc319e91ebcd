"""Rows to train on, to validate and to test with: from the hub, from files, or made here."""

from __future__ import annotations

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
        DataError: an empty split, a missing column, nothing at that place.
    """
    from datasets import load_dataset  # type: ignore[import-untyped]

    def read(source: str, split: str, config: str | None = None) -> list[Row] | None:
        path = Path(source)
        try:
            if path.is_dir():
                files = [p for p in sorted(path.iterdir()) if p.stem.startswith(split)]
                if not files:
                    return None
                return list(_file(files[0]))
            if path.suffix in (".jsonl", ".json", ".parquet"):
                return list(_file(path)) if split != "train" or source == train else None
            return list(load_dataset(source, config, split=split))
        except DataError:
            raise
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise DataError(f"cannot read {source}: {type(error).__name__}: {first}") from error

    def _file(path: Path) -> Any:
        if not path.is_file():
            raise DataError(f"{path} does not exist")
        if not path.stat().st_size:
            raise DataError(f"{path} is empty")
        kind = "parquet" if path.suffix == ".parquet" else "json"
        return load_dataset(kind, data_files=str(path), split="train")

    rows = read(train, "train")
    tests = read(evaluation, "test", "main")
    pool = read(evaluation, "train", "main")
    for where, found, columns in (
        (train, rows, ("query", "response")),
        (evaluation, tests, ("question", "answer")),
    ):
        if not found:
            raise DataError(f"{where} has no rows")
        if missing := [c for c in columns if c not in found[0]]:
            raise DataError(
                f"{where} lacks the column {missing[0]!r}; it has {sorted(found[0])}, and "
                f"{list(columns)} are needed"
            )
    assert rows is not None
    assert tests is not None
    if pool is None:
        valid, tests = split_evaluation(tests, protocol, seed, evaluation)
    else:
        valid = [pool[i] for i in protocol.validation(len(pool), seed)]
    texts = [str(r["text"]) for r in read(kept, "train") or []] if kept else []
    return Data(rows, valid, tests, texts[:100])


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
