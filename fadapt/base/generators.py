"""All global generators that a forward may draw from: torch's, Python's, and numpy's.

A model's dropout draws from torch's. But masks of speech models come from numpy's, and others ask
``random``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .device import cuda_devices_of


@contextmanager
def forked(model: nn.Module) -> Iterator[None]:
    """Within the block the generators may be drawn from and seeded; after it they are as before."""
    with torch.random.fork_rng(cuda_devices_of(model)), _others_forked():
        yield


@contextmanager
def others_seeded(seed: int) -> Iterator[None]:
    """Within the block Python's and numpy's give what follows from the seed."""
    with _others_forked():
        _seed_others(seed)
        yield


def seed_all(seed: int) -> None:
    """Seeds them; call it inside :func:`forked`."""
    torch.manual_seed(seed)
    _seed_others(seed)


def states(model: nn.Module) -> list[Hashable]:
    """What tells whether anything was drawn."""
    own = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda_devices_of(model))]
    numpy = _numpy()
    kind, key, *rest = (None, b"") if numpy is None else numpy.get_state(legacy=True)
    return [*(bytes(t.numpy()) for t in own), random.getstate(), (kind, bytes(key), *rest)]


@contextmanager
def _others_forked() -> Iterator[None]:
    before, numpy = random.getstate(), _numpy()
    of_numpy = None if numpy is None else numpy.get_state()
    try:
        yield
    finally:
        random.setstate(before)
        if numpy is not None:
            numpy.set_state(of_numpy)


def _seed_others(seed: int) -> None:
    random.seed(seed)
    if (numpy := _numpy()) is not None:
        numpy.seed(seed % 2**32)


def _numpy() -> Any:
    """numpy's global generator, if anybody here uses numpy, which fadapt does not need."""
    numpy = sys.modules.get("numpy")
    return getattr(numpy, "random", None)
