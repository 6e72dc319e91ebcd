"""How a layer uses its fused experts: as a stack of (out, in) or of (in, out) matrices.

Neither a shape nor a flag tells it surely, the layer's own forward does. So it is run on a few rows
of zeros, in a copy of the layer with stand-ins for its weights, which have their shapes and no
values: a stand-in notes how it is multiplied, and gives zeros of the product's shape. The layer
itself is neither run nor touched.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .torch_private import GROUPED_MM, pytree


@dataclass(frozen=True)
class Layout:
    """How a parameter is used.

    Attributes:
        experts: the number of matrices that it holds.
        transposed: whether each is stored (in, out).
    """

    experts: int
    transposed: bool


def layouts(root: nn.Module) -> dict[str, Layout]:
    """{parameter's name in ``root``: its layout} of the stacks that its forward tells of.

    A parameter that is used in two ways, or in none that is known, is not in it.
    """
    for width, rows in _widths(root):
        for args in _arguments(root, width, rows):
            found = _watch(root, args)
            if found:
                return found
    return {}


def _widths(root: nn.Module) -> Iterator[tuple[int, int]]:
    """(input width, rows) to try: the last axes of the stacks, and rows for each expert."""
    shapes = [p.shape for p in root.parameters() if p.dim() in (2, 3)]
    counts = {s[0] for s in shapes if len(s) == 3}
    counts |= {n for m in root.modules() for n in expert_counts(m)}
    rows = math.lcm(*counts) if counts and max(counts) <= 1024 else 1
    for width in dict.fromkeys(d for s in shapes for d in reversed(s[-2:])):
        yield width, rows if rows <= 4096 else max(counts)


def expert_counts(module: nn.Module) -> list[int]:
    """What a module's attributes say of a number of experts."""
    named = (v for k, v in vars(module).items() if "expert" in k.lower())
    return [v for v in named if type(v) is int and v > 0]


def _arguments(root: nn.Module, width: int, rows: int) -> Iterator[tuple[Any, ...]]:
    """What the forward may take, by the names of its parameters."""
    signature = inspect.signature(root.forward)
    names = [
        p.name for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    parameter = next((p for p in root.parameters() if p.dim() > 1), None)
    if not names or parameter is None:
        return
    counts = [p.shape[0] for p in root.parameters() if p.dim() == 3]
    counts += [n for m in root.modules() for n in expert_counts(m)]
    experts = counts[0] if counts else 1
    hidden = torch.zeros(rows, width, dtype=parameter.dtype)
    each = [rows] + [0] * (experts - 1)
    for x in (hidden, hidden[None]):
        for chosen in (1, experts):
            args: list[Any] = [x]
            for name in names[1:]:
                if re.search("per_expert|count", name):
                    args.append(torch.tensor(each))
                elif re.search("size|len", name):
                    args.append(each)
                elif re.search("ind|ids|select", name):
                    args.append(torch.zeros(rows, 1, dtype=torch.long))
                elif re.search("weight|score|prob|gate|affinit", name):
                    args.append(torch.zeros(rows, chosen, dtype=parameter.dtype))
                else:
                    return
            yield tuple(args)


def _watch(root: nn.Module, args: tuple[Any, ...]) -> dict[str, Layout]:
    uses: dict[str, set[Layout]] = {}
    stands: dict[int, Any] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1:
            meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            stands[id(parameter)] = _spy(meta, _Uses(name, tuple(parameter.shape), uses))
        else:
            stands[id(parameter)] = torch.zeros(parameter.shape, dtype=parameter.dtype)
    for buffer in root.buffers():
        stands[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    try:
        layer = copy.deepcopy(root, stands)  # what it sets on itself is set on the copy
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            type(root).forward(layer, *args)
    except Exception:
        # Not arguments of this forward, or a use that has no shape without values.
        return {}
    return {name: next(iter(found)) for name, found in uses.items() if len(found) == 1}


@dataclass(frozen=True)
class _Uses:
    """Where the stand-ins of one parameter write their uses."""

    name: str
    shape: tuple[int, ...]
    uses: dict[str, set[Layout]]
    experts: int = 0

    def note(self, weight: Tensor, rows_out: bool) -> None:
        """One product; ``rows_out``: with the weight as (out, in)."""
        experts = self.shape[0] if len(self.shape) == 3 else self.experts
        if experts:
            # The stored last axis is the one of stride 1, however often it was transposed.
            as_stored = weight.stride(-1) == 1
            self.uses.setdefault(self.name, set()).add(Layout(experts, rows_out != as_stored))


class _Spy(Tensor):
    """A stand-in for a weight: a meta tensor that notes how it is multiplied."""

    uses: _Uses

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        spies = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, _Spy)]
        if func is Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cpu")
        product = _product_of(func, args)
        if product is not None:
            weight, rows_out = product
            weight.uses.note(_plain(weight), rows_out)
            on_meta: Any = pytree.tree_map_only(Tensor, _on_meta, (args, kwargs))
            return _zeros(func(*on_meta[0], **on_meta[1]))
        if func is Tensor.__getitem__:
            args = (args[0], pytree.tree_map_only(Tensor, _index, args[1]))
        plain: Any = pytree.tree_map_only(_Spy, _plain, (args, kwargs))
        result = func(*plain[0], **plain[1])
        return pytree.tree_map_only(Tensor, lambda t: _spy(t, spies[0].uses), result)


def _spy(tensor: Tensor, uses: _Uses) -> _Spy:
    if len(uses.shape) == 2 and tensor.dim() == 3 and not uses.experts:
        uses = _Uses(uses.name, uses.shape, uses.uses, tensor.shape[0])
    spy = tensor.as_subclass(_Spy)
    spy.uses = uses
    return spy


_PRODUCTS = frozenset(
    (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
)
_SUMS = frozenset((torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm))


def _product_of(func: Callable, args: tuple) -> tuple[_Spy, bool] | None:
    """The weight of a product, and whether it is used as (out, in)."""
    if func is F.linear and isinstance(args[1], _Spy):
        return args[1], True
    first = 1 if func in _SUMS else 0
    if func in _PRODUCTS or func in _SUMS or func is GROUPED_MM or "grouped_mm" in str(func):
        if isinstance(args[first + 1], _Spy):
            return args[first + 1], False
        if isinstance(args[first], _Spy):
            return args[first], True
    return None


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


def _on_meta(tensor: Tensor) -> Tensor:
    return _plain(tensor) if isinstance(tensor, _Spy) else tensor.to("meta")


def _index(tensor: Tensor) -> Any:
    return int(tensor) if tensor.dim() == 0 else tensor.to("meta")


def _zeros(result: Any) -> Any:
    return torch.zeros(result.shape, dtype=result.dtype)
