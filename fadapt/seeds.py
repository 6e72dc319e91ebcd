"""Generators whose stream depends on what they are for, not on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by the texts of ``parts`` alone."""
    return torch.Generator().manual_seed(number(*parts))


def number(*parts: object) -> int:
    """A number of 63 bits that depends on the texts of ``parts`` alone."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
