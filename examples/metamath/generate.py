"""Accuracy: greedy answers of all adapters at once, with one key-value cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fadapt

from .data import Row
from .protocol import Protocol


@torch.no_grad()
def accuracy(
    model: Any,
    stack: Any,
    rows: list[Row],
    tokenizer: Any,
    protocol: Protocol,
    *,
    batch: int = 50,
    new_tokens: int | None = None,
) -> Tensor:
    """The share of right answers, (n,) for a stack of n adapters or a scalar without one.

    Args:
        stack: a stack, or None for the base.
        batch: prompts at once; n times as many rows go through the model.
        new_tokens: the most to generate; None takes the protocol's.
    """
    device = next(model.parameters()).device
    tokenizer.padding_side = "left"
    n = 1 if stack is None else stack.size
    right = torch.zeros(n)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        inputs = tokenizer(
            [protocol.prompt(r["question"]) for r in part],
            return_tensors="pt",
            padding=True,
        )
        asked = {k: inputs[k].to(device) for k in ("input_ids", "attention_mask")}
        length = asked["input_ids"].shape[1]
        most = new_tokens or protocol.max_new_tokens
        if protocol.max_total_tokens:
            most = max(1, min(most, protocol.max_total_tokens - length))
        options = dict(
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        if stack is None:
            out = model.generate(**asked, **options)[None]
        else:
            out = fadapt.apply(model, stack, method="generate", **asked, **options)
        out = out if protocol.reads_prompt else out[..., length:]
        for k in range(n):
            texts = tokenizer.batch_decode(out[k], skip_special_tokens=True)
            right[k] += sum(
                protocol.right(text, row["answer"]) for text, row in zip(texts, part, strict=True)
            )
    return right / len(rows)


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share of so many (95 % by default)."""
    if not count:
        return math.nan, math.nan
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)
