"""Every private name of torch, and of its pytrees, that the package uses; nothing else uses any.

Each says why, and what would replace it. Read in torch 2.11 to 2.13.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed

# torch.func, torch.compile and checkpointing flatten their arguments with this registry, and torch
# has no public module for it. Replace with torch.utils.pytree once the oldest torch supported has
# it.
import torch.utils._pytree as pytree
from optree.registry import __GLOBAL_NAMESPACE as _GLOBAL_NAMESPACE
from torch import Tensor, nn

# The identity of a storage, which keeps its address from being used again but not its values;
# torch's own multiprocessing and Inductor use it. Replace with weakref once a storage's Python
# object lives as long as the storage does.
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef

# Sees every operation below autograd, as nothing public does; torch's notes on how to extend it
# name this module. Replace with a public name once there is one.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode


def register_node(
    cls: type, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]
) -> None:
    """Registers a class in optree and in torch's pytree; ``unflatten(aux, children)``.

    optree's global namespace, in which ``optree.tree_map`` works without a ``namespace=``, has no
    public name. Without it users would have to write one.
    """
    import optree

    optree.register_pytree_node(cls, flatten, unflatten, namespace=_GLOBAL_NAMESPACE)

    def with_keys(node: Any) -> Any:
        children, aux = flatten(node)
        return [(pytree.SequenceKey(i), child) for i, child in enumerate(children)], aux

    pytree.register_pytree_node(
        cls,
        flatten,
        lambda children, aux: unflatten(aux, children),
        flatten_with_keys_fn=with_keys,
    )


CHILDREN, COMPILED_CALL = "_modules", "_compiled_call_impl"
"""The attributes of a module that hold its children, and what ``module.compile()`` made.

What is asked of all modules before every call is looked up without a function in between.
"""

PARAMETERS, BUFFERS = "_parameters", "_buffers"
"""The attributes of a module in which nn.Module's ``__getattr__`` looks for its tensors.

For the time of a call another dict stands there. ``torch.func.functional_call`` writes into this
one instead, which all threads see, and which an interrupt may leave as it is.
"""


CALL: CodeType = nn.Module.__call__.__code__
"""Of the function that calls a module: who asks for a parameter below it is the model's forward."""


def is_move(frame: FrameType) -> bool:
    """Whether a frame is ``module.to``'s, which puts new parameters where they do not fit the old.

    What all such functions call, ``nn.Module._apply``, has no public name.
    """
    return frame.f_code is nn.Module._apply.__code__


def parameters_of(module: nn.Module) -> MutableMapping[str, Tensor | None]:
    """A module's own parameters, to read and to replace (``module._parameters``).

    ``named_parameters`` cannot put a tensor that is no Parameter where a Parameter is, and its
    generators cost more than the rest of a call's preparation.
    """
    return module._parameters  # type: ignore[return-value]


def buffers_of(module: nn.Module) -> MutableMapping[str, Tensor | None]:
    """A module's own buffers (``module._buffers``); as :func:`parameters_of`."""
    return module._buffers


plain_attributes: Any = torch._C.DisableTorchFunctionSubclass
"""A block in which the attributes of a subclass of Tensor are read without its own function."""


def storage_key(tensor: Tensor) -> int | None:
    """The identity of a tensor's storage while it lives; None where there is none (``_cdata``).

    Its address is no identity: storages without elements share one.
    """
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors, wrappers
        return None


def is_view_of_argument(func: Any) -> bool:
    """Whether an operation, as a TorchDispatchMode gets it, only looks at its argument otherwise.

    Its schema says so (``OpOverload.is_view``), which has no public name.
    """
    return func.is_view


def written_arguments(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation, as a TorchDispatchMode gets it, writes to.

    Its schema says so (``OpOverload._schema``), which has no public name.
    """
    schema = func._schema
    if not schema.is_mutable:
        return []
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
    found = pytree.tree_leaves([given.get(name) for name in names])
    return [t for t in found if isinstance(t, Tensor)]


def saving_is_hooked() -> bool:
    """Whether someone has hooks on what autograd saves, as activation checkpointing has.

    ``torch.autograd.graph.saved_tensors_hooks`` sets them; there is no public question.
    """
    top = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]
    return top(False) is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after a module's forward or backward; no public question."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_persistent(module: nn.Module, key: str) -> bool:
    """Whether a buffer belongs to the state dict, without building it."""
    return key not in module._non_persistent_buffers_set


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread.

    torch.utils.checkpoint asks the same, to tell a recomputation; there is no public question.
    """
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


def hand_to_backward(key: str, value: Any) -> None:
    """Keeps an object for this thread, and for autograd's own threads that run its backward passes.

    Those take over torch's thread-local state, but neither Python's contexts nor threading.local.
    """
    if _UNCOUNTED:  # before, so that an interrupt between the two leaks a reference at worst
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    torch._C._stash_obj_in_tls(key, value)  # type: ignore[attr-defined]


def _stashes_uncounted() -> bool:
    """Whether torch gives back a reference to what it stashed that it never took.

    2.11 does: an object in use is freed when the next one takes its place, and the process crashes.
    2.13 counts it. Remove with the last torch that does not.
    """
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("fadapt.probe", probe)  # type: ignore[attr-defined]
    uncounted = sys.getrefcount(probe) == before
    if uncounted:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return uncounted


_UNCOUNTED = _stashes_uncounted()


def handed_to_backward(key: str) -> Any:
    """What :func:`hand_to_backward` kept, or None."""
    known = torch._C._is_key_in_tls(key)  # type: ignore[attr-defined]
    return torch._C._get_obj_in_tls(key) if known else None  # type: ignore[attr-defined]


def original_of(module: nn.Module) -> nn.Module | None:
    """The module that torch.compile(module) wraps, else None (``_orig_mod``).

    torch.compile has no public way back; ``torch._dynamo.OptimizedModule`` is private as well.
    """
    return module.__dict__.get("_modules", {}).get("_orig_mod")


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled on its own, so that its forward ignores overlays.

    ``module.compile()`` leaves its mark in ``_compiled_call_impl`` alone.
    """
    return module._compiled_call_impl is not None or original_of(module) is not None


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for inference tensors, which do not count.

    autograd's notes speak of the counter, ``_version``, and give no public name for it. A copy of
    the tensor to compare with would cost its memory.
    """
    return 0 if tensor.is_inference() else tensor._version


def grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Each group of rows with its own matrix; ``F.grouped_mm`` calls the same (2.10 and later)."""
    return torch._grouped_mm(x, weight, offs=offs)  # type: ignore[attr-defined]


GROUPED_MM: Callable[..., Tensor] = torch._grouped_mm  # type: ignore[attr-defined]
"""The function that an overlay sees, whether a model calls it or ``F.grouped_mm``, which passes its
arguments on before torch asks them for an override."""

SAME_KIND_OF_TENSOR: Callable[..., bool] = torch._has_compatible_shallow_copy_type  # type: ignore[attr-defined]
"""What ``module.to`` asks before it writes to ``tensor.data``; only to know the question."""


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func has wrapped the tensor; there is no public question."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]


def known_values(index: Tensor) -> list[int] | None:
    """The numbers in an index tensor, or None where Python cannot know them.

    Inside torch.compile, and for a tensor that vmap maps over. torch.func has no public way to ask
    for the latter; one may replace ``torch._C._functorch``.
    """
    if torch.compiler.is_compiling():
        return None
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(index):
        if functorch.is_batchedtensor(index):
            return None
        index = functorch.get_unwrapped(index)
    return index.tolist()


def is_transformed() -> bool:
    """Whether this code runs under a transform of torch.func, where tensors may have no values.

    torch.func has no public question; functorch's stack of interpreters is empty outside.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]


def timeout_of_default_group() -> timedelta:
    """The timeout with which the default process group was made; there is no public way to ask."""
    group: Any = torch.distributed.group.WORLD
    for device in ("cpu", "cuda"):
        try:
            options = group._get_backend(torch.device(device)).options
        except RuntimeError:  # the group has no backend for it
            continue
        return options._timeout
    return timedelta(minutes=30)
