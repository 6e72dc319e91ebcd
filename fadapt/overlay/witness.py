"""The first forward with adapters in a model is watched for what goes past them.

An adapter stands where a module has its weight. A model may come to the weight on another way: by
a list in which it kept the parameter, a closure, a module outside of its modules, a copy. There the
frozen weight would be used without a word. So the operations of one forward are seen, and one
that reads an adapted weight, other than an adapter does, is an error; and so is one that computes
with the placeholder which stands for a weight. A tensor that follows from the adapters, and that
the forward leaves in an attribute of a module, is named: the base would find it there.
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
)
from ..errors import FadaptWarning, TargetError
from .tensor import Overlay, when_lost

Range = tuple[int, int, str]
"""(first byte, last byte, name) of an adapted weight in its storage."""


class Frozen:
    """Where the adapted weights of a model lie in memory.

    Args:
        adapted: (name, weight) of each.
        others: all other parameters. A weight that is tied to one of them is left out: this other
            use of it is the base's own, which :func:`fadapt.init` names.
    """

    def __init__(self, adapted: Sequence[tuple[str, Tensor]], others: Sequence[Tensor]):
        self._ranges: dict[int, list[Range]] = {}
        for name, weight in adapted:
            if type(weight) not in (Tensor, nn.Parameter):
                continue
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
            with _Watch(self._frozen(), self._leaves) as watch:
                lost = when_lost.set(self._again if torch.is_grad_enabled() else None)
                try:
                    output = self._function(*args, **kwargs)
                except Exception as error:
                    if watch.error is None or error is watch.error:
                        raise
                    raise watch.error from error  # torch.jit has made another one of it
                finally:
                    when_lost.reset(lost)
            _name_what_stays(self._model, self._modules, before, watch)
        except BaseException:
            self._over = False
            raise
        self._done()
        return output

    def _frozen(self) -> Frozen:
        own = {
            (at, key): weight
            for at, module in enumerate(self._modules)
            for key, weight in own_tensors(parameters_of(module)).items()
            if weight is not None
        }
        adapted = [(name, own.pop((at, key))) for at, key, name in self._places]
        return Frozen(adapted, list(own.values()))


def _possible() -> bool:
    if is_transformed() or in_backward() or torch.jit.is_tracing():  # type: ignore[reportPrivateImportUsage]
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


class _Watch(Flow):
    def __init__(self, frozen: Frozen, leaves: Sequence[Tensor]):
        super().__init__(leaves)
        self._frozen = frozen
        self.error: TargetError | None = None
        self._placeholders: dict[int, tuple[StorageWeakRef, str]] = {}

    @is_step
    def _follow(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        result = super()._follow(func, args, kwargs)
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

    def _hold(self, tensor: Any, name: str) -> None:
        if isinstance(tensor, Tensor) and (key := storage_key(tensor)) is not None:
            self._placeholders[key] = StorageWeakRef(tensor.untyped_storage()), name

    def _placeholder(self, tensor: Tensor) -> str:
        return self._placeholders.get(storage_key(tensor) or 0, (None, ""))[1]


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
