"""Residual blocks of diffusers. Data, named in `asr_downstream.registry.FRAMEWORKS` and read without diffusers."""

from __future__ import annotations

from asr_downstream.plugging.sites import Branch

__all__ = ['SITES']

BEFORE_ACTIVATION = 'before the activation that ends the branch'

SITES: dict[str, Branch] = {
    'diffusers.models.resnet.ResnetBlock2D': Branch(('conv2',)),
    'diffusers.models.resnet.ResnetBlockCondNorm2D': Branch(('conv2',)),
    'diffusers.models.resnet.ResidualTemporalBlock1D': Branch(('conv_out.group_norm',), note=BEFORE_ACTIVATION),
    'diffusers.models.unets.unet_1d_blocks.ResConvBlock': Branch(('group_norm_2', 'conv_2'), note=BEFORE_ACTIVATION),
    'diffusers.models.unets.unet_1d_blocks.SelfAttention1d': Branch(('proj_attn',)),
    'diffusers.models.attention_processor.Attention': Branch(('to_out.0',), part=True),
    'diffusers.models.attention.FeedForward': Branch(('net.2',), part=True),
}
