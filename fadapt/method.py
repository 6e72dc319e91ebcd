"""The contract of a method: frozen hyper-parameters and pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .base.linear_map import LinearMap
    from .site import Site, SiteView


Leaves = dict[str, Tensor]
Factors = tuple[Tensor, Tensor]
STRENGTH = "strength"


@dataclass(frozen=True)
class Method:
    """An adapter method: fields are static hyper-parameters, functions are pure.

    A subclass is a frozen dataclass that writes :meth:`init` and one or both of :meth:`shift`
    (input side) and :meth:`delta` (output side). The runtime computes, for every adapted map,

        x' = x + shift(p, x);   y = base(x');   y' = y + delta(p, x', y, base)

    with ``x`` (tokens, in_features) and ``y`` (tokens, out_features) as plain matrices in the
    adapter's dtype. It flattens, casts, maps over stacked adapters and applies the strength.

    Two laws hold for every method. At the initial parameters ``shift`` and ``delta`` return exact
    zeros. The adapted map is affine in x, so the dense weight and bias are derived from it
    (:meth:`dense`); an override may be faster but never mean something else.
    """

    keep_wide: ClassVar[frozenset[str]] = frozenset()
    """Fixed leaves kept in float32 or better whatever the adapter dtype; the method casts them."""
    reads_output: ClassVar[bool] = True
    """False where ``delta`` ignores ``y``: spares the cast of ``y`` to the adapter dtype."""
    acts_on_bias: ClassVar[bool] = False
    """True where the adapted layer's bias differs from the base's (IA3, RoAd)."""
    owns_strength: ClassVar[bool] = False
    """True where the method reads the strength c itself, through :meth:`strength`."""
    broadcasts: ClassVar[bool] = False
    """True where shift and delta also take leading axes, with vectors given as rows (..., 1, k).

    A stack of such a method runs as batched products, without torch.func.vmap's overhead."""
    statistic: ClassVar[Any] = None
    """What :meth:`init` needs as ``stat``: a ``fadapt.calibration.Statistic``, or None."""
    rank_axes: ClassVar[Mapping[str, int]] = {}
    """{leaf: axis} that a larger rank extends, where zero padding leaves the map as it is.

    Axes count from the end (-1 is the last), because leaves of expert stacks have more in front."""
    needs_plain_base: ClassVar[bool] = False
    """True where constants of the frozen weight enter, so that a Chain may hold it only first."""

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        """Makes the trainable and the fixed leaves of one site.

        Args:
            site: shapes, the frozen weight and tensor factories of this site.
            rng: a CPU generator seeded by (seed, site name) alone.
            stat: this site's calibration statistic, for methods that ask for one.

        Returns:
            Two flat dicts of floating tensors with disjoint names: trainable, fixed.
        """
        raise NotImplementedError(f"{type(self).__name__} must define init")

    @classmethod
    def plan(cls, sites: Mapping[str, tuple[Method, Any]]) -> Mapping[str, Method | None]:
        """Looks at all calibrated sites of this class at once, before :meth:`init` of each.

        Args:
            sites: {site name: (method, its statistic)}.

        Returns:
            The methods to use, None for a site that is to be dropped.
        """
        return {name: method for name, (method, _) in sites.items()}

    def check(self, site: Site) -> None:
        """Raises ConfigError for a shape that the method cannot take."""

    def shift(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The increment of the input: (tokens, in_features) -> the same shape."""
        raise NotImplementedError

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        """The increment of the output: (tokens, out_features)."""
        raise NotImplementedError

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        """Exact factors A (k, in), B (out, k) of the weight's increment, W' - W = B A.

        None, the default, where it has no low rank in general. Written beside ``delta`` and
        ``shift``, it holds for them alone: a subclass that overrides one of them says its own.
        A method with ``owns_strength`` includes the strength, for others the caller does.
        """
        return None

    def project(self, train: Leaves) -> Leaves:
        """The trainable leaves moved to the nearest allowed point; the identity by default."""
        return train

    def true_gradient(self) -> Method:
        """The same map with its mathematical derivative, where the method defines another one.

        DoRA's norm, for example, is a constant in backpropagation.
        """
        return self

    def widened(self, r: int) -> Method:
        """The method that runs this one's leaves padded to rank ``r`` along ``rank_axes``.

        Methods that agree on ``widened(1)`` share a stack; what still differs between them, they
        read from :meth:`hyper_leaves`.
        """
        return self

    def hyper_leaves(self) -> dict[str, float]:
        """Fixed scalar leaves that stand for hyper-parameters in a stack of mixed ones."""
        return {}

    def dense(self, p: Mapping[str, Tensor], base: LinearMap) -> tuple[Tensor, Tensor | None]:
        """The adapted weight (out, in) and bias: W' = [f(I) - f(0)]ᵀ, b' = f(0)."""
        weight = base.weight()
        zero = self(p, weight.new_zeros(1, weight.shape[1]), base)
        width = weight.shape[1]
        rows = []
        for start in range(0, width, 2048):
            count = min(2048, width - start)
            # Rows of the identity; the whole of it would be as large as the input is wide, squared.
            eye = torch.eye(count, dtype=weight.dtype, device=weight.device)
            rows.append(self(p, F.pad(eye, (start, width - start - count)), base) - zero)
        return torch.cat(rows).mT, None if base.bias is None else zero[0]

    # The runtime's half. Chain overrides enter and leave; nothing else does.

    @property
    def has_shift(self) -> bool:
        return type(self).shift is not Method.shift

    @property
    def has_delta(self) -> bool:
        return type(self).delta is not Method.delta

    def enter(self, p: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Any]:
        """The base's input x', and what :meth:`leave` needs of it."""
        if not self.has_shift:
            return x, x
        shift = self.shift(p, x.to(self.compute_dtype(p)))
        x = x + self._with_strength(p, shift).to(x.dtype)
        return x, x

    def leave(self, p: Mapping[str, Tensor], saved: Any, y: Tensor, base: LinearMap) -> Tensor:
        """The adapted output, from the base's output y = base(x').

        Its leading axes may be others than those of the rows that came in, of as many rows.
        """
        if not self.has_delta:
            return y
        dtype = self.compute_dtype(p)
        rows = y.reshape(*saved.shape[:-1], y.shape[-1]).to(dtype) if self.reads_output else y
        delta = self.delta(p, saved.to(dtype), rows, base)
        return y + self._with_strength(p, delta).to(y.dtype).reshape(y.shape)

    def __call__(self, p: Mapping[str, Tensor], x: Tensor, base: LinearMap) -> Tensor:
        """The adapted map on plain rows: (tokens, in_features) -> (tokens, out_features)."""
        x, saved = self.enter(p, x)
        return self.leave(p, saved, base(x), base)

    def compute_dtype(self, p: Mapping[str, Tensor]) -> torch.dtype:
        """The dtype of the adapter's arithmetic: that of its leaves."""
        for name, leaf in p.items():
            if name not in self.keep_wide and name != STRENGTH:
                return leaf.dtype
        return torch.float32

    def strength(self, p: Mapping[str, Tensor]) -> Tensor | float:
        """The runtime strength c: 0 is the base, 1 the trained adapter."""
        return p.get(STRENGTH, 1.0)

    def _with_strength(self, p: Mapping[str, Tensor], increment: Tensor) -> Tensor:
        if self.owns_strength or STRENGTH not in p:
            return increment
        return p[STRENGTH].to(increment.dtype) * increment


def increment_factors(method: Method, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
    """:meth:`Method.low_rank` at the strength in ``p``; None where it is not known.

    What a class says of its increment is not taken for a subclass with another increment.
    """
    order = type(method).__mro__
    says = next(i for i, cls in enumerate(order) if "low_rank" in vars(cls))
    means = (i for i, c in enumerate(order) if vars(c).keys() & {"delta", "shift"})
    if next(means, len(order)) < says:
        return None
    factors = method.low_rank(p, base)
    if factors is None or method.owns_strength or STRENGTH not in p:
        return factors
    return factors[0], factors[1] * p[STRENGTH].to(factors[1].dtype)
