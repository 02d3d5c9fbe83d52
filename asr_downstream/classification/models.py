"""Classifiers by name: the ResNets of the papers for CIFAR, and classes that users register with `CLASSIFIERS`.

A class takes ``num_classes``, and the first argument of its ``forward`` is images, normalised, ``(B, C, H, W)``; it
returns logits ``(B, num_classes)``, or something with ``logits``.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from asr_downstream.errors import AsrError
from asr_downstream.files.configs import plain
from asr_downstream.models.resnet_cifar import resnet
from asr_downstream.plugging.plug import plug
from asr_downstream.registry import Registry, build

__all__ = ['CLASSIFIERS', 'build_classifier', 'build_model']

CLASSIFIERS = Registry('classifier', error=AsrError, key='model', typed=False)
CLASSIFIERS.register_module(name='ResNet', module=resnet)


def build_classifier(spec: dict[str, Any], num_classes: int) -> nn.Module:
    """Build a stock classifier, in training mode.

    Raises:
        AsrError: the class or an argument is not known.
    """
    return build(CLASSIFIERS, plain(spec), num_classes=num_classes)


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Build the model of a config, plugged as it says; of two of one seed, the plugged one has the stock weights.

    Raises:
        AsrError: the class or an argument is not known.
        PlugError: the plug does not fit.
    """
    torch.manual_seed(config.seed)
    model = build_classifier(config.model, num_classes)
    if config.plug is not None:
        plug(model, plain(config.plug))
    return model
