"""Small models in which a part learns, trained for a few steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream import plug
from asr_downstream.models.resnet_cifar import ResNet
from helpers.plugged import ASR, X, tiny

DIA = dict(type='DIA', attention=dict(type='DIALSTM', reduction=4))
SRM = dict(type='Attention', attention=dict(type='SRM'))


def made(spec: Any = ASR) -> ResNet:
    model = tiny()
    if spec is not None:
        plug(model, dict(spec, preserve=True))
    return model.train()


def step(model: nn.Module, times: int = 3, make: Any = torch.optim.AdamW) -> torch.optim.Optimizer:
    """Train as a trainer does: with ``train()`` before every step."""
    optimiser = make([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(times):
        model.train()
        optimiser.zero_grad()
        model(torch.randn(X)).square().mean().backward()
        optimiser.step()
    return optimiser


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


class FreezesItself(ResNet):
    """Freezes its first stage whenever the mode is switched, as mmdet's ``frozen_stages`` does."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.layer1.eval()
        for parameter in self.layer1.parameters():
            parameter.requires_grad_(False)
        return self


def freezing(spec: Any = ASR) -> ResNet:
    model = made(None)
    model.__class__ = FreezesItself
    model.train()
    plug(model, dict(spec, preserve=True), frozen=True)
    return model.train()
