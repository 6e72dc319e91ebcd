"""Stats: what one calibration pass learned, per site; combined, saved and read again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from numbers import Real
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..arguments import listed
from ..base.weights import BaseWeight, find_weights, weights_by_name
from ..errors import CalibrationError, ConfigError
from ..params.params import destination
from ..statistics.moments import PCA
from ..statistics.reduction import Reduction, Side, State, Statistic, Stream, width_of
from ..statistics.sketch import Sketch
from ..statistics.spectrum import Spectrum
from . import files


@dataclass(frozen=True, eq=False)
class Stats:
    """Calibration statistics of the frozen model, as states that combine.

    Attributes:
        streams: {site: the site whose input stream it shares}; itself, if it came first.
        states: {(site, side): {reduction: state}}.
        base: {parameter: fingerprint} of the whole model that was observed.
        tolerance: the share of rows with NaN or Inf that is accepted; 0 accepts none.

    Example:
        >>> first = fadapt.observe(model, fadapt.EVA(r=2), [x[:3]])
        >>> second = fadapt.observe(model, fadapt.EVA(r=2), [x[3:]])
        >>> first.combine(second).tokens("0.weight")
        6
    """

    streams: Mapping[str, str]
    states: Mapping[Stream, Mapping[Reduction, State]]
    base: Mapping[str, str]
    tolerance: float = 0.0
    _spectra: dict[Any, Spectrum] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)

    def get(self, site: str, statistic: Statistic) -> Any:
        """The finalised statistic of a site.

        Raises:
            CalibrationError: the site or statistic was not observed, too few rows were, or too
                many of them hold NaN or Inf.
        """
        if not isinstance(statistic, Statistic):
            raise CalibrationError(
                f"expected a fadapt.calibration.Statistic, got {statistic!r:.80}: "
                "stats.get(site, Statistic(SumSq()))"
            )
        stream, wanted = self._stream(site, statistic.side), statistic.reduction
        stored, state = self._find(site, stream, wanted)
        self._check(site, statistic, state)
        key = stream, stored, getattr(wanted, "center", False)
        cached = self._spectra.get(key)
        if isinstance(wanted, PCA) and cached is not None and cached.holds(wanted.k):
            return cached.top(wanted.k)
        if not all(leaf.isfinite().all() for leaf in state.values()):
            raise CalibrationError(f"{site}: {wanted} overflowed float32; the activations are huge")
        if isinstance(stored, Sketch) and isinstance(wanted, PCA):
            result = stored.finalize(state).top(wanted.k)
        else:
            result = wanted.finalize(stored.convert(state, wanted))
        if isinstance(result, Spectrum):
            # Small, dear to compute, and wanted again by the sites that share the stream.
            self._spectra[key] = result
        return result

    def tokens(self, site: str, side: Side = "in") -> int:
        """How many rows were counted at a site (pairs, where only pairs were observed)."""
        kinds = self.states.get(self._stream(site, side))
        if not kinds:
            raise CalibrationError(f"{site}: nothing was observed of its {side!r} side")
        return max(int(s["n"]) for s in kinds.values())

    @property
    def shared(self) -> list[list[str]]:
        """Groups of sites that are fed by the same tensor and share their input statistics."""
        groups: dict[str, list[str]] = {}
        for site, first in self.streams.items():
            groups.setdefault(first, []).append(site)
        return [g for first, g in groups.items() if len(g) > 1 and (first, "in") in self.states]

    @property
    def nbytes(self) -> int:
        """The size of all states."""
        return sum(
            t.nbytes for kinds in self.states.values() for s in kinds.values() for t in s.values()
        )

    def combine(self, *others: Stats) -> Stats:
        """The statistics of all the rows together; the order does not matter.

        Raises:
            CalibrationError: the parts observed another model, other sites or other statistics.
        """
        for other in others:
            if not isinstance(other, Stats):
                raise CalibrationError(
                    f"combine takes Stats, got {type(other).__name__}: a.combine(b, c)"
                )
        return reduce(_combine_two, others, self)

    def check_base(self, model: nn.Module) -> None:
        """Refuses a model other than the one observed.

        Raises:
            CalibrationError: naming the first parameter that differs.
        """
        now = base_fingerprints(model)
        if "meta" in now.values():
            return
        for name in sorted(now.keys() | self.base.keys()):
            if now.get(name) != self.base.get(name):
                gone = "is gone" if name not in now else "differs"
                what = gone if name in self.base else "is new"
                raise CalibrationError(
                    f"the statistics were observed on another base model: {name} {what}. "
                    "Observe this one: stats = fadapt.observe(model, cfg, batches)"
                )
        weights = weights_by_name(model)
        for (site, side), kinds in self.states.items():
            for reduction, state in kinds.items():
                width = next(len(state[k]) for k, shape in reduction.leaves(1).items() if shape)
                weight = weights.get(site)
                if weight is None or width_of(side, weight.shape) != width:
                    has = "no such weight" if weight is None else f"the shape {weight.shape}"
                    raise CalibrationError(
                        f"the {_of(side)} of {site} are {width} wide; the model has {has}"
                    )

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all, with a checksum.

        Raises:
            CheckpointError: a path or disk that refuses, or a reduction of your own.
        """
        files.write(self.streams, self.states, self.base, self.tolerance, path)

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module | None = None) -> Stats:
        """Reads what :meth:`save` wrote.

        Args:
            path: of the file.
            model: checked against the model observed, where given; ``init`` always checks.

        Raises:
            CheckpointError: not such a file, a damaged one, or one of an earlier version.
            CalibrationError: statistics of another base model.
        """
        stats = cls(*files.read(path))
        if model is not None:
            stats.check_base(model)
        return stats

    def to(self, device: torch.device | str) -> Stats:
        """A copy with all states on a device."""
        where, _ = destination((), device, None)
        if where is None:
            raise ConfigError('Stats.to takes a device: stats.to("cuda")')
        states = {
            stream: {r: {k: t.to(where) for k, t in s.items()} for r, s in kinds.items()}
            for stream, kinds in self.states.items()
        }
        return dataclasses.replace(self, states=states, _spectra={})

    def __repr__(self) -> str:
        count = sum(len(kinds) for kinds in self.states.values())
        return f"Stats({len(self.streams)} sites, {count} states, {self.nbytes / 2**20:.1f} MiB)"

    def _stream(self, site: str, side: Side) -> Stream:
        if not isinstance(site, str) or site not in self.streams:
            raise CalibrationError(
                f"no statistics for {site!s:.200}; observed were {sorted(self.streams)[:4]}... "
                "Observe with init's config: stats = fadapt.observe(model, cfg, batches)"
            )
        return (self.streams[site] if side == "in" else site), side

    def _find(self, site: str, stream: Stream, wanted: Reduction) -> tuple[Reduction, State]:
        kinds = self.states.get(stream, {})
        # An exact state before a sketch.
        for reduction in sorted(kinds, key=lambda r: isinstance(r, Sketch)):
            if reduction.covers(wanted):
                return reduction, kinds[reduction]
        raise CalibrationError(
            f"{site}: {wanted} of the {_of(stream[1])} was not observed (but {list(kinds)}); "
            "observe with the config that init gets"
        )

    def _check(self, site: str, statistic: Statistic, state: State) -> None:
        n, bad = int(state["n"]), int(state["bad"])
        what = "batches" if statistic.side == "grad" else "tokens"
        what = "pairs" if statistic.reduction.paired else what
        if bad > self.tolerance * (n + bad):
            raise CalibrationError(
                f"{site}: {bad} of {n + bad} {what} hold NaN or Inf; the model overflows on this "
                "data. Run it in bfloat16 or float32, or accept a share of them: "
                "observe(..., tolerance=0.01)"
            )
        if n < statistic.at_least:
            raise CalibrationError(
                f"{site}: {n} {what} were counted, at least {statistic.at_least} are needed. "
                + ("Give more batches or a lower rank" if n else f"None reached it: {UNSEEN}")
            )


def _of(side: str) -> str:
    return "gradients" if side == "grad" else f"{side}puts"


UNSEEN = "the layer did not run, or its weight is used by an operation without an overlay rule"


def check_tolerance(tolerance: float) -> None:
    """Raises CalibrationError unless it is a share of rows, from 0 to 1."""
    number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    if not number or not 0 <= tolerance <= 1:
        raise CalibrationError(
            f"tolerance must be the share of rows to accept, from 0 to 1; got {tolerance!r:.80}"
        )


def base_fingerprints(model: nn.Module) -> dict[str, str]:
    """{name: fingerprint} of every parameter."""
    first: dict[int, BaseWeight] = {}  # of the names of a tied tensor
    for weight in find_weights(model):
        first.setdefault(id(weight.parameter), weight)
    return {weight.name: weight.fingerprint() for weight in first.values()}


def combine_all(parts: Iterable[Stats]) -> Stats:
    """``Stats.combine`` over a list or iterator of parts, such as those of several files.

    Raises:
        CalibrationError: no parts, something else than Stats, or what ``Stats.combine`` refuses.
    """
    write = "combine_all([fadapt.Stats.load(a), fadapt.Stats.load(b)])"
    many = listed("parts", parts, write, CalibrationError)
    odd = [p for p in many if not isinstance(p, Stats)]
    if odd or not many:
        what = f"got {odd[0]!r:.80} among them" if many else "got none"
        raise CalibrationError(f"parts must be a list of Stats, {what}; write {write}")
    return many[0].combine(*many[1:])


def _combine_two(a: Stats, b: Stats) -> Stats:
    if a.base != b.base:
        raise CalibrationError("the statistics to combine were observed on different base models")
    kinds = [{s: set(r) for s, r in x.states.items()} for x in (a, b)]
    if a.streams != b.streams or kinds[0] != kinds[1]:
        raise CalibrationError(
            "the statistics to combine are of different sites or kinds; observe all parts with the "
            "same config and the same options"
        )
    states = {
        stream: {r: r.combine(s, _like(b.states[stream][r], s)) for r, s in reductions.items()}
        for stream, reductions in a.states.items()
    }
    return Stats(a.streams, states, a.base, min(a.tolerance, b.tolerance))


def _like(state: State, other: State) -> State:
    return {k: t.to(other[k].device) for k, t in state.items()}
