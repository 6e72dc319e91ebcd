"""Mounting: adapters put where a model's weights are, for one call or for a while."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapted_map import acts_in_training
from ..base.checks import check_one_way, check_weight
from ..base.flow import is_step
from ..base.quantized import QuantizedMap
from ..base.scope import (
    BUFFERS,
    PARAMETERS,
    OnRead,
    Place,
    View,
    own_function,
    own_tensors,
)
from ..base.sharded import compute_device, is_dtensor
from ..base.survey import Held, Survey, Walk, survey
from ..base.torch_private import buffers_of, is_persistent, is_transformed, parameters_of
from ..base.weights import Kind
from ..dropout import fresh_draw
from ..errors import ConfigError, TargetError
from ..hugging_face import CHECKPOINT_FUNCTION, checkpoint_function, forward_key
from ..params.adapter import Adapted, Adapter
from ..params.params import Params
from .checkpointing import Recomputed, refuse_checkpoint
from .exact import layer_map, marked_like
from .fused import let_fuse
from .rules import overlay
from .tensor import Overlay, aliased, materialize
from .witness import Watched

# Dynamo follows F.layer_norm to an overlay in every version, and F.rms_norm since 2.13.
_FOLLOWS_RMS_NORM = torch.__version__ >= "2.13"


class SwappedForward:
    """The ``forward`` of a quantised layer for one call: its weight cannot be overlaid.

    Args:
        base: the layer's frozen map.
        adapter: the layer's adapter, or None: then the layer is its own, but in a form that
            torch.func can transform.
    """

    def __init__(self, base: QuantizedMap, adapter: Adapted | None):
        self.base, self.adapter = base, adapter

    def __call__(self, x: Tensor) -> Tensor:
        if self.adapter is None:
            return self.base(x)
        refuse_checkpoint(self.adapter)
        return self.adapter(x, self.base)


class LinearForward:
    """The ``forward`` of an ``nn.Linear`` for one call: what its weight's overlay would come to.

    It spares the way through torch's dispatch of functions, which costs as much as a small product.

    Args:
        module: the layer.
        adapter: of its weight.
        seen: what the call sees in place of the layer's parameters.
    """

    __slots__ = ("adapter", "module", "seen")

    def __init__(self, module: nn.Module, adapter: Adapted, seen: Mapping[str, Any]):
        self.module, self.adapter, self.seen = module, adapter, seen

    @is_step
    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in nn.Linear
        module, adapter = self.module, self.adapter
        own = own_tensors(parameters_of(module))
        weight, bias = own["weight"], own["bias"]
        seen = self.seen
        # Unless the forward has put another weight there, as by torch.func.functional_call.
        plain = type(input) is Tensor and "bias" not in seen and isinstance(seen["weight"], OnRead)
        if not plain or weight is None or (bias is None and adapter.acts_on_bias):
            return F.linear(input, module.weight, module.bias)  # type: ignore[arg-type]
        refuse_checkpoint(adapter)
        required_grad = weight.requires_grad
        frozen = weight.detach() if required_grad else weight
        return adapter(input, layer_map(input, frozen, bias, False, required_grad))


class TwinForward:
    """The ``forward`` of a recurrent layer for one call: of another layer with the same contents.

    Such a layer keeps a list of its weights, which it makes anew when it sees others. In the layer
    itself it would be seen by other threads, and stay after the call.

    Args:
        module: the layer.
    """

    __slots__ = ("module",)

    def __init__(self, module: nn.Module):
        self.module = module

    @is_step
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cls = type(self.module)
        twin = cls.__new__(cls)
        twin.__dict__.update(self.module.__dict__)
        twin.__dict__.pop("forward", None)
        twin.__dict__[PARAMETERS] = dict(parameters_of(self.module).items())
        return cls.forward(twin, *args, **kwargs)


class _Overlaid(OnRead):
    """An overlay of a site's weight, made when the weight is read."""

    __slots__ = ("adapter",)

    def __init__(self, adapter: Adapted):
        super().__init__(functools.partial(_overlay_of, adapter))
        self.adapter = adapter


def _overlay_of(adapter: Adapted, weight: Tensor) -> Overlay:
    return overlay(weight.detach(), adapter, required_grad=weight.requires_grad)


def _traced(adapter: Adapted, weight: Tensor, module: nn.Module) -> Tensor:
    """What a compiled call sees of a site's weight.

    The vector of one adapter itself: Dynamo does not follow every function of norms to an overlay,
    and an adapted vector costs next to nothing to compute.
    """
    made = _overlay_of(adapter, weight)
    if adapter.site.kind is Kind.VECTOR:
        if isinstance(adapter, Adapter):
            return materialize(made)
        if not _FOLLOWS_RMS_NORM and isinstance(module, nn.RMSNorm):
            raise TargetError(
                f"{adapter.site.name} is of an nn.RMSNorm, of which torch {torch.__version__} "
                "compiles no stack; run it uncompiled, one adapter at a time, or with torch 2.13"
            )
    return made


def _alias(weight: Tensor) -> Tensor:
    alias = marked_like(weight.detach(), True)
    told = not (torch.compiler.is_compiling() or is_transformed())
    if told and (tell := aliased.get()) is not None:
        tell(weight, alias)
    return alias


_ALIAS = OnRead(_alias)
"""Of a base parameter that asks for gradients, which must not reach it."""


@dataclass(frozen=True)
class _Part:
    """One parameter in whose place a call sees something else, checked.

    Attributes:
        held: the parameter.
        adapter: of a site, else None.
        follows: whether the adapter is to know its layer.
        seen: what is seen there, as far as it is the same in all calls.
    """

    held: Held
    adapter: Adapted | None
    follows: bool
    seen: OnRead | None


class _Parts(list[_Part]):
    """The parts of one set of sites.

    Args:
        parts: the parts.
        where: (leaf, device) of every adapter, which was compared with its weight's.
    """

    def __init__(self, parts: Iterable[_Part], where: list[tuple[Tensor, torch.device]]):
        super().__init__(parts)
        self.where = where

    def hold(self) -> bool:
        """Whether the adapters are where they were."""
        return all(leaf.device == device for leaf, device in self.where)


class Mount:
    """What one call is to see in the places of a model's own tensors and functions.

    Args:
        model: the base.
        modules: all modules of the model.
        walk: over them.
        parts: of the sites.
        any_mode: whether the mode may change before the model runs, as in a ``bound`` block.
        found: the survey of the model, outside of torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: list[nn.Module],
        walk: Walk,
        parts: Sequence[_Part],
        any_mode: bool,
        found: Survey | None = None,
    ):
        self.model, self.modules, self.walk, self.parts = model, modules, walk, parts
        self.any_mode, self.found = any_mode, found
        self.draws = _Draws(any_mode)

    @property
    def checkpoints(self) -> bool:
        """Whether the model checkpoints activations by a function of its own."""
        return bool(self.walk.checkpointed)

    @property
    def sharded(self) -> str:
        """The name of a weight that is spread over processes, or ""."""
        return next((part.held.name for part in self.parts if part.held.sharded), "")

    def by_name(self) -> dict[str, Tensor]:
        """The tensors, for torch.func.functional_call."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            if part.held.quantized is None:
                module = self.modules[part.held.at]
                weight = own_tensors(parameters_of(module))[part.held.key]
                assert weight is not None
                adapter = self._within(part, module)
                found[part.held.name] = (
                    marked_like(weight.detach(), True)
                    if adapter is None
                    else _traced(adapter, weight, module)
                )
        for prefix, _, key, buffer in self._buffers():
            found[f"{prefix}.{key}" if prefix else key] = buffer.clone()
        return found

    def forwards(self) -> list[tuple[nn.Module, str, SwappedForward]]:
        """(module, attribute, function) of the quantised layers, whose kernels take no overlay."""
        found = []
        for part in self.parts:
            if part.held.quantized is not None:
                module = self.modules[part.held.at]
                swapped = SwappedForward(part.held.quantized(module), self._within(part, module))
                found.append((module, forward_key(module), swapped))
        return found

    def view(
        self,
        owner: Any = None,
        instead: Sequence[tuple[nn.Module, Callable[..., Any]]] = (),
    ) -> View:
        """The model as the call sees it.

        Args:
            owner: the params of a ``bound`` block.
            instead: (part, function): what runs parts of the model, with the adapters in them.
        """
        seen: dict[Place, Any] = {(id(module), "forward"): function for module, function in instead}
        places: list[tuple[nn.Module, str]] = [(module, "forward") for module, _ in instead]
        elsewhere = {id(inner) for module, _ in instead for inner in module.modules()}
        recomputed = []
        for part in self.parts:
            held, module = part.held, self.modules[part.held.at]
            if elsewhere and id(module) in elsewhere:
                continue
            adapter = self._within(part, module) if part.follows else part.adapter
            place = id(module), PARAMETERS
            if held.quantized is not None:
                place = id(module), forward_key(module)
                seen[place] = SwappedForward(held.quantized(module), adapter)
                places.append((module, place[1]))
                continue
            if place not in seen:
                seen[place] = {}
                places.append((module, PARAMETERS))
            seen[place][held.key] = part.seen or _seen_of(held, adapter)
            if (
                isinstance(module, nn.RNNBase)
                and (id(module), "forward") not in seen
                and own_function(module.__dict__.get("forward")) is None
            ):
                seen[id(module), "forward"] = TwinForward(module)
                places.append((module, "forward"))
            if adapter is not None and held.plain_linear and _is_plain(adapter):
                seen[id(module), "forward"] = LinearForward(module, adapter, seen[place])
                places.append((module, "forward"))
        if self.walk.fused and not instead:
            more = let_fuse([self.modules[at] for at in self.walk.fused], seen)
            places += [(module, PARAMETERS) for module in more]
        for _, module, key, buffer in self._buffers():
            place = id(module), BUFFERS
            if place not in seen:
                seen[place] = {}
                places.append((module, BUFFERS))
            seen[place][key] = buffer.clone()
        for at in self.walk.checkpointed:
            module = self.modules[at]
            function = Recomputed(own_function(checkpoint_function(module)))
            seen[id(module), CHECKPOINT_FUNCTION] = function
            places.append((module, CHECKPOINT_FUNCTION))
            recomputed.append(function)
        if self.found is not None and not instead:
            self._watch(self.found, seen, places)
        ids = frozenset(map(id, self.modules)) if self.found is None else self.found.ids
        view = View(self.model, ids, seen, places, owner)
        for function in recomputed:
            function.view = view
        return view

    def _watch(
        self, found: Survey, seen: dict[Place, Any], places: list[tuple[nn.Module, str]]
    ) -> None:
        """Has the model's next forward watched, if none of its kind was."""
        adapted = [p for p in self.parts if p.adapter is not None]
        modes = self.model.training, torch.is_grad_enabled()
        kind = frozenset(p.held.name for p in adapted), modes
        if kind in found.watched or self.sharded:
            return
        quantized = any(p.held.quantized for p in self.parts)
        if quantized and any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return  # bitsandbytes' own operations, seen from below, would not be cast
        model, place = self.model, (id(self.model), "forward")
        function = seen.get(place) or own_function(model.__dict__.get("forward"))
        if place not in seen:
            places.append((model, "forward"))
        seen[place] = Watched(
            model,
            function or type(model).forward.__get__(model),
            [(p.held.at, p.held.key, p.held.name) for p in adapted if p.held.quantized is None],
            self.modules,
            [t for p in adapted for t in getattr(p.adapter, "tensors", ())],
            functools.partial(found.watched.add, kind),
            functools.partial(found.watched.discard, kind),
        )

    def _within(self, part: _Part, module: nn.Module) -> Adapted | None:
        adapter = part.adapter
        if adapter is None or not part.follows:
            return adapter
        return adapter.within(module, self.draws.of(adapter, module))

    def _buffers(self) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
        """(path, module, key, buffer) of those that a forward may write to."""
        for prefix, at in self.walk.buffered:
            module = self.modules[at]
            training = self.any_mode or module.training
            for key, buffer in own_tensors(buffers_of(module)).items():
                if buffer is not None and _may_be_updated(module, key, buffer, training):
                    yield prefix, module, key, buffer


def _seen_of(held: Held, adapter: Adapted | None) -> OnRead:
    if held.sharded:
        return OnRead(Gathered(adapter, held.in_unit), passes_writes=True)
    return _ALIAS if adapter is None else _Overlaid(adapter)


def _is_plain(adapter: Adapted) -> bool:
    """Whether the adapter's matrix is a linear layer's weight as it is stored."""
    site = adapter.site
    return not (site.transposed or site.experts or site.flat)


def prepare(model: nn.Module, sites: Mapping[str, Adapted], any_mode: bool = False) -> Mount:
    """An overlay for every site, a detached alias for every other trainable base parameter.

    And copies of the buffers that a forward may write to, such as the running statistics of
    BatchNorm: the base stays as it is.

    Args:
        any_mode: whether the mode may change before the model runs, as in a ``bound`` block.

    Raises:
        TargetError: a model that no adapted call can run, or sites of another one.
        ConfigError: adapters on another device.
    """
    if torch.compiler.is_compiling():
        walk = Walk(model)
        parts = _parts(model, walk.modules, walk, sites)
        return Mount(model, walk.modules, walk, parts, any_mode)
    found, modules = survey(model)
    parts = None
    if isinstance(sites, Params):
        ref, parts = found.kept.get(id(sites), (None, None))
        if ref is None or ref() is not sites or not parts.hold():
            parts = _parts(model, modules, found.walk, sites)
            forget = functools.partial(_forget, weakref.ref(found), id(sites))
            found.kept[id(sites)] = weakref.ref(sites, forget), parts
    else:
        parts = _parts(model, modules, found.walk, sites)
    return Mount(model, modules, found.walk, parts, any_mode, found)


def _forget(kept: weakref.ref[Survey], key: int, ref: Any) -> None:
    found = kept()
    if found is not None and found.kept.get(key, (None,))[0] is ref:
        del found.kept[key]


def _parts(
    model: nn.Module, modules: list[nn.Module], walk: Walk, sites: Mapping[str, Adapted]
) -> _Parts:
    """What the call is to see of the parameters, after all checks."""
    parts, where, names = [], [], {held.name for held in walk.held}
    for held in walk.held:
        adapter = sites.get(held.name)
        module = modules[held.at]
        weight = own_tensors(parameters_of(module))[held.key]
        assert weight is not None
        if adapter is not None:
            wanted, found = adapter.site.stored_shape, tuple(weight.shape)
            if held.quantized is not None:
                base = held.quantized(module)
                base.check(held.name)
                wanted, found = adapter.site.matrix_shape, base.shape
            else:
                check_weight(held.name, module, weight)
            where.append(_check_site(held.name, found, weight, adapter, wanted))
        elif held.quantized is None and not held.requires_grad:
            continue
        if held.in_unit:
            check_one_way(held.name, weight)
        follows = adapter is not None and not _stays(adapter)
        same = None if held.quantized is not None or follows else _seen_of(held, adapter)
        parts.append(_Part(held, adapter, follows, same))
    if missing := [n for n, a in sites.items() if n not in names and not a.site.is_shared]:
        raise TargetError(
            f"the params adapt {missing[0]} and {len(missing) - 1} more weights that this "
            f"{type(model).__name__} does not have; they were made for another model"
        )
    return _Parts(parts, [pair for pair in where if pair is not None])


def _stays(adapter: Adapted) -> bool:
    """Whether an adapter is the same in every layer and mode."""
    return isinstance(adapter, Adapter) and not acts_in_training(adapter.method)


class _Draws:
    """The number from which all masks of dropout in one call follow.

    It is drawn before the call, so that a recomputation has the same.

    Args:
        any_mode: whether there are many calls, which draw their own.
    """

    def __init__(self, any_mode: bool):
        self.any_mode = any_mode
        self.drawn: Tensor | None = None

    def of(self, adapter: Adapted, module: nn.Module) -> Tensor | None:
        """For an adapter in its layer; None where it needs none, or a new one each time."""
        if self.any_mode or not module.training or not adapter.drops:
            return None
        if self.drawn is None:
            self.drawn = fresh_draw(adapter.device or torch.device("cpu"))
        return self.drawn


class Gathered:
    """The overlay of a weight as it is when its layer reads it: gathered by FSDP2, or a DTensor.

    Args:
        adapter: what is to stand there, or None for the frozen weight itself.
        in_unit: whether FSDP2 gathers it.
    """

    def __init__(self, adapter: Adapted | None, in_unit: bool):
        self.adapter, self.in_unit = adapter, in_unit

    def __call__(self, weight: Tensor) -> Tensor:
        adapter = self.adapter
        if is_dtensor(weight):
            if self.in_unit:
                # Not gathered: FSDP2 itself asks. A layer cannot compute with it.
                return weight
            mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
            adapter = adapter and adapter.over_mesh(mesh)
        return weight.detach() if adapter is None else overlay(weight.detach(), adapter)


def _may_be_updated(module: nn.Module, key: str, buffer: Tensor, training: bool) -> bool:
    """Whether a forward may write to a buffer of the model's state.

    Not to those outside the state dict, which a model makes anew from its configuration, nor to
    matrices of integers, in which quantised layers of other libraries pack their weights, and the
    scales beside them. torch's own modules write in training mode alone.
    """
    if not is_persistent(module, key) or buffer.is_meta:
        return False
    if not training and (type(module).__module__.startswith("torch.nn.") or _packs(module)):
        return False
    return buffer.is_floating_point() or buffer.is_complex() or buffer.dim() < 2


def _packs(module: nn.Module) -> bool:
    buffers = own_tensors(buffers_of(module)).values()
    return any(
        b is not None and b.dim() > 1 and not (b.is_floating_point() or b.is_complex())
        for b in buffers
    )


def _check_site(
    name: str, found: tuple[int, ...], weight: Tensor, adapter: Adapted, wanted: tuple[int, ...]
) -> tuple[Tensor, torch.device] | None:
    """Refuses an adapter that does not fit; returns one of its leaves and where that has to be."""
    where = compute_device(weight)
    if found != wanted:
        raise TargetError(
            f"{name} has shape {found}, but its adapter was made for {wanted}: another base model"
        )
    device = adapter.device or where
    if device.type == "meta" and not weight.is_meta:
        raise TargetError(
            f"the adapter of {name} was made on a meta model and has no values; call fadapt.init "
            "or fadapt.load with this model"
        )
    if device != where:
        raise ConfigError(
            f"{name} is on {where}, its adapter on {device}; "
            f"write params = params.to({str(where)!r})"
        )
    if not isinstance(adapter, Adapter) or adapter.device is None:
        return None
    return next(iter(adapter.leaves.values())), where


@contextmanager
def forwards_swapped(forwards: list[tuple[nn.Module, str, SwappedForward]]) -> Iterator[None]:
    """The forwards in their places, as torch.compile traces it; the rest is functional_call's."""
    before = [(m, key, m.__dict__.get(key)) for m, key, _ in forwards]
    try:
        for module, key, new in forwards:
            setattr(module, key, new)
        yield
    finally:
        for module, key, old in reversed(before):
            if old is None:
                module.__dict__.pop(key, None)
            else:
                setattr(module, key, old)
