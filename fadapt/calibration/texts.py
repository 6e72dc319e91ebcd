"""Batches of token ids from texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from ..arguments import check_function, check_int, is_many
from ..errors import CalibrationError


class TextBatches:
    """Tokenised batches with an attention mask, which can be read again and again."""

    def __init__(self, texts: list[str], tokenizer: Any, batch_size: int, max_length: int):
        self.texts, self.tokenizer = texts, tokenizer
        self.batch_size, self.max_length = batch_size, max_length

    def __len__(self) -> int:
        return -(-len(self.texts) // self.batch_size)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(self.texts), self.batch_size):
            yield self.tokenizer(
                self.texts[start : start + self.batch_size],
                padding=self.batch_size > 1,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
                return_attention_mask=True,
            )


def text_batches(
    texts: Iterable[Any],
    tokenizer: Any,
    *,
    batch_size: int = 8,
    max_length: int = 512,
    limit: int | None = None,
    column: str = "text",
) -> TextBatches:
    """Calibration batches from texts.

        fadapt.init(model, cfg, text_batches(texts, tokenizer))

    Args:
        texts: an iterable of strings, or of rows with a text column (a ``datasets.Dataset``, also a
            streamed one).
        tokenizer: a Hugging Face tokenizer; it is not changed.
        batch_size: texts a batch; with 1 there is no padding.
        max_length: tokens at which a text is cut.
        limit: use only so many texts.
        column: the text column of the rows.

    Raises:
        CalibrationError: no texts, rows without the column, or a tokenizer without a pad token, or
            an argument of the wrong type.
    """
    check_int("batch_size", batch_size, 1, CalibrationError)
    check_int("max_length", max_length, 1, CalibrationError)
    if limit is not None:
        check_int("limit", limit, 1, CalibrationError)
    check_function("tokenizer", tokenizer, "a Hugging Face tokenizer", CalibrationError, True)
    if isinstance(texts, (str, Mapping)) or not isinstance(texts, Iterable) or not is_many(texts):
        raise CalibrationError(
            f"texts must be an iterable of strings or rows, got one {type(texts).__name__}; "
            "write [text]"
        )
    if not isinstance(column, str):
        raise CalibrationError(f"column must be the name of a column, got {column!r:.80}")
    if batch_size > 1 and getattr(tokenizer, "pad_token", None) is None:
        raise CalibrationError(
            "the tokenizer has no pad token, which batches of texts need; write "
            "tokenizer.pad_token = tokenizer.eos_token, or batch_size=1"
        )
    found = [_text(row, column, i) for i, row in enumerate(islice(texts, limit))]
    if not found:
        raise CalibrationError("there are no texts: the iterable is empty or exhausted")
    return TextBatches(found, tokenizer, batch_size, max_length)


def _text(row: Any, column: str, i: int) -> str:
    text = row.get(column) if isinstance(row, Mapping) else row
    if not isinstance(text, str):
        is_row = isinstance(row, Mapping)
        has = f"a row with the columns {sorted(row)}" if is_row else repr(row)[:80]
        raise CalibrationError(
            f"text {i} is {has}, not a string in {column!r}; name the text column: column=..."
        )
    return text
