"""Rotary tables: computed once in a compiled pass, not again in every kernel that reads them.

torch.compile counts a cosine as cheap, and computes it in each kernel that needs it, for every head
and layer, forward and backward. Such kernels took two to three times as long as their memory does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...base.torch_private import pytree
from ...fusion import written
from ...hugging_face import is_rotary


@contextmanager
def tables_written(model: nn.Module) -> Iterator[None]:
    """Within the block the rotary embeddings of a Hugging Face model pass on copies."""
    handles = [
        module.register_forward_hook(_copied) for module in model.modules() if is_rotary(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(module: nn.Module, args: Any, output: Any) -> Any:
    # Some modules of that name return no tables but what they have rotated.
    return pytree.tree_map_only(Tensor, lambda t: t if t.requires_grad else written(t), output)
