"""Batches for a language model from a file of texts: token ids, attention mask, labels."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, FadaptWarning
from .models import load_tokenizer

IGNORED = -100
"""The label of a token that the loss leaves out."""


@dataclass(frozen=True)
class TextFile:
    """A file of texts, and how they become batches.

    Attributes:
        path: ``.txt``, a text a line; or ``.jsonl``, rows with "text", or with "prompt" and
            "completion", of which the completion alone is learned.
        length: tokens at which a row is cut.
        batch: rows of a batch, in the order of the file.
    """

    path: Path
    length: int
    batch: int


def text_batches(file: TextFile, base: str) -> list[dict[str, Tensor]]:
    """The batches, padded on the right.

    Args:
        file: the texts.
        base: whose tokenizer.

    Raises:
        CheckpointError: no such file.
        ConfigError: no tokenizer, no rows, or a row of another form.

    Warns:
        FadaptWarning: how many rows were cut.
    """
    rows = _rows(file.path)
    tokenizer = load_tokenizer(base)
    encoded = [_encoded(tokenizer, *row) for row in rows]
    if cut := sum(len(ids) > file.length for ids, _ in encoded):
        warnings.warn(
            f"{file.path}: {cut} of {len(rows)} rows have more than {file.length} tokens and are "
            "cut; [data] length says where",
            FadaptWarning,
            stacklevel=2,
        )
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    return [
        _batch(encoded[i : i + file.batch], file.length, pad)
        for i in range(0, len(encoded), file.batch)
    ]


def _rows(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) of each row; a text has no prompt."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(
            f"{path}: texts are a .txt (a text a line) or a .jsonl (rows with text, or with prompt "
            "and completion); for other data write module:function, which returns batches"
        )
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(("", line) if path.suffix == ".txt" else _row(path, number, line))
    if not rows:
        raise ConfigError(f"{path} holds no texts")
    return rows


def _row(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
    keys = ("text",) if isinstance(row, dict) and "text" in row else ("prompt", "completion")
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in keys):
        raise ConfigError(
            f"{path}, line {number} is not a row with text, or with prompt and completion: "
            f"{line:.80}"
        )
    return ("", row["text"]) if len(keys) == 1 else (row["prompt"], row["completion"])


def _encoded(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int]:
    """The token ids, and how many of them are the prompt's."""
    first = tokenizer(prompt or completion)["input_ids"]
    end = tokenizer.eos_token_id
    if first and first[-1] == end:
        first = first[:-1]
    second = tokenizer(completion, add_special_tokens=False)["input_ids"] if prompt else []
    return [*first, *second, *([] if end is None else [end])], len(first) if prompt else 0


def _batch(rows: list[tuple[list[int], int]], length: int, pad: int) -> dict[str, Tensor]:
    width = min(length, max(len(ids) for ids, _ in rows))
    ids = torch.full((len(rows), width), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (tokens, prompt) in enumerate(rows):
        row = torch.tensor(tokens[:width], dtype=ids.dtype)
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, prompt : len(row)] = row[prompt:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
