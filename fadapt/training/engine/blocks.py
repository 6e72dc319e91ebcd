"""Equal blocks of a model, such as a transformer's layers, compiled once and used for each.

To compile a whole model takes as much longer as it has layers. Here a function is compiled that
runs one block, with all its tensors (the frozen ones and the adapters' leaves) as arguments. The
rest of the model runs as it is, but for the loss over a frozen head.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...base.quantized import has_quantized
from ...base.scope import own_function, own_tensors
from ...base.sharded import is_sharded
from ...base.torch_private import (
    BUFFERS,
    CHILDREN,
    PARAMETERS,
    buffers_of,
    has_hooks,
    is_persistent,
    parameters_of,
    pytree,
)
from ...fold.fold import FoldedSite
from ...overlay.tensor import overlay
from ...params.adapter import Adapted, Adapter
from ...params.params import Params
from ...params.stack import Group, Stack

Leaves = list[dict[str, tuple[Any, ...]]]
"""The tensors of a block's adapters: for each group, {site: (train, fixed, bank, draw)}."""

_OWN = frozenset(vars(nn.Module()))
_NUMBERING = "layer_idx"
"""An attribute that may differ in equal blocks; whether it matters is tried out."""


@dataclass(eq=False)
class _Block:
    """One block, and those of the model's adapters that are in it.

    Attributes:
        module: the block.
        prefix: its path, with a dot.
        shape: equal for blocks that may be one function.
        model: a copy of the first such block's modules, with none of its tensors' memory.
        proved: whether that function computes what the block does.
    """

    module: nn.Module
    prefix: str
    shape: Any
    model: nn.Module
    proved: bool = False


class Blocks:
    """The equal blocks of a model, and the functions that run them.

    Args:
        model: the base.
        compiled: compiles a function.
    """

    def __init__(
        self, model: nn.Module, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    ):
        self.model, self._compiled = model, compiled
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._lock = threading.RLock()
        self.blocks = _blocks(model)
        self._modes = self._modes_now()

    def _modes_now(self) -> list[bool]:
        return [m.training for block in self.blocks for m in block.module.modules()]

    def refresh(self) -> None:
        """Looks at the blocks again, where training mode was switched on or off in one."""
        if self._modes_now() != self._modes:
            self.blocks = _blocks(self.model)
            self._modes = self._modes_now()

    def function(self, function: Any, key: Any = None) -> Any:
        """The function, compiled once.

        Args:
            key: equal for functions that are the same.
        """
        key = key or function
        with self._lock:
            if key not in self._functions:
                self._functions[key] = self._compiled(function)
            return self._functions[key]

    def run_block(
        self, block: _Block, inside: _Inside, rows: int | None, args: Any, kwargs: Any
    ) -> Any:
        """The block's output, by the function of all that are like it."""
        given = inside.leaves, _tensors(block.module), args, kwargs
        if not block.proved:
            self._prove(block, _Run(block.model, inside.local, rows), given)
        key = id(block.model), inside.key, rows
        return self.function(_Run(block.model, inside.local, rows).run, key)(*given)

    def _prove(self, block: _Block, run: _Run, given: Any) -> None:
        """Takes a block by itself that does not compute what the first of its kind does."""
        tensors = [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]
        cuda = [d for d in {t.device for t in tensors} if d.type == "cuda"]
        outs = []
        for model in (block.model, block.module):
            with torch.random.fork_rng(devices=cuda), torch.no_grad():
                own = _Run(_skeleton(model), run.local, run.rows)
                outs.append(pytree.tree_leaves(own.run(*given)))
        first, second = outs
        same = len(first) == len(second) and all(
            torch.equal(a, b) if isinstance(a, Tensor) else a is b or a == b
            for a, b in zip(first, second, strict=True)
        )
        if not same:
            block.model = _skeleton(block.module)
        block.proved = True


class BlocksOf:
    """The blocks with the adapters of some params in them (an ``Instead``).

    Args:
        blocks: of the model.
        params: the adapters, of one or of a stack.
    """

    def __init__(self, blocks: Blocks, params: Params | Stack):
        self.blocks, self.params = blocks, params
        self._inside: dict[str, _Inside] = {}

    def forwards(
        self, model: nn.Module, sites: Mapping[str, Adapted]
    ) -> list[tuple[nn.Module, Callable[..., Any]]]:
        if model is not self.blocks.model:
            return []
        self.blocks.refresh()
        rows = next((s.rows for s in sites.values() if isinstance(s, FoldedSite)), None)
        return [(b.module, self._call(b, rows)) for b in self.blocks.blocks]

    def _call(self, block: _Block, rows: int | None) -> Callable[..., Any]:
        inside = self._inside.get(block.prefix)
        if inside is None:
            inside = self._inside[block.prefix] = _Inside(self.params, block.prefix)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.blocks.run_block(block, inside, rows, args, kwargs)

        return call

    def function(self, function: Any) -> Any:
        return self.blocks.function(function)


class _Run:
    """A block as a function of its tensors.

    Args:
        model: the modules.
        local: the adapters, by their names within the block, whose leaves are not used.
        rows: of each member of a stack.
    """

    def __init__(self, model: nn.Module, local: Params | Stack, rows: int | None):
        self.model, self.local, self.rows = model, local, rows

    def run(
        self, leaves: Leaves, tensors: dict[str, Tensor], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        sites = self._sites(leaves)
        places = dict(self.model.named_modules())
        seen = {}
        for name, tensor in tensors.items():
            adapter = sites.get(name)
            if adapter is not None:
                adapter = adapter.within(places[name.rpartition(".")[0]], None)
                tensor = overlay(tensor, adapter)
            seen[name] = tensor
        return functional_call(self.model, seen, args, kwargs, tie_weights=False)

    def _sites(self, leaves: Leaves) -> Mapping[str, Adapted]:
        if isinstance(self.local, Params):
            return {name: _with(self.local[name], t) for name, t in leaves[0].items()}
        groups = [
            Group(g.index, Params({n: _with(g.params[n], t) for n, t in tensors.items()}), ())
            for g, tensors in zip(self.local.groups, leaves, strict=True)
        ]
        stack = Stack(groups, self.local.per_row, self.local.size)
        return {name: FoldedSite(name, stack, self.rows) for name in stack.sites}


def _with(adapter: Adapter, tensors: tuple[Any, ...]) -> Adapter:
    train, fixed, bank, draw = tensors
    return replace(adapter, train=train, fixed=fixed, bank=bank, draw=draw)


class _Inside:
    """The adapters within one block, by their names there.

    Attributes:
        local: the adapters.
        leaves: their tensors.
        key: equal for those that one compiled function runs.
    """

    def __init__(self, params: Params | Stack, prefix: str):
        groups = [params] if isinstance(params, Params) else [g.params for g in params.groups]
        found = [
            {
                name.removeprefix(prefix): _moved(adapter, prefix)
                for name, adapter in group.items()
                if name.startswith(prefix) and not adapter.site.is_shared
            }
            for group in groups
        ]
        self.leaves: Leaves = [
            {name: (a.train, a.fixed, a.bank, a.draw) for name, a in group.items()}
            for group in found
        ]
        local = [Params(group) for group in found]
        indices: Any = ()
        if isinstance(params, Params):
            self.local: Params | Stack = local[0]
        else:
            pairs = zip(params.groups, local, strict=True)
            self.local = Stack(
                [Group(g.index, p, ()) for g, p in pairs], params.per_row, params.size
            )
            indices = tuple(g.index for g in params.groups)
        self.key = (
            indices,
            tuple(
                tuple(
                    (name, a.site, a.method, getattr(a, "shared", None))
                    for name, a in group.items()
                )
                for group in found
            ),
        )


def _moved(adapter: Adapter, prefix: str) -> Adapter:
    site = adapter.site
    bias = None if site.bias is None else site.bias.removeprefix(prefix)
    name = site.name.removeprefix(prefix)
    return replace(adapter, site=replace(site, name=name, bias=bias, fingerprint="", tied=()))


def _blocks(model: nn.Module) -> list[_Block]:
    """The parts of a model's lists of modules that have an equal one beside them."""
    if has_quantized(model) or is_sharded(model):
        return []
    found: list[_Block] = []
    taken: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or id(module) in taken:
            continue
        own = [_Block(m, f"{path}.{i}.", _shape(m), m) for i, m in enumerate(module)]
        counted = [[b.shape for b in own].count(b.shape) for b in own]
        chosen = [b for b, n in zip(own, counted, strict=True) if n > 1 and b.shape is not None]
        inner = [id(m) for b in chosen for m in b.module.modules()]
        if len(set(inner)) < len(inner):  # one module in two places
            continue
        taken.update(id(m) for m in module.modules())
        found += chosen
    first: dict[Any, nn.Module] = {}
    for block in found:
        if block.shape not in first:
            first[block.shape] = _skeleton(block.module)
            block.proved = True
        block.model = first[block.shape]
    return found


def _shape(block: nn.Module) -> Any:
    """What blocks agree on that differ in their tensors alone; None where that cannot be told."""
    parts: list[Any] = []
    for name, module in block.named_modules():
        if has_hooks(module) or own_function(module.__dict__.get("forward")) is not None:
            return None
        if any(is_persistent(module, key) for key in buffers_of(module)):
            return None  # training may write to it
        attributes = [
            (key, value if _is_plain(value) else id(value))
            for key, value in sorted(module.__dict__.items())
            if key not in _OWN and key not in (_NUMBERING, "forward")
        ]
        tensors = [
            (key, None if t is None else (t.shape, t.dtype, t.device))
            for key, t in _own_tensors(module)
        ]
        parts.append((name, type(module), module.training, tuple(attributes), tuple(tensors)))
    return tuple(parts)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None), torch.dtype, torch.device))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    yield from own_tensors(parameters_of(module)).items()
    yield from own_tensors(buffers_of(module)).items()


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """All tensors of a block, without gradients, also within a call that sees others."""
    return {
        f"{path}.{key}" if path else key: tensor.detach()
        for path, module in block.named_modules()
        for key, tensor in _own_tensors(module)
        if tensor is not None
    }


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy of the modules alone: other tensors can be put into it without touching the model."""
    new = copy.copy(module)
    if own_function(new.__dict__.get("forward")) is None:
        new.__dict__.pop("forward", None)
    new.__dict__[PARAMETERS] = dict(own_tensors(parameters_of(module)))
    new.__dict__[BUFFERS] = dict(own_tensors(buffers_of(module)))
    children = module.__dict__[CHILDREN]
    new.__dict__[CHILDREN] = {k: None if m is None else _skeleton(m) for k, m in children.items()}
    return new
