"""Small backbones of MMDetection, stock and plugged."""

from __future__ import annotations

from typing import Any

from mmdet.registry import MODELS

ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))


X = (2, 3, 64, 64)


BACKBONES = [
    (dict(type='ResNet', depth=18), 'bn2', 8),
    (dict(type='ResNet', depth=50), 'bn3', 16),
    (dict(type='ResNeXt', depth=50, groups=4, base_width=4), 'bn3', 16),
    (dict(type='ResNetV1d', depth=50), 'bn3', 16),
    (dict(type='ResNet', depth=18, norm_cfg=dict(type='GN', num_groups=4)), 'gn2', 8),
]


IDS = [f'{b["type"]}-{b["depth"]}-{end}' for b, end, _ in BACKBONES]


def tiny(backbone: dict, **extra: Any) -> Any:
    return MODELS.build(dict(backbone, base_channels=8, **extra))


def plugged(backbone: dict, spec: Any = ASR, **extra: Any) -> Any:
    return tiny(dict(backbone, type='asr_downstream.' + backbone['type']), plug=spec, **extra)


def in_eval(model: Any) -> Any:
    model.eval()  # mmdet's ResNet.eval() returns None
    return model
