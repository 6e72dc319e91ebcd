"""From calibration data to what each method's ``init`` receives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import CalibrationError, ConfigError
from ..fields import check_fields


def statistics_of(wanted: Any) -> Iterator[Statistic]:
    """The statistics in a method's ``statistic``: none, one, or one per link of a Chain."""
    if isinstance(wanted, Statistic):
        yield wanted
    elif isinstance(wanted, tuple):
        for part in wanted:
            yield from statistics_of(part)


State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Rows:
    """One block of rows, ready for :meth:`Reduction.lift`.

    Attributes:
        values: (n, d) in float32 or float64; rows that do not count are zero.
        keep: (n,), 1 for the rows that count and 0 for the others, in the dtype of ``values``.
        bad: 0-d float64, the number of rows left out because they hold NaN or Inf.
    """

    values: Tensor
    keep: Tensor
    bad: Tensor

    @property
    def n(self) -> Tensor:
        """The number of rows that count: 0-d float64."""
        return self.keep.sum(dtype=torch.float64)


def as_rows(x: Tensor, mask: Tensor | None = None) -> Rows:
    """Flattens x (..., d) to rows and takes out the masked and the non-finite ones.

    Args:
        x: (..., d), any floating dtype.
        mask: (...), nonzero where a row counts; None for all.
    """
    values = x.detach().reshape(-1, x.shape[-1])
    if values.device.type == "mps":
        values = values.cpu()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    finite = values.isfinite().all(-1)
    wanted = torch.ones_like(finite) if mask is None else mask.reshape(-1).to(finite)
    keep = finite & wanted
    # where, not a product: 0 * NaN is NaN. Shapes stay static, so a GPU need not be waited for.
    values = torch.where(keep.unsqueeze(-1), values, 0)
    return Rows(values, keep.to(values.dtype), (wanted & ~finite).sum(dtype=torch.float64))


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Inside, float32 products are float32: TF32 and autocast are off."""
    cuda = torch.backends.cuda.matmul
    before = cuda.fp32_precision
    try:
        cuda.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        cuda.fp32_precision = before


def check_width(k: int | None) -> None:
    """Refuses a number of directions below 1; None is for all."""
    if k is not None and k < 1:
        raise ConfigError(f"k must be an int from 1, got {k}")


@dataclass(frozen=True)
class Reduction:
    """A statistic of rows (n, d). Subclasses define ``leaves``, ``lift`` and ``finalize``."""

    maxima: ClassVar[frozenset[str]] = frozenset()
    """Leaves that combine by maximum; the others combine by sum."""
    constants: ClassVar[frozenset[str]] = frozenset()
    """Leaves that are the same in all states of a site."""
    leafwise: ClassVar[bool] = True
    """Whether ``combine`` works leaf by leaf, so that torch.distributed can all-reduce it."""
    paired: ClassVar[bool] = False
    """Whether the rows are pairs (z⁺, z⁻) side by side, one from each half of a pair of batches."""

    def __post_init__(self) -> None:
        check_fields(self)

    def leaves(self, d: int) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the state's leaves beside "n" and "bad"."""
        raise NotImplementedError

    def lift(self, rows: Rows, state: State) -> State:
        """One block of rows as leaves, without "n" and "bad"; of ``state`` only constants count."""
        raise NotImplementedError

    def finalize(self, state: State) -> object:
        """The statistic. ``state["n"]`` is at least 1."""
        raise NotImplementedError

    def zero(
        self, d: int, device: torch.device | str | None = None, weight: Tensor | None = None
    ) -> State:
        """The state of no rows.

        Args:
            d: width of the rows.
            device: where the state lives.
            weight: (out, in), the site's frozen matrix, for reductions with constants of it.
        """
        device = torch.device(device or "cpu")
        device = torch.device("cpu") if device.type == "mps" else device
        shapes = {"n": (), "bad": (), **self.leaves(d)}
        return {k: torch.zeros(s, dtype=torch.float64, device=device) for k, s in shapes.items()}

    def update(self, state: State, x: Tensor, mask: Tensor | None = None) -> State:
        """The state with the rows of x (..., d) where mask (...) is nonzero added."""
        return self.add(state, as_rows(x, mask))

    def add(self, state: State, rows: Rows) -> State:
        """The state with a block of rows added."""
        with exact_products(rows.values.device.type):
            lifted = self.lift(rows, state)
        return self.combine(state, {"n": rows.n, "bad": rows.bad, **lifted})

    def combine(self, a: State, b: State) -> State:
        """The state of the rows of both."""
        if any(a[k] is not b[k] and not torch.equal(a[k], b[k]) for k in self.constants):
            raise CalibrationError(
                f"{self}: the states differ in {sorted(self.constants)}; they come from other "
                "weights, or from another device whose decompositions differ"
            )

        def join(k: str) -> Tensor:
            if k in self.constants:
                return a[k]
            return torch.maximum(a[k], b[k]) if k in self.maxima else a[k] + b[k]

        return {k: join(k) for k in a}

    def nbytes(self, d: int) -> int:
        """The size of a state in bytes."""
        shapes = [(), (), *self.leaves(d).values()]
        return sum(8 * torch.Size(shape).numel() for shape in shapes)

    @property
    def stored(self) -> Reduction:
        """The reduction whose state this one reads; only such states are kept."""
        return self

    def covers(self, target: Reduction) -> bool:
        """Whether this state determines the state of ``target`` for the same rows."""
        return target.stored == self

    def convert(self, state: State, target: Reduction) -> State:
        """The state of a ``target`` that this reduction covers."""
        return state


Side = Literal["in", "out", "grad"]
Stream = tuple[str, Side]
"""Where rows come from: a site's name and side."""


def width_of(side: str, shape: tuple[int, int]) -> int:
    """The width of a side's rows, at a weight (out, in)."""
    d_out, d_in = shape
    return {"in": d_in, "out": d_out, "grad": d_out * d_in}[side]


@dataclass(frozen=True)
class Statistic:
    """What a method asks to know of the data at its site.

    Args:
        reduction: over which statistic.
        side: "in", the rows that enter the linear map; "out", its outputs without the bias; or
            "grad", a batch's gradient of the loss by the weight, (out, in) as one row.
        at_least: rows (pairs, for a paired reduction) that are needed.

    Raises:
        ConfigError: an unknown side, or a paired reduction of inputs.

    Example:
        >>> from fadapt.calibration import SumSq
        >>> wanted = fadapt.Statistic(SumSq(), at_least=4)  # mean squares of the inputs
        >>> stats = fadapt.observe(model, fadapt.LoRA(r=2), [x], statistics=[wanted])
        >>> stats.get("0.weight", wanted).shape
        torch.Size([8])
    """

    reduction: Reduction
    side: Side = "in"
    at_least: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.side, str) or self.side not in ("in", "out", "grad"):
            raise ConfigError(f'side must be "in", "out" or "grad", got {self.side!r:.80}')
        check_fields(self)
        if self.at_least < 1:
            raise ConfigError(f"at_least must be an int from 1, got {self.at_least}")
        if self.reduction.paired and self.side != "out":
            raise ConfigError(f'{self.reduction} is of outputs; write Statistic(..., side="out")')
