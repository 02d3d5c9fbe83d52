"""A small network to plug, and whether a refused plug has left it as it was."""

from __future__ import annotations

import torch
import torch.nn.utils.prune
from torch import nn

from asr_downstream.models.resnet_cifar import Bottleneck, ResNet

ASR = dict(type='ASR', attention=dict(type='SE', reduction=4))


CLASSIC = dict(type='Attention', attention=dict(type='SE', reduction=4))


X = (2, 3, 16, 16)


def tiny(block: type = Bottleneck) -> ResNet:
    return ResNet(block, 2, width=8)


def snapshot(model: nn.Module) -> tuple:
    """Everything that a failed plug must leave as it was."""
    classes = [(n, type(m)) for n, m in model.named_modules()]
    tensors = {n: (t.data_ptr(), t.detach().clone()) for n, t in model.state_dict(keep_vars=True).items()}
    return classes, tensors, dict(vars(model)).keys()


def assert_untouched(model: nn.Module, before: tuple) -> None:
    classes, tensors, attributes = snapshot(model)
    assert classes == before[0]
    assert attributes == before[2]
    assert tensors.keys() == before[1].keys()
    for name, (pointer, value) in tensors.items():
        assert pointer == before[1][name][0]
        assert torch.equal(value, before[1][name][1])
