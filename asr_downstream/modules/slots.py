"""Names under which plugging registers modules, and which names of a model lie below them.

The names of weights contain them (``layer1.0.bn2.gate.0.psi``, ``shared_attention.layer1.attention.fc1.bias``), so they
are part of the format of checkpoints.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

__all__ = ['BASE', 'DYNAMIC', 'GATE', 'GATES', 'SHARED', 'SLOTS', 'HasGates', 'SharedAttentions', 'inside_gate']

GATE = 'gate'  # child of a plugged layer: its constant gates, a ModuleList, or None
DYNAMIC = 'dynamic'  # child of a plugged layer: its input-dependent gates, a ModuleList, or None
SLOTS = (GATE, DYNAMIC)
SHARED = 'shared_attention'  # child of a plugged model: the attentions that its sites share
BASE = 'adapter_base'  # attribute of a model: digests of the weights that stay as they are while its gates are trained
# Names of weights that plugging adds, where there is a checkpoint and no model.
GATES = re.compile(rf'(^|\.)({GATE}|{DYNAMIC}|{SHARED})\.')


class HasGates:
    """Base of all plugged layers: modules registered under `SLOTS` are gates."""


class SharedAttentions(nn.ModuleDict):
    """The shared attentions of a model, registered at its root. In an ``nn.Sequential`` it passes its input on."""

    def forward(self, x: Any) -> Any:
        """Return ``x``."""
        return x


def inside_gate(model: nn.Module, name: str) -> bool:
    """Whether a module or weight belongs to the gates of a plugged layer, or to an attention that sites share."""
    parts = name.split('.')
    if SHARED in parts:
        home = model.get_submodule('.'.join(parts[: parts.index(SHARED) + 1]))
        return isinstance(home, SharedAttentions)
    return any(
        parts[i] in SLOTS and isinstance(model.get_submodule('.'.join(parts[:i])), HasGates)
        for i in range(1, len(parts))
    )
