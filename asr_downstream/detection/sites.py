"""Residual blocks of MMDetection and mmcv, and mmcv's own kinds of torch's layers. Data; read without these libraries.

`asr_downstream.registry.FRAMEWORKS` names this module; it is read when a class of one of the two is first met, and
imports neither. mmdet's ``norm2`` and mmcv's ``norm`` are properties that find ``bn2``, ``gn2``, ..., or None.
"""

from __future__ import annotations

from torch import nn

from asr_downstream.modules.native import Native
from asr_downstream.plugging.sites import Branch

__all__ = ['LAYERS', 'NATIVE', 'SITES']

BEFORE_ACTIVATION = 'before the activation that ends the branch'

SITES: dict[str, Branch] = {
    'mmdet.models.backbones.resnet.BasicBlock': Branch(('norm2',)),
    'mmdet.models.backbones.resnet.Bottleneck': Branch(('norm3',)),
    'mmdet.models.backbones.darknet.ResBlock': Branch(('conv2.norm',), note='before its LeakyReLU: the same'),
    'mmdet.models.layers.csp_layer.DarknetBottleneck': Branch(
        ('conv2.norm', 'conv2.pointwise_conv.norm'), shortcut='add_identity', note=BEFORE_ACTIVATION
    ),
    'mmdet.models.layers.csp_layer.CSPNeXtBlock': Branch(
        ('conv2.pointwise_conv.norm',), shortcut='add_identity', note=BEFORE_ACTIVATION
    ),
    'mmdet.models.layers.inverted_residual.InvertedResidual': Branch(
        ('linear_conv.norm',), shortcut='with_res_shortcut'
    ),
    'mmdet.models.backbones.efficientnet.EdgeResidual': Branch(('conv2.norm',), shortcut='with_residual'),
    'mmdet.models.backbones.swin.WindowMSA': Branch(('proj',), part=True, windows=True),
    'mmdet.models.backbones.pvt.MixFFN': Branch(('layers.3', 'layers.4'), part=True),
    'mmcv.cnn.bricks.transformer.FFN': Branch(('layers.1',), shortcut='add_identity', part=True),
}

# Class of mmcv -> the class of torch that computes the same; they differ on empty inputs alone, in torch before 1.5.
LAYERS: dict[str, type[nn.Module]] = {
    'mmcv.cnn.bricks.wrappers.Conv2d': nn.Conv2d,
    'mmcv.cnn.bricks.wrappers.Conv3d': nn.Conv3d,
    'mmcv.cnn.bricks.wrappers.ConvTranspose2d': nn.ConvTranspose2d,
    'mmcv.cnn.bricks.wrappers.ConvTranspose3d': nn.ConvTranspose3d,
    'mmcv.cnn.bricks.wrappers.Linear': nn.Linear,
}

# Attention of its own, see `asr_downstream.modules.native`: of EfficientNet and MobileNetV3, and of CSPNeXt (RTMDet).
NATIVE: dict[str, Native] = {
    'mmdet.models.layers.se_layer.SELayer': Native('conv2'),
    'mmdet.models.layers.se_layer.ChannelAttention': Native('act'),
}
