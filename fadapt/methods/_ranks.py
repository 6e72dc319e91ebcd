"""What a rank may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import require

if TYPE_CHECKING:
    from ..site import Site

LARGEST_RANK = 2**16
"""More than the width of any layer: a slip, which would fill the memory."""


def check_rank_range(name: str, value: int) -> None:
    """Raises ConfigError for a rank that no layer can use."""
    require(
        1 <= value <= LARGEST_RANK,
        f"{name} must be at least 1 and at most {LARGEST_RANK}, got {value}; write {name}=8",
    )


def check_rank(site: Site, name: str, value: int) -> None:
    """Raises ConfigError where the layer has fewer singular directions than asked for."""
    largest = min(site.out_features, site.in_features)
    require(
        value <= largest,
        f"{name}={value} is more than the {largest} singular directions of a "
        f"{site.out_features} x {site.in_features} weight; write {name}={largest} or less",
    )
