"""Trainable tokens: some rows of an embedding move, W'[t] = W[t] + d_j for the j-th token t.

Trainable: d (n, width), zero, for n tokens. Count: n·width, also where the embedding is tied to the
head. Fixed: the tokens' indices. Identity at the start: d = 0.
Ties are followed: where the embedding's tensor is used again, as a head for logits, its uses are
sites, too, and share d. At a linear layer a row belongs to an output, at an embedding to an id.
A rule that names no parameter means the model's input embedding (``get_input_embeddings``, else
every ``nn.Embedding``), and ``exclude``'s default does not keep it out.
LoRA form: exact of rank n, where the tokens are named. The bias is untouched.

The method of PEFT's ``TrainableTokensConfig``, whose files hold the rows themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..base.weights import Kind
from ..errors import require
from ..method import Factors, Leaves, Method

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class TrainableTokens(Method):
    """Trained rows of an embedding, and of what is tied to it.

    Args:
        token_indices: the ids of the tokens; None for all of them.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2))
        >>> fadapt.init(net, fadapt.TrainableTokens(token_indices=(3, 7)))
        Params(TrainableTokens(token_indices=(3, 7)) x 1; 8 trainable)
    """

    token_indices: tuple[int, ...] | None = None

    reads_output: ClassVar[bool] = False
    usual_kind: ClassVar[str] = "embedding"
    follows_ties: ClassVar[bool] = True

    def __post_init__(self) -> None:
        tokens = self.token_indices
        require(
            tokens is None or len(tokens) == len(set(tokens)) > 0,
            f"token_indices must name at least one token, and none twice, got {tokens}",
        )
        require(min(tokens or (0,)) >= 0, f"token_indices must be at least 0, got {tokens}")

    def check(self, site: Site) -> None:
        rows = _rows(site)
        require(
            max(self.token_indices or (0,)) < rows,
            f"token_indices has {max(self.token_indices or (0,))}, and there are {rows} rows",
        )

    def shared(self, sites: Sequence[SiteView], rng: torch.Generator) -> tuple[Leaves, Leaves]:
        first = sites[0]
        return ({"d": self._start(first)}, {}) if _are_tied([s.site for s in sites]) else ({}, {})

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        train = {} if _are_tied(site.sites) else {"d": self._start(site)}
        tokens = torch.tensor(self.token_indices or (), dtype=torch.int64, device=site.device)
        return train, {"ids" if site.site.kind is Kind.EMBEDDING else "outputs": tokens}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        if self.token_indices is None:
            return x @ p["d"] if "ids" in p else x @ p["d"].mT
        if "ids" in p:
            return x[..., p["ids"]] @ p["d"]
        moved = x @ p["d"].mT
        zero = moved.new_zeros(*moved.shape[:-1], y.shape[-1])
        return zero.index_add(-1, p["outputs"], moved)

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        if self.token_indices is None:
            return None
        d, shape = p["d"], base.weight().shape
        axis = 1 if "ids" in p else 0
        tokens = p["ids" if axis else "outputs"]
        positions = torch.arange(shape[axis], device=tokens.device)
        chosen = (tokens.unsqueeze(1) == positions).to(d.dtype)
        return (chosen, d.mT) if axis else (d, chosen.mT)

    def _start(self, site: SiteView) -> Tensor:
        rows, width = _rows(site.site), _width(site.site)
        return site.zeros(rows if self.token_indices is None else len(self.token_indices), width)


def _rows(site: Site) -> int:
    return site.in_features if site.kind is Kind.EMBEDDING else site.out_features


def _width(site: Site) -> int:
    return site.out_features if site.kind is Kind.EMBEDDING else site.in_features


def _are_tied(sites: Sequence[Site]) -> bool:
    """Whether several sites are uses of one tensor.

    Raises:
        ConfigError: some of them are, others not.
    """
    groups = {frozenset((site.name, *site.tied)) for site in sites}
    tied = len(sites) > 1 and len(groups) == 1
    several = [g for g in groups if sum(site.name in g for site in sites) > 1]
    require(
        tied or not several,
        f"{sorted(map(sorted, several))[:1]} are one tied tensor, and the rule means other "
        "embeddings, too, which have rows of their own: adapt them by params of their own",
    )
    return tied
