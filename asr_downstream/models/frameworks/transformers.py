"""Residual blocks of the image models of transformers, and its layers that are no layers of torch. Data.

Where two paths stand, the first is that of today's transformers, the second that of 4.x and 5.0.
"""

from __future__ import annotations

from torch import nn

from asr_downstream.modules.native import Native
from asr_downstream.plugging.sites import Branch

__all__ = ['LAYERS', 'NATIVE', 'NOT_LAYERS', 'SITES', 'THEN']

MODELS = 'transformers.models'
ATTENTION = ('o_proj', 'output.dense')
OLDER = 'transformers 4.x and 5.0'

SITES: dict[str, Branch] = {
    f'{MODELS}.resnet.modeling_resnet.ResNetBasicLayer': Branch(('layer.1.normalization',)),
    f'{MODELS}.resnet.modeling_resnet.ResNetBottleNeckLayer': Branch(('layer.2.normalization',)),
    f'{MODELS}.regnet.modeling_regnet.RegNetXLayer': Branch(('layer.2.normalization',)),
    f'{MODELS}.regnet.modeling_regnet.RegNetYLayer': Branch(('layer.3.normalization',)),
    f'{MODELS}.mobilenet_v2.modeling_mobilenet_v2.MobileNetV2InvertedResidual': Branch(
        ('reduce_1x1.normalization',), shortcut='use_residual'
    ),
    f'{MODELS}.convnext.modeling_convnext.ConvNextLayer': Branch(('pwconv2',), note='before its layer scale'),
    f'{MODELS}.convnextv2.modeling_convnextv2.ConvNextV2Layer': Branch(('pwconv2',)),
    f'{MODELS}.bit.modeling_bit.BitBottleneckLayer': Branch(('norm3',)),
    f'{MODELS}.bit.modeling_bit.BitPreActivationBottleneckLayer': Branch(
        ('norm3',), note='the last convolution standardises its weight: the norm before it'
    ),
    f'{MODELS}.vit.modeling_vit.ViTAttention': Branch(ATTENTION, part=True),
    f'{MODELS}.vit.modeling_vit.ViTMLP': Branch(('fc2',), part=True),
    f'{MODELS}.vit.modeling_vit.ViTOutput': Branch(('dense',), part=True, note=OLDER),
    f'{MODELS}.deit.modeling_deit.DeiTAttention': Branch(ATTENTION, part=True),
    f'{MODELS}.deit.modeling_deit.DeiTMLP': Branch(('fc2',), part=True),
    f'{MODELS}.deit.modeling_deit.DeiTOutput': Branch(('dense',), part=True, note=OLDER),
    f'{MODELS}.swin.modeling_swin.SwinAttention': Branch(ATTENTION, part=True, windows=True),
    f'{MODELS}.swin.modeling_swin.SwinMLP': Branch(('fc2',), part=True),
    f'{MODELS}.swin.modeling_swin.SwinOutput': Branch(('dense',), part=True, note=OLDER),
}

# Class of transformers -> the class of torch that computes the same, but for the modules of THEN.
LAYERS: dict[str, type[nn.Module]] = {f'{MODELS}.bit.modeling_bit.BitGroupNormActivation': nn.GroupNorm}

# Class of a layer -> modules inside it that are applied to what the layer of torch gives.
THEN: dict[str, tuple[str, ...]] = {f'{MODELS}.bit.modeling_bit.BitGroupNormActivation': ('activation',)}

# Class of a layer that looks like one of torch -> why no gate can be folded into it.
NOT_LAYERS: dict[str, str] = {
    f'{MODELS}.bit.modeling_bit.WeightStandardizedConv2d': (
        'it standardises its weight in every forward, which undoes a scale; take the norm before or after it'
    ),
}

# Attention of its own, see `asr_downstream.modules.native`.
NATIVE: dict[str, Native] = {
    f'{MODELS}.regnet.modeling_regnet.RegNetSELayer': Native('attention'),
    f'{MODELS}.efficientnet.modeling_efficientnet.EfficientNetSqueezeExciteLayer': Native('act_expand'),
    f'{MODELS}.align.modeling_align.AlignVisionSqueezeExciteLayer': Native('act_expand'),
    f'{MODELS}.pp_lcnet.modeling_pp_lcnet.PPLCNetSqueezeExcitationModule': Native('convolutions.3'),
    f'{MODELS}.pp_lcnet_v3.modeling_pp_lcnet_v3.PPLCNetV3SqueezeExcitationModule': Native('convolutions.3'),
    f'{MODELS}.pp_lcnet_v4.modeling_pp_lcnet_v4.PPLCNetV4SqueezeExcitationModule': Native('convolutions.3'),
}
