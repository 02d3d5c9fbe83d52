"""Freezing: which weights of a student are trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from asr_downstream.far.model.attentions import StandIn
from asr_downstream.far.model.describe import mixers
from asr_downstream.far.model.mixer import VARIANTS

__all__ = ['STUDENTS', 'block_of', 'learning']

STUDENTS = ('replacements', 'blocks', 'all')


def learning(model: Any, learns: str) -> None:
    """Set which parameters of a student learn.

    Args:
        model: with replaced attentions.
        learns: ``'replacements'`` (LSTMs and their projections; the teacher's output projections stay), ``'blocks'``
            (all of the blocks they are in) or ``'all'``.
    """
    model.requires_grad_(learns == 'all')
    for path, mixer in mixers(model):
        if learns == 'blocks':
            model.get_submodule(block_of(model, path)).requires_grad_(True)
        mixer.requires_grad_(True)
        if VARIANTS[mixer.variant].projection == 'fresh':
            projection_of(model, path).requires_grad_(True)


def projection_of(model: nn.Module, path: str) -> nn.Module:
    """Output projection of a replaced attention."""
    stand_in = model.get_submodule(path)
    return stand_in.get_submodule(stand_in.kept[0] if isinstance(stand_in, StandIn) else 'to_out.0')


def block_of(model: nn.Module, path: str) -> str:
    """Path of the block an attention is in: the module around it that is no list; the attention itself if in a list."""
    parent = path.rpartition('.')[0]
    module = model.get_submodule(parent)
    if isinstance(module, nn.ModuleList | nn.Sequential) or not parent:
        return path
    wrapper = type(module).__name__ == 'MultiheadAttention'  # of mmcv, around that of torch
    return block_of(model, parent) if wrapper else parent
