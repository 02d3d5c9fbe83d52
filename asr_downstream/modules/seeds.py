"""Streams of random numbers of their own, which follow from numbers and words alone."""

from __future__ import annotations

import hashlib

import torch

__all__ = ['generator', 'mix']


def mix(*parts: object) -> int:
    """Hash numbers and words to a seed below 2**63."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'big') >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator of its own stream for ``parts``."""
    return torch.Generator().manual_seed(mix(*parts))
