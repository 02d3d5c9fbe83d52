"""Which form of input-dependent gates runs: the plain one, or one that keeps no second feature map (``memory``).

    plain    the output of the layer times its gates; the backward pass keeps both maps
    low      batch norms: `gated_batch_norm`; convolutions and linear layers: `regained_scale`

Without a choice (None) the plain form runs, which is the faster one on small maps, and on large ones about as fast:
`gated_batch_norm` reads maps less often and takes four times the operators, `regained_scale` takes one more convolution
a site. Without gradients there is nothing to keep, and every choice runs the plain form.
"""

from __future__ import annotations

from typing import Any

import torch

from asr_downstream.errors import PlugError

__all__ = ['LOW', 'MEMORY', 'PLAIN', 'check_memory', 'chosen', 'low_memory']

PLAIN, LOW = 'plain', 'low'
MEMORY = (PLAIN, LOW)


def check_memory(plug: str, memory: Any) -> None:
    """Refuse a value that is no choice.

    Raises:
        PlugError: it is not.
    """
    if memory is not None and memory not in MEMORY:
        raise PlugError(
            f"{plug}: memory={memory!r} should be 'low' (keeps no second feature map a site), 'plain' (keeps it, and "
            f'launches fewer operators), or None, which takes the faster one'
        )


def chosen(layer: Any) -> str | None:
    """The choice of a plugged layer's input-dependent gates, of the first that says one."""
    return next((gate.memory for gate in layer.dynamic or () if gate.memory), None)


def low_memory(layer: Any) -> bool:
    """Whether the low form shall run, where it can."""
    return torch.is_grad_enabled() and chosen(layer) == LOW
