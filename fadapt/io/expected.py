"""What leaves a method has at a site, from shapes alone: what a file's leaves are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..adapted_map import SharedLeaves, adapt, check_site, start
from ..base.linear_map import DenseMap
from ..errors import CheckpointError
from ..method import DROPOUT_KEY, RUNTIME_LEAVES, STRENGTH, Leaves, Method, RankPadded
from ..seeds import generator
from ..site import Site, SiteView
from ..statistics.reduction import width_of
from .tensors import TensorSpec

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Specs = dict[str, TensorSpec]


def check_specs(
    who: str, site: Site, method: Method, train: Specs, fixed: Specs, bank: Specs | None = None
) -> None:
    """Refuses leaves that the method does not have at this site; nothing is computed.

    Args:
        who: names the file and the site, for messages.
        train, fixed: {leaf: shape and dtype}, with the axis of the experts in front.
        bank: the leaves that the method's sites share.

    Raises:
        CheckpointError: other names, shapes or dtypes, or a method that refuses the site.
    """
    specs = {**train, **fixed}
    if len(specs) < len(train) + len(fixed):
        raise CheckpointError(f"{who}: {sorted(train.keys() & fixed.keys())} is there twice")
    _check_dtypes(who, method, train, fixed)
    strength = fixed.get(STRENGTH)
    if STRENGTH in train or (strength is not None and strength.shape):
        raise CheckpointError(f"{who}: the strength must be one fixed number, got {strength}")
    key, wanted = fixed.get(DROPOUT_KEY), (site.experts,) if site.experts else ()
    if DROPOUT_KEY in train or (key and (key.shape, key.dtype) != (wanted, torch.int64)):
        raise CheckpointError(f"{who}: the key of dropout must be one fixed integer, got {key}")
    own = [
        {
            k: spec
            for k, spec in part.items()
            if k not in RUNTIME_LEAVES and _per_expert(who, site, k, spec)
        }
        for part in (train, fixed)
    ]
    shapes = [{k: s.shape[1:] if site.experts else s.shape for k, s in p.items()} for p in own]
    both = {**shapes[0], **shapes[1]}
    try:
        check_site(method, site)
        _check_rank(who, method, both)
        bank = bank or {}
        _check_map(
            who,
            site,
            method,
            {**{k: spec.shape for k, spec in bank.items()}, **both},
            {k: spec.dtype for k, spec in {**bank, **specs}.items()},
        )
        made = _made(site, method)
    except CheckpointError:
        raise
    # A file chooses the method and its fields, so whatever they raise is said of the file.
    except Exception as error:
        raise CheckpointError(f"{who}: the leaves {both} do not fit {method!r}: {error}") from error
    if made is not None and bank:  # init may return them, too, at every site
        made = tuple({k: s for k, s in part.items() if k not in bank} for part in made)
    if made is not None and made != (shapes[0], shapes[1]):
        raise CheckpointError(
            f"{who}: {method!r} has the leaves {made[0]} and {made[1]} there, trainable and fixed; "
            f"the file has {shapes[0]} and {shapes[1]}"
        )


def check_shared_specs(who: str, method: SharedLeaves, train: Specs, fixed: Specs) -> None:
    """Refuses shared leaves by their dtypes; their shapes are those that the sites can use."""
    if taken := train.keys() & fixed.keys():
        raise CheckpointError(f"{who}: {sorted(taken)} is there twice")
    _check_dtypes(who, method, train, fixed)


def _check_dtypes(who: str, method: Method, train: Specs, fixed: Specs) -> None:
    for part, may_be in ((train, FLOATS), (fixed, (*FLOATS, *INTEGERS))):
        if odd := [k for k, spec in part.items() if spec.dtype not in may_be]:
            raise CheckpointError(f"{who}: {odd[0]} is {part[odd[0]].dtype}")
    if STRENGTH in fixed and fixed[STRENGTH].dtype not in FLOATS:
        raise CheckpointError(f"{who}: the strength is {fixed[STRENGTH].dtype}")
    wide, specs = method.keep_fp32 | {STRENGTH}, {**train, **fixed}
    dtypes = {str(s.dtype) for k, s in specs.items() if k not in wide and s.dtype in FLOATS}
    if len(dtypes) > 1:
        raise CheckpointError(f"{who}: its leaves are of several dtypes, {sorted(dtypes)}")


def _per_expert(who: str, site: Site, key: str, spec: TensorSpec) -> bool:
    if site.experts and spec.shape[:1] != (site.experts,):
        raise CheckpointError(f"{who}: {key} is {spec}, for a stack of {site.experts} matrices")
    return True


def _check_rank(who: str, method: Method, shapes: dict[str, tuple[int, ...]]) -> None:
    # First: where the shapes are made, a rank of 10¹² is a shape like any other.
    if not isinstance(method, RankPadded):
        return
    for key, axis in method.rank_axes.items():
        shape = shapes.get(key)
        if shape is not None and (len(shape) < -axis or shape[axis] != method.r):
            raise CheckpointError(f"{who}: {key} has the shape {list(shape)}, under {method!r}")


def _check_map(
    who: str,
    site: Site,
    method: Method,
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
) -> None:
    """Runs the adapted map on tensors without values."""
    with torch.no_grad(), torch.device("meta"):
        p = {
            k: torch.empty(shape, dtype=dtypes[k] if dtypes[k] in INTEGERS else torch.float32)
            for k, shape in shapes.items()
        }
        y = adapt(method, p, torch.empty(3, site.in_features), _base(site))
    if tuple(y.shape) != (3, site.out_features):
        raise CheckpointError(f"{who}: the leaves {shapes} do not fit its shape")


def _base(site: Site) -> DenseMap:
    bias = torch.empty(site.out_features, device="meta") if site.bias else None
    return DenseMap(torch.empty(site.matrix_shape, device="meta"), bias)


def _made(site: Site, method: Method) -> tuple[dict, dict] | None:
    """The shapes of what ``method.init`` returns; None where they cannot be known without data."""
    try:
        with torch.no_grad(), torch.device("meta"), _AnyAnswer():
            view = _ShapeView(site, _base(site), torch.device("meta"), torch.float32)
            stat = _statistic(method.statistic, site)
            train, fixed = start(method, view, generator(0, site.name), stat)
        return _shapes(train), _shapes(fixed)
    except Exception:
        # A method may draw its own numbers, or refuse a statistic without values.
        return None


def _shapes(leaves: Leaves) -> dict[str, tuple[int, ...]]:
    return {k: tuple(t.shape) for k, t in leaves.items()}


def _statistic(wanted: Any, site: Site) -> Any:
    if wanted is None:
        return None
    if isinstance(wanted, tuple):
        return tuple(_statistic(part, site) for part in wanted)
    stored = wanted.reduction.stored
    width = width_of(wanted.side, site.matrix_shape)
    state = stored.zero(width, "meta", torch.empty(site.matrix_shape, device="meta"))
    counts = {"n": torch.tensor(1e9, device="cpu"), "bad": torch.tensor(0.0, device="cpu")}
    return wanted.reduction.finalize(stored.convert({**state, **counts}, wanted.reduction))


class _ShapeView(SiteView):
    """A site whose random tensors have no values, and cost nothing."""

    def uniform(self, rng: torch.Generator, shape: Any, bound: float) -> Tensor:
        return self.zeros(*shape)

    def normal(self, rng: torch.Generator, shape: Any, std: float = 1.0) -> Tensor:
        return self.zeros(*shape)


class _AnyAnswer(TorchFunctionMode):
    """Inside, questions about values that do not exist are answered: yes, and very many.

    Calibrated methods ask whether a statistic is finite and how many directions it has; the shapes
    of what they make do not depend on it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is Tensor.__bool__:
                return True
            if func in (Tensor.item, Tensor.__int__, Tensor.__index__):
                return 1 << 40
        return func(*args, **(kwargs or {}))
