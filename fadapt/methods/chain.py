"""Chain: several methods on one site; each adapts the map that the one before it made.

f_0 is the frozen layer and f_k the map f_{k-1} adapted by the k-th method, whose ``base`` is
f_{k-1}. Leaves are those of the methods, prefixed "0.", "1.", ...
Identity at the start: every f_k is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..adapted_map import AdaptedMap, Composed, increment_factors, start, start_shared
from ..errors import require
from ..method import Factors, Leaves, Method
from ..seeds import generator

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


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

    def __post_init__(self) -> None:
        require(bool(self.methods), "Chain needs at least one method: Chain((LoRA(), IA3()))")
        for method in self.methods[1:]:
            require(
                not method.needs_plain_base,
                f"{type(method).__name__} is defined by the frozen weight; put it first",
            )

    @property
    def keep_fp32(self) -> frozenset[str]:
        return frozenset(f"{i}.{k}" for i, m in enumerate(self.methods) for k in m.keep_fp32)

    @property
    def acts_on_bias(self) -> bool:
        return any(m.acts_on_bias for m in self.methods)

    @property
    def adapts_vectors(self) -> bool:
        return all(m.adapts_vectors for m in self.methods)

    @property
    def starts_at_identity(self) -> bool:
        return all(m.starts_at_identity for m in self.methods)

    @property
    def supports_batch_dims(self) -> bool:
        return all(m.supports_batch_dims for m in self.methods)

    @property
    def statistic(self) -> tuple | None:
        parts = tuple(m.statistic for m in self.methods)
        return parts if any(part is not None for part in parts) else None

    def init(self, site: SiteView, rng: torch.Generator, stat: Any = None) -> tuple[Leaves, Leaves]:
        train: Leaves = {}
        fixed: Leaves = {}
        for i, method in enumerate(self.methods):
            own = generator(rng.initial_seed(), i)
            parts = start(method, site, own, None if stat is None else stat[i])
            for whole, part in zip((train, fixed), parts, strict=True):
                whole.update({f"{i}.{k}": t for k, t in part.items()})
        return train, fixed

    def shared(self, sites: Sequence[SiteView], rng: torch.Generator) -> tuple[Leaves, Leaves]:
        whole: tuple[Leaves, Leaves] = {}, {}
        for i, method in enumerate(self.methods):
            parts = start_shared(method, sites, generator(rng.initial_seed(), i))
            for one, part in zip(whole, parts, strict=True):
                one.update({f"{i}.{k}": t for k, t in part.items()})
        return whole

    def true_gradient(self) -> Chain:
        return Chain(tuple(m.true_gradient() for m in self.methods))

    def project(self, train: Leaves) -> Leaves:
        return {
            f"{i}.{k}": t
            for i, method in enumerate(self.methods)
            for k, t in method.project(self.part(train, i)).items()
        }

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
