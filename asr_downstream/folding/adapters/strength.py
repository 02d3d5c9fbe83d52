"""Constants at a strength, and constants of several adapters after one another."""

from __future__ import annotations

import torch
from torch import Tensor

from asr_downstream.modules.affine import Constants

__all__ = ['after', 'at_strength']


def at_strength(constants: Constants, strength: float) -> Constants:
    """Constants of which a part is taken: at 1 they are what they were, at 0 they do nothing.

    Scales go with the power of the strength, ``v ** strength``, so that half of an adapter twice is the whole; one that
    is not positive goes linearly, ``1 + strength (v - 1)``. Shifts go linearly.
    """
    if strength == 1:
        return constants
    gate, shift, inputs = constants
    return Constants(powered(gate, strength), None if shift is None else shift * strength, powered(inputs, strength))


def powered(v: Tensor | None, strength: float) -> Tensor | None:
    """See `at_strength`."""
    return None if v is None else torch.where(v > 0, v.clamp_min(0) ** strength, 1 + strength * (v - 1))


def after(first: Constants, then: Constants) -> Constants:
    """Constants of two adapters of one layer, of which ``then`` works on what ``first`` has made of it.

    ``(y v1 + s1) v2 + s2``: scales are multiplied, and the first shift is scaled as well, so the order counts where
    there are shifts.
    """
    shift = product(first.shift, then.gate) if first.shift is not None else None
    return Constants(
        product(first.gate, then.gate),
        then.shift if shift is None else shift if then.shift is None else shift + then.shift,
        product(first.inputs, then.inputs),
    )


def product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Product of what is there; None is 1."""
    return b if a is None else a if b is None else a * b
