"""The runtime's half of a method: from its shift and delta to the adapted map."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base.linear_map import DenseMap, LinearMap
from .base.torch_private import is_transformed
from .base.weights import LINEAR_KINDS, Kind
from .dropout import drop, fresh_draw
from .errors import ConfigError, TargetError, require
from .fields import check_fields
from .method import (
    DROPOUT_KEY,
    RUNTIME_LEAVES,
    STRENGTH,
    Factors,
    LastProduct,
    Leaves,
    Method,
    Site,
    SiteView,
)
from .seeds import generator


@dataclass(frozen=True)
class Compound(Method):
    """A method made of others, whose leaves are theirs, prefixed "0.", "1.", ..."""

    methods: tuple[Method, ...] = ()

    numbers: ClassVar[tuple[str, ...]] = ()
    """Fixed numbers that it holds for each of its methods, 1 at the start."""

    @property
    def keep_fp32(self) -> frozenset[str]:
        return frozenset(
            f"{i}.{k}" for i, m in enumerate(self.methods) for k in (*m.keep_fp32, *self.numbers)
        )

    @property
    def acts_on_bias(self) -> bool:
        return any(m.acts_on_bias for m in self.methods)

    @property
    def adapts_vectors(self) -> bool:
        return all(m.adapts_vectors for m in self.methods)

    @property
    def starts_at_identity(self) -> bool:
        return all(m.starts_at_identity for m in self.methods)

    @property
    def statistic(self) -> tuple | None:
        parts = tuple(m.statistic for m in self.methods)
        return parts if any(part is not None for part in parts) else None

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        whole: tuple[Leaves, Leaves] = {}, {}
        for i, method in enumerate(self.methods):
            own = generator(rng.initial_seed(), i)
            _add(whole, i, start(method, site, own, None if stat is None else stat[i]))
            whole[1].update({f"{i}.{k}": site.zeros() + 1 for k in self.numbers})
        return whole

    def shared(self, sites: Sequence[SiteView], rng: torch.Generator) -> tuple[Leaves, Leaves]:
        whole: tuple[Leaves, Leaves] = {}, {}
        for i, method in enumerate(self.methods):
            _add(whole, i, start_shared(method, sites, generator(rng.initial_seed(), i)))
        return whole

    def project(self, train: Leaves) -> Leaves:
        return {
            f"{i}.{k}": t
            for i, method in enumerate(self.methods)
            for k, t in method.project(self.part(train, i)).items()
        }

    def part(self, p: Mapping[str, Tensor], i: int) -> Leaves:
        """The leaves of the method at ``i``, among those of all, with a key of dropout."""
        prefix = f"{i}."
        part = {k[len(prefix) :]: t for k, t in p.items() if k.startswith(prefix)}
        if DROPOUT_KEY in p:
            part.setdefault(DROPOUT_KEY, p[DROPOUT_KEY] + i)
        return part


def _add(whole: tuple[Leaves, Leaves], i: int, parts: tuple[Leaves, Leaves]) -> None:
    for leaves, part in zip(whole, parts, strict=True):
        leaves.update({f"{i}.{k}": t for k, t in part.items()})


@dataclass(frozen=True)
class Composed(Compound):
    """Methods of which each adapts the map that the one before made; :class:`fadapt.Chain`."""

    def part(self, p: Mapping[str, Tensor], i: int) -> Leaves:
        part = super().part(p, i)
        if STRENGTH in p:
            part[STRENGTH] = p[STRENGTH]
        return part


class ContractError(ConfigError):
    """What a method's class does wrong, as opposed to a site or a value that it refuses."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def has_shift(method: Method) -> bool:
    """Whether a method changes the input of its map."""
    if isinstance(method, Composed):
        return any(has_shift(m) for m in method.methods)
    return type(method).shift is not Method.shift


def has_delta(method: Method) -> bool:
    """Whether a method changes the output of its map."""
    if isinstance(method, Composed):
        return any(has_delta(m) for m in method.methods)
    return type(method).delta is not Method.delta


def drops_input(method: Method) -> bool:
    """Whether a method drops parts of its input while it trains."""
    if isinstance(method, Compound):
        return any(drops_input(m) for m in method.methods)
    return method.dropout > 0 and _is_own_dropout(method)


def _is_own_dropout(method: Method) -> bool:
    """Whether ``dropout`` is the field of all methods, and not another of a class's own."""
    declared = type(method).__dataclass_fields__["dropout"]
    return declared is Method.__dataclass_fields__["dropout"]


def acts_in_training(method: Method) -> bool:
    """Whether a method acts otherwise in its layer's training mode."""
    if isinstance(method, Compound):
        return any(acts_in_training(m) for m in method.methods)
    return drops_input(method) or type(method).delta_takes_training


def needs_plain_base(method: Method) -> bool:
    """Whether constants of the frozen weight enter a method."""
    if isinstance(method, Composed):
        return any(needs_plain_base(m) for m in method.methods)
    return method.needs_plain_base


@dataclass(frozen=True)
class SharedLeaves(Method):
    """Stands where a method's shared leaves are held, which is no layer.

    Args:
        of: the method that has them.
    """

    of: Method

    @property
    def keep_fp32(self) -> frozenset[str]:
        return self.of.keep_fp32


def has_shared(method: Method) -> bool:
    """Whether the sites of a method share leaves."""
    if isinstance(method, Compound):
        return any(has_shared(m) for m in method.methods)
    return type(method).shared is not Method.shared


TENSOR_PARALLEL = ("LoRA", "RsLoRA", "DoRA", "IA3", "IA3FF")
"""Methods that are tested over weights split by tensor parallelism."""


def check_tensor_parallel(name: str, method: Method) -> None:
    """Refuses a method over a weight that stays split over processes while it is multiplied.

    Raises:
        TargetError: a method that is not in ``TENSOR_PARALLEL``.
    """
    cls = type(method)
    if cls.__name__ in TENSOR_PARALLEL and cls.__module__.startswith("fadapt.methods."):
        return
    raise TargetError(
        f"{name} is split over processes by tensor parallelism, over which {cls.__name__} is not "
        f"known to hold; use one of {', '.join(TENSOR_PARALLEL)}, or shard the base with "
        "torch.distributed.fsdp.fully_shard, over which every method works"
    )


def check_contract(method: Method) -> None:
    """Refuses a class that is no whole method.

    Raises:
        ContractError: no dataclass, no ``init``, or neither ``shift`` nor ``delta``; or fields that
            were changed after construction to what they may not be.
    """
    cls = type(method)
    _require(
        isinstance(method, Method),
        f"expected a method, an instance of a subclass of fadapt.Method, got {method!r:.80}",
    )
    own = [n for n, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)]
    _require(
        "__dataclass_fields__" in vars(cls) or not own,
        f"{cls.__name__} declares the fields {own}; write @dataclass(frozen=True) above the class",
    )
    _require(
        cls.init is not Method.init,
        f"{cls.__name__} has no init; write init(self, site, rng), which returns two dicts of "
        "tensors, the trainable leaves and the fixed ones",
    )
    _require(
        has_shift(method) or has_delta(method),
        f"{cls.__name__} has neither shift nor delta, so it would change nothing; write "
        "delta(self, p, x, y, base), which returns the increment of the output, or shift(self, p, "
        "x), that of the input",
    )
    check_fields(method)


def check_site(method: Method, site: Site) -> None:
    """Refuses a site that the method, or the runtime for it, cannot take.

    Raises:
        ConfigError: with the reason.
    """
    check_contract(method)
    if isinstance(method, Compound):
        for inner in method.methods:
            check_site(inner, site)
    require(
        site.kind is not Kind.VECTOR or method.adapts_vectors,
        f"{type(method).__name__} is of matrices, and this is a vector of {site.out_features} "
        "values; write fadapt.IA3(), which scales it, or a method with adapts_vectors = True",
    )
    if method.dropout and _is_own_dropout(method):
        name = type(method).__name__
        require(
            not isinstance(method, Compound),
            f"{name} drops nothing itself; give dropout to the methods in it",
        )
        require(
            has_delta(method) and method.reads_input,
            f"the increment of {name} is not made of its input, of which dropout={method.dropout} "
            "would drop entries; write dropout=0.0",
        )
        require(
            site.kind in (*LINEAR_KINDS, Kind.MATRIX),
            f"dropout={method.dropout} drops entries of a linear map's input, and this is "
            f"{site.kind}; write dropout=0.0 here",
        )
    method.check(site)


def start(method: Method, site: SiteView, rng: torch.Generator, stat: Any) -> tuple[Leaves, Leaves]:
    """What ``init`` returns, after the checks.

    Raises:
        ContractError: something else than two dicts of tensors with distinct names.
    """
    # An author whose method asks for no statistic writes no argument for it.
    made = method.init(site, rng, *(() if method.statistic is None else (stat,)))
    return _checked_leaves(f"{type(method).__name__}.init at {site.name}", made)


def start_shared(
    method: Method, sites: Sequence[SiteView], rng: torch.Generator
) -> tuple[Leaves, Leaves]:
    """What ``shared`` returns, after the same checks."""
    return _checked_leaves(f"{type(method).__name__}.shared", method.shared(sites, rng))


def _checked_leaves(who: str, made: Any) -> tuple[Leaves, Leaves]:
    two = isinstance(made, (tuple, list)) and len(made) == 2
    if not two or not all(isinstance(part, Mapping) for part in made):
        found = type(made).__name__
        if isinstance(made, (tuple, list)):
            found = f"a {found} of ({', '.join(type(part).__name__ for part in made)})"
        raise ContractError(
            f"{who} returned {'one dict' if isinstance(made, Mapping) else found}; return two "
            "dicts, the trainable leaves and the fixed ones: return {...}, {}"
        )
    train, fixed = made
    both = train.keys() | fixed.keys()
    if taken := (train.keys() & fixed.keys()) | ({*RUNTIME_LEAVES} & both):
        raise ContractError(
            f"{who}: leaf names must be distinct and not of {RUNTIME_LEAVES}; rename "
            f"{sorted(taken)}"
        )
    for name, leaf in {**train, **fixed}.items():
        if not isinstance(name, str) or not isinstance(leaf, Tensor):
            raise ContractError(
                f"{who}: leaf {name!r} must be a tensor under a string, got "
                f"{type(leaf).__name__}; write torch.as_tensor(...)"
            )
        if name in train and not leaf.is_floating_point():
            raise ContractError(
                f"{who}: the trainable leaf {name!r} is {leaf.dtype}, which has no gradient; make "
                "it floating, or return it among the fixed leaves, the second dict"
            )
        if leaf.is_complex() or leaf.is_sparse or leaf.is_quantized:
            raise ContractError(
                f"{who}: leaf {name!r} is {leaf.layout} {leaf.dtype}; leaves are dense tensors, "
                "real, and only fixed ones integers or booleans (torch.view_as_real(z) holds a "
                "complex one)"
            )
    return dict(train), dict(fixed)


def check_start(
    method: Method, p: Mapping[str, Tensor], site: Site, base: LinearMap, device: torch.device
) -> None:
    """Refuses initial leaves at which the method is not the identity, as one random row shows.

    Raises:
        ContractError: an increment that is not zero.
    """
    if device.type == "meta" or not method.starts_at_identity:
        return
    dtype, rng = compute_dtype(method, p), torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(1, n, generator=rng, device="cpu").to(device, dtype)
        for n in (site.in_features, site.out_features)
    )
    try:
        moved, saved = adapt_input(method, p, x, site.name)
        # A random y stands for base(x), a product that a look at the start is not worth.
        adapted = adapt_output(method, p, saved, y, base, site.name)
    except Exception:  # what fails here fails in the first run, where it is seen in its place
        return
    for what, new, old in (("shift", moved, x), ("delta", adapted, y)):
        if not torch.equal(new, old):
            raise ContractError(
                f"{type(method).__name__}.{what} at {site.name} is not zero at the leaves that "
                f"init returns: up to {float((new - old).abs().max()):.3g} on a random row. Store "
                "what is trained as an increment that starts at zero, such as d of a gain 1 + d; "
                "or, where the method is to change the model from the start, set "
                "starts_at_identity = False"
            )


def compute_dtype(method: Method, p: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of the adapter's arithmetic: that of its floating leaves."""
    wide = method.keep_fp32
    for name, leaf in p.items():
        if leaf.is_floating_point() and name not in wide and name != STRENGTH:
            return leaf.dtype
    return torch.float32


def is_plain_product(x: Tensor, base: LinearMap) -> bool:
    """Whether base(x) is torch's product of a plain block of rows, of which nobody else knows.

    It is then a tensor of its own, in rows as in the shape of x to the last bit, into which an
    increment may be written.
    """
    return (
        not torch.compiler.is_compiling()
        and type(base) is DenseMap
        and type(x) is Tensor
        and x.dim() > 1
        and x.is_contiguous()
        and not is_transformed()
    )


def adapt_input(
    method: Method, p: Mapping[str, Tensor], x: Tensor, where: str = ""
) -> tuple[Tensor, Any]:
    """The base's input x', and what :func:`adapt_output` needs of it.

    Args:
        where: the site's name, for errors.

    Raises:
        ConfigError: an increment of another shape than what it is added to.
    """
    cls = type(method)
    if cls.shift is Method.shift and not isinstance(method, Composed):
        return x, x
    if isinstance(method, Composed):
        saved = []
        for i in reversed(range(len(method.methods))):
            x, keep = adapt_input(method.methods[i], method.part(p, i), x, where)
            saved.append(keep)
        return x, tuple(reversed(saved))
    shift = method.shift(p, _as(x, compute_dtype(method, p)))
    _check_shape(method, "shift", shift, x.shape, where)
    x = x + _as(_with_strength(method, p, shift), x.dtype)
    return x, x


def adapt_output(
    method: Method,
    p: Mapping[str, Tensor],
    saved: Any,
    y: Tensor,
    base: LinearMap,
    where: str = "",
    training: bool = False,
    draw: Tensor | None = None,
    into: bool | None = None,
) -> Tensor:
    """The adapted output, from the base's output y = base(x').

    Its leading axes may be others than those of the rows that came in, of as many rows.

    Args:
        where: the site's name, for errors.
        training: whether the layer is in training mode.
        draw: the number of the pass, from which masks of dropout follow; None takes a new one.
        into: whether a ``last_product`` is added within the product: into y itself, which was
            made for this call alone (True), or into a copy (False), by the same arithmetic. None
            forms the increment.

    Raises:
        ConfigError: an increment of another shape than what it is added to.
    """
    if isinstance(method, Composed):
        for i, inner in enumerate(method.methods):
            part = method.part(p, i)
            y = adapt_output(inner, part, saved[i], y, base, where, training, draw)
            base = AdaptedMap(inner, part, base)
        return y
    cls = type(method)
    if cls.delta is Method.delta:
        return y
    dtype, shape = compute_dtype(method, p), y.shape
    wanted = (*saved.shape[:-1], shape[-1])
    rows = y
    if method.reads_output:
        rows = y if wanted == shape else y.reshape(wanted)
        rows = _as(rows, dtype) if method.casts_output else rows
    x = _as(saved, dtype)
    if training and method.dropout and drops_input(method):
        draw = fresh_draw(x.device) if draw is None else draw
        x = drop(x, method.dropout, p.get(DROPOUT_KEY), draw)
    if into is not None and dtype is y.dtype and wanted == shape and says_last_product(cls):
        product = method.last_product(p, x, base)
        if product is not None and product[1].dim() == y.dim():
            return _add_product(method, p, y, into, product)
    if isinstance(method, Compound):  # its parts may drop their input
        delta = method.delta(p, x, rows, base, training, draw)  # type: ignore[call-arg]
    elif cls.delta_takes_training:
        delta = method.delta(p, x, rows, base, training=training)  # type: ignore[call-arg]
    else:
        delta = method.delta(p, x, rows, base)
    _check_shape(method, "delta", delta, wanted, where)
    delta = _as(_with_strength(method, p, delta), y.dtype)
    return y + (delta if wanted == shape else delta.reshape(shape))


@functools.cache
def says_last_product(cls: type[Method]) -> bool:
    """Whether a class says of its own ``delta`` what its last product is."""
    return _is_of_own_increment(cls, "last_product", {"delta"})


def _is_of_own_increment(cls: type[Method], says: str, of: set[str]) -> bool:
    """Whether what a class says of its increment is not said of that of another class.

    Args:
        says: the name of the function that says it.
        of: the names of the functions that it is about.
    """
    for c in cls.__mro__:
        if says in vars(c):
            return c is not Method
        if vars(c).keys() & of:
            return False
    return False


def _add_product(
    method: Method, p: Mapping[str, Tensor], y: Tensor, into: bool, product: LastProduct
) -> Tensor:
    """y + c h Bᵀ by one product, so that no increment takes memory and time of its own."""
    h, b, c = product
    h, b = _with_strength(method, p, h), b.mT
    if y.dim() == 2:
        return y.addmm_(h, b, alpha=c) if into else torch.addmm(y, h, b, alpha=c)
    return y.baddbmm_(h, b, alpha=c) if into else torch.baddbmm(y, h, b, alpha=c)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; itself, without a call of torch's, where it has that."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def adapt(method: Method, p: Mapping[str, Tensor], x: Tensor, base: LinearMap) -> Tensor:
    """The adapted map on plain rows: (tokens, in_features) -> (tokens, out_features)."""
    x, saved = adapt_input(method, p, x)
    return adapt_output(method, p, saved, base(x), base)


def dense(method: Method, p: Mapping[str, Tensor], base: LinearMap) -> tuple[Tensor, Tensor | None]:
    """The adapted weight (out, in) and bias: W' = [f(I) - f(0)]ᵀ, b' = f(0)."""
    weight = base.weight()
    zero = adapt(method, p, weight.new_zeros(1, weight.shape[1]), base)
    width = weight.shape[1]
    rows = []
    for start in range(0, width, 2048):
        count = min(2048, width - start)
        # Rows of the identity; the whole of it would be as large as the input is wide, squared.
        eye = torch.eye(count, dtype=weight.dtype, device=weight.device)
        rows.append(adapt(method, p, F.pad(eye, (start, width - start - count)), base) - zero)
    return torch.cat(rows).mT, None if base.bias is None else zero[0]


def increment_factors(method: Method, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
    """:meth:`Method.low_rank` at the strength in ``p``; None where it is not known.

    What a class says of its increment is not taken for a subclass with another increment.
    """
    if not _is_of_own_increment(type(method), "low_rank", {"delta", "shift", "increment"}):
        return None
    factors = method.low_rank(p, base)
    if factors is None or method.owns_strength or STRENGTH not in p:
        return factors
    return factors[0], factors[1] * p[STRENGTH].to(factors[1].dtype)


class AdaptedMap:
    """An adapted map as the base of the next method: what makes composition closed."""

    def __init__(self, method: Method, p: Mapping[str, Tensor], base: LinearMap):
        self._method, self._p, self._base = method, p, base

    @property
    def bias(self) -> Tensor | None:
        if self._base.bias is None or not self._method.acts_on_bias:
            return self._base.bias
        return self(self._zero())[0]

    def __call__(self, x: Tensor) -> Tensor:
        return adapt(self._method, self._p, x, self._base)

    def linear(self, z: Tensor) -> Tensor:
        y = self(z)
        return y if self.bias is None else y - self(self._zero()).to(y.dtype)

    def weight(self) -> Tensor:
        return dense(self._method, self._p, self._base)[0]

    def _zero(self) -> Tensor:
        weight = self._base.weight()
        return weight.new_zeros(1, weight.shape[1])


def _check_shape(method: Method, what: str, increment: Any, wanted: Any, where: str) -> None:
    if isinstance(increment, Tensor) and increment.shape == wanted:
        return
    found = tuple(increment.shape) if isinstance(increment, Tensor) else type(increment).__name__
    if found != tuple(wanted):
        of = "input (tokens, in_features)" if what == "shift" else "output (tokens, out_features)"
        raise ContractError(
            f"{type(method).__name__}.{what} at {where or 'a site'} returned {found} where "
            f"{tuple(wanted)} is needed: {what} returns the increment of the {of}, one row per "
            "token; .expand_as(...) repeats one row for all"
        )


def _with_strength(method: Method, p: Mapping[str, Tensor], increment: Tensor) -> Tensor:
    if method.owns_strength or STRENGTH not in p:
        return increment
    return p[STRENGTH].to(increment.dtype) * increment
