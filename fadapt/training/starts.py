"""The initial adapters of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ..base.weights import weights_by_name
from ..calibration.stats import Stats
from ..config import Config
from ..errors import ConfigError, require
from ..fold.losses import LossFn
from ..init import init
from ..params.adapter import Adapter
from ..params.params import Params
from .trial import Trial


def initial(
    model: nn.Module,
    trials: Mapping[str, Trial],
    calib: Stats | Iterable[Any] | None,
    loss_fn: LossFn | None = None,
) -> list[Params]:
    """The adapters that the trials begin with. Trials of one config and seed share an init.

    Raises:
        ConfigError: Params of another model, or adapters with nothing to train.
    """
    made: dict[Config, Params] = {}
    checked: set[int] = set()
    if isinstance(calib, Iterator):
        calib = list(calib)
    result = []
    for name, trial in trials.items():
        config = trial.resolved()
        if isinstance(config, Params):
            if id(config) not in checked:  # once, where trials share their Params
                _check_base(name, model, config)
                checked.add(id(config))
            params = config
        else:
            if config not in made:
                made[config] = init(model, config, calib, loss_fn=loss_fn)
            params = made[config]
        require(bool(params.trainable()), f"{name} has nothing to train: {params!r}")
        _check_leaves(name, trial, params)
        if any(leaf.is_meta for leaf in params.trainable()):
            raise ConfigError(f"{name}: a model on the meta device has no values to train on")
        # Made under torch.inference_mode, a leaf could not be part of a graph.
        result.append(params.map(_usable))
    return result


def _usable(adapter: Adapter) -> Adapter:
    if not any(t.is_inference() for t in adapter.leaves.values()):
        return adapter
    train, fixed = (
        {k: t.detach().clone() for k, t in leaves.items()}
        for leaves in (adapter.train, adapter.fixed)
    )
    return adapter.replace(train, fixed)


def _check_leaves(name: str, trial: Trial, params: Params) -> None:
    leaves = {leaf for adapter in params.values() for leaf in adapter.train}
    if unknown := sorted((trial.lr_ratio or {}).keys() - leaves):
        raise ConfigError(
            f"{name}: lr_ratio names {unknown}, but the trainable leaves are {sorted(leaves)}"
        )
    if not any(trial.ratio(leaf) for leaf in leaves):
        raise ConfigError(f"{name}: lr_ratio={trial.lr_ratio!r} leaves nothing to train")


def _check_base(name: str, model: nn.Module, params: Params) -> None:
    weights = weights_by_name(model)
    for site, adapter in params.at_sites().items():
        weight = weights.get(site)
        if weight is None or weight.fingerprint() != adapter.site.fingerprint:
            raise ConfigError(
                f"{name} adapts {site} of another base model than this {type(model).__name__}; "
                "all trials of a sweep share one base"
            )
