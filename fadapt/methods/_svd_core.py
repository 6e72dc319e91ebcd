"""What the methods over frozen singular directions share.

U (out, r) holds orthonormal output directions of W. In their coordinates
    z = u U,  u = y - b = x Wᵀ,     equally  z = x Pᵀ,  P = UᵀW  (= diag(S) Vᵀ for singular ones),
a core K' (r, r) acts: the increment is z K'ᵀ Uᵀ, that is ΔW = U K' UᵀW. Exact for any orthonormal
U, so V and S are never needed. P is stored only where the layer widens (out > in), which is cheaper
there; its absence says that z comes from the output. Cores that S does not scale from the right
take U, S and V instead (:func:`singular_leaves`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.linear_map import without_bias
from ..errors import CalibrationError
from ..linalg import top_svd
from ..method import Factors, Leaves, Method
from ._ranks import check_rank, check_rank_range

if TYPE_CHECKING:
    from ..base.linear_map import LinearMap
    from ..site import Site, SiteView


@dataclass(frozen=True)
class SpectralMethod(Method):
    """A method whose increment lives in r frozen output directions.

    Args:
        r: number of directions, at most min(out, in).
    """

    r: int = 32

    owns_strength: ClassVar[bool] = True
    needs_plain_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_range("r", self.r)

    def check(self, site: Site) -> None:
        check_rank(site, "r", self.r)

    def init(self, site: SiteView, rng: torch.Generator) -> tuple[Leaves, Leaves]:
        return self.start(site, rng), direction_leaves(site, self.directions(site))

    def directions(self, site: SiteView) -> Tensor:
        """U (out, r), orthonormal columns; the top left singular vectors by default."""
        return top_svd(site.weight(), self.r)[0]

    def start(self, site: SiteView, rng: torch.Generator) -> Leaves:
        """The trainable leaves."""
        raise NotImplementedError


@dataclass(frozen=True)
class SpectralGain(SpectralMethod):
    """K' = diag(ELU(c g)): a positive gain 1 + ELU(c g) for each direction, g (r,) zero.

    Args:
        suppress_only: keep g at or below 0, so that a strength c >= 0 only damps.
    """

    suppress_only: bool = field(default=False, kw_only=True)

    reads_input: ClassVar[bool] = False

    @property
    def supports_batch_dims(self) -> bool:
        return True

    def start(self, site: SiteView, rng: torch.Generator) -> Leaves:
        return {"g": site.zeros(self.r)}

    def delta(self, p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap) -> Tensor:
        rows, into = coordinates(p, x, y, base)
        gain = F.elu(coefficient(self, p, p["g"]) * p["g"])
        return ((rows @ into) * gain) @ p["U"].mT

    def low_rank(self, p: Mapping[str, Tensor], base: LinearMap) -> Factors | None:
        return core_factors(self, p, base)

    def project(self, train: Leaves) -> Leaves:
        return {**train, "g": train["g"].clamp(max=0)} if self.suppress_only else train


def direction_leaves(site: SiteView, u: Tensor) -> Leaves:
    """The fixed leaves of output directions U (out, r): U, and P where the layer widens."""
    if site.out_features <= site.in_features:
        return {"U": u}
    return {"U": u, "P": u.mT @ site.weight()}


def coordinates(
    p: Mapping[str, Tensor], x: Tensor, y: Tensor, base: LinearMap
) -> tuple[Tensor, Tensor]:
    """(rows, into): rows (tokens, d) @ into (d, r) are the coordinates z."""
    return (x, p["P"].mT) if "P" in p else (without_bias(base, y), p["U"])


def core_factors(method: Method, p: Mapping[str, Tensor], base: LinearMap) -> Factors:
    """The factors of an increment U K Vᵀ or U K' UᵀW, whose core is read off ``method.delta``."""
    u = p["U"]
    eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    # In coordinates where the directions are the axes, the increment of the axes is the core.
    core = method.delta({**p, "U": eye, "V" if "V" in p else "P": eye}, eye, eye, base)
    return input_directions(p, base), u @ core.mT


def input_directions(p: Mapping[str, Tensor], base: LinearMap) -> Tensor:
    """Vᵀ, or P = UᵀW (r, in)."""
    if "V" in p:
        return p["V"].mT
    return p["P"] if "P" in p else p["U"].mT @ base.weight().to(p["U"].dtype)


def singular_leaves(site: SiteView, k: int) -> Leaves:
    """The top-k triplets of the frozen weight: U (out, k), S (k,), V (in, k)."""
    u, s, v = top_svd(site.weight(), k)
    return {"U": u, "S": s, "V": v}


def coefficient(method: Method, p: Mapping[str, Tensor], like: Tensor) -> Tensor | float:
    """The strength c in the dtype of ``like``."""
    c = method.strength(p)
    return c.to(like.dtype) if isinstance(c, Tensor) else c


def calibrated(site: SiteView, method: Method, stat: Any, shape: tuple[int, ...]) -> Tensor:
    """A site's statistic in float64, after the checks.

    Args:
        shape: the wanted shape; -1 stands for any positive size.

    Raises:
        CalibrationError: missing, of another shape, not finite, or zero throughout.
    """
    who = f"{site.name}: {type(method).__name__}"
    if stat is None:
        raise CalibrationError(
            f"{who} chooses its directions from data and got no statistic; "
            "pass calib=batches (or a Stats) to fadapt.init"
        )
    found = tuple(stat.shape) if isinstance(stat, Tensor) else type(stat).__name__
    fits = isinstance(found, tuple) and len(found) == len(shape) and 0 not in found
    if not fits or any(n not in (-1, m) for n, m in zip(shape, found, strict=True)):
        raise CalibrationError(
            f"{who} needs a statistic of shape {shape}, got {found}; observe this model and config"
        )
    if not stat.isfinite().all():
        raise CalibrationError(
            f"{who}: the statistic holds NaN or Inf; look for bad values in the calibration batches"
        )
    if not stat.any():
        raise CalibrationError(
            f"{who}: the statistic is zero throughout; calibrate on batches that reach this layer"
        )
    return stat.detach().to(site.device, wide_dtype(site))


def wide_dtype(site: SiteView) -> torch.dtype:
    """float64, or float32 where the device has none."""
    return torch.float32 if site.device.type == "mps" else torch.float64
