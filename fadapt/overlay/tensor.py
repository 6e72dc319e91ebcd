"""The overlay: a stand-in for a frozen weight that computes the adapted map instead.

``functional_call`` puts it where the weight was. It has the weight's shape, dtype and device but
holds one NaN, so an operation that escaped the rules would show, not pass as the unadapted model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from ..base.torch_private import is_transformed, pytree
from ..base.weights import Kind
from ..errors import DenseFallbackWarning, FadaptError, TargetError
from ..linalg import inverse_permutation
from ..params.adapter import Adapted
from .checkpointing import refuse_checkpoint
from .exact import marked_like
from .vectors import Stacked, Vectors, of_members

RULES: dict[Callable, Callable[..., Any]] = {}
"""What stands for a torch function that gets an overlay."""


def implements(*functions: Callable) -> Callable[[Callable], Callable]:
    """Makes the decorated function the rule for what these torch functions do with an overlay.

    A rule returns NotImplemented for what it does not know; then the adapted weight is
    materialised.
    """

    def register(rule: Callable) -> Callable:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


class Overlay(Tensor):
    """A weight whose linear products are those of its adapted map. Made by :func:`overlay`."""

    frozen: Tensor
    adapter: Adapted
    flipped: bool
    required_grad: bool

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _by_rule(func, args, kwargs or {})


def _by_rule(func: Callable, args: tuple, kwargs: dict) -> Any:
    """What a function of overlays means."""
    if kwargs and func in NAMES:
        args, kwargs = _positional(NAMES[func], args, kwargs)
    if func not in METADATA and any(map(_is_vector, (*args, *kwargs.values()))):
        return _with_vectors(func, args, kwargs)
    if func in RULES and "out" not in kwargs:
        result = RULES[func](*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func in METADATA:
        return func(*map(_as_it_lies, args), **kwargs)
    return _dense_fallback(func, args, kwargs)


def _as_it_lies(value: Any) -> Any:
    """The frozen weight, as an overlay of it lies in memory; anything else as it is."""
    if not isinstance(value, Overlay):
        return value
    return value.frozen.mT if value.flipped else value.frozen


def _called(func: Callable, args: tuple, kwargs: dict) -> Any:
    """A function of arguments of which some may still be overlays.

    Dynamo (2.13) does not ask a subclass of Tensor again within its own function.
    """
    if any(isinstance(value, Overlay) for value in (*args, *kwargs.values())):
        return _by_rule(func, args, kwargs)
    return func(*args, **kwargs)


def overlay(
    weight: Tensor, adapter: Adapted, flipped: bool = False, required_grad: bool = False
) -> Overlay:
    """An overlay of ``weight`` (frozen, in its stored layout) that applies ``adapter``.

    as_subclass, not _make_wrapper_subclass: torch.compile traces through it, and every overlay is
    made inside the traced or transformed function.

    Args:
        flipped: whether it stands for the transposed weight.
        required_grad: whether the base's own parameter requires grad.
    """
    shape = weight.mT.shape if flipped else weight.shape
    nan = torch.full((), float("nan"), dtype=weight.dtype, device=weight.device).expand(shape)
    compiling = torch.compiler.is_compiling()
    if not compiling and (lost := when_lost.get()) is not None and not is_transformed():
        leaves = [t for t in getattr(adapter, "tensors", ()) if t.requires_grad]
        nan = _Placeholder.apply(nan, adapter.site.name, lost, *leaves) if leaves else nan
    result = nan.as_subclass(Overlay)
    result.frozen, result.adapter, result.flipped = weight, adapter, flipped
    result.required_grad = required_grad
    if not compiling:
        result._is_param = True  # isinstance(weight, nn.Parameter), as the model may ask
    return result


def trains(adapter: Adapted) -> bool:
    """Whether a gradient may be asked for a leaf of the adapter."""
    return any(t.requires_grad for t in getattr(adapter, "tensors", ()))


handed_out: ContextVar[Callable[[Tensor, str], None] | None] = ContextVar(
    "fadapt.handed_out", default=None
)
"""In a forward that is watched: what is told of each adapted weight that was computed, and whose it
is. What is written to such a tensor is lost."""

aliased: ContextVar[Callable[[Tensor, Tensor], None] | None] = ContextVar(
    "fadapt.aliased", default=None
)
"""The same of other parameters that require grad, of which a call sees (its own, an alias)."""

when_lost: ContextVar[Callable[[], None] | None] = ContextVar("fadapt.when_lost", default=None)
"""In a forward that is watched with autograd: what is called when a gradient would get lost."""


class _Placeholder(torch.autograd.Function):
    """Meets a gradient that an operation without ``__torch_function__`` sends to an overlay.

    That is a torch.autograd.Function of the model's own: within, the rules apply, but it gives back
    the gradient of the weight, and not of the adapter.
    """

    @staticmethod
    def forward(
        ctx: Any, nan: Tensor, name: str, lost: Callable[[], None], *leaves: Tensor
    ) -> Tensor:
        ctx.name, ctx.lost = name, lost
        return nan.view_as(nan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:  # type: ignore[override]
        ctx.lost()
        raise TargetError(
            f"{ctx.name} is adapted, and the model gives it to a torch.autograd.Function of its "
            "own, whose backward knows the weight and not the adapter, whose gradient would be "
            "lost; have the model run without that function, or leave this weight out: "
            f"{{{ctx.name!r}: None, ...}}"
        )


def _is_vector(value: Any) -> bool:
    return isinstance(value, Overlay) and value.adapter.site.kind is Kind.VECTOR


def _with_vectors(func: Callable, args: tuple, kwargs: dict) -> Any:
    """The function of the adapted vectors themselves, which cost next to nothing to compute."""
    if not torch.compiler.is_compiling():  # which cannot trace the name of every function
        name = getattr(func, "__name__", str(func))
        if name.endswith("_") and not name.endswith("__") and _is_vector(args[0]):
            what = args[0].adapter.site.name
            raise FadaptError(f"the model's forward writes to {what} ({name}); it is frozen")

    stacked = [_stacked(a) for a in args], {k: _stacked(v) for k, v in kwargs.items()}
    if any(isinstance(a, Stacked) for a in (*stacked[0], *stacked[1].values())):
        result = of_members(func, *stacked, _remade, _called)
        if result is not NotImplemented:
            return result

    def adapted(value: Any) -> Any:
        if not _is_vector(value):
            return value
        refuse_checkpoint(value.adapter)
        return materialize(value)

    args, kwargs = tuple(map(adapted, args)), {k: adapted(v) for k, v in kwargs.items()}
    return _called(func, args, kwargs)


def _stacked(value: Any) -> Any:
    """A vector of a stack as what its members make of it; anything else as it is."""
    if not _is_vector(value):
        return value
    refuse_checkpoint(value.adapter)
    vectors = getattr(value.adapter, "vectors", None)
    if vectors is None:
        return value
    return Stacked(value.frozen, vectors(value.frozen), value.adapter, value.required_grad)


def _remade(one: Stacked, own: Tensor, values: Tensor) -> Overlay:
    return overlay(own, Vectors(values, one.adapter), required_grad=one.required_grad)


def _dense_fallback(func: Callable, args: tuple, kwargs: dict) -> Any:
    name = getattr(func, "__name__", str(func))
    overlays = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Overlay)]
    names = [o.adapter.site.name for o in overlays]
    if name.endswith("_") and not name.endswith("__") and isinstance(args[0], Overlay):
        raise FadaptError(f"the model's forward writes to {names[0]} ({name}); it is frozen")
    args, with_bias = _adapt_biases(func, args)
    for o in overlays:
        if o.adapter.acts_on_bias and o.adapter.site.bias is not None and id(o) not in with_bias:
            raise TargetError(
                f"{o.adapter.site.name} is used by {name}, for which fadapt has no rule, and "
                f"{o.adapter} acts on the bias; use another method there"
            )
        refuse_checkpoint(o.adapter)
    if not torch.compiler.is_compiling():  # which cannot trace a warning
        ends = (
            func in _ENDS and torch.is_grad_enabled() and any(trains(o.adapter) for o in overlays)
        )
        warnings.warn(
            f"{names} used by {name}, for which fadapt has no rule: the adapted weight was "
            "materialised (exact, but slower)"
            + ("; the adapter's gradient ends there, as the weight's own would" if ends else ""),
            DenseFallbackWarning,
            stacklevel=4,
        )
    args, kwargs = pytree.tree_map_only(Overlay, materialize, (args, kwargs))
    return func(*args, **kwargs)


_ENDS = (
    *(Tensor.detach, Tensor.data.__get__, Tensor.item, Tensor.tolist, Tensor.numpy),  # type: ignore[attr-defined]
    *(Tensor.__array__, torch.detach, Tensor.__bool__, Tensor.__float__),
)


def materialize(weight: Overlay) -> Tensor:
    """The adapted weight as an ordinary tensor, differentiable in the adapter's leaves."""
    # Without the bias, whose rounding would keep an untrained adapter from being the identity.
    new, _ = weight.adapter.dense(_wide(weight.frozen), None)
    new = _strided_like(new.to(weight.frozen.dtype), weight.frozen)
    if not torch.compiler.is_compiling() and (tell := handed_out.get()) is not None:
        tell(new, weight.adapter.site.name)
    return marked_like(new.mT if weight.flipped else new, weight.required_grad)


def _strided_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in the other's memory layout, on which the kernel and so the last bit depend."""
    order = sorted(range(other.dim()), key=other.stride, reverse=True)
    return tensor.permute(order).contiguous().permute(inverse_permutation(order))


def _adapt_biases(func: Callable, args: tuple) -> tuple[tuple, set[int]]:
    """The arguments with adapted biases, where a method acts on them; and whose these are."""
    new_args, done = list(args), set()
    for at, bias_at in BIASES.get(func, ()):
        weight = args[at] if bias_at < len(args) else None
        if isinstance(weight, Overlay) and weight.adapter.acts_on_bias and not weight.flipped:
            bias = args[bias_at]
            if bias is not None:
                new_args[bias_at] = adapted_bias(weight.adapter, weight.frozen, bias)
            done.add(id(weight))
    return tuple(new_args), done


def adapted_bias(adapter: Adapted, weight: Tensor, bias: Tensor) -> Tensor:
    """The adapted bias of a layer, of a method that acts on it."""
    _, new = adapter.dense(_wide(weight), _wide(bias))
    assert new is not None
    return new.to(bias.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


BIASES: dict[Callable, tuple[tuple[int, int], ...]] = {
    torch.conv1d: ((1, 2),),
    torch.conv2d: ((1, 2),),
    torch.conv3d: ((1, 2),),
    F.multi_head_attention_forward: ((5, 6), (11, 12)),
}
"""Where functions without a rule take a weight and its bias."""

NAMES: dict[Callable, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.embedding: ("input", "weight"),
    torch.addmm: ("input", "mat1", "mat2"),
    Tensor.addmm: ("input", "mat1", "mat2"),
    torch.matmul: ("input", "other"),
    Tensor.matmul: ("input", "other"),
    torch.mm: ("input", "mat2"),
    Tensor.mm: ("input", "mat2"),
    torch.bmm: ("input", "mat2"),
    Tensor.bmm: ("input", "mat2"),
    torch.transpose: ("input", "dim0", "dim1"),
    Tensor.transpose: ("input", "dim0", "dim1"),
    torch.t: ("input",),
}
"""torch's names of the arguments that stand first in a rule."""


def _positional(names: tuple[str, ...], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The call with those arguments by position that a rule takes so."""
    kwargs = dict(kwargs)
    for name in names[len(args) :]:
        if name not in kwargs:
            break
        args = (*args, kwargs.pop(name))
    return args, kwargs


METADATA: frozenset[Callable] = frozenset(
    [
        getattr(Tensor, name).__get__
        for name in "shape dtype device ndim requires_grad is_leaf grad grad_fn layout itemsize "
        "nbytes is_cuda is_cpu is_meta is_sparse is_quantized is_nested".split()
    ]
    + [
        getattr(Tensor, name)
        for name in "size dim numel stride is_floating_point is_complex is_contiguous "
        "element_size get_device ndimension nelement is_inference __len__".split()
    ]
)
