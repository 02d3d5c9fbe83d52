"""Branches that the host merges itself, as RepVGG does: gates fold into the norm of each, and then they are merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, randomise
from helpers.documents import Document
from torch import Tensor, nn

from asr_downstream import describe, fold, plug, verify

SITES = ['*.rbr_dense.bn', '*.rbr_1x1.bn', '*.rbr_identity']
SE = dict(type='ASR', attention=dict(type='SE', reduction=4), sites=SITES)
SPECS = {
    'SE': SE,
    'twice': dict(SE, repeat=2),
    'one DIA for the branches': dict(type='ASR', attention=dict(type='DIALSTM', reduction=4), sites=SITES),
    'preserved': dict(SE, preserve=True),
}


class Branch(nn.Sequential):
    """Convolution and norm."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)


class RepBlock(nn.Module):
    """A 3x3, a 1x1 and an identity branch, each with a norm of its own, and one activation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.rbr_dense = Branch(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = Branch(inputs, outputs, 1, stride, groups)
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return (y if self.rbr_identity is None else y + self.rbr_identity(x)).relu()


def network() -> nn.Sequential:
    blocks = [RepBlock(3, 8, 2), RepBlock(8, 8), RepBlock(8, 8, groups=2), RepBlock(8, 16, 2)]
    return nn.Sequential(*blocks).double()


@torch.no_grad()
def merged(model: nn.Sequential) -> nn.Sequential:
    """What the host does for deployment: every block becomes one 3x3 convolution."""
    layers: list[nn.Module] = []
    for block in model:
        dense, pointwise, identity = block.rbr_dense, block.rbr_1x1, block.rbr_identity
        kernels = [(dense.conv.weight, dense.bn), (F.pad(pointwise.conv.weight, [1, 1, 1, 1]), pointwise.bn)]
        if identity is not None:
            unit = torch.zeros_like(dense.conv.weight)
            for channel in range(len(unit)):
                unit[channel, channel % unit.shape[1], 1, 1] = 1
            kernels.append((unit, identity))
        scales = [norm.weight / (norm.running_var + norm.eps).sqrt() for _, norm in kernels]
        inputs, outputs = dense.conv.in_channels, dense.conv.out_channels
        conv = nn.Conv2d(inputs, outputs, 3, block.stride, 1, groups=block.groups).double()
        conv.weight.copy_(sum(s.view(-1, 1, 1, 1) * k for s, (k, _) in zip(scales, kernels, strict=True)))
        conv.bias.copy_(sum(n.bias - n.running_mean * s for s, (_, n) in zip(scales, kernels, strict=True)))
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def trained(spec: dict[str, Any]) -> nn.Sequential:
    """The network, plugged, after a training step."""
    model = randomise(network())
    plug(model, spec)
    randomise(model).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    model(images()).square().mean().backward()
    optimiser.step()
    return model.eval()


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_merge_of_the_test_is_right() -> None:
    stock = randomise(network()).eval()
    assert verify(stock, merged(stock), images()).relative <= 1e-10


@pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)
def test_gates_of_every_branch_fold_and_then_the_branches_merge(spec: dict[str, Any]) -> None:
    model = trained(spec)
    assert len(describe(model).sites) == 10  # two blocks have no identity branch
    folded, _ = fold(model)
    assert [type(m) for m in folded.modules()] == [type(m) for m in network().modules()]
    shipped = merged(folded)
    assert [type(layer) for layer in shipped] == [nn.Conv2d, nn.ReLU] * 4
    assert verify(model, shipped, images()).relative <= 1e-10


def test_merging_before_folding_would_lose_the_gates() -> None:
    """Negative control: the host reads the weights of the norms, past the gates of a plugged model."""
    model = trained(SE)
    assert verify(model, merged(model), images()).relative > 1e-3


def test_the_sites_are_those_of_the_recipe() -> None:
    recipe = next(b for b in Document(ROOT / 'docs/folding.md').blocks('python') if 'rbr_dense' in b)
    space: dict[str, Any] = {}
    exec(recipe, space)
    assert space['spec']['sites'] == SITES
