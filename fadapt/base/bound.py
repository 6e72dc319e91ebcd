"""What is refused inside ``bound``."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import FadaptError
from .scope import bound_view, open_view


def bound_params(model: nn.Module) -> Any:
    """The params to which the model is bound in this context, or None."""
    view = bound_view(model)
    return None if view is None else view.owner


def refuse_bound(model: nn.Module, what: str) -> None:
    """Raises FadaptError inside ``bound``."""
    if bound_view(model) is not None:
        raise FadaptError(
            f"{what} inside fadapt.bound(model, params), where the model is the adapted one: call "
            "the model itself there, or leave the block first"
        )


def refuse_adapted(model: nn.Module, what: str) -> None:
    """Raises FadaptError where this context does not see the model's own weights.

    That is inside ``bound``, and within the forward of ``run`` and ``apply``, as in a hook.
    """
    refuse_bound(model, what)
    if open_view(id(model)) is not None:
        raise FadaptError(
            f"{what} within the model's own adapted forward (a hook?) would read the adapted "
            "weights; do it before or after the call"
        )
