"""Residual blocks of timm's ResNet, RegNet, ConvNeXt and ViT, and its own kinds of torch's layers. Data.

Names are those of timm 0.9 and later.
"""

from __future__ import annotations

from torch import nn

from asr_downstream.modules.native import Native
from asr_downstream.plugging.sites import Branch

__all__ = ['LAYERS', 'NATIVE', 'NOT_LAYERS', 'SITES', 'THEN']

OWN_ATTENTION = 'before the attention of the block, if it has one'
STANDARDISED = 'the norm where the last convolution standardises its weight'

SITES: dict[str, Branch] = {
    'timm.models.resnet.BasicBlock': Branch(('bn2',), note=OWN_ATTENTION),
    'timm.models.resnet.Bottleneck': Branch(('bn3',), note=OWN_ATTENTION),
    'timm.models.resnetv2.PreActBasic': Branch(('conv2', 'norm2'), note=STANDARDISED),
    'timm.models.resnetv2.PreActBottleneck': Branch(('conv3', 'norm3'), note=STANDARDISED),
    'timm.models.resnetv2.Bottleneck': Branch(('norm3',)),
    'timm.models.regnet.Bottleneck': Branch(('conv3.bn',), shortcut='downsample'),
    'timm.models.regnet.PreBottleneck': Branch(('conv3',), shortcut='downsample'),
    'timm.models.convnext.ConvNeXtBlock': Branch(('mlp.fc2',), note='before its layer scale'),
    'timm.models.vision_transformer.Block': Branch(
        ('attn.proj',), others=(Branch(('mlp.fc2',)),), note='before its layer scale'
    ),
    'timm.models.vision_transformer.ResPostBlock': Branch(('norm1',), others=(Branch(('norm2',)),)),
}

NORMS = 'timm.layers.norm_act'
# Class of timm -> the class of torch that computes the same, but for the modules of THEN.
LAYERS: dict[str, type[nn.Module]] = {
    f'{NORMS}.BatchNormAct2d': nn.BatchNorm2d,
    f'{NORMS}.SyncBatchNormAct': nn.SyncBatchNorm,
    f'{NORMS}.GroupNormAct': nn.GroupNorm,
    f'{NORMS}.GroupNorm1Act': nn.GroupNorm,
    f'{NORMS}.LayerNormAct': nn.LayerNorm,
    'timm.layers.norm.GroupNorm': nn.GroupNorm,
    'timm.layers.norm.GroupNorm1': nn.GroupNorm,
    'timm.layers.norm.LayerNorm': nn.LayerNorm,
}

# Class of a layer -> modules inside it that are applied to what the layer of torch gives.
THEN: dict[str, tuple[str, ...]] = {name: ('drop', 'act') for name in LAYERS if name.startswith(NORMS)}

# Class of a layer that looks like one of torch -> why no gate can be folded into it.
NOT_LAYERS: dict[str, str] = {
    **dict.fromkeys(
        ('timm.layers.std_conv.StdConv2d', 'timm.layers.std_conv.StdConv2dSame'),
        'it standardises its weight in every forward, which undoes a scale; take the norm before or after it',
    ),
    **dict.fromkeys(
        ('timm.layers.std_conv.ScaledStdConv2d', 'timm.layers.std_conv.ScaledStdConv2dSame'),
        'it standardises its weight in every forward, which undoes a scale',
    ),
    f'{NORMS}.FrozenBatchNormAct2d': (
        'its weight is a buffer and not a parameter; take the convolution before it, whose scale passes through'
    ),
}

# Attention of its own, see `asr_downstream.modules.native`. Attention with gates of positions (CBAM, GatherExcite) is
# none of these.
NATIVE: dict[str, Native] = {
    'timm.layers.squeeze_excite.SEModule': Native('gate'),
    'timm.layers.squeeze_excite.EffectiveSEModule': Native('gate'),
    'timm.layers.squeeze_excite.SqueezeExciteCl': Native('gate', axis=-1),
    'timm.layers.eca.EcaModule': Native('gate'),
    'timm.layers.eca.CecaModule': Native('gate'),
    'timm.models._efficientnet_blocks.SqueezeExcite': Native('gate'),
}
