"""Layers and the towers that they form, read from the names of parameters.

A layer's index is the first number in a name, and its tower is what stands before it: an
encoder-decoder has the towers ``encoder.block`` and ``decoder.block``.
"""

from __future__ import annotations

from collections.abc import Iterable


def split_name(name: str) -> tuple[str, int | None, str]:
    """(tower, layer, the rest of the name); the layer is None in a name without a number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])
    return "", None, name


def layers_of(names: Iterable[str]) -> dict[str, set[int]]:
    """{tower: its layers}.

    Where a model has towers of blocks, a plain sequence of layers (``head.0.weight``) is none;
    where it has none, each sequence is one.
    """
    blocks: dict[str, set[int]] = {}
    sequences: dict[str, set[int]] = {}
    for name in names:
        tower, layer, rest = split_name(name)
        if layer is not None:
            sequences.setdefault(tower, set()).add(layer)
            if "." in rest:
                blocks.setdefault(tower, set()).add(layer)
    return {tower: sequences[tower] for tower in blocks} or sequences
