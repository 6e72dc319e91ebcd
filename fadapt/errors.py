"""Every refusal of the package: what happened, the values, and what to write instead."""

from __future__ import annotations


class FadaptError(Exception):
    """Base class of all errors raised by fadapt."""


class TargetError(FadaptError):
    """A rule, site or model that cannot be adapted as asked."""


class ConfigError(FadaptError):
    """A hyper-parameter, batch or tree that does not fit."""


class CheckpointError(FadaptError):
    """A file that is damaged, foreign, incomplete or meant for another base."""


class CalibrationError(FadaptError):
    """Calibration data or statistics that are missing or insufficient."""


class FadaptWarning(UserWarning):
    """Base class of all warnings issued by fadapt."""


class DenseFallbackWarning(FadaptWarning):
    """An operation without an overlay rule: the adapted weight was materialised, exact but slow.

    ``warnings.simplefilter("error", fadapt.DenseFallbackWarning)`` turns it into an error.
    """


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)
