"""Recorders: what sees the rows of every site while the frozen model runs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from ..base.linear_map import LinearMap
from ..base.torch_private import version_of
from ..base.weights import BaseWeight
from ..errors import CalibrationError
from ..site import Site
from ..statistics.reduction import Reduction, State, Stream, as_rows
from .memory_plan import Kinds
from .token_mask import RowFilter

See = Callable[[str, Tensor, LinearMap], Tensor]
"""(site, input, frozen map) -> the map's own output."""

States = dict[Stream, dict[Reduction, State]]
Last = dict[Stream, Tensor]
"""The last tokens (batch, d) of each stream with paired statistics."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Stands where a weight is, leaves its map alone and lets ``see`` watch (an ``Adapted``)."""

    site: Site
    see: See

    acts_on_bias: bool = False
    device: torch.device | None = None

    def __call__(self, x: Tensor, base: LinearMap) -> Tensor:
        return self.see(self.site.name, x, base)

    def within(self, module: nn.Module, draw: Tensor | None = None) -> Self:
        return self

    @property
    def drops(self) -> bool:
        return False

    def over_mesh(self, mesh: Any) -> NoReturn:
        raise CalibrationError(
            f"{self.site.name} is split over processes by tensor parallelism, where its rows "
            "cannot be observed; observe on a whole or a fully_shard'ed model"
        )

    def embed(self, one_hot: Any, base: LinearMap) -> Tensor:
        return self(one_hot, base)

    def dense(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias


class _Seen:
    """A tensor as it was when it was seen, without keeping it alive."""

    def __init__(self, x: Tensor):
        self.ref, self.version = weakref.ref(x), _version(x)

    def __eq__(self, x: object) -> bool:
        return self.ref() is x and isinstance(x, Tensor) and self.version == _version(x)

    __hash__ = None  # type: ignore[assignment]


def _version(x: Tensor) -> int:
    return version_of(x)


class Discovery:
    """Finds out, in one forward, which sites are fed by the same tensor.

    Attributes:
        streams: {site: the first site that was fed by the same tensor, or itself}.
    """

    def __init__(self) -> None:
        self.streams: dict[str, str] = {}
        self._first: dict[int, tuple[str, _Seen]] = {}

    def see(self, site: str, x: Tensor, base: LinearMap) -> Tensor:
        if site not in self.streams:
            leader, seen = self._first.get(id(x), (site, None))
            if seen is None or seen != x:
                leader = site
                self._first[id(x)] = site, _Seen(x)
            self.streams[site] = leader
        return base(x)


class Recorder:
    """Feeds the states of one pass.

    Args:
        streams: from :class:`Discovery`, complete.
        states: {(site, side): {reduction: state}}, replaced as rows come in.
    """

    def __init__(self, streams: Mapping[str, str], states: dict[Stream, dict[Reduction, State]]):
        self.streams, self.states = streams, states
        self._leaders = {leader for site, leader in streams.items() if leader != site}
        self._rows: RowFilter | None = None
        self.paired = any(r.paired for kinds in states.values() for r in kinds)

    def begin(self, rows: RowFilter) -> None:
        """The rows that come now are those of a new batch, or of one half of a pair."""
        self._rows = rows
        self._calls: Counter[str] = Counter()
        self._seen: dict[str, list[_Seen]] = {leader: [] for leader in self._leaders}
        self._last: dict[Stream, list[Tensor]] = {}

    def end(self) -> Last:
        """Ends a batch.

        Returns:
            The last tokens (batch, d) at the streams that have paired statistics.

        Raises:
            CalibrationError: sites that share a stream were not called equally often.
        """
        self._rows = None
        for site, leader in self.streams.items():
            if self._calls[site] != self._calls[leader]:
                self._refuse(site, leader)
        return {stream: torch.cat(parts) for stream, parts in self._last.items()}

    def see(self, site: str, x: Tensor, base: LinearMap) -> Tensor:
        y = base(x)
        if self._rows is None:
            return y  # Not our call: an iterator of batches that runs the model itself.
        leader, call = self.streams[site], self._calls[site]
        self._calls[site] += 1
        if leader in self._leaders and leader == site:
            self._seen[site].append(_Seen(x))
        if leader == site:
            self._feed((site, "in"), x, None)
        elif call >= len(self._seen[leader]) or self._seen[leader][call] != x:
            self._refuse(site, leader)
        self._feed((site, "out"), y, base.bias)
        return y

    def add_pairs(
        self, plus: dict[Stream, Tensor], minus: dict[Stream, Tensor], where: str
    ) -> None:
        """Adds the last tokens of the two halves of a pair."""
        for stream in plus.keys() | minus.keys():
            halves = [half.get(stream) for half in (plus, minus)]
            counts = [0 if z is None else len(z) for z in halves]
            if counts[0] != counts[1]:
                raise CalibrationError(
                    f"{stream[0]}: the halves of {where} have {counts[0]} and {counts[1]} "
                    "sequences; pair them one to one"
                )
            rows = as_rows(torch.cat(halves, -1))  # type: ignore[arg-type]
            states = self.states[stream]
            for reduction in states:
                if reduction.paired:
                    states[reduction] = reduction.add(states[reduction], rows)

    def _feed(self, stream: Stream, x: Tensor, bias: Tensor | None) -> None:
        states = self.states.get(stream, {})
        plain = [r for r in states if not r.paired]
        if plain:
            rows = as_rows(_without(bias, self._rows.select(stream[0], x)))  # type: ignore[union-attr]
            for reduction in plain:
                states[reduction] = reduction.add(states[reduction], rows)
        if len(plain) < len(states):
            last = _without(bias, self._rows.last(stream[0], x))  # type: ignore[union-attr]
            self._last.setdefault(stream, []).append(last)

    def _refuse(self, site: str, leader: str) -> NoReturn:
        raise CalibrationError(
            f"{site} and {leader} were fed by one tensor in the first batch but not later, "
            "so they cannot share statistics; pass share=False"
        )


def _without(bias: Tensor | None, y: Tensor) -> Tensor:
    if bias is None:
        return y
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.to(wide) - bias.to(wide)


def zero_states(kinds: Kinds, weights: Mapping[str, BaseWeight]) -> States:
    """Empty states on the devices of the weights.

    Args:
        weights: {site: its frozen weight}.
    """
    return {
        (site, side): {
            r: r.zero(
                weights[site].shape[side == "in"],
                weights[site].device,
                weights[site].map.weight() if r.constants else None,
            )
            for r in reductions
        }
        for (site, side), reductions in kinds.items()
    }
