"""Adapter: the method and the leaves of one site; Adapted: whatever may stand where a weight is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from ..adapted_map import (
    acts_in_training,
    adapt_input,
    adapt_output,
    check_tensor_parallel,
    dense,
    drops_input,
    is_plain_product,
)
from ..base.linear_map import DenseMap, LinearMap
from ..base.sharded import replicated
from ..dense_increment import DenseIncrement
from ..errors import ConfigError, FadaptError
from ..method import STRENGTH, Leaves, Method
from ..site import Site
from .pytree import register_node


class Adapted(Protocol):
    """What stands behind an overlay: one adapter, or a fold of many."""

    @property
    def site(self) -> Site: ...

    @property
    def acts_on_bias(self) -> bool: ...

    @property
    def device(self) -> torch.device | None: ...

    def __call__(self, x: Tensor, base: LinearMap) -> Tensor:
        """The adapted map on (..., in_features)."""
        ...

    def embed(self, one_hot: Any, base: LinearMap) -> Tensor:
        """The adapted map on the one-hot rows of an embedding (``overlay.embedding.OneHot``)."""
        ...

    def dense(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The adapted parameter, in its stored shape, and bias; or an error."""
        ...

    def within(self, module: nn.Module, draw: Tensor | None) -> Adapted:
        """The same in the layer that holds the weight, whose training mode it may follow.

        Args:
            draw: the number from which masks of dropout follow; None where none has been drawn.
        """
        ...

    @property
    def drops(self) -> bool:
        """Whether it drops parts of its input while its layer trains, and has no draw yet."""
        ...

    def over_mesh(self, mesh: Any) -> Adapted:
        """The same for a weight that is a DTensor of this mesh; or an error."""
        ...


@dataclass(frozen=True, eq=False)
class Adapter:
    """One site's adapter: static site and method, trainable and fixed leaves.

    Attributes:
        site: where it belongs; static.
        method: its hyper-parameters; static.
        train: trainable leaves, which start at the increment zero or at random.
        fixed: constants the method needs (row norms, SVD factors) and the runtime strength.
        bank: the leaves that the method's sites share, from the Params that holds them.
        owner: the layer whose training mode the adapter follows, during a call; not kept.
        draw: the number from which masks of dropout follow, during a call, or of a training loop
            that counts its passes; not kept.

    Example:
        >>> adapter = fadapt.init(model, fadapt.LoRA(r=2))["0.weight"]
        >>> adapter.method, adapter.site.matrix_shape, sorted(adapter.train)
        (LoRA(r=2, ...), (16, 8), ['A', 'B'])
    """

    site: Site
    method: Method
    train: Leaves
    fixed: Leaves
    owner: nn.Module | None = field(default=None, kw_only=True)
    bank: Leaves = field(default_factory=dict, kw_only=True)
    draw: Tensor | None = field(default=None, kw_only=True)

    is_group: ClassVar[bool] = False
    """True where the leaves are those of several adapters (a stack's)."""

    @property
    def training(self) -> bool:
        """Whether the layer trains and the method acts otherwise then."""
        return self.owner is not None and self.owner.training

    def within(self, module: nn.Module, draw: Tensor | None = None) -> Adapted:
        """The adapter in its layer, for one call; a method that need not know it is as it was."""
        if not acts_in_training(self.method):
            return self
        return replace(self, owner=module, draw=draw if self.draw is None else self.draw)

    @property
    def drops(self) -> bool:
        return self.draw is None and drops_input(self.method)

    def over_mesh(self, mesh: Any) -> Self:
        """The adapter with its leaves as DTensors, for a weight that is split over processes.

        Raises:
            TargetError: a method whose arithmetic DTensors do not know, or may not.
        """
        check_tensor_parallel(self.site.name, self.method)
        return self.replace(
            *({k: replicated(t, mesh) for k, t in p.items()} for p in (self.train, self.fixed))
        )

    @property
    def leaves(self) -> Leaves:
        """Trainable, fixed and shared leaves together, as a method's functions receive them."""
        return {**self.bank, **self.train, **self.fixed}

    @property
    def tensors(self) -> list[Tensor]:
        """All leaves, in no particular order."""
        return [*self.leaves.values()]

    @property
    def acts_on_bias(self) -> bool:
        return self.method.acts_on_bias

    @property
    def device(self) -> torch.device | None:
        """Where the leaves are; None without leaves."""
        return next((t.device for t in self.leaves.values()), None)

    def with_bank(self, source: Adapter) -> Self:
        """The adapter with the leaves of another that its method's sites share."""
        return replace(self, bank={k: t for k, t in source.leaves.items() if k != STRENGTH})

    def __str__(self) -> str:
        return type(self.method).__name__

    def __call__(self, x: Tensor, base: LinearMap) -> Tensor:
        """The adapted map on (..., in_features).

        The base sees x in its own shape, so its kernel and rounding are those of the plain layer.
        """
        p, method, where = self.leaves, self.method, self.site.name
        if isinstance(method, DenseIncrement) and not self.training:
            y = method.whole(p, x, base)
            if y is not None:
                return y
        if is_plain_product(x, base):
            # As rows: torch's own product sees a plain block of them as a matrix, too.
            rows = x if x.dim() == 2 else x.flatten(0, -2)
            shifted, saved = adapt_input(method, p, rows, where)
            y, training = base(shifted), self.training
            y = adapt_output(method, p, saved, y, base, where, training, self.draw, into=True)
            return y if rows is x else y.reshape(*x.shape[:-1], y.shape[-1])
        if method.supports_batch_dims:
            x, saved = adapt_input(method, p, x, where)
            return adapt_output(method, p, saved, base(x), base, where, self.training, self.draw)
        rows = x.reshape(-1, x.shape[-1])
        shifted, saved = adapt_input(method, p, rows, where)
        y = base(x if shifted is rows else shifted.reshape(x.shape))
        return adapt_output(method, p, saved, y, base, where, self.training, self.draw)

    def embed(self, one_hot: Any, base: LinearMap) -> Tensor:
        """The adapted map on the one-hot rows of an embedding."""
        return self(one_hot, base)

    def expert(self, index: Any, count: int = 0) -> Self:
        """The adapter of one expert, or of the experts ``index`` (count,) with repetitions."""

        def take(leaves: Leaves) -> Leaves:
            return {k: t if k == STRENGTH else t[index] for k, t in leaves.items()}

        site = replace(self.site, experts=count, flat=False)
        return replace(self, site=site, train=take(self.train), fixed=take(self.fixed))

    def dense(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The adapted parameter, in its stored shape, and bias; in the dtype of ``weight``.

        Pass float32 or float64 tensors; the leaves are cast to them.
        """
        if self.training:
            raise FadaptError(
                f"{self.site.name} is used by an operation without a rule, where {self.method} "
                "cannot act as it does in training mode; write dropout=0.0, or model.eval()"
            )
        matrix = self.site.matrix(weight)
        if self.site.experts:
            each = range(self.site.experts)
            new = torch.stack([self.expert(e)._dense(matrix[e], None)[0] for e in each])
            return self.site.parameter(new), bias
        new, new_bias = self._dense(matrix, bias)
        return self.site.parameter(new), new_bias

    def _dense(self, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        p = {k: t.to(matrix.dtype) if t.is_floating_point() else t for k, t in self.leaves.items()}
        return dense(self.method, p, DenseMap(matrix, bias))

    def projected(self) -> Leaves:
        """The trainable leaves moved into the constraints of the method."""
        return self.method.project(self.train)

    def replace(self, train: Leaves | None = None, fixed: Leaves | None = None) -> Self:
        """A copy with other leaves."""
        return replace(
            self,
            train=self.train if train is None else _sorted(train),
            fixed=self.fixed if fixed is None else _sorted(fixed),
        )


def _sorted(items: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(items, Mapping):
        raise ConfigError(f"expected a dict of names, got {items!r:.80}")
    # torch's pytree keeps a dict's insertion order, optree sorts it: sorted keys agree in both.
    return {k: items[k] for k in sorted(items)}


def _flatten_adapter(a: Adapter) -> tuple[tuple[Leaves, Leaves], tuple[Site, Method]]:
    return (a.train, a.fixed), (a.site, a.method)


def _unflatten_adapter(aux: Any, children: Any) -> Adapter:
    return Adapter(*aux, *children)


register_node(Adapter, _flatten_adapter, _unflatten_adapter)
