"""Blocks with the names and the structure of torchvision's, which is not installed."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from helpers.branches import named


def conv_norm(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    """What `Conv2dNormActivation` is: a sequence of convolution, norm and activation."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if act else []))


@named('torchvision.ops.misc.FrozenBatchNorm2d')
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            self.register_buffer(name, torch.full((channels,), float(name in ('weight', 'running_var'))))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (b.view(1, -1, 1, 1) for b in self.buffers())
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


@named('torchvision.models.resnet.BasicBlock')
class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        changes = stride != 1 or inputs != outputs
        self.downsample = conv_norm(inputs, outputs, 1, stride, act=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


@named('torchvision.models.resnet.Bottleneck')
class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or inputs != outputs
        self.downsample = conv_norm(inputs, outputs, 1, stride, act=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


@named('torchvision.ops.misc.SqueezeExcitation')
class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


@named('torchvision.models.regnet.ResBottleneckBlock')
class ResBottleneckBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, squeezed: int = 0) -> None:
        super().__init__()
        changes = stride != 1 or inputs != outputs
        self.proj = conv_norm(inputs, outputs, 1, stride, act=False) if changes else None
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers['a'] = conv_norm(inputs, outputs, 1)
        layers['b'] = conv_norm(outputs, outputs, 3, stride, groups=outputs // 4)
        if squeezed:
            layers['se'] = SqueezeExcitation(outputs, squeezed)
        layers['c'] = conv_norm(outputs, outputs, 1, act=False)
        self.f = nn.Sequential(layers)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation((x if self.proj is None else self.proj(x)) + self.f(x))


class Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


@named('torchvision.models.convnext.CNBlock')
class CNBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer_scale * self.block(x)
        result += x
        return result


@named('torchvision.models.vision_transformer.MLPBlock')
class MLPBlock(nn.Sequential):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(
            nn.Linear(channels, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, channels), nn.Dropout(0.1)
        )


@named('torchvision.models.vision_transformer.EncoderBlock')
class EncoderBlock(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(channels, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(channels, 2, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.ln_2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MLPBlock(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = self.dropout(y) + x
        return x + self.mlp(self.ln_2(x))
