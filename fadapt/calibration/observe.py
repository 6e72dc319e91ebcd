"""observe: one pass of the frozen model that feeds every statistic a config's methods ask for."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_flags, check_function, is_many, listed
from ..base.bound import refuse_adapted
from ..base.checks import check_model
from ..base.device import device_of, to_device
from ..base.eval_mode import evaluating
from ..base.weights import BaseWeight, Kind
from ..config import Config, Rules, as_config
from ..errors import CalibrationError, ConfigError, FadaptWarning
from ..fold.losses import LossFn, scalar_loss
from ..hugging_face import output_head
from ..method import Method
from ..overlay.call import Bound
from ..site import Site
from ..statistics.reduction import Reduction, State, Statistic, Stream, statistics_of, width_of
from ..targeting import resolve
from .distributed import in_step
from .memory_plan import plan_passes
from .recorder import Discovery, Probe, Recorder, See, zero_states
from .stats import Stats, base_fingerprints, check_tolerance
from .token_mask import RowFilter, arguments, halves, without_padded_labels


def observe(
    model: nn.Module,
    cfg: Config | Rules | Sequence[Config | Rules],
    batches: Iterable[Any],
    *,
    statistics: Iterable[Statistic] = (),
    label_mask: bool = False,
    max_memory: int | None = None,
    tolerance: float = 0.0,
    share: bool = True,
    progress: bool = True,
    loss_fn: LossFn | None = None,
) -> Stats:
    """Runs the frozen, unadapted model over the batches and collects what the methods ask for.

    The model runs in eval mode, and is left as it was, also after an exception; gradients are
    taken where a statistic is of them, and reach nothing of the model's. Rows are dropped where
    ``attention_mask`` is 0; for a loss, the labels there are -100.

    Args:
        model: the frozen base.
        cfg: as for :func:`fadapt.init`; or a list of such, to start several params from one pass.
        batches: of keyword arguments (dicts), positional ones (tuples) or single tensors, on any
            device; for paired statistics, tuples of two dicts.
        statistics: more statistics, observed at every site of ``cfg``.
        label_mask: count only tokens whose ``labels`` are not -100.
        max_memory: bytes that the states may take. Where they need more, the sites are observed in
            several passes over the batches; batches that can be read only once, and single states
            that are too large, are sketched. A FadaptWarning says what was done.
        tolerance: the share of rows with NaN or Inf to accept at a site.
        share: let sites that are fed by the same tensor share their input statistics.
        progress: show a progress bar in a terminal, where rich is installed.
        loss_fn: ``loss_fn(output, batch)``, for statistics of gradients (LoRAGA); without it the
            loss that the model returns.

    Raises:
        CalibrationError: nothing to observe, no batches, a batch without the mask it needs, rows
            that do not match the mask, or an option of the wrong kind.
        FadaptError: the model is inside ``bound``.

    Example:
        >>> stats = fadapt.observe(model, fadapt.CorDA(r=2), [x, x])
        >>> stats.tokens("0.weight")
        12
        >>> params = fadapt.init(model, fadapt.CorDA(r=2), stats)
    """
    check_model(model)
    refuse_adapted(model, "fadapt.observe")
    check_flags(CalibrationError, label_mask=label_mask, share=share, progress=progress)
    check_function("loss_fn", loss_fn, "def loss_fn(output, batch)", CalibrationError)
    statistics = _check_options(statistics, max_memory, tolerance)
    configs: Sequence[Config | Rules] = cfg if isinstance(cfg, (list, tuple)) else [cfg]  # type: ignore[list-item]
    if not configs:
        raise CalibrationError("nothing to observe: the list of configs is empty")
    found = [part for c in configs for part in resolve(model, as_config(c))]
    wanted = _wanted(found, statistics)
    _check_weights(found)
    sites = {site.name: site for _, site, _ in found}
    weights = {site.name: weight for weight, site, _ in found}
    feed = _Feed(
        model,
        label_mask,
        head=any(weight.module is output_head(model) for weight, _, _ in found),
        loss_fn=loss_fn,
    )
    source, again = _source(batches)
    source = in_step(model, source)

    streams = {name: name for name in sites}
    if share and sum(side == "in" for _, side in wanted) > 1:
        head = list(itertools.islice(source, 1))
        if not head:
            raise CalibrationError(EMPTY)
        source = source if again else itertools.chain(head, source)
        discovery = Discovery()
        with _recording(model, sites, discovery.see):
            feed.run(halves(head[0])[0], "batch 0")
        streams.update(discovery.streams)

    by_stream = _by_stream(wanted, streams)
    widths: dict[Stream, int] = {
        (site, side): width_of(side, weights[site].shape) for site, side in by_stream
    }
    plan = plan_passes(by_stream, widths, max_memory, again)
    if plan.note:
        warnings.warn(plan.note, FadaptWarning, stacklevel=2)
    states: dict[Stream, dict[Reduction, State]] = {}
    for kinds in plan.passes:
        recorder = Recorder(streams, zero_states(kinds, weights))
        count = 0
        with _recording(model, sites, recorder.see, bool(recorder.gradients)):
            for batch in _bar(source, progress):
                feed.observe(batch, f"batch {count}", recorder)
                count += 1
        if not count:
            raise CalibrationError(EMPTY)
        states.update(recorder.states)
    return Stats(streams, states, base_fingerprints(model), tolerance)


def _check_options(statistics: Any, max_memory: Any, tolerance: Any) -> tuple[Statistic, ...]:
    """The statistics, after a check of what is easily mistaken."""
    check_tolerance(tolerance)
    if max_memory is not None and (type(max_memory) is not int or max_memory < 1):
        raise CalibrationError(
            f"max_memory must be a number of bytes such as 2**30, or None; got {max_memory!r:.80}"
        )
    write = "statistics=[Statistic(SumSq())]"
    given = () if isinstance(statistics, Statistic) else statistics
    found = tuple(listed("statistics", given, write, CalibrationError))
    if given is not statistics or not all(isinstance(s, Statistic) for s in found):
        raise CalibrationError(
            f"statistics must be a list of fadapt.calibration.Statistic, got {statistics!r:.80}; "
            "write statistics=[Statistic(SumSq())]"
        )
    return found


class _Feed:
    """Runs batches through the model for a recorder."""

    def __init__(
        self, model: nn.Module, label_mask: bool, head: bool, loss_fn: LossFn | None = None
    ):
        self.model, self.label_mask, self.head, self.loss_fn = model, label_mask, head, loss_fn
        self.masked: bool | None = None

    def run(self, batch: Any, where: str) -> None:
        batch = to_device(batch, device_of(self.model))
        args, kwargs = arguments(self.model, batch, where, self.head)
        self.model(*args, **kwargs)

    def loss(self, batch: Any, where: str) -> Tensor:
        """The batch's loss, in which padded tokens do not count."""
        # All of it: loss_fn reads the batch, too.
        batch = without_padded_labels(self.model, to_device(batch, device_of(self.model)))
        args, kwargs = arguments(self.model, batch, where, head=True)
        output = self.model(*args, **kwargs)
        given = self.loss_fn(output, batch) if self.loss_fn else getattr(output, "loss", output)
        try:
            return scalar_loss(given, self.loss_fn)
        except ConfigError as error:
            raise CalibrationError(
                f"{where}: a method starts from the gradient of the loss, and there is {error}, "
                "here to fadapt.init or fadapt.observe"
            ) from error

    def observe(self, batch: Any, where: str, recorder: Recorder) -> None:
        parts = halves(batch)
        if len(parts) == 1 and recorder.paired:
            raise CalibrationError(
                f"{where} is one batch, and paired statistics need two: give tuples of two dicts, "
                "(batch that shows the trait, the same without it)"
            )
        last = []
        for part in parts:
            rows = RowFilter(self.model, part, where, self.label_mask)
            if self.masked not in (None, bool(rows.masks)):
                raise CalibrationError(
                    f"{where} has {'an' if rows.masks else 'no'} attention_mask, unlike those "
                    "before it; give all batches one, so that padding is known in each"
                )
            self.masked = bool(rows.masks)
            recorder.begin(rows)
            if recorder.gradients:
                recorder.gradient_of(self.loss(part, where), where)
            else:
                self.run(part, where)
            last.append(recorder.end())
        if len(parts) == 2:
            recorder.add_pairs(last[0], last[1], where)


EMPTY = (
    "there are no batches: the iterator is empty or exhausted (a generator can be read only once); "
    "pass a list or a DataLoader"
)


def _wanted(
    found: list[tuple[BaseWeight, Site, Method]], extra: tuple[Statistic, ...]
) -> dict[Stream, list[Reduction]]:
    wanted: dict[Stream, list[Reduction]] = {}
    for _, site, method in found:
        for statistic in (*statistics_of(method.statistic), *extra):
            wanted.setdefault((site.name, statistic.side), []).append(statistic.reduction)
    if not wanted:
        methods = sorted({type(m).__name__ for _, _, m in found})
        raise CalibrationError(
            f"nothing to observe: {methods} need no statistics; "
            "write observe(..., statistics=[Statistic(SumSq())]) for statistics of your own"
        )
    return wanted


def _by_stream(
    wanted: dict[Stream, list[Reduction]], streams: dict[str, str]
) -> dict[Stream, list[Reduction]]:
    result: dict[Stream, list[Reduction]] = {}
    for (site, side), reductions in wanted.items():
        leader = streams[site] if side == "in" else site
        result.setdefault((leader, side), []).extend(reductions)
    return result


def _source(batches: Iterable[Any]) -> tuple[Iterable[Any], bool]:
    """The batches, and whether they can be read more than once."""
    many = isinstance(batches, Iterable) and is_many(batches)
    if isinstance(batches, (Tensor, Mapping)) or not many:
        raise CalibrationError(
            f"calibration data must be an iterable of batches, got {type(batches).__name__}; "
            "put a single batch into a list: [batch]"
        )
    # Not iter(batches), which starts the workers of a DataLoader.
    return batches, not isinstance(batches, Iterator)


def _check_weights(found: list[tuple[BaseWeight, Site, Method]]) -> None:
    for weight, site, method in found:
        if weight.is_meta:
            raise CalibrationError(f"{site.name} is a meta tensor without values; load the weights")
        if weight.kind is Kind.EXPERTS:
            raise CalibrationError(
                f"{site.name} is a stack of experts, which cannot be calibrated; put a method "
                f"there that needs no data, not {method}"
            )


@contextmanager
def _recording(
    model: nn.Module, sites: Mapping[str, Site], see: See, gradients: bool = False
) -> Iterator[None]:
    """Inside, the model runs in eval mode, and ``see`` sees every site."""
    probes = {name: Probe(site, see) for name, site in sites.items()}
    with Bound(model, lambda: probes, probes), torch.set_grad_enabled(gradients), evaluating(model):
        yield


def _bar(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if progress and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            return batches
        return track(batches, "calibrating", console=Console(stderr=True), transient=True)
    return batches
