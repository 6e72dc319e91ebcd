"""The fold: N adapters in one ordinary pass, their batches side by side on the batch axis.

The trunk runs once as plain modules, on N x B rows; only ``shift`` and ``delta`` are mapped over
the adapters. The adapters do not see each other's rows, so each gets exactly its own gradient
from the sum of the losses.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapted_map import (
    acts_in_training,
    adapt_input,
    adapt_output,
    drops_input,
    has_shift,
    is_plain_product,
)
from ..base.linear_map import DenseMap, LinearMap
from ..base.torch_private import pytree
from ..base.weights import Kind
from ..dropout import fresh_draw
from ..errors import ConfigError, FadaptError
from ..linalg import inverse_permutation
from ..method import Leaves, Method
from ..overlay.embedding import OneHot
from ..params.stack import Stack, StackedAdapter
from ..site import Site

APART = (
    "Run the adapters one by one, over fadapt.unstack(stack), or with torch.func.vmap over "
    "fadapt.run"
)

_BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm


class FoldedSite:
    """One site of a stack: every group's adapters applied to their own rows.

    Args:
        name: of the site.
        stack: the stack.
        rows: batch rows per adapter, or None where that is not known (``bound``).
    """

    def __init__(self, name: str, stack: Stack, rows: int | None):
        self.stack_size, self.rows = stack.size, rows
        self.pieces: list[tuple[tuple[int, ...], StackedAdapter]] = [
            (g.index, cast(StackedAdapter, g.params[name]))
            for g in stack.groups
            if name in g.params
        ]
        have = {i for index, _ in self.pieces for i in index}
        self.rest = tuple(i for i in range(stack.size) if i not in have)
        self.owner: nn.Module | None = None
        self.draw: Tensor | None = None
        self.site: Site = self.pieces[0][1].site

    @property
    def acts_on_bias(self) -> bool:
        return any(adapter.acts_on_bias for _, adapter in self.pieces)

    @property
    def device(self) -> torch.device | None:
        return self.pieces[0][1].device

    @property
    def tensors(self) -> list[Tensor]:
        return [t for _, adapter in self.pieces for t in adapter.tensors]

    def __str__(self) -> str:
        return " or ".join(sorted({str(adapter) for _, adapter in self.pieces}))

    def __call__(self, x: Tensor, base: LinearMap) -> Tensor:
        n = self.stack_size
        self._check(x)
        shifts = any(has_shift(adapter.method) for _, adapter in self.pieces)
        # First: torch.compile copies an x that it has not written down before it is seen as rows.
        y = None if shifts or not torch.compiler.is_compiling() else base(x)
        rows = x.reshape(n, -1, x.shape[-1])
        plain = is_plain_product(x, base)
        # One group has all rows of the output, and may write into it. More of them add to copies of
        # their parts, by the same product: who else is there changes no bit.
        alone = len(self.pieces) == 1 and not self.rest
        entered = [
            adapter.over(functools.partial(_adapt_input, adapter.method, self.site.name), part)
            for (_, adapter), part in zip(self.pieces, self._parts(rows), strict=True)
        ]
        if y is None:
            # The rows, not x: so the gradients of x add up in one order, whether or not another
            # adapter of the pass shifts it, and a trial's bits do not depend on who else is there.
            whole = self._gather([value for value, _ in entered], rows) if shifts else rows
            y = base(whole if plain else whole.reshape(x.shape))
        # Not as rows: torch.compile would write the gradient of a sum that is seen as rows, and by
        # the base's product as a matrix, twice.
        split = y if plain else y.unflatten(0, (n, -1))
        left = [
            adapter.over(
                functools.partial(
                    self._adapt_output, adapter.method, base, alone if plain else None
                ),
                saved,
                part,
                *self._apart(index, adapter, x.device),
            )
            for (index, adapter), (_, saved), part in zip(
                self.pieces, entered, self._parts(split), strict=True
            )
        ]
        return self._gather(left, split).reshape(*x.shape[:-1], y.shape[-1])

    def cannot_embed(self) -> str:
        """Why the members cannot share an embedding; "" where they can, or it is none."""
        if self.site.kind is Kind.EMBEDDING and any(has_shift(a.method) for _, a in self.pieces):
            return f"is an embedding, whose one-hot input {self} changes"
        return ""

    def embed(self, one_hot: OneHot, base: LinearMap) -> Tensor:
        """The adapted map on the one-hot rows of an embedding (N·B, ..., vocabulary)."""
        n = self.stack_size
        self._check(one_hot)
        y = base(one_hot)  # type: ignore[arg-type]
        id_rows, y_rows = one_hot.ids.reshape(n, -1), y.reshape(n, -1, y.shape[-1])

        name = self.site.name

        def leave(method: Method, p: Leaves, ids: Tensor, y: Tensor) -> Tensor:
            # Made inside, because vmap maps over tensors.
            rows: Any = OneHot(ids, one_hot.width, one_hot.dtype, one_hot.owner)
            return adapt_output(method, p, adapt_input(method, p, rows)[1], y, base, name)

        left = [
            torch.func.vmap(
                functools.partial(leave, adapter.method),
                in_dims=({k: None if k in adapter.shared else 0 for k in adapter.leaves}, 0, 0),
            )(adapter.leaves, take(id_rows, index), take(y_rows, index))
            for index, adapter in self.pieces
        ]
        return self._gather(left, y_rows).reshape(y.shape)

    @property
    def vectors(self) -> Callable[[Tensor], Tensor] | None:
        """A function of a frozen vector (n,): each adapter's own (N, n); None of other sites."""
        return self._vectors if self.site.kind is Kind.VECTOR else None

    def _vectors(self, own: Tensor) -> Tensor:
        wide = own.to(torch.promote_types(own.dtype, torch.float32))
        base, name = DenseMap(wide.unsqueeze(1)), self.site.name

        def adapted(method: Method, p: Leaves, one: Tensor) -> Tensor:
            p = {k: t.to(wide.dtype) if t.is_floating_point() else t for k, t in p.items()}
            x, saved = adapt_input(method, p, one, name)
            return adapt_output(method, p, saved, base(x), base, name)

        # A vector is the map of the number 1; (members, 1, 1) -> (members, 1, n).
        ones = wide.new_ones(self.stack_size, 1, 1)
        parts = [
            adapter.over(functools.partial(adapted, adapter.method), part)
            for (_, adapter), part in zip(self.pieces, self._parts(ones), strict=True)
        ]
        rows = wide.expand(self.stack_size, 1, -1)
        return self._gather(parts, rows).squeeze(1).to(own.dtype)

    def dense(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise FadaptError(
            f"{self.site.name} is used by an operation without a rule, and {self.stack_size} "
            f"adapters in one pass have no common weight. {APART}"
        )

    def _adapt_output(
        self,
        method: Method,
        base: LinearMap,
        into: bool | None,
        p: Any,
        saved: Any,
        y: Tensor,
        draw: Tensor | None = None,
    ) -> Tensor:
        training = self.owner is not None and self.owner.training
        into = into if method.supports_batch_dims else None  # torch.func.vmap maps the others
        return adapt_output(method, p, saved, y, base, self.site.name, training, draw, into)

    def _apart(
        self, index: tuple[int, ...], adapter: StackedAdapter, device: torch.device
    ) -> tuple[Tensor, ...]:
        """A draw for each adapter of a piece, (n, 1, 1), where its method drops inputs.

        That of a loop which counts its passes is the same for all: there the adapters' keys, which
        follow from their seeds, tell them apart, in a stack as alone.
        """
        if self.owner is None or not self.owner.training or not drops_input(adapter.method):
            return ()
        if adapter.draw is not None:
            return (adapter.draw.expand(len(index), 1, 1),)
        draw = fresh_draw(device) if self.draw is None else self.draw
        places = take(torch.arange(self.stack_size, device=device), index)
        return (draw + (places.view(-1, 1, 1) << 32),)

    def within(self, module: nn.Module, draw: Tensor | None = None) -> FoldedSite:
        """The same in the layer that holds the weight, where a method follows its training mode."""
        if any(acts_in_training(adapter.method) for _, adapter in self.pieces):
            self.owner, self.draw = module, draw
        return self

    @property
    def drops(self) -> bool:
        return any(adapter.drops for _, adapter in self.pieces)

    def over_mesh(self, mesh: Any) -> FoldedSite:
        """The same for a weight that is a DTensor; see :meth:`Adapter.over_mesh`."""
        placed = copy.copy(self)
        placed.pieces = [(index, adapter.over_mesh(mesh)) for index, adapter in self.pieces]
        return placed

    def _parts(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of each piece."""
        if len(self.pieces) == 1 and not self.rest:
            return [rows]  # as they are: torch.compile copies the only part of a split
        if [i for index, _ in self.pieces for i in index] == list(range(self.stack_size)):
            # One split: its gradient is one concatenation, where each slice's fills the whole.
            return rows.split([len(index) for index, _ in self.pieces])
        return [take(rows, index) for index, _ in self.pieces]

    def _gather(self, parts: list[Tensor], rows: Tensor) -> Tensor:
        """The parts and the rows without an adapter, in the order of the stack."""
        order = [i for index, _ in self.pieces for i in index] + list(self.rest)
        if self.rest:
            parts = [*parts, take(rows, self.rest)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return take(whole, inverse_permutation(order))

    def _check(self, x: Tensor | OneHot) -> None:
        batch = self.stack_size * (self.rows or 1)
        whole = x.shape[0] == batch or (
            (x.dim() == 2 or self.rows is None) and x.shape[0] % batch == 0
        )
        if x.dim() < 2 or not whole:
            raise FadaptError(
                f"{self.site.name} gets an input of shape {tuple(x.shape)}, where {self.stack_size}"
                f" adapters x {self.rows or '?'} rows need a leading batch axis of {batch}: the "
                f"model moves or mixes its batch axis. {APART}"
            )


def _adapt_input(method: Method, where: str, p: Any, x: Tensor) -> tuple[Tensor, Any]:
    return adapt_input(method, p, x, where)


def take(rows: Tensor, index: Sequence[int]) -> Tensor:
    """The rows at ``index``, no row twice; a view where they are consecutive."""
    first, last = index[0], index[-1]
    if list(index) == list(range(first, last + 1)):
        return rows if len(index) == rows.shape[0] else rows[first : last + 1]
    # Not by a tensor of indices: it would have to be copied to the device, which breaks off the
    # recording of a CUDA graph.
    starts = [k for k, i in enumerate(index) if not k or i != index[k - 1] + 1]
    runs = [index[a:b] for a, b in itertools.pairwise([*starts, len(index)])]
    cuts = sorted({0, rows.shape[0], *(r[0] for r in runs), *(r[-1] + 1 for r in runs)})
    pieces = rows.split([b - a for a, b in itertools.pairwise(cuts)])
    found = dict(zip(cuts, pieces, strict=False))
    return torch.cat([found[run[0]] for run in runs])


def folded_sites(stack: Stack, rows: int | None) -> dict[str, FoldedSite]:
    """The overlays' contents for a stack, by site.

    Raises:
        FadaptError: a site whose layer cannot tell the rows of the adapters apart.
    """
    sites = {name: FoldedSite(name, stack, rows) for name in stack.sites}
    for name, folded in sites.items():
        if why := cannot_fold(folded.site) or folded.cannot_embed():
            raise FadaptError(
                f"{name} {why}: a stack of {stack.size} adapters cannot be folded there. {APART}"
            )
    return sites


def cannot_fold(site: Site) -> str:
    """Why a layer needs its adapters one by one; "" where it does not."""
    if site.experts:
        return "holds expert weights, and routing mixes the rows of a batch"
    if site.kernel:
        what = (
            "the kernel of a convolution" if site.kind is Kind.CONVOLUTION else "split into heads"
        )
        return f"is {what}, which takes one weight for all rows"
    return ""


def check_rows_apart(model: nn.Module) -> None:
    """Refuses modules in which rows of different adapters would meet, as far as they can be seen.

    Those that put time before the batch, and those that in training mode compute something of the
    whole batch; :mod:`.proof` looks at the values, but in eval mode only.
    """
    for name, module in model.named_modules():
        if why := _mixes_rows(module):
            raise FadaptError(f"{name} ({type(module).__name__}) {why}. {APART}")


def _mixes_rows(module: nn.Module) -> str:
    if vars(module).get("batch_first", True) is False:
        return "has batch_first=False; a stack needs the batch axis first. Build it with True"
    if isinstance(module, _BATCH_NORMS) and (module.training or module.running_mean is None):
        return (
            "normalises by statistics of the whole batch, so the rows of different adapters would "
            "meet in a stack. Call .eval() on this module, if it keeps running statistics"
        )
    if module.training and _has_capacity(module):
        return (
            "is in training mode and has a capacity, for which the rows of different adapters "
            "would compete in a stack. Call model.eval()"
        )
    return ""


def _has_capacity(module: nn.Module) -> bool:
    attributes = vars(module)
    if torch.compiler.is_compiling():
        # Up to torch 2.11 Dynamo looks names up in a module's attributes, but cannot list them.
        return attributes.get("expert_capacity") is not None
    return any("capacity" in key for key in attributes)


def parts(batch: Any, stack: Stack, per_adapter: bool) -> Sequence[Any]:
    """The batch of each member alone; the very same object where they share it."""
    if not per_adapter and not stack.per_row:
        return [batch] * stack.size

    def part(t: Any, k: int) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0:
            return t
        if stack.per_row:
            return t if t.shape[0] == 1 else t[k : k + 1]
        return t[k]

    return [pytree.tree_map(functools.partial(part, k=k), batch) for k in range(stack.size)]


def rows_of(batch: Any) -> int:
    """The rows of one member's batch."""
    return max((t.shape[0] for _, t in _tensors(batch)), default=1)


def rows_at(batch: Any, rows: int, index: Sequence[int]) -> Any:
    """One member's batch with other rows of it."""

    def pick(t: Any) -> Any:
        picks = isinstance(t, Tensor) and t.dim() and t.shape[0] == rows
        return take(t, index) if picks else t

    return pytree.tree_map(pick, batch)


def joined(batches: Sequence[Any], rows: int) -> Any:
    """The batches of several members as one, as :func:`fold_batch` has it."""

    def join(first: Any, *others: Any) -> Any:
        joins = isinstance(first, Tensor) and first.dim() and first.shape[0] == rows
        return torch.cat([first, *others]) if joins else first

    return pytree.tree_map(join, *batches)


def batch_rows(batch: Any, stack: Stack, per_adapter: bool) -> int:
    """B, the rows per adapter, from the leaves of a batch.

    Raises:
        ConfigError: leaves that disagree, or a leading axis that is not the number of adapters.
    """
    tensors = _tensors(batch)
    if not tensors:
        raise ConfigError("the batch holds no tensor")
    if stack.per_row:
        for key, t in tensors:
            if t.shape[0] not in (1, stack.size):
                raise ConfigError(
                    f"{key} has {t.shape[0]} rows, but select() chose an adapter for {stack.size}"
                )
        return 1
    if not per_adapter:
        rows = max(t.shape[0] for _, t in tensors)
        if not rows:
            raise ConfigError(
                f"the batch has no rows: {tensors[0][0]} is {list(tensors[0][1].shape)}"
            )
        return rows
    for key, t in tensors:
        if t.shape[0] != stack.size or t.dim() < 2:
            raise ConfigError(
                f"per_adapter=True needs (N, B, ...) with N = {stack.size} adapters; "
                f"{key} has shape {tuple(t.shape)}"
            )
    return max(t.shape[1] for _, t in tensors)


def fold_batch(batch: Any, stack: Stack, rows: int, per_adapter: bool) -> Any:
    """The batch with N x B rows: per-adapter leaves flattened, shared ones repeated."""

    def fold(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0 or stack.per_row:
            return t
        if t.layout is not torch.strided:
            raise ConfigError(
                f"a stack gives its adapters parts of a batch, which a tensor of layout {t.layout} "
                "has not; pass its .to_dense(). "
                f"{APART}"
            )
        if per_adapter:
            return t.flatten(0, 1)
        if t.shape[0] == 1 and rows > 1:
            return t
        if t.shape[0] != rows:
            raise ConfigError(
                f"a shared batch of {rows} rows holds a tensor of shape {tuple(t.shape)}; give "
                "every tensor the batch axis first"
            )
        return t.expand(stack.size, *t.shape).flatten(0, 1)

    return pytree.tree_map(fold, batch)


def reorder(batch: Any, order: Sequence[int]) -> Any:
    """The batch with the parts of the adapters, or of their rows, in another order."""

    def pick(t: Any) -> Any:
        if not isinstance(t, Tensor) or t.dim() == 0 or t.shape[0] == 1:
            return t
        return take(t, order)

    return pytree.tree_map(pick, batch)


def unfold(output: Any, stack: Stack, rows: int) -> Any:
    """The output with (N, B, ...) tensors in place of (N x B, ...) ones.

    Raises:
        FadaptError: tensors in an object that cannot be taken apart.
    """
    if stack.per_row:
        return output

    def split(t: Any) -> Any:
        if isinstance(t, Tensor) and t.dim() and t.shape[0] == stack.size * rows:
            return t.unflatten(0, (stack.size, rows))
        return t

    return _map(split, output, stack.size * rows)


def slices(tree: Any, stack: Stack, rows: int) -> Sequence[Any]:
    """The part of each adapter of a folded batch or output.

    Raises:
        FadaptError: tensors in an object that cannot be taken apart.
    """
    n = stack.size
    leaves, spec = pytree.tree_flatten(tree)
    # As in FoldedSite._parts: the gradient of n slices would fill the whole output n times.
    columns = [_parts_of(leaf, n, rows) for leaf in leaves]
    return [pytree.tree_unflatten([c[i] for c in columns], spec) for i in range(n)]


def _parts_of(leaf: Any, n: int, rows: int) -> Sequence[Any]:
    """What each of n adapters gets of a leaf."""
    if isinstance(leaf, Tensor):
        return leaf.split(rows) if leaf.dim() and leaf.shape[0] == n * rows else (leaf,) * n
    if not _is_dataclass(leaf):
        _refuse_hidden(leaf, n * rows)
        return (leaf,) * n
    copies = [copy.copy(leaf) for _ in range(n)]
    for f in dataclasses.fields(leaf):
        values, spec = pytree.tree_flatten(getattr(leaf, f.name))
        columns = [_parts_of(value, n, rows) for value in values]
        for i, new in enumerate(copies):  # object's: a frozen one refuses its own
            part = pytree.tree_unflatten([c[i] for c in columns], spec)
            object.__setattr__(new, f.name, part)
    return copies


def opened(tree: Any) -> Any:
    """A tree in which dataclasses that no registry of trees knows are dicts."""
    return pytree.tree_map(
        lambda leaf: (
            {f.name: opened(getattr(leaf, f.name)) for f in dataclasses.fields(leaf)}
            if _is_dataclass(leaf)
            else leaf
        ),
        tree,
    )


def _map(function: Callable[[Any], Any], tree: Any, rows: int) -> Any:
    """A function of the leaves, also of those in dataclasses."""

    def visit(leaf: Any) -> Any:
        if not _is_dataclass(leaf):
            _refuse_hidden(leaf, rows)
            return function(leaf)
        new = copy.copy(leaf)
        for f in dataclasses.fields(leaf):
            object.__setattr__(new, f.name, _map(function, getattr(leaf, f.name), rows))
        return new

    return pytree.tree_map(visit, tree)


def _is_dataclass(leaf: Any) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)


def _refuse_hidden(leaf: Any, rows: int) -> None:
    """Refuses an object, such as a distribution, that holds a tensor with the rows of all."""
    if torch.compiler.is_compiling() or isinstance(leaf, (Tensor, type, nn.Module)):
        return
    if not hasattr(leaf, "__dict__"):
        return
    for key, value in vars(leaf).items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
            raise FadaptError(
                f"the model returns a {type(leaf).__name__}, whose {key} has the {rows} rows of "
                "all adapters, and fadapt cannot take it apart: return tensors, in tuples, dicts "
                f"or dataclasses. {APART}"
            )


def _tensors(batch: Any) -> list[tuple[str, Tensor]]:
    leaves, _ = pytree.tree_flatten_with_path(batch)
    return [
        (f"batch{pytree.keystr(path)}", leaf)
        for path, leaf in leaves
        if isinstance(leaf, Tensor) and leaf.dim()
    ]
