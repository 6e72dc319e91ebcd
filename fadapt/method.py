"""The contract of a method: what its author writes, and no more.

    from fadapt.method import Leaves, LinearMap, Method, SiteView, Statistic

:class:`Method` is the whole of it for most methods. :class:`RankPadded` and :class:`Planned` are
for those whose ranks mix in a stack, or that choose ranks over all sites at once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base.linear_map import LinearMap as LinearMap
from .errors import ConfigError, require
from .fields import check_fields
from .site import Site as Site
from .site import SiteView as SiteView
from .statistics.reduction import Statistic as Statistic

Leaves = dict[str, Tensor]
Factors = tuple[Tensor, Tensor]
LastProduct = tuple[Tensor, Tensor, float]
STRENGTH = "strength"
DROPOUT_KEY = "dropout_key"
RUNTIME_LEAVES = (STRENGTH, DROPOUT_KEY)
"""The names of the fixed leaves that the runtime adds to a method's own."""


@dataclass(frozen=True)
class Method:
    """An adapter method: fields are static hyper-parameters, functions are pure.

    A subclass is a frozen dataclass that writes :meth:`init` and one or both of :meth:`shift`
    (input side) and :meth:`delta` (output side). The runtime computes, for every adapted map,

        x' = x + shift(p, x);   y = base(x');   y' = y + delta(p, x', y, base)

    with ``x`` (tokens, in_features) and ``y`` (tokens, out_features) as plain matrices in the
    adapter's dtype, and ``p`` the trainable and the fixed leaves together. It flattens, casts, maps
    over stacked adapters and applies the strength.

    Two laws hold for every method. At the initial parameters ``shift`` and ``delta`` return exact
    zeros. The adapted map is affine in x, so its dense weight and bias are derived from it.
    ``fadapt.testing.check_method`` tests these and all others.

    Fields may be None, bool, int, float, str, Literal, methods and tuples of them. They are checked
    by their annotations before ``__post_init__`` runs, in which a subclass checks their ranges.

    Args:
        dropout: the share of the entries of ``delta``'s input that are zeroed in the layer's
            training mode, the others being scaled by 1 / (1 - dropout); every method has it, by
            keyword. The masks follow from the adapter's seed and from a draw of torch's generator,
            in ``fit`` and ``sweep`` from the number of the batch instead.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Gate(fadapt.Method):
        ...     acts_on_bias = True
        ...
        ...     def init(self, site, rng):
        ...         return {"d": site.zeros(site.out_features)}, {}
        ...
        ...     def delta(self, p, x, y, base):
        ...         return p["d"] * y
        >>> fadapt.init(torch.nn.Linear(4, 3), Gate())
        Params(Gate() x 1; 3 trainable)
    """

    dropout: float = field(default=0.0, kw_only=True)

    reads_output: ClassVar[bool] = True
    """False where ``delta`` ignores ``y``: spares the cast of ``y`` to the adapter dtype."""
    casts_output: ClassVar[bool] = True
    """False where ``delta`` takes ``y`` in the base's own dtype: training then keeps it so, which
    over a base of 16 bits is half the memory. torch promotes a product with a leaf by itself."""
    reads_input: ClassVar[bool] = True
    """False where ``delta`` ignores ``x``, or may read ``y`` in its place: ``dropout`` is then
    refused, as it would drop nothing."""
    owns_strength: ClassVar[bool] = False
    """True where the method reads the strength c itself, through :meth:`strength`."""
    needs_plain_base: ClassVar[bool] = False
    """True where constants of the frozen weight enter, so that a Chain may hold it only first."""

    usual_kind: ClassVar[str] = "linear"
    """What a rule that names no parameter means: "linear", "norm" (the vectors of norms) or
    "embedding" (the input embedding)."""
    follows_ties: ClassVar[bool] = False
    """True where all uses of a tied tensor are adapted together; :meth:`shared` may join them."""

    # Flags that may depend on the fields. A class may also set them as plain attributes.

    @property
    def acts_on_bias(self) -> bool:
        """True where the adapted layer's bias differs from the base's (IA3, RoAd)."""
        return False

    @property
    def adapts_vectors(self) -> bool:
        """True where the method also makes sense for a parameter of one axis: a norm's, a bias.

        A vector of n values is the weight (n, 1) of a map from one number, which is always 1, to
        ``y`` (1, n), the vector: ``delta`` returns the vector's increment, (1, n). It must be zero
        where x is, as there is no bias.
        """
        return False

    @property
    def starts_at_identity(self) -> bool:
        """False where fresh leaves already change the model (SSteer): init then does not object."""
        return True

    @property
    def statistic(self) -> Statistic | tuple | None:
        """What :meth:`init` gets as its third argument ``stat``; None for a method without data."""
        return None

    @property
    def keep_fp32(self) -> frozenset[str]:
        """Fixed leaves kept in float32 or better whatever the adapter dtype; the method casts."""
        return frozenset()

    @property
    def supports_batch_dims(self) -> bool:
        """True where shift and delta also take leading axes, vectors given as rows (..., 1, k).

        A stack of such a method runs as batched products, without torch.func.vmap's overhead.
        """
        return False

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        """Makes the trainable and the fixed leaves of one site.

        A method with a :attr:`statistic` takes a third argument, ``stat``: this site's.

        Args:
            site: shapes, the frozen weight and tensor factories of this site.
            rng: a CPU generator seeded by (seed, site name) alone.

        Returns:
            Two flat dicts of tensors with disjoint names: trainable, which are floating; and fixed,
            which may also be integers or booleans.
        """
        raise ConfigError(f"{type(self).__name__} must define init(self, site, rng)")

    def shared(self, sites: Sequence[SiteView], rng: torch.Generator) -> tuple[Leaves, Leaves]:
        """Makes the leaves that all sites of this method have in common; none by default.

        There is one of each: one tensor, one gradient, one state of the optimizer, held once in
        params, stacks and files. ``p`` has them beside the site's own, under the same names at
        every site. A tensor that :meth:`init` itself returns at every site is shared likewise.

        Args:
            sites: all sites of this very method (equal in every field), in the model's order.
            rng: a CPU generator seeded by (seed, class name) alone.

        Returns:
            As :meth:`init`; names must differ from those of ``init``.
        """
        return {}, {}

    def shift(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The increment of the input: (tokens, in_features) -> the same shape."""
        raise NotImplementedError

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        """The increment of the output: (tokens, out_features).

        One that takes a fifth argument named ``training`` is told whether the layer is in
        training mode.
        """
        raise NotImplementedError

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        """Exact factors A (k, in), B (out, k) of the weight's increment, W' - W = B A.

        None, the default, where it has no low rank in general. Written beside ``delta`` and
        ``shift``, it holds for them alone: a subclass that overrides one of them says its own.
        A method with ``owns_strength`` includes the strength, for others the caller does.
        """
        return None

    def last_product(
        self, p: Mapping[str, Tensor], x: Tensor, base: LinearMap
    ) -> LastProduct | None:
        """``delta`` as h (tokens, k), B (out, k) and a number c: the increment is c h Bᵀ.

        None, the default, where it is no such product. What is given here is added to the output by
        the product itself, which spares the pass that would add an increment. Written beside
        ``delta``, it holds for it alone: a subclass that overrides ``delta`` says its own.
        """
        return None

    def check(self, site: Site) -> None:
        """Raises ConfigError for a shape that the method cannot take."""

    def project(self, train: Leaves) -> Leaves:
        """The trainable leaves moved to the nearest allowed point; the identity by default."""
        return train

    def true_gradient(self) -> Method:
        """The same map with its mathematical derivative, where the method defines another one.

        DoRA's norm, for example, is a constant in backpropagation.
        """
        return self

    def strength(self, p: Mapping[str, Tensor]) -> Tensor | float:
        """The strength c that ``fadapt.scale`` sets: 0 is the base, 1 the trained adapter."""
        return p.get(STRENGTH, 1.0)

    # What follows holds for every method and is not for authors.

    name: ClassVar[str]
    """The class's name in files, where it is to differ from ``module:Class``."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Its former names, under which files of it still load."""
    delta_takes_training: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            cls.__repr__ = _repr
        if "__post_init__" in vars(cls):
            cls.__post_init__ = _after_check(vars(cls)["__post_init__"])
        if "delta" in vars(cls):
            cls.delta_takes_training = "training" in inspect.signature(cls.delta).parameters


def _after_check(own: Any) -> Any:
    """A subclass's ``__post_init__`` that need not call its parent's to have the fields checked."""

    @functools.wraps(own)
    def checked(self: Method, *args: Any) -> None:
        _check(self)
        own(self, *args)

    return checked


def _check(self: Method) -> None:
    check_fields(self)
    require(
        0 <= self.dropout < 1,
        f"dropout must be at least 0 and less than 1, got {self.dropout}",
    )


def _repr(self: Method) -> str:
    """As a dataclass's own, with ``dropout`` last, and only where there is some."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}
    dropout = fields.pop("dropout", 0.0)
    if dropout:
        fields["dropout"] = dropout
    return f"{type(self).__qualname__}({', '.join(f'{k}={v!r}' for k, v in fields.items())})"


@dataclass(frozen=True)
class RankPadded(Method):
    """A method of rank ``r`` that computes the same with leaves padded with zeros to a larger one.

    Adapters of different ranks then share a group of a stack: their leaves are padded along
    :attr:`rank_axes`, and what still differs between them is read from :meth:`hyper_leaves`.
    """

    r: int = 8

    rank_axes: ClassVar[Mapping[str, int]] = {}
    """{leaf: axis} that a larger rank extends, where zero padding leaves the map as it is.

    Axes count from the end (-1 is the last), because leaves of expert stacks have more in front."""

    def widened(self, r: int) -> Method:
        """The method that runs this one's leaves padded to rank ``r``.

        Methods that agree on ``widened(1)`` share a stack.
        """
        return dataclasses.replace(self, r=r)

    def hyper_leaves(self) -> dict[str, float]:
        """Fixed scalar leaves that stand for hyper-parameters in a stack of mixed ones."""
        return {}


@dataclass(frozen=True)
class Planned(Method):
    """A method that looks at the statistics of all its sites before any of them starts."""

    @classmethod
    def plan_ranks(cls, sites: Mapping[str, tuple[Any, Any]]) -> Mapping[str, Method | None]:
        """Chooses the method of every site.

        Args:
            sites: {site name: (method, its statistic)}, the sites whose method is of this class.

        Returns:
            The methods to use, None for a site that is to be dropped.
        """
        return {name: method for name, (method, _) in sites.items()}
