"""IA3: y' = (1 + d) ∘ y, bias included.  IA3-FF: y' = base((1 + d) ∘ x).

Trainable: d (out,) for IA3, d (in,) for IA3-FF, zero. Count: out, or in.
Stored as the increment d of the paper's vector l = 1 + d, and evaluated as y + d ∘ y, so it is
the identity at d = 0 to the last bit, and bfloat16 does not round small steps around 1 away.
IA3 scales the bias with the output (as the paper's formula does); IA3-FF leaves the bias alone.
Usual targets: k_proj and v_proj for IA3, down_proj for IA3-FF.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", arXiv 2205.05638, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..method import Leaves, Method

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class IA3(Method):
    """Learned rescaling of the output, bias included.

    Example:
        >>> params = fadapt.init(model, fadapt.IA3())
        >>> sorted(params["0.weight"].train)
        ['d']
    """

    reads_input: ClassVar[bool] = False
    casts_output: ClassVar[bool] = False

    @property
    def acts_on_bias(self) -> bool:
        return True

    @property
    def supports_batch_dims(self) -> bool:
        return True

    @property
    def adapts_vectors(self) -> bool:
        return True

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        return {"d": site.zeros(site.out_features)}, {}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return p["d"] * y


@dataclass(frozen=True)
class IA3FF(Method):
    """Learned rescaling of the input.

    Example:
        >>> params = fadapt.init(model, fadapt.IA3FF())
        >>> sorted(params["0.weight"].train)
        ['d']
    """

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        return {"d": site.zeros(site.in_features)}, {}

    def shift(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return p["d"] * x
