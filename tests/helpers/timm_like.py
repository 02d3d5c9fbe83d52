"""Layers and blocks with the names and the structure of timm's, which is not installed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.branches import named


class NormAct:
    """What timm's norms with an activation inside have in common."""

    def finish(self: Any, x: Tensor) -> Tensor:
        return self.act(self.drop(x))

    def add(self: Any, apply_act: bool) -> None:
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True) if apply_act else nn.Identity()


@named('timm.layers.norm_act.BatchNormAct2d')
class BatchNormAct2d(nn.BatchNorm2d, NormAct):
    def __init__(self, channels: int, apply_act: bool = True) -> None:
        super().__init__(channels)
        self.add(apply_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(super().forward(x))


@named('timm.layers.norm_act.SyncBatchNormAct')
class SyncBatchNormAct(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.act(self.drop(x)) if hasattr(self, 'act') else x


@named('timm.layers.norm_act.GroupNormAct')
class GroupNormAct(nn.GroupNorm, NormAct):
    def __init__(self, channels: int, apply_act: bool = True) -> None:
        super().__init__(4, channels)
        self.add(apply_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


@named('timm.layers.norm.LayerNorm')
class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@named('timm.layers.std_conv.StdConv2d')
class StdConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Squeeze(nn.Module):
    """A squeeze-and-excitation of the block's own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


@named('timm.models.resnet.BasicBlock')
class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, se: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.se = Squeeze(outputs) if se else None
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.se is not None:
            x = self.se(x)
        x += shortcut if self.downsample is None else self.downsample(shortcut)
        return self.act2(x)


@named('timm.models.resnet.Bottleneck')
class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3, self.act3 = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        x = self.bn3(self.conv3(x))
        x += shortcut if self.downsample is None else self.downsample(shortcut)
        return self.act3(x)


class ConvNormAct(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, apply_act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.bn = BatchNormAct2d(outputs, apply_act=apply_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@named('timm.models.regnet.Bottleneck')
class RegNetBottleneck(nn.Module):
    """``shortcut=False``: timm's RegNetZ leaves it out where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(inputs, outputs, 1)
        self.conv2 = ConvNormAct(outputs, outputs, 3, stride, outputs // 4)
        self.se = Squeeze(outputs)
        self.conv3 = ConvNormAct(outputs, outputs, 1, apply_act=False)
        self.act3 = nn.ReLU()
        self.downsample: nn.Module | None = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = ConvNormAct(inputs, outputs, 1, stride, apply_act=False) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv3(self.se(self.conv2(self.conv1(x))))
        if self.downsample is not None:
            x = x + self.downsample(shortcut)
        return self.act3(x)


@named('timm.models.regnet.PreBottleneck')
class RegNetPreBottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.conv1 = BatchNormAct2d(inputs), nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm2 = BatchNormAct2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, groups=outputs // 4, bias=False)
        self.se = Squeeze(outputs)
        self.norm3, self.conv3 = BatchNormAct2d(outputs), nn.Conv2d(outputs, outputs, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = shortcut = self.norm1(x)
        x = self.se(self.conv2(self.norm2(self.conv1(x))))
        return self.conv3(self.norm3(x)) + self.downsample(shortcut)


@named('timm.models.resnetv2.PreActBasic')
class PreActBasic(nn.Module):
    def __init__(self, inputs: int, outputs: int, conv: type[nn.Conv2d] = StdConv2d) -> None:
        super().__init__()
        self.downsample = conv(inputs, outputs, 1, bias=False) if inputs != outputs else None
        self.norm1, self.conv1 = GroupNormAct(inputs), conv(inputs, outputs, 3, 1, 1, bias=False)
        self.norm2, self.conv2 = GroupNormAct(outputs), conv(outputs, outputs, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(first)
        return self.conv2(self.norm2(self.conv1(first))) + shortcut


@named('timm.models.resnetv2.PreActBottleneck')
class PreActBottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, conv: type[nn.Conv2d] = StdConv2d) -> None:
        super().__init__()
        width = outputs // 2
        self.downsample = conv(inputs, outputs, 1, bias=False) if inputs != outputs else None
        self.norm1, self.conv1 = GroupNormAct(inputs), conv(inputs, width, 1, bias=False)
        self.norm2, self.conv2 = GroupNormAct(width), conv(width, width, 3, 1, 1, bias=False)
        self.norm3, self.conv3 = GroupNormAct(width), conv(width, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(first)
        return self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(first))))) + shortcut


@named('timm.models.resnetv2.Bottleneck')
class V2Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.downsample = None
        self.conv1, self.norm1 = StdConv2d(channels, 8, 1, bias=False), GroupNormAct(8)
        self.conv2, self.norm2 = StdConv2d(8, 8, 3, 1, 1, bias=False), GroupNormAct(8)
        self.conv3, self.norm3 = StdConv2d(8, channels, 1, bias=False), GroupNormAct(channels, apply_act=False)
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.act3(self.norm3(self.conv3(y)) + x)


@named('timm.layers.mlp.Mlp')
class Mlp(nn.Module):
    def __init__(self, channels: int, use_conv: bool = False) -> None:
        super().__init__()
        layer: Any = (lambda a, b: nn.Conv2d(a, b, 1)) if use_conv else nn.Linear
        self.fc1, self.act, self.drop1 = layer(channels, 2 * channels), nn.GELU(), nn.Dropout(0.1)
        self.norm = nn.Identity()
        self.fc2, self.drop2 = layer(2 * channels, channels), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


@named('timm.models.convnext.ConvNeXtBlock')
class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int, conv_mlp: bool = False, layer_scale: bool = True) -> None:
        super().__init__()
        self.use_conv_mlp = conv_mlp
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.GroupNorm(1, channels) if conv_mlp else LayerNorm(channels)
        self.mlp = Mlp(channels, conv_mlp)
        self.gamma = nn.Parameter(torch.full((channels,), 0.1)) if layer_scale else None
        self.shortcut, self.drop_path = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv_dw(x)
        x = (
            self.mlp(self.norm(x))
            if self.use_conv_mlp
            else self.mlp(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        )
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(x) + self.shortcut(shortcut)


class Attention(nn.Module):
    """With the ``gate`` of its own that timm's has: it is none of a plug."""

    def __init__(self, channels: int, gated: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.gate = nn.Linear(channels, channels) if gated else None
        self.proj, self.proj_drop = nn.Linear(channels, channels), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@named('timm.models.vision_transformer.Block')
class Block(nn.Module):
    def __init__(self, channels: int, gated: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = LayerNorm(channels), Attention(channels, gated), LayerScale(channels)
        self.norm2, self.mlp, self.ls2 = LayerNorm(channels), Mlp(channels), LayerScale(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


@named('timm.models.vision_transformer.ResPostBlock')
class ResPostBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn, self.norm1 = Attention(channels), LayerNorm(channels)
        self.mlp, self.norm2 = Mlp(channels), LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))
