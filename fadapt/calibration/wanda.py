"""Wanda scores: how much each weight moves the layer's output on the calibration data.

    score_ij = |W_ij| ‖X_j‖₂,   X_j the j-th input over all counted tokens

to be compared within a row of W.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
arXiv 2306.11695, eq. 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import overload

from torch import Tensor, nn

from ..arguments import listed
from ..base.weights import weights_by_name
from ..errors import CalibrationError
from ..statistics.reduction import Statistic
from ..statistics.sums import SumSq
from .stats import Stats

MEAN_SQUARES = Statistic(SumSq())


@overload
def wanda_scores(weight: Tensor, stats: Tensor) -> Tensor: ...
@overload
def wanda_scores(
    weight: nn.Module, stats: Stats, sites: Iterable[str] | None = None
) -> dict[str, Tensor]: ...


def wanda_scores(
    weight: nn.Module | Tensor, stats: Stats | Tensor, sites: Iterable[str] | None = None
) -> dict[str, Tensor] | Tensor:
    """The scores |W_ij| ‖X_j‖₂ of a model's weights, or of one weight.

    Args:
        weight: the model that was observed; or one matrix (out, in).
        stats: of any statistic that holds mean squares (SumSq, Gram, CenteredGram); for a matrix,
            the norms ‖X_j‖₂ (in,).
        sites: which; by default all that were observed.

    Returns:
        {site: (out, in)}, float64, on the devices of the weights; or one such tensor.

    Raises:
        CalibrationError: no such statistics, or of another base model.

    Example:
        >>> stats = fadapt.observe(model, fadapt.AntiPaSTO(r=2, select="wanda"), [x])
        >>> fadapt.wanda_scores(model, stats)["0.weight"].shape
        torch.Size([16, 8])
    """
    if sites is not None and isinstance(weight, Tensor):
        raise CalibrationError("sites choose among those of a model; leave them out for one weight")
    if isinstance(weight, Tensor):
        shape = tuple(stats.shape) if isinstance(stats, Tensor) else type(stats).__name__
        if not isinstance(stats, Tensor) or shape != tuple(weight.shape[-1:]):
            raise CalibrationError(
                f"a weight of shape {tuple(weight.shape)} needs norms of shape "
                f"{tuple(weight.shape[-1:])}, got {shape}"
            )
        return weight.detach().double().abs() * stats.to(weight.device)
    if not isinstance(stats, Stats):
        raise CalibrationError("a model needs the Stats of fadapt.observe")
    stats.check_base(weight)
    weights = weights_by_name(weight)
    if sites is not None and not isinstance(sites, Mapping):  # params name their sites
        sites = listed("sites", sites, 'sites=["0.weight"]', CalibrationError)
    result = {}
    for name in stats.streams if sites is None else sites:
        norms = (stats.get(name, MEAN_SQUARES) * stats.tokens(name)).sqrt()
        result[name] = wanda_scores(weights[name].map.weight(), norms)
    return result
