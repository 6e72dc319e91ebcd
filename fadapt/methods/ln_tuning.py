"""LN-tuning: w' = w + d, the scales and the shifts of a model's norms and nothing else.

Trainable: d (n,), zero, for each weight and each bias of a norm. Count: n each.
Stored as the increment of the frozen vector, so it is the identity at d = 0 to the last bit, and
weight decay pulls towards the base. A rule that names no parameter means the vectors of all norms
that it matches (layers whose class is called a norm); others, such as biases, are adapted where a
rule matches no norm.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
arXiv 2312.11420; Qi et al. 2022, "Parameter-Efficient Tuning on Layer Normalization for
Pre-trained Language Models", arXiv 2211.08682.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..base.weights import Kind
from ..errors import require
from ..method import Leaves, Method

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class LNTuning(Method):
    """Trained increments of the vectors of norms.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
        >>> list(fadapt.init(net, fadapt.LNTuning()))
        ['1.bias', '1.weight']
    """

    reads_output: ClassVar[bool] = False
    usual_kind: ClassVar[str] = "norm"

    @property
    def adapts_vectors(self) -> bool:
        return True

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def check(self, site: Site) -> None:
        require(
            site.kind is Kind.VECTOR,
            f"LNTuning trains vectors, and {site.name} is {site.kind}; write fadapt.Full() there",
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        return {"d": site.zeros(site.out_features)}, {}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        return x * p["d"]
