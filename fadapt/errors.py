"""Every refusal of the package: what happened, the values, and what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any


class FadaptError(Exception):
    """Base class of all errors raised by fadapt.

    Example:
        >>> try:
        ...     fadapt.init(model, {"query": fadapt.LoRA()})
        ... except fadapt.FadaptError as error:
        ...     print(type(error).__name__)
        TargetError
    """


class TargetError(FadaptError):
    """A rule, site or model that cannot be adapted as asked.

    Example:
        >>> fadapt.init(model, {"query": fadapt.LoRA()})
        Traceback (most recent call last):
        fadapt.errors.TargetError: ...
    """


class ConfigError(FadaptError):
    """A hyper-parameter, batch or tree that does not fit.

    Example:
        >>> fadapt.LoRA(r=0)
        Traceback (most recent call last):
        fadapt.errors.ConfigError: ...
    """


class CheckpointError(FadaptError):
    """A file that is damaged, foreign, incomplete or meant for another base.

    Example:
        >>> fadapt.load("no such file", model)
        Traceback (most recent call last):
        fadapt.errors.CheckpointError: ...
    """


class CalibrationError(FadaptError):
    """Calibration data or statistics that are missing or insufficient.

    Example:
        >>> fadapt.init(model, fadapt.EVA(r=2))
        Traceback (most recent call last):
        fadapt.errors.CalibrationError: ...
    """


class FadaptWarning(UserWarning):
    """Base class of all warnings issued by fadapt.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", fadapt.FadaptWarning)
    """


class DenseFallbackWarning(FadaptWarning):
    """An operation without an overlay rule: the adapted weight was materialised, exact but slow.

    ``warnings.simplefilter("error", fadapt.DenseFallbackWarning)`` turns it into an error.

    Example:
        >>> import warnings
        >>> convolution = nn.Conv2d(2, 4, 3)
        >>> params = fadapt.init(convolution, {"weight": fadapt.LoRA(r=2)})
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = fadapt.apply(convolution, params, torch.randn(1, 2, 5, 5))
        >>> caught[0].category.__name__
        'DenseFallbackWarning'
    """


class OneByOneWarning(FadaptWarning):
    """A sweep whose trials cannot share a pass over this model: exact, but slower.

    Example:
        >>> import warnings
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).train()
        >>> trials = [fadapt.Trial(fadapt.LoRA(r=2), seed=i) for i in range(2)]
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     loss = lambda output, batch: output.square().mean()
        ...     _ = fadapt.sweep(net, trials, [torch.randn(6, 4)], loss_fn=loss)
        >>> caught[0].category.__name__
        'OneByOneWarning'
    """


def require_takes(function: Any, arguments: Sequence[str], name: str) -> None:
    """Raises ConfigError where a function cannot be called with so many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # C functions have none
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        call = f"{name}({', '.join(arguments)})"
        raise ConfigError(
            f"{name} is called as {call}, which {function!r:.80} does not take ({error}); "
            f"write def {call}"
        ) from None


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)
