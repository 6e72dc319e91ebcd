"""Which rows of a batch count: padding, labels, last tokens; and what a batch may look like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..hugging_face import (
    ATTENTION_MASKS as MASKS,
)
from ..hugging_face import (
    is_encoder_decoder,
    mask_of,
    pad_token,
    without_cache,
    without_logits,
)

IGNORED = -100


def halves(batch: Any) -> tuple[Any, ...]:
    """The two batches of a pair (a tuple of two dicts), or the batch itself, in a tuple."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    return tuple(batch) if pair and all(isinstance(b, Mapping) for b in batch) else (batch,)


def arguments(
    model: nn.Module, batch: Any, where: str, head: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments.

    Args:
        head: whether the logits themselves are needed; else a Hugging Face decoder is asked for one
            row of them, and for no loss.
    """
    if isinstance(batch, Mapping):
        if odd := [k for k in batch if not isinstance(k, str)]:
            raise CalibrationError(
                f"{where} is a dict with the key {odd[0]!r:.80}; its keys are the model's arguments"
            )
        kwargs = without_cache(model, dict(batch))
        return (), kwargs if head else without_logits(model, kwargs)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise CalibrationError(
        f"{where} is a {type(batch).__name__}; give dicts of keyword arguments, tuples of "
        "positional ones or tensors. For texts: fadapt.calibration.text_batches(texts, tokenizer)"
    )


def without_padded_labels(model: nn.Module, batch: Any) -> Any:
    """The batch with the labels of padded tokens ignored."""
    if not isinstance(batch, Mapping):
        return batch
    labels = batch.get("labels")
    mask = batch.get(MASKS[1] if is_encoder_decoder(model) else MASKS[0])
    if not isinstance(labels, Tensor) or not isinstance(mask, Tensor) or labels.shape != mask.shape:
        return batch
    return {**batch, "labels": labels.masked_fill(mask.to(labels.device) == 0, IGNORED)}


class RowFilter:
    """The rows of one batch that count.

    In an encoder-decoder, ``attention_mask`` is of the tokens that the encoder reads, and
    ``decoder_attention_mask`` of those that the decoder does; which of them a layer's rows are, its
    name tells. Rows of a decoder without a mask all count, as do those of a vision tower.

    Args:
        model: the model that gets the batch.
        batch: the batch, before it loses its labels.
        where: its name in messages.
        label_mask: count only tokens whose labels are not -100; in an encoder-decoder, of the
            decoder's tokens.
    """

    def __init__(self, model: nn.Module, batch: Any, where: str, label_mask: bool):
        self.model, self.where = model, where
        masks: list[tuple[str, Tensor]] = []
        if isinstance(batch, Mapping):
            masks = [(k, batch[k]) for k in MASKS if isinstance(batch.get(k), Tensor)]
        if not any(key == MASKS[0] for key, _ in masks):
            _refuse_padding(batch, where, pad_token(model))
        for key, mask in masks:
            if mask.dim() != 2:
                raise CalibrationError(
                    f"{where}: {key} has shape {tuple(mask.shape)}; calibration needs the (batch, "
                    "tokens) mask, to know which tokens are padding"
                )
        kept = [(key, mask.bool()) for key, mask in masks]
        if label_mask:
            kept = _with_labels(kept, batch, where, is_encoder_decoder(model))
        self.masks = [(key, mask.cpu()) for key, mask in kept]
        self.full = all(bool(mask.all()) for _, mask in self.masks)
        self._index: dict[tuple[str, torch.device], Tensor] = {}

    def select(self, site: str, x: Tensor) -> Tensor:
        """The rows of x (batch, tokens, ..., d) or (batch * tokens, d) that count: (n, d)."""
        if self.full:
            return x.reshape(-1, x.shape[-1])
        found = self._match(site, x)
        if found is None:
            return x.reshape(-1, x.shape[-1])
        key, mask = found
        if (key, x.device) not in self._index:
            self._index[key, x.device] = mask.flatten().nonzero().squeeze(1).to(x.device)
        tokens = x.reshape(mask.numel(), -1, x.shape[-1])
        return tokens.index_select(0, self._index[key, x.device]).reshape(-1, x.shape[-1])

    def last(self, site: str, x: Tensor) -> Tensor:
        """The last counted token of every sequence: (batch, d). Rows without a token axis stay."""
        if x.dim() == 2 and not self.masks:
            return x
        if x.dim() != 3:
            raise CalibrationError(
                f"{site}: paired statistics need (batch, tokens, d), got {tuple(x.shape)}"
            )
        if not self.masks:
            return x[:, -1]
        found = self._match(site, x)
        if found is None:
            return x[:, -1]
        _, mask = found
        if not mask.any(1).all():
            raise CalibrationError(f"{self.where} has a sequence without any counted token")
        steps = torch.arange(mask.shape[1])
        last = (mask * (steps + 1)).argmax(1).to(x.device)
        return x[torch.arange(len(x), device=x.device), last]

    def _match(self, site: str, x: Tensor) -> tuple[str, Tensor] | None:
        """The mask of a layer's rows, by its name, or where that does not tell by their shape."""
        shape = x.shape[:-1]
        whose = mask_of(self.model, site)
        if whose is not None and all(key != whose for key, _ in self.masks):
            return None
        fits = [
            (key, mask)
            for key, mask in self.masks
            if whose in (None, key) and (shape[:2] == mask.shape or tuple(shape) == (mask.numel(),))
        ]
        if not fits or any(not torch.equal(mask, fits[0][1]) for _, mask in fits):
            found = {key: tuple(mask.shape) for key, mask in self.masks}
            raise CalibrationError(
                f"{site}: {self.where} gives it an input of shape {tuple(x.shape)}, of which "
                f"{'two masks fit' if fits else 'no mask fits'} ({found}), so padding cannot be "
                "told from tokens. Leave the site out, or give batches without padding"
            )
        return fits[0]


def _with_labels(
    masks: list[tuple[str, Tensor]], batch: Any, where: str, encoder_decoder: bool
) -> list[tuple[str, Tensor]]:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise CalibrationError(
            f"{where} has no (batch, tokens) labels, and label_mask=True needs them; add labels "
            "(-100 where a token does not count) or leave label_mask out"
        )
    answer = labels != IGNORED
    if encoder_decoder:
        source, target = ([(k, m) for k, m in masks if k == key] for key in MASKS)
        tokens = target[0][1] & answer.to(target[0][1].device) if target else answer
        return [*source, (MASKS[1], tokens)]
    with_labels = [(k, m & answer.to(m.device)) for k, m in masks if m.shape == labels.shape]
    others = [(k, m) for k, m in masks if m.shape != labels.shape]
    return [*others, *(with_labels or [("labels", answer)])]


def _refuse_padding(batch: Any, where: str, pad: int | None) -> None:
    """Refuses token ids that end or begin in a run of pad tokens, where no mask says so."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if pad is None or not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        return
    is_pad = ids == pad
    if (is_pad[:, -2:].all(1) | is_pad[:, :2].all(1)).any():
        raise CalibrationError(
            f"{where} has runs of the pad token {pad} at the ends of its sequences but no "
            "attention_mask; without it padding would count as data. Keep the tokenizer's "
            "attention_mask in the batch"
        )
