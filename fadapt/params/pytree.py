"""Registration of nodes in torch's pytree and in optree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree

# torch.func flattens its arguments with this registry; torch has no public name for it.
import torch.utils._pytree as torch_pytree
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE


class Note:
    """Carries a value through a treespec without taking part in its comparison."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Note)

    def __hash__(self) -> int:
        return 0


def register_node(
    cls: type, flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]
) -> None:
    """Registers a class in optree and in torch's pytree; ``unflatten(aux, children)``."""
    optree.register_pytree_node(cls, flatten, unflatten, namespace=GLOBAL_NAMESPACE)
    torch_pytree.register_pytree_node(cls, flatten, lambda children, aux: unflatten(aux, children))
