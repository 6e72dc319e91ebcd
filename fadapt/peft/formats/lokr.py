"""LOKR: a Kronecker product of two small matrices.

Files. ``lokr_w1`` (a, c), or ``lokr_w1_a`` (a, r) and ``lokr_w1_b`` (r, c); ``lokr_w2`` (b, d), or
in factors likewise. Of a convolution ``lokr_w2`` is (b, d, kernel) and ``lokr_w2_b`` (r, d kernel).
Refused: factors with a core (``lokr_t2``, of ``use_effective_conv2d``), and whole ``lokr_w2`` of
convolutions over one axis, whose product PEFT makes along other axes than the weight's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import CheckpointError
from ...methods.lokr import LoKr, factorization
from ...params.adapter import Adapter
from ..format import Format, Read, Settings, Taken, Tensors, common, majority, strength, wide
from ..places import CONVOLUTION, LINEAR, Place
from ._convolutions import refuse_three_axes

NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


class LoKrFormat(Format):
    """LoKr of linear layers and convolutions."""

    peft_type = "LOKR"
    methods = (LoKr,)
    suffixes = (*(f"lokr_{name}" for name in NAMES), "lokr_t2")
    layers = frozenset({LINEAR, CONVOLUTION})
    fields = frozenset(
        "r alpha rank_pattern alpha_pattern use_effective_conv2d decompose_both decompose_factor "
        "rank_dropout_scale".split()
    )
    patterns = ("rank_pattern", "alpha_pattern")

    def read(self, settings: Settings, place: Place, tensors: Taken) -> Read:
        if "lokr_t2" in tensors:
            raise settings.fail(
                f"{place.key}: the kernels of use_effective_conv2d are products of three factors "
                "(lokr_t2), and fadapt's LoKr has two"
            )
        factor = settings.config.get("decompose_factor")
        method = LoKr(
            r=settings.integer_at(place, "r", 8, "rank_pattern"),
            alpha=settings.number_at(place, "alpha", 8, "alpha_pattern"),
            decompose_both=settings.flag("decompose_both", False),
            decompose_factor=-1 if factor is None else settings.integer("decompose_factor", -1, -1),
        )
        shapes = method.shapes(place.site)
        if "w2" in shapes and len(place.site.kernel) == 2:
            raise settings.fail(f"{place.key}: {_ONE_AXIS}")
        leaves = {}
        for name, shape in shapes.items():
            stored = _stored(place, method, name, shape)
            leaves[name] = tensors.take(f"lokr_{name}", *stored).reshape(shape)
        return Read(method, leaves, {})

    def settings(self, adapters: Mapping[Place, Adapter]) -> dict[str, Any]:
        methods: dict[Place, Any] = {place: a.method for place, a in adapters.items()}

        def one(field: str) -> Any:
            return common([(p, getattr(m, field)) for p, m in methods.items()], field)

        r, rank_pattern = majority({p: m.r for p, m in methods.items()})
        alpha, alpha_pattern = majority({p: m.alpha for p, m in methods.items()})
        return {
            "r": r,
            "alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "decompose_both": one("decompose_both"),
            "decompose_factor": one("decompose_factor"),
            "use_effective_conv2d": False,
            "init_weights": True,
        }

    def write(self, place: Place, adapter: Adapter, settings: Mapping[str, Any]) -> Tensors:
        refuse_three_axes(self, place)
        c, p = strength(adapter), dict(adapter.leaves)
        method: Any = adapter.method
        shapes = method.shapes(place.site)
        if "w2" in shapes and len(place.site.kernel) == 2:
            raise CheckpointError(
                f"{place.site.name}: {_ONE_AXIS}. Save fadapt.as_lora(model, params, r=...)"
            )
        if c != 1:
            first = "w1" if "w1" in p else "w1_a"
            p[first] = c * wide(p[first])
        return {
            f"lokr_{name}": p[name].reshape(_stored(place, method, name, shape))
            for name, shape in shapes.items()
        }


_ONE_AXIS = (
    "of a whole lokr_w2 over one axis PEFT makes another product than the Kronecker product of the "
    "weight's axes, which is fadapt's LoKr"
)


def _stored(place: Place, method: LoKr, name: str, shape: tuple[int, int]) -> tuple[int, ...]:
    """The shape of a leaf in the file."""
    if name != "w2" or not place.site.kernel:
        return shape
    channels, *taps = place.site.kernel
    return shape[0], factorization(channels, method.decompose_factor)[1], *taps
