"""What every test starts from: no network, fixed seeds, PyTorch's own default dtype."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import pytest
import torch
from hypothesis import settings

settings.register_profile("fadapt", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fadapt")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64() -> torch.dtype:
    """Makes float64 the default dtype for one test."""
    torch.set_default_dtype(torch.float64)
    return torch.float64
