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
from ..statistics.reduction import Reduction, State, Stream, as_rows, exact_products, width_of
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
        self.gradients = {site for site, side in states if side == "grad"}
        self.paired = any(r.paired for kinds in states.values() for r in kinds)

    def begin(self, rows: RowFilter) -> None:
        """The rows that come now are those of a new batch, or of one half of a pair."""
        self._rows = rows
        self._calls: Counter[str] = Counter()
        self._seen: dict[str, list[_Seen]] = {leader: [] for leader in self._leaders}
        self._last: dict[Stream, list[Tensor]] = {}
        # Added to what is watched, so that a graph leads there from the loss and nothing else.
        self.root = torch.zeros((), requires_grad=True) if self.gradients else None

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
        return self._watched(site, x, y) if site in self.gradients else y

    def _watched(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """The output, whose gradient will be noted together with the input."""
        assert self.root is not None
        version = version_of(x)

        def note(g: Tensor) -> None:
            if version_of(x) != version:
                raise CalibrationError(
                    f"{site}: the model has written into the layer's input since, and its gradient "
                    "cannot be known; leave the site out"
                )
            rows, of_rows = (t.detach().reshape(-1, t.shape[-1]) for t in (x, g))
            wide = torch.promote_types(rows.dtype, torch.float32)
            with exact_products(rows.device.type):
                product = of_rows.to(wide).mT @ rows.to(wide)
            before = self._products.get(site)
            self._products[site] = product if before is None else before + product

        y = y + self.root.to(y.device, y.dtype)
        y.register_hook(note)
        return y

    def gradient_of(self, loss: Tensor, where: str) -> None:
        """Adds the gradients of a batch's loss, a row for each site that it depends on."""
        assert self.root is not None
        self._products: dict[str, Tensor] = {}
        if not any(self._calls[site] for site in self.gradients):
            return  # None was seen, which the statistics will say.
        if not loss.requires_grad:
            raise CalibrationError(
                f"{where}: the loss does not depend on {sorted(self.gradients)[:3]}; it must be "
                "computed from the model's output, without detaching it"
            )
        torch.autograd.grad(loss, self.root, allow_unused=True)
        for site, product in self._products.items():
            states = self.states[site, "grad"]
            rows = as_rows(product.reshape(1, -1))
            for reduction in states:
                states[reduction] = reduction.add(states[reduction], rows)

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
                width_of(side, weights[site].shape),
                weights[site].device,
                weights[site].map.weight() if r.constants else None,
            )
            for r in reductions
        }
        for (site, side), reductions in kinds.items()
    }
