"""Losses of single adapters from a folded pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError
from ..hugging_face import config_of, loss_of, loss_type, text_config

LossFn = Callable[[Any, Any], Tensor]
"""(output, batch) -> a scalar loss."""

# What a Hugging Face model's own forward passes to its loss_function, by its loss type.
_TOKEN_LOSSES = ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM")
_CLASS_LOSSES = (
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
)


def hugging_face_loss(
    model: nn.Module, batch: Any
) -> tuple[Callable[[Any, Any], Tensor], Any, dict[str, Any]]:
    """A Hugging Face model's own loss, to be applied to each adapter's logits.

    Returns:
        ``loss_fn(output, batch)``, the batch, and the inputs without the labels, so that the
        model does not average over the adapters.

    Raises:
        ConfigError: no labels, or a model whose loss fadapt cannot call from outside.
    """
    advice = "pass loss_fn(output, batch) -> scalar to run"
    if not isinstance(batch, Mapping) or batch.get("labels") is None:
        raise ConfigError(f"no labels in the batch to make the losses of a stack from; {advice}")
    function, config, kind = loss_of(model), config_of(model), loss_type(model)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    if function is not None and kind in _TOKEN_LOSSES:
        text = text_config(model)
        return (
            lambda out, part: function(
                logits=out.logits, labels=part["labels"], vocab_size=text.vocab_size
            ),
            batch,
            inputs,
        )
    if function is not None and kind in _CLASS_LOSSES:
        return lambda out, part: function(part["labels"], out.logits, config), batch, inputs
    raise ConfigError(f"the loss {kind} of {type(model).__name__} is not per row; {advice}")


def scalar_loss(loss: Any, loss_fn: LossFn | None) -> Tensor:
    """The loss, which must be one number; of the model's own where there is no ``loss_fn``."""
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    if isinstance(loss, Tensor) and loss.shape == (1,):
        return loss.squeeze(0)
    what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ConfigError(
        f"no scalar loss: {'loss_fn returned' if loss_fn else 'the model returned'} {what}. "
        "Pass loss_fn(output, batch) -> scalar, or labels in the batch of a Hugging Face model"
    )
