"""LOHA: the Hadamard product of two low-rank matrices.

Files. ``hada_w1_a``, ``hada_w2_a`` (out, r), ``hada_w1_b``, ``hada_w2_b`` (r, in); of a convolution
in = channels times kernel. Of ``use_effective_conv2d`` the factors are tensors of rank 3, with
cores ``hada_t1`` and ``hada_t2``: another map, which is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...methods.loha import LoHa
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, majority, strength, wide
from ..places import CONVOLUTION, LINEAR, Place
from ._convolutions import refuse_three_axes

NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")


class LoHaFormat(Format):
    """LoHa of linear layers and convolutions."""

    peft_type = "LOHA"
    methods = (LoHa,)
    suffixes = (*(f"hada_{name}" for name in NAMES), "hada_t1", "hada_t2")
    layers = frozenset({LINEAR, CONVOLUTION})
    fields = frozenset("r alpha rank_pattern alpha_pattern use_effective_conv2d".split())
    patterns = ("rank_pattern", "alpha_pattern")

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        if "hada_t1" in tensors or "hada_t2" in tensors:
            raise settings.fail(
                f"{place.key}: the kernels of use_effective_conv2d are products of three factors "
                "(hada_t1, hada_t2), and fadapt's LoHa has two"
            )
        r = settings.integer_at(place, "r", 8, "rank_pattern")
        alpha = settings.number_at(place, "alpha", 8, "alpha_pattern")
        d_out, d_in = place.site.matrix_shape
        shapes = {"a": (d_out, r), "b": (r, d_in)}
        leaves = {name: tensors.take(f"hada_{name}", *shapes[name[-1]]) for name in NAMES}
        return Read(LoHa(r=r, alpha=alpha), leaves, {})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        ranks = {place: a.leaves["w1_a"].shape[-1] for place, a in adapters.items()}
        r, rank_pattern = majority(ranks)
        alpha, alpha_pattern = majority({p: _alpha(a) for p, a in adapters.items()})
        return {
            "r": r,
            "alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "use_effective_conv2d": False,
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        refuse_three_axes(self, place)
        c, p = strength(adapter), adapter.leaves
        found = {f"hada_{name}": p[name] for name in NAMES}
        if c != 1:
            found["hada_w2_a"] = c * wide(p["w2_a"])
        return found


def _alpha(adapter: Adapter) -> float:
    method: Any = adapter.method
    p = adapter.leaves
    alpha = float(p["s"]) * p["w1_a"].shape[-1] if "s" in p else method.alpha
    return int(alpha) if alpha == int(alpha) else alpha
