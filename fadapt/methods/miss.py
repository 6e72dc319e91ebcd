"""MiSS: y' = y + (Σ_c x_c) D,  x_c the parts of x of r entries each, the last filled with zeros.

Every block of r columns of W gets the same increment Dᵀ.
    miss: D (r, out). Rank r. Count: r out.
    mini: D (r, mini_r), repeated along the outputs. Rank min(r, mini_r). Count: r mini_r.
    bat (block affine transformation, formerly Bone): D (out / r, r, r), the block of outputs a and
        inputs c becomes W_ac + (W_ac + I) D_a. Full rank. Count: out r. It makes one matrix of
        in x out in every pass (a quantized W is dequantized for it), which is not kept. As for
        HiRA, its gradient is one product of the size of W's own.
Trainable: D zero. Identity at the start: D = 0. The bias is untouched.
Pitfall: r sets the number of values and, in "miss", what is summed: r = in is the full increment,
small r sums many entries of x into one, so the sizes of the steps grow as in / r.

Kang and Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing
Structure" (first "Bone: Block-Affine Adaptation of Large Language Models"), arXiv 2409.15371.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dense_increment import DenseIncrement
from ..errors import require
from ..method import Factors, Leaves
from ._ranks import check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class MiSS(DenseIncrement):
    """One increment shared by all blocks of r columns.

    Args:
        r: columns of a block, at most in_features; of "bat" a divisor of inputs and outputs.
        mode: "miss", "bat" or "mini".
        mini_r: of "mini", the outputs after which the increment repeats; divides them.

    Example:
        >>> params = fadapt.init(model, fadapt.MiSS(r=2))
        >>> tuple(params["0.weight"].train["D"].shape)
        (2, 16)
    """

    r: int = 64
    mode: Literal["miss", "bat", "mini"] = "miss"
    mini_r: int = 1

    row_axes: ClassVar[Mapping[str, int]] = {"D": -3}

    @property
    def reads_weight(self) -> bool:
        return self.mode == "bat"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)
        require(self.mini_r >= 1, f"mini_r must be at least 1, got {self.mini_r}; write mini_r=1")

    def check(self, site: Site) -> None:
        r, (d_out, d_in) = self.r, site.matrix_shape
        require(
            r <= d_in,
            f"r={r} is more than the {d_in} inputs of a {d_out} x {d_in} weight; write r={d_in} or "
            "less",
        )
        both = [n for n in range(1, min(d_in, d_out) + 1) if d_in % n == 0 == d_out % n]
        near = sorted(sorted(both, key=lambda n: abs(n - r))[:8])
        require(
            self.mode != "bat" or r in both,
            f'mode "bat" has r x r blocks, and r={r} does not divide both the {d_in} inputs and '
            f"the {d_out} outputs; choose from {near}",
        )
        require(
            self.mode != "mini" or d_out % self.mini_r == 0,
            f"mini_r={self.mini_r} does not divide the {d_out} outputs; write mini_r=1",
        )

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        r = self.r
        shape = {
            "miss": (r, site.out_features),
            "mini": (r, self.mini_r),
            "bat": (site.out_features // r, r, r),
        }[self.mode]
        return {"D": site.zeros(*shape)}, {}

    def prefers_matrix(self, p: Mapping[str, Tensor], tokens: int, d_out: int, d_in: int) -> bool:
        return self.mode == "bat"

    def increment(
        self, p: Mapping[str, Tensor], weight: Callable[[], Tensor], d_out: int, d_in: int
    ) -> Tensor:
        r, d = self.r, p["D"]
        # (out / r, r, in / r, r): the rows of the blocks of one a, in one product with D_a.
        blocks = weight().to(d.dtype).unflatten(-1, (-1, r)).unflatten(-3, (-1, r))
        blocks = blocks + torch.eye(r, dtype=d.dtype, device=d.device).unsqueeze(-2)
        change = blocks.flatten(-3, -2) @ d
        return change.unflatten(-2, (r, -1)).flatten(-2).flatten(-3, -2)

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        d, r = p["D"], self.r
        if self.mode == "bat":
            return super().delta(p, x, y, base)
        sums = F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2)
        out = sums @ d
        if self.mode == "mini":
            out = out.repeat(*(1,) * (out.dim() - 1), y.shape[-1] // self.mini_r)
        return out

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        if self.mode == "bat":
            return None
        weight, d = base.weight(), p["D"]
        d_out, d_in = weight.shape[-2:]
        eye = torch.eye(self.r, dtype=d.dtype, device=d.device)
        tiled = eye.repeat(1, -(-d_in // self.r))[:, :d_in]
        if self.mode == "miss":
            return tiled, d.mT
        copies = torch.eye(self.mini_r, dtype=d.dtype, device=d.device)
        copies = copies.repeat(d_out // self.mini_r, 1)
        return (tiled, copies @ d.mT) if self.r <= self.mini_r else (d.mT @ tiled, copies)
