"""Residual blocks of torchvision's ResNet, RegNet, ConvNeXt and ViT, and its layers that are no layers of torch. Data.

Names are those of torchvision 0.12 and later; before, there was no ConvNeXt, and the MLP of the ViT had other children.
"""

from __future__ import annotations

from asr_downstream.modules.native import Native
from asr_downstream.plugging.sites import Branch

__all__ = ['NATIVE', 'NOT_LAYERS', 'SITES']

SITES: dict[str, Branch] = {
    'torchvision.models.resnet.BasicBlock': Branch(('bn2',)),
    'torchvision.models.resnet.Bottleneck': Branch(('bn3',)),
    'torchvision.models.regnet.ResBottleneckBlock': Branch(('f.c.1',)),
    'torchvision.models.convnext.CNBlock': Branch(('block.5',), note='before its layer scale'),
    'torchvision.models.vision_transformer.MLPBlock': Branch(
        ('3', 'linear_2'), part=True, note='of a ViT the MLPs alone: its attention is `nn.MultiheadAttention`'
    ),
}

# Class of a layer that looks like one of torch -> why no gate can be folded into it.
NOT_LAYERS: dict[str, str] = {
    'torchvision.ops.misc.FrozenBatchNorm2d': (
        'its weight is a buffer and not a parameter; take the convolution before it, whose scale passes through'
    ),
}

# Attention of its own, see `asr_downstream.modules.native`: of RegNet-Y, EfficientNet and MobileNetV3.
NATIVE: dict[str, Native] = {'torchvision.ops.misc.SqueezeExcitation': Native('scale_activation')}
