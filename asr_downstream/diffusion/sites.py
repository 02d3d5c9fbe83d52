"""Residual blocks of diffusers. Data, named in `asr_downstream.registry.FRAMEWORKS` and read without diffusers."""

from __future__ import annotations

from asr_downstream.plugging.sites import Branch

__all__ = ['SITES']

SITES: dict[str, Branch] = {
    'diffusers.models.resnet.ResnetBlock2D': Branch(('conv2',)),
    'diffusers.models.attention_processor.Attention': Branch(('to_out.0',), part=True),
    'diffusers.models.attention.FeedForward': Branch(('net.2',), part=True),
}
