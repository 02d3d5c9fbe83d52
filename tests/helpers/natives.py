"""Attention blocks as torchvision and timm compute them, under their names, and hosts to put blocks in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

C = 8  # channels of all blocks here


def known_as(module: str) -> Callable[[type], type]:
    """Give a class the name that it has in a library."""

    def rename(cls: type) -> type:
        cls.__module__ = module
        return cls

    return rename


@known_as('torchvision.ops.misc')
class SqueezeExcitation(nn.Module):
    def __init__(self, activation: type = nn.ReLU, scale_activation: type = nn.Sigmoid) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1)
        self.activation, self.scale_activation = activation(), scale_activation()

    def forward(self, input: Tensor) -> Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(input))))
        return self.scale_activation(scale) * input


class TimmGate(nn.Module):
    """Its forward pools over positions and multiplies; subclasses say what comes between."""

    def descriptor(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


@known_as('timm.models._efficientnet_blocks')
class SqueezeExcite(TimmGate):
    def __init__(self) -> None:
        super().__init__()
        self.conv_reduce, self.act1 = nn.Conv2d(C, 4, 1), nn.SiLU(inplace=True)
        self.conv_expand, self.gate = nn.Conv2d(4, C, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(self.descriptor(x)))))


@known_as('timm.layers.squeeze_excite')
class SEModule(TimmGate):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.act = nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.fc2, self.gate = nn.Conv2d(4, C, 1), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        squeezed = 0.5 * self.descriptor(x) + 0.5 * x.amax((2, 3), keepdim=True)  # add_maxpool=True
        return x * self.gate(self.fc2(self.act(self.bn(self.fc1(squeezed)))))


@known_as('timm.layers.squeeze_excite')
class EffectiveSEModule(TimmGate):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate = nn.Conv2d(C, C, 1), nn.Hardsigmoid(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc(self.descriptor(x)))


@known_as('timm.layers.squeeze_excite')
class SqueezeExciteCl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = nn.Linear(C, 4), nn.ReLU(), nn.Linear(4, C), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((1, 2), keepdim=True)))))


@known_as('timm.layers.eca')
class EcaModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1)))
        return x * y.view(x.shape[0], -1, 1, 1).expand_as(x)


@known_as('timm.layers.eca')
class CecaModule(EcaModule):
    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(x.mean((2, 3)).view(x.shape[0], 1, -1), (1, 1), mode='circular')
        y = self.gate(F.conv1d(y, self.conv.weight))
        return x * y.view(x.shape[0], -1, 1, 1).expand_as(x)


def transformers_block(name: str) -> nn.Module:
    from transformers import EfficientNetConfig
    from transformers.models.efficientnet import modeling_efficientnet as efficientnet
    from transformers.models.pp_lcnet import modeling_pp_lcnet as pp_lcnet
    from transformers.models.regnet import modeling_regnet as regnet

    built: dict[str, Callable[[], nn.Module]] = {
        'RegNetSELayer': lambda: regnet.RegNetSELayer(C, 4),
        'EfficientNetSqueezeExciteLayer': lambda: efficientnet.EfficientNetSqueezeExciteLayer(
            EfficientNetConfig(), C, C, expand=True
        ),
        'PPLCNetSqueezeExcitationModule': lambda: pp_lcnet.PPLCNetSqueezeExcitationModule(C, 2),
    }
    return built[name]()


class Host(nn.Module):
    """Stem, one block with attention, and a head; ``between`` is what lies around the attention of the block."""

    def __init__(self, before: list[nn.Module], attention: nn.Module, after: list[nn.Module], shortcut: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.block = Block(before, attention, after, shortcut)
        self.head = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    """A residual block: layers, attention, layers."""

    def __init__(self, before: list[nn.Module], attention: nn.Module, after: list[nn.Module], shortcut: bool) -> None:
        super().__init__()
        self.before = nn.Sequential(*before)
        self.se = attention
        self.after = nn.Sequential(*after)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.after(self.se(self.before(x)))
        return y + x if self.shortcut else y


class ChannelsLast(nn.Module):
    """Runs a module on ``(B, H, W, C)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv(kernel: int = 1, groups: int = 1, bias: bool = False) -> nn.Module:
    return nn.Conv2d(C, C, kernel, padding=kernel // 2, groups=groups, bias=bias)


def host(attention: nn.Module, activation: Any = nn.ReLU, shortcut: bool = True) -> Host:
    """As in RegNet-Y or EfficientNet: convolution, norm, activation, attention, convolution, norm."""
    return Host([conv(3), nn.BatchNorm2d(C), activation()], attention, [conv(), nn.BatchNorm2d(C)], shortcut)


def batches(count: int = 2, size: int = 4) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return [torch.randn(size, 3, 9, 9, dtype=torch.float64, generator=drawn) for _ in range(count)]
