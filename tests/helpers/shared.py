"""A small network with shared units, and what its forwards leave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asr_downstream import plug
from asr_downstream.models.resnet_cifar import Bottleneck, ResNet

DIA = dict(type='DIA', attention=dict(type='DIALSTM'))


ASR_DIA = dict(type='ASR', attention=dict(type='DIALSTM'))


RECURRENT = {'DIA': DIA, 'DIA-low': dict(DIA, memory='low'), 'ASR-DIA': ASR_DIA}


SPECS = {**RECURRENT, 'DIA-SRM': dict(type='DIA', attention=dict(type='SRM'))}


every_spec = pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)


recurrent_spec = pytest.mark.parametrize('spec', RECURRENT.values(), ids=RECURRENT)


class Net(ResNet):
    """Three stages of three bottlenecks; ``around`` wraps the call of every block."""

    around: Callable[..., Tensor] | None = None

    def __init__(self) -> None:
        super().__init__(Bottleneck, 3, width=8)

    def forward(self, x: Tensor) -> Tensor:
        if self.around is None:
            return super().forward(x)
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = self.around(block, x)
        return self.fc(x.mean((2, 3)))


def plugged(spec: Any, training: bool = True) -> Net:
    model = Net().double()
    plug(model, spec)
    return randomise(model).train(training)


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 12, 12, dtype=torch.float64)


def results(model: nn.Module, *inputs: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Outputs, gradients and, afterwards, buffers: all that a forward and a backward leave."""
    model.zero_grad()
    call = model if run is None else run
    outputs = [call(x) for x in inputs]
    sum(y.square().sum() for y in outputs).backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [*outputs, *grads, *(b.double() for b in model.buffers())]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip((t.detach() for t in ours), (t.detach() for t in theirs), strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


BY_BLOCK = partial(checkpoint, use_reentrant=False)


def unet(**extra: Any) -> Any:
    diffusers = pytest.importorskip('diffusers')
    kwargs = dict(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
        up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
    )
    return diffusers.UNet2DModel(**{**kwargs, **extra})


NOISE = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
