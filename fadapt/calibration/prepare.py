"""From calibration data to what each method's ``init`` receives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ..config import Config
from ..errors import CalibrationError, FadaptWarning
from ..guard import refuse_bound
from ..method import Method
from ..sites import Site
from ..slots import Slot
from .reductions import Statistic
from .stats import Stats

Found = list[tuple[Slot, Site, Method]]


def statistics_of(wanted: Any) -> Iterator[Statistic]:
    """The statistics in a method's ``statistic``: none, one, or one per link of a Chain."""
    if isinstance(wanted, Statistic):
        yield wanted
    elif isinstance(wanted, tuple):
        for part in wanted:
            yield from statistics_of(part)


def as_stats(
    model: nn.Module, config: Config, found: Found, calib: Stats | Iterable[Any] | None
) -> Stats | None:
    """The statistics that the methods of ``config`` need; None if they need none.

    Args:
        found: the sites that the config means.
        calib: batches, which are observed; or the Stats of an earlier pass over this model.

    Raises:
        CalibrationError: data that are missing or of another model.
        FadaptError: the model is inside ``bound``.
    """
    refuse_bound(model, "calibrating")
    for _, site, method in found:
        if calib is None and any(True for _ in statistics_of(method.statistic)):
            raise CalibrationError(
                f"{method} at {site.name} starts from data: pass batches, "
                "fadapt.init(model, cfg, batches), or stats = fadapt.observe(model, cfg, batches) "
                "once and fadapt.init(model, cfg, stats)"
            )
    if not any(True for _, _, m in found for _ in statistics_of(m.statistic)):
        return None
    if isinstance(calib, Stats):
        calib.check_base(model)
        return calib
    from .observe import observe

    return observe(model, config, calib or ())


def prepare(found: Found, stats: Stats | None) -> tuple[Found, Callable[[Site, Method], Any]]:
    """Lets the methods plan over all sites.

    Args:
        found: the sites and methods of a config.
        stats: from :func:`as_stats`.

    Returns:
        The sites that remain, with the methods that :meth:`Method.plan` chose; and a function that
        gives ``init`` the statistic of a site, or None where its method asks for none.

    Raises:
        CalibrationError: data that are insufficient.
    """
    if stats is None:
        return found, lambda site, method: None

    def statistic(site: Site, method: Method) -> Any:
        return _read(stats, site.name, method.statistic)

    return _plan(found, statistic), statistic


def _read(stats: Stats, site: str, wanted: Any) -> Any:
    if isinstance(wanted, tuple):
        return tuple(_read(stats, site, part) for part in wanted)
    return None if wanted is None else stats.get(site, wanted)


def _plan(found: Found, statistic: Callable[[Site, Method], Any]) -> Found:
    chosen: dict[str, Method | None] = {site.name: m for _, site, m in found}
    for cls in dict.fromkeys(type(m) for _, _, m in found):
        if cls.plan.__func__ is not Method.plan.__func__:  # type: ignore[attr-defined]
            mine = {s.name: (m, statistic(s, m)) for _, s, m in found if type(m) is cls}
            chosen.update(cls.plan(mine))
    if dropped := [name for name, method in chosen.items() if method is None]:
        warnings.warn(
            f"{len(dropped)} of {len(chosen)} sites got rank 0 and are not adapted: {dropped}",
            FadaptWarning,
            stacklevel=4,
        )
    return [(slot, s, m) for slot, s, _ in found if (m := chosen[s.name]) is not None]
