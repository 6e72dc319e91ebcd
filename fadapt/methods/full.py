"""Full: W' = W + D, a dense increment of the whole parameter.

Trainable: D (out, in), zero. Count: out·in; of a vector of n values, n.
Identity at the start: D = 0. The bias is untouched; in a Chain, :class:`fadapt.BitFit` trains it.
The yardstick of full fine-tuning, over a base that stays as it is: weight decay pulls towards the
base, and strengths interpolate. It also takes embeddings, kernels, and norms and biases by name.
PEFT keeps such copies of whole modules under ``modules_to_save``.
Numerics: D's gradient is a product of the size of W's own. Alone and in float32 the base meets
W + D in one product; over 16 bits, where W + D would round D away, x meets both.
Pitfall: as large as the weight itself, and a stack holds one for each member.

Ilharco et al. 2022, "Editing Models with Task Arithmetic", arXiv 2212.04089, where D is the task
vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dense_increment import DenseIncrement
from ..method import Leaves

if TYPE_CHECKING:
    from ..site import SiteView


@dataclass(frozen=True)
class Full(DenseIncrement):
    """A dense increment of a matrix or of a vector.

    Example:
        >>> params = fadapt.init(model, {"0.weight": fadapt.Full()})
        >>> params["0.weight"].train["D"].shape
        torch.Size([16, 8])
    """

    @property
    def adapts_vectors(self) -> bool:
        return True

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        return {"D": site.zeros(site.out_features, site.in_features)}, {}

    def increment(
        self, p: Mapping[str, Tensor], weight: Callable[[], Tensor], d_out: int, d_in: int
    ) -> Tensor:
        return p["D"]
