"""The first forward with adapters in a model is watched for what goes past them.

An adapter stands where a module has its weight. A model may come to the weight on another way: by
a list in which it kept the parameter, a closure, a module outside of its modules, a copy. There the
frozen weight would be used without a word. So the operations of one forward are seen, and one
that reads an adapted weight, other than an adapter does, is an error; and so is one that computes
with the placeholder which stands for a weight. So is one that changes a parameter: the base is
frozen, and what is written to an adapted weight, which is computed when it is read, is lost. A
tensor that follows from the adapters, and that the forward leaves in an attribute of a module, is
named: the base would find it there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.flow import Flow, is_entry, is_step, models_own
from ..base.scope import own_tensors
from ..base.torch_private import (
    StorageWeakRef,
    in_backward,
    is_transformed,
    is_view_of_argument,
    parameters_of,
    pytree,
    storage_key,
    written_arguments,
)
from ..errors import FadaptError, FadaptWarning, TargetError
from .tensor import Overlay, aliased, handed_out, when_lost

Range = tuple[int, int, str]
"""(first byte, last byte, name) of an adapted weight in its storage."""


class Frozen:
    """Where the adapted weights of a model lie in memory.

    Args:
        adapted: (name, weight) of each.
        others: all other parameters. A weight that is tied to one of them is left out: this other
            use of it is the base's own, which :func:`fadapt.init` names.

    Attributes:
        weights: (name, weight, its data as it is now) of each adapted one.
    """

    def __init__(self, adapted: Sequence[tuple[str, Tensor]], others: Sequence[Tensor]):
        self._ranges: dict[int, list[Range]] = {}
        self.weights: list[tuple[str, Tensor, Tensor]] = []
        for name, weight in adapted:
            if type(weight) not in (Tensor, nn.Parameter):
                continue
            self.weights.append((name, weight, weight.detach()))
            key, low, high = _extent(weight)
            if key is not None and high > low:
                self._ranges.setdefault(key, []).append((low, high, name))
        for other in others:
            key, low, high = _extent(other)
            if key in self._ranges:
                self._ranges[key] = [r for r in self._ranges[key] if r[1] <= low or high <= r[0]]

    def name_of(self, tensor: Tensor) -> str:
        """The adapted weight that a tensor lies in; "" if it lies in none."""
        key = storage_key(tensor)
        if key not in self._ranges:
            return ""
        _, low, high = _extent(tensor)
        return next((n for a, b, n in self._ranges[key] if a < high and low < b), "")


def _extent(tensor: Tensor) -> tuple[int | None, int, int]:
    """(storage, first byte, end) of a tensor."""
    key = storage_key(tensor)
    if key is None or not tensor.numel():
        return None, 0, 0
    low, size = int(tensor.storage_offset()), tensor.element_size()
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return key, low * size, (low + span) * size


class Watched:
    """The ``forward`` of a model for the first call: watched, and then its own.

    Args:
        model: the base.
        function: what its forward is in this call.
        places: (number of the module, key, name) of the adapted weights.
        modules: all modules of the model.
        leaves: of the adapters.
        done: called after a forward in which all was well.
        again: called when its backward pass was not.
    """

    __slots__ = (
        "_again",
        "_done",
        "_function",
        "_leaves",
        "_model",
        "_modules",
        "_over",
        "_places",
    )

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any],
        places: Sequence[tuple[int, str, str]],
        modules: Sequence[nn.Module],
        leaves: Sequence[Tensor],
        done: Callable[[], None],
        again: Callable[[], None],
    ):
        self._model, self._function, self._modules = model, function, modules
        self._places, self._leaves, self._done, self._again = places, leaves, done, again
        self._over = False

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self._function  # for inspect.signature

    @is_entry
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._over or torch.compiler.is_compiling() or not _possible():
            return self._function(*args, **kwargs)
        self._over = True  # the forward may call itself
        try:
            before = _attributes(self._modules)
            frozen, base = self._frozen()
            with _Watch(frozen, base, self._leaves) as watch:
                lost = when_lost.set(self._again if torch.is_grad_enabled() else None)
                told = handed_out.set(watch.computed), aliased.set(watch.alias)
                try:
                    output = self._function(*args, **kwargs)
                except Exception as error:
                    if watch.error is None or error is watch.error:
                        raise
                    raise watch.error from error  # torch.jit has made another one of it
                finally:
                    when_lost.reset(lost)
                    handed_out.reset(told[0])
                    aliased.reset(told[1])
            watch.refuse_moved()
            _name_what_stays(self._model, self._modules, before, watch)
        except BaseException:
            self._over = False
            raise
        self._done()
        return output

    def _frozen(self) -> tuple[Frozen, Frozen]:
        """Where the adapted weights lie, and where all parameters do."""
        own = {
            (at, key): weight
            for at, module in enumerate(self._modules)
            for key, weight in own_tensors(parameters_of(module)).items()
            if weight is not None
        }
        adapted = [(name, own.pop((at, key))) for at, key, name in self._places]
        names = {id(module): name for name, module in self._model.named_modules()}
        others = [
            (".".join(filter(None, [names.get(id(self._modules[at]), ""), key])), weight)
            for (at, key), weight in own.items()
        ]
        return Frozen(adapted, list(own.values())), Frozen([*adapted, *others], [])


def _possible() -> bool:
    if is_transformed() or in_backward() or torch.jit.is_tracing():  # type: ignore[reportPrivateImportUsage]
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


class _Watch(Flow):
    def __init__(self, frozen: Frozen, base: Frozen, leaves: Sequence[Tensor]):
        super().__init__(leaves)
        self._frozen, self._base = frozen, base
        self._computed: dict[int, tuple[StorageWeakRef, str]] = {}
        self._aliases: list[tuple[Tensor, Tensor]] = []
        self.error: FadaptError | None = None
        self._placeholders: dict[int, tuple[StorageWeakRef, str]] = {}

    def alias(self, weight: Tensor, alias: Tensor) -> None:
        """Notes what the forward sees of another parameter."""
        self._aliases.append((weight, alias))

    def refuse_moved(self) -> None:
        """Refuses a forward that gave a parameter other data, which no operation shows."""
        moved = [name for name, own, data in self._base.weights if _moved(own, data)]
        for _, own, data in self._base.weights:
            if _moved(own, data):
                own.data = data
        names = {id(own): name for name, own, _ in self._base.weights}
        moved += [names[id(own)] for own, alias in self._aliases if _moved(alias, own)]
        if moved:
            raise FadaptError(
                f"the model's forward writes to {moved[0]} (.data = ...), and the base is frozen: "
                "nothing was changed"
            )

    def computed(self, weight: Tensor, name: str) -> None:
        """Notes an adapted weight that the model is given as a tensor."""
        if (key := storage_key(weight)) is not None:
            self._computed[key] = StorageWeakRef(weight.untyped_storage()), name

    @is_step
    def _follow(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        kept = [
            (tensor, tensor.detach().clone(), name)
            for tensor in written_arguments(func, args, kwargs)
            if not isinstance(tensor, Overlay) and (name := self._parameter(tensor))
        ]
        result = super()._follow(func, args, kwargs)
        for tensor, before, name in kept:
            if not _equal(tensor, before) and (where := models_own()):
                tensor.detach().copy_(before)
                self.error = FadaptError(
                    f"the model's forward writes to {name} ({func.overloadpacket.__name__}, "
                    f"{where}), and the base is frozen: nothing was changed. If it does so in this "
                    "mode alone, switch the mode (model.eval()); if only once, call the model "
                    "itself first"
                )
                raise self.error
        if in_backward():
            return result
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in tensors:
            if isinstance(tensor, Overlay):
                self._hold(tensor, tensor.adapter.site.name)
        if is_view_of_argument(func):
            if tensors and (placeholder := self._placeholder(tensors[0])):
                for leaf in pytree.tree_leaves(result):
                    self._hold(leaf, placeholder)
            return result
        operation = func.overloadpacket.__name__
        for tensor in tensors:
            if (name := self._placeholder(tensor)) and (where := models_own()):
                self.error = TargetError(
                    f"{name} is adapted, and the model's forward computes with it ({operation}, "
                    f"{where}) in a way that fadapt cannot follow, as within torch.jit.script or "
                    "with the weight as what torch.func maps over or differentiates; leave this "
                    f"weight out: {{{name!r}: None, ...}}"
                )
                raise self.error
            if (name := self._frozen.name_of(tensor)) and (where := models_own()):
                self.error = TargetError(
                    f"{name} is adapted, and the model's forward reads it ({operation}, {where}) "
                    "not as its module's parameter, but as it was kept elsewhere (in a list, a "
                    "closure, a copy, a module that is not registered), where no adapter is; read "
                    f"it from the module, or leave this weight out: {{{name!r}: None, ...}}"
                )
                raise self.error
        return result

    def _parameter(self, tensor: Tensor) -> str:
        """The parameter that a tensor lies in, or is the adapted value of."""
        own = self._computed.get(storage_key(tensor) or 0, (None, ""))[1]
        return own or self._base.name_of(tensor)

    def _hold(self, tensor: Any, name: str) -> None:
        if isinstance(tensor, Tensor) and (key := storage_key(tensor)) is not None:
            self._placeholders[key] = StorageWeakRef(tensor.untyped_storage()), name

    def _placeholder(self, tensor: Tensor) -> str:
        return self._placeholders.get(storage_key(tensor) or 0, (None, ""))[1]


def _moved(tensor: Tensor, data: Tensor) -> bool:
    """Whether a tensor has got other data; not where it was cast, or comes back with its values."""
    if tensor.dtype != data.dtype or tensor.device != data.device:
        return False
    return storage_key(tensor) != storage_key(data) and not (
        tensor.shape == data.shape and _equal(tensor, data)
    )


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)


def _attributes(modules: Sequence[nn.Module]) -> dict[tuple[int, str], set[int]]:
    """{(number of a module, attribute): ids of the tensors there}, beside its parameters."""
    return {(at, key): {id(t) for t in tensors} for at, key, tensors in _kept(modules)}


def _kept(modules: Sequence[nn.Module]) -> Iterator[tuple[int, str, list[Tensor]]]:
    for at, module in enumerate(modules):
        for key, value in [*vars(module).items()]:
            if isinstance(module, nn.RNNBase) and key == "_flat_weights":
                continue  # which the layer makes anew when it has other weights
            if isinstance(value, (Tensor, list, tuple)) or type(value) is dict:
                tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
                if tensors:
                    yield at, key, tensors


def _name_what_stays(
    model: nn.Module,
    modules: Sequence[nn.Module],
    before: Mapping[tuple[int, str], set[int]],
    watch: Flow,
) -> None:
    overlays = [
        (f"{type(modules[at]).__name__}.{key}", tensor.adapter.site.name)
        for at, key, tensors in _kept(modules)
        for tensor in tensors
        if isinstance(tensor, Overlay)
    ]
    if overlays:
        attribute, name = overlays[0]
        raise TargetError(
            f"the forward of {type(model).__name__} keeps {name}, which is adapted, in "
            f"{attribute}; later calls would see it adapted in this way. Have the forward read the "
            f"weight from its module each time, or leave this weight out: {{{name!r}: None, ...}}"
        )
    found = [
        f"{type(modules[at]).__name__}.{key}"
        for at, key, tensors in _kept(modules)
        for tensor in tensors
        if id(tensor) not in before.get((at, key), ()) and watch.reaches(tensor)
    ]
    if found:
        warnings.warn(
            f"the forward of {type(model).__name__} keeps what it computed with the adapters in "
            f"{', '.join(sorted(set(found))[:3])}, where calls of the base and of other adapters "
            "find it; clear it after the call, if the forward reads it again",
            FadaptWarning,
            stacklevel=2,
        )
