"""ResNets for 32-pixel images (He et al., CVPR 2016, arXiv 1512.03385, section 4.2), those of the ASR and DIA papers.

ResNet-56: basic blocks, 9 a stage, widths 16, 32, 64. ResNet-164: bottlenecks, 18 a stage, widths 64, 128, 256 at the
block outputs; with 100 classes 1,727,284 parameters. Both with 1x1 convolution and BN in the shortcuts of new stages.
`resnet` makes one of any depth.
"""

from __future__ import annotations

from torch import Tensor, nn

from asr_downstream.errors import AsrError, did_you_mean

__all__ = ['BasicBlock', 'Bottleneck', 'ResNet', 'resnet', 'resnet56', 'resnet164']


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; ``bn2`` ends the residual branch."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; ``bn3`` ends the residual branch."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


class ResNet(nn.Module):
    """Three stages of blocks, global pooling and a linear classifier.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depth: blocks in each stage.
        num_classes: number of classes.
        width: planes of the first stage.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], depth: int, num_classes: int = 10, width: int = 16
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        channels = width
        for stage in range(3):
            planes = width * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                out = planes * block.expansion
                downsample = None
                if stride != 1 or channels != out:
                    downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                blocks.append(block(channels, planes, stride, downsample))
                channels = out
            self.add_module(f'layer{stage + 1}', nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        return self.fc(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Map images ``(B, 3, H, W)`` to pooled features, ``(B, 4 * width)`` with basic blocks."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # type: ignore[operator]
        return x.mean((2, 3))


# Name -> the block, and its layers with weights.
BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], int]] = {
    'basic': (BasicBlock, 2),
    'bottleneck': (Bottleneck, 3),
}
INITS = ('torch', 'he')


def resnet(
    depth: int = 20, num_classes: int = 10, block: str = 'basic', width: int = 16, init: str = 'torch'
) -> ResNet:
    """ResNet for 32-pixel images, by its number of layers.

    Args:
        depth: 6 n + 2 with basic blocks (20, 32, 44, 56, 110), 9 n + 2 with bottlenecks (29, 56, 110, 164).
        num_classes: number of classes.
        block: ``'basic'`` or ``'bottleneck'``.
        width: planes of the first stage.
        init: of convolutions: ``'torch'``, its default, or ``'he'``, normal by the fan out, as in the papers.

    Raises:
        AsrError: there is no such network.
    """
    if block not in BLOCKS:
        raise AsrError(f'block={block!r} is not known; {did_you_mean(str(block), BLOCKS)}')
    if init not in INITS:
        raise AsrError(f'init={init!r} is not known; {did_you_mean(str(init), INITS)}')
    cls, layers = BLOCKS[block]
    blocks, rest = divmod(depth - 2, 3 * layers)
    if rest or blocks < 1:
        near = max(1, round((depth - 2) / (3 * layers)))
        raise AsrError(f'depth={depth}: with block={block!r} it is {3 * layers} n + 2, such as {3 * layers * near + 2}')
    model = ResNet(cls, blocks, num_classes, width)
    if init == 'he':
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
    return model


def resnet56(num_classes: int = 10) -> ResNet:
    """ResNet-56 for 32-pixel images."""
    return ResNet(BasicBlock, 9, num_classes)


def resnet164(num_classes: int = 100) -> ResNet:
    """ResNet-164 with bottlenecks for 32-pixel images."""
    return ResNet(Bottleneck, 18, num_classes)
