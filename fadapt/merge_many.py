"""merge_many: several adapters in one set of weights, by task arithmetic, TIES or DARE.

Each adapter's increment D_i of a weight or bias is what merging it alone adds to the base. Then

    sum        W + Σ w_i D_i                                           (task arithmetic)
    dare       W + Σ w_i (M_i ∘ D_i) / density,  M_i keeps each entry with probability density
    ties       W + Σ w_i T_i [sign T_i = s] / #{i : sign T_i = s},  T_i the ``density`` largest
               entries of D_i, s the sign of Σ T_i
    dare_ties  the same with M_i ∘ D_i / density in the place of T_i

entry by entry, tensor by tensor, in float64 (float32 where the device has none).

Ilharco et al. 2022, "Editing Models with Task Arithmetic", arXiv 2212.04089; Yadav et al. 2023,
"TIES-Merging", arXiv 2306.01708; Yu et al. 2023, "Language Models are Super Mario" (DARE),
arXiv 2311.03099.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .base.sharded import full, like
from .base.weights import weights_by_name
from .combine import check_members
from .errors import ConfigError, FadaptWarning
from .merge import merge
from .params.params import Params
from .seeds import generator

Rule = Literal["sum", "ties", "dare", "dare_ties"]


def merge_many(
    model: nn.Module,
    params: Sequence[Params],
    weights: Sequence[float],
    *,
    rule: Rule = "sum",
    density: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """New weights and biases that hold several adapters; the model is not changed.

    With ``rule="sum"`` it is what ``merge(model, combine(params, weights))`` gives.

    Args:
        model: the base of all of them.
        params: the adapters.
        weights: a finite number for each.
        rule: how the increments are put together; see the module.
        density: the share of the entries of each increment that is kept, for "ties" the largest,
            for "dare" random ones; above 0 and at most 1.
        seed: of the random ones, which depend on it, the parameter's name and the adapter's place.
        dtype: as for :func:`fadapt.merge`.

    Returns:
        {name: new tensor}, spread over the processes where the model's own is (FSDP2).

    Raises:
        ConfigError: an unknown rule, a density out of range, or what ``merge`` and ``combine``
            refuse.

    Example:
        >>> import torch, fadapt
        >>> model = torch.nn.Linear(4, 3)
        >>> a, b = (fadapt.init(model, fadapt.LoRA(r=2)) for _ in range(2))
        >>> merged = fadapt.merge_many(model, [a, b], [1.0, 1.0], rule="ties", density=0.2)
        >>> list(merged)
        ['weight']
    """
    members, values = check_members(params, weights, "merge_many(model, [a, b], [0.5, 0.5])")
    if not isinstance(rule, str) or rule not in get_args(Rule):
        raise ConfigError(f"rule must be one of {list(get_args(Rule))}, got {rule!r:.80}")
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not number or not 0 < density <= 1 or (rule == "sum" and density != 1):
        raise ConfigError(
            f"density must be above 0 and at most 1, and 1 for the rule 'sum'; got {density!r:.80}"
        )
    if type(seed) is not int:
        raise ConfigError(f"seed must be an int, got {seed!r:.80}")
    merge(model, members[0], dtype=dtype)  # checks, and warns of ties and new biases
    increments: dict[str, list[tuple[int, Tensor]]] = {}
    frozen = weights_by_name(model)
    base: dict[str, Tensor] = {}
    own: dict[str, torch.dtype] = {}
    spread: dict[str, Tensor] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FadaptWarning)
        for i, member in enumerate(members):
            for name, value in merge(model, member, dtype=_wide(members)).items():
                # The rules look at an increment as a whole, wherever its parts are.
                merged = full(value)
                if name not in base:
                    spread[name] = value
                    new = name not in frozen
                    base[name] = (
                        torch.zeros_like(merged) if new else frozen[name].dense().to(merged)
                    )
                    own[name] = merged.dtype if new else frozen[name].dtype
                increments.setdefault(name, []).append((i, merged - base[name]))
        result = {}
        for name, parts in increments.items():
            kept = [_kept(d, rule, density, (seed, name, i)) for i, d in parts]
            total = _together(kept, [float(values[i]) for i, _ in parts], rule)
            result[name] = like((base[name] + total).to(dtype or own[name]), spread[name])
    return result


def _wide(members: list[Params]) -> torch.dtype:
    mps = any(a.device is not None and a.device.type == "mps" for p in members for a in p.values())
    return torch.float32 if mps else torch.float64


def _kept(d: Tensor, rule: str, density: float, seed: tuple[Any, ...]) -> Tensor:
    if density == 1 or rule == "sum":
        return d
    if rule == "ties":
        k = max(1, int(density * d.numel()))
        index = d.flatten().abs().topk(k).indices
        return torch.zeros_like(d).flatten().index_copy(0, index, d.flatten()[index]).view_as(d)
    keep = torch.rand(d.shape, generator=generator(*seed), dtype=torch.float64, device="cpu")
    return torch.where(keep.to(d.device, d.dtype) < density, d / density, 0)


def _together(kept: list[Tensor], weights: list[float], rule: str) -> Tensor:
    stacked = torch.stack(kept)
    w = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
    weighted = stacked * w.view(-1, *[1] * (stacked.dim() - 1))
    if rule in ("sum", "dare"):
        return weighted.sum(0)
    sign = torch.where(stacked.sum(0) >= 0, 1, -1)
    agree = stacked.sign() == sign
    return torch.where(agree, weighted, 0).sum(0) / agree.sum(0).clamp(min=1)
