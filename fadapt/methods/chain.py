"""Chain: several methods on one site; each adapts the map that the one before it made.

f_0 is the frozen layer and f_k the map f_{k-1} adapted by the k-th method, whose ``base`` is
f_{k-1}. Leaves are those of the methods, prefixed "0.", "1.", ...
Identity at the start: every f_k is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..adapted_map import AdaptedMap, Composed, increment_factors, needs_plain_base
from ..errors import require
from ..method import Factors, Method

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap


@dataclass(frozen=True)
class Chain(Composed):
    """Methods applied one over the other, innermost first.

    Args:
        methods: at least one method. Those whose constants come from the frozen weight's norms
            (DoRA) can only stand first.

    Example:
        >>> params = fadapt.init(model, fadapt.Chain((fadapt.LoRA(r=2), fadapt.IA3())))
        >>> sorted(params["0.weight"].train)
        ['0.A', '0.B', '1.d']
    """

    methods: tuple[Method, ...] = ()

    owns_strength: ClassVar[bool] = True  # which it hands to its methods
    # And no supports_batch_dims, as a method may read the weight or the bias of the map under it.

    def __post_init__(self) -> None:
        require(bool(self.methods), "Chain needs at least one method: Chain((LoRA(), IA3()))")
        for method in self.methods[1:]:
            require(
                not needs_plain_base(method),
                f"{type(method).__name__} is defined by the frozen weight; put it first",
            )

    def true_gradient(self) -> Chain:
        return Chain(tuple(m.true_gradient() for m in self.methods))

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        pairs = []
        for i, method in enumerate(self.methods):
            part = self.part(p, i)
            pairs.append(increment_factors(method, part, base))
            base = AdaptedMap(method, part, base)
        if any(pair is None for pair in pairs):
            return None
        downs, ups = zip(*(pair for pair in pairs if pair), strict=True)
        return torch.cat(downs, -2), torch.cat(ups, -1)
