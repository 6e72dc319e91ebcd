"""BitFit: y' = y + d, a trained bias and nothing else.

Trainable: d (out,), zero. Count: out. Stored as the increment of the frozen bias, so weight decay
pulls towards the base model. In a Chain it gives any other method a trained bias.
Identity at the start: d = 0. The weight is untouched.

Ben-Zaken, Ravfogel and Goldberg 2021, "BitFit: Simple Parameter-efficient Fine-tuning for
Transformer-based Masked Language-models", arXiv 2106.10199.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..method import Factors, Leaves, Method

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import SiteView


@dataclass(frozen=True)
class BitFit(Method):
    """A trained increment of the bias.

    Example:
        >>> params = fadapt.init(model, fadapt.BitFit())
        >>> sorted(params["0.weight"].train)
        ['d']
    """

    reads_input: ClassVar[bool] = False
    reads_output: ClassVar[bool] = False

    @property
    def acts_on_bias(self) -> bool:
        return True

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        return {"d": site.zeros(site.out_features)}, {}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return p["d"].expand(*x.shape[:-1], -1)

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        d = p["d"]
        return d.new_zeros(0, base.weight().shape[-1]), d.new_zeros(d.shape[-1], 0)
