"""A model in training mode, but for its dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_DROPOUTS = frozenset(
    [
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout),
        *(F.feature_alpha_dropout, torch.dropout, torch.feature_dropout, torch.alpha_dropout),
        *(torch.feature_alpha_dropout, torch.dropout_, torch.alpha_dropout_),
    ]
)

_DROPOUT_P = 4
"""Where scaled_dot_product_attention takes its own."""


class WithoutDropout(TorchFunctionMode):
    """Within the block, torch's dropout gives its input back, and attention drops nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > _DROPOUT_P:
                args = (*args[:_DROPOUT_P], 0.0, *args[_DROPOUT_P + 1 :])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)
