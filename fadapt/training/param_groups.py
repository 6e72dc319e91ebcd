"""param_groups: learning rates per leaf for a loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ConfigError, require
from ..params.params import Params
from ..params.stack import Stack
from .trial import check_ratios, is_number


def param_groups(
    params: Params | Stack, ratios: Mapping[str, float], *, lr: float | None = None, **options: Any
) -> list[dict[str, Any]]:
    """The trainable leaves as param groups of torch.optim, some at a learning rate of their own.

    ``{"B": 16.0}`` is LoRA+ (arXiv:2402.12354). A leaf whose factor is 0 is in no group, so it is
    not trained: ``{"A": 0.0}`` is LoRA-FA (arXiv:2308.03303). A sweep takes the same factors as
    ``Trial(..., lr_ratio=...)``.

    Args:
        params: the adapter or stack that is trained.
        ratios: {leaf: factor of the learning rate}, for the leaves of that name at all sites.
        lr: of all other leaves; None for the rate that the optimizer is given, or has by default.
        options: for every group, such as ``weight_decay``.

    Raises:
        ConfigError: a factor, a learning rate or the name of a leaf that does not fit.

    Example:
        >>> import torch, fadapt
        >>> params = fadapt.init(torch.nn.Sequential(torch.nn.Linear(4, 2)), fadapt.LoRA(r=1))
        >>> groups = fadapt.param_groups(params, {"B": 16.0}, lr=1e-4)
        >>> [(len(g["params"]), g["lr"]) for g in groups]
        [(1, 0.0001), (1, 0.0016)]
        >>> optimizer = torch.optim.AdamW(groups)

        >>> optimizer = torch.optim.AdamW(fadapt.param_groups(params, {"B": 16.0}), lr=1e-4)
        >>> [g["lr"] for g in optimizer.param_groups]
        [0.0001, 0.0016]
    """
    if not isinstance(params, (Params, Stack)):
        raise ConfigError(f"param_groups takes Params or a Stack, got {type(params).__name__}")
    check_ratios("param_groups: ratios", {} if ratios is None else ratios)
    require(
        lr is None or (is_number(lr) and lr >= 0),
        f"lr must be a finite number of at least 0, or None for the optimizer's, got {lr!r}",
    )
    given = dict(ratios or {})
    trees = [g.params for g in params.groups] if isinstance(params, Stack) else [params]
    leaves: dict[float, list[Tensor]] = {}
    names = set()
    for tree in trees:
        for adapter in tree.values():
            for name, leaf in adapter.train.items():
                names.add(name)
                leaves.setdefault(float(given.get(name, 1.0)), []).append(leaf)
    if unknown := sorted(given.keys() - names):
        raise ConfigError(f"ratios names {unknown}, but the trainable leaves are {sorted(names)}")
    leaves.pop(0.0, None)
    require(bool(leaves), f"ratios={given!r} leaves nothing to train")
    if lr is None:
        return [_AtRatio(ratio, {**options, "params": p}) for ratio, p in leaves.items()]
    return [{**options, "params": p, "lr": lr * ratio} for ratio, p in leaves.items()]


class _AtRatio(dict[str, Any]):
    """A group to which the optimizer's own learning rate comes times a factor.

    ``torch.optim.Optimizer.add_param_group`` gives a group what it lacks by ``setdefault``.
    """

    def __init__(self, ratio: float, items: Mapping[str, Any]):
        super().__init__(items)
        self._ratio = ratio

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key == "lr" and "lr" not in self:
            default = default * self._ratio
        return super().setdefault(key, default)

    def __reduce__(self) -> Any:  # a dict's own would make it without its ratio
        return _AtRatio, (self._ratio, dict(self))
