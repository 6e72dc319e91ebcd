"""Full: W' = W + D, a dense increment of the whole parameter.

Trainable: D (out, in), zero. Count: out·in; of a vector of n values, n.
Identity at the start: D = 0. The bias is untouched; in a Chain, :class:`fadapt.BitFit` trains it.
The yardstick of full fine-tuning, over a base that stays as it is: weight decay pulls towards the
base, and strengths interpolate. It also takes embeddings, kernels, and norms and biases by name.
PEFT keeps such copies of whole modules under ``modules_to_save``.
Pitfall: as large as the weight itself, and a stack holds one for each member.

Ilharco et al. 2022, "Editing Models with Task Arithmetic", arXiv 2212.04089, where D is the task
vector.
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
class Full(Method):
    """A dense increment of a matrix or of a vector.

    Example:
        >>> params = fadapt.init(model, {"0.weight": fadapt.Full()})
        >>> params["0.weight"].train["D"].shape
        torch.Size([16, 8])
    """

    reads_output: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    @property
    def adapts_vectors(self) -> bool:
        return True

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        return {"D": site.zeros(site.out_features, site.in_features)}, {}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return x @ p["D"].mT
