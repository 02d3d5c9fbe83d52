"""Fusing convolutions with their norms: only those that belong together, only with the same result."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomise
from torch import Tensor, nn

from asr_downstream import FoldError, fold, fuse_conv_bn, plug, verify
from asr_downstream.models import resnet56

X = torch.randn(2, 3, 16, 16, dtype=torch.float64)


def test_a_folded_resnet_fuses_to_the_same_function() -> None:
    model = resnet56()
    plug(model, dict(type='ASR', attention=dict(type='SE')))
    randomise(model).double().eval()
    folded, _ = fold(model)
    fused, pairs = fuse_conv_bn(folded, X)
    assert ('conv1', 'bn1') in pairs
    assert len(pairs) == sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert verify(model, fused, X).relative < 1e-10
    assert any(isinstance(m, nn.BatchNorm2d) for m in folded.modules()), 'a copy'


class Odd(nn.Module):
    """Registered in another order than called; one norm is not after a convolution, one convolution is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_b, self.bn_a, self.bn_c, self.bn_d = (nn.BatchNorm2d(3) for _ in range(4))
        self.conv_a, self.conv_b, self.twice = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_b(self.conv_b(self.bn_a(self.conv_a(x))))
        x = self.bn_c(x.relu())
        return self.bn_d(self.twice(self.twice(x)))


def test_pairs_are_those_of_the_forward_and_not_of_the_registration() -> None:
    model = randomise(Odd()).double().eval()
    fused, pairs = fuse_conv_bn(model, X)
    assert sorted(pairs) == [('conv_a', 'bn_a'), ('conv_b', 'bn_b')]
    assert isinstance(fused.bn_c, nn.BatchNorm2d)
    assert isinstance(fused.bn_d, nn.BatchNorm2d)
    assert verify(fused, model, X).relative < 1e-10


class OtherReader(nn.Module):
    """The output of the convolution is also read past its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y.sin()


class InPlace(nn.Module):
    """Something works on the output of the convolution in place before the norm reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last, self.end = (
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.last(self.bn(self.conv(x).relu_())))


def test_work_in_place_between_them_parts_a_pair() -> None:
    model = randomise(InPlace()).double().eval()
    _, pairs = fuse_conv_bn(model, X)
    assert pairs == [('last', 'end')]


def test_what_does_not_belong_together_is_refused() -> None:
    model = randomise(OtherReader()).double().eval()
    with pytest.raises(FoldError, match='another reader'):
        fuse_conv_bn(model, X)


def test_refusals() -> None:
    model = randomise(resnet56()).double()
    with pytest.raises(FoldError, match=r'model\.eval\(\)'):
        fuse_conv_bn(model, X)
    plugged = copy.deepcopy(model).eval()
    plug(plugged, dict(type='ASR', attention=dict(type='SE')))
    with pytest.raises(FoldError, match='is plugged; fold the model first'):
        fuse_conv_bn(plugged, X)
    with pytest.raises(FoldError, match='no batch norm follows a convolution'):
        fuse_conv_bn(nn.Conv2d(3, 3, 1).double().eval(), X)
