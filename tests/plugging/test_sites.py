"""Where the table of sites comes from: adapters' data, read without the adapters, and what a user has registered."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT
from torch import Tensor, nn

from asr_downstream import SITES, PlugError, plug, register_site
from asr_downstream.plugging.sites import known_sites

ASR = dict(type='ASR', attention=dict(type='SE'))
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({absent}))  # None: not installed
import asr_downstream
"""


def lines_of(code: str, *absent: str) -> list[str]:
    script = WITHOUT.format(absent=absent) + code
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


class BasicBlock(nn.Module):
    """A block that has the qualified name of one of MMDetection's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.first(x))


BasicBlock.__module__ = 'mmdet.models.backbones.resnet'
NAME = 'mmdet.models.backbones.resnet.BasicBlock'


def test_blocks_of_a_framework_are_known_without_its_adapter() -> None:
    code = (
        'from torch import nn\n'
        'class FFN(nn.Sequential): add_identity = True; layers = property(lambda s: s)\n'
        "FFN.__module__, FFN.__qualname__ = 'mmcv.cnn.bricks.transformer', 'FFN'\n"
        'model = nn.Sequential(FFN(nn.Linear(4, 4), nn.Linear(4, 4)))\n'
        "print([row.path for row in asr_downstream.plug(model, dict(type='ASR', attention=dict(type='SE'))).sites])\n"
        "print([name for name in sys.modules if name in ('asr_downstream.detection', 'asr_downstream.diffusion')])\n"
    )
    assert lines_of(code, 'mmdet', 'mmcv', 'diffusers') == ["['0.1']", '[]']


def test_the_table_of_the_user_holds_what_the_user_registered() -> None:
    assert SITES == {}
    plug(nn.Sequential(BasicBlock()), ASR)  # a class of a framework was met
    register_site('mine.Mine', 'bn')
    assert list(SITES) == ['mine.Mine']


class Residual(nn.Module):
    """A block as of the CIFAR ResNets: a shortcut without layers is the identity."""

    def __init__(self, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.bn, self.shortcut = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y if self.shortcut is None else y + self.shortcut(x)


def test_an_empty_shortcut_is_the_identity() -> None:
    register_site(Residual, 'bn', shortcut='shortcut')
    model = nn.Sequential(Residual(nn.Sequential()), Residual(nn.Identity()), Residual(None))
    assert [row.path for row in plug(model, ASR).sites] == ['0.bn', '1.bn']


@pytest.mark.slow
@pytest.mark.det
def test_blocks_and_layers_of_mmcv_are_known_where_there_is_no_mmdet() -> None:
    code = (
        'import torch\n'
        'from mmcv.cnn.bricks.transformer import FFN\n'
        'from mmcv.cnn.bricks.wrappers import Conv2d\n'
        "plug, spec = asr_downstream.plug, dict(type='ASR', attention=dict(type='SE'))\n"
        'print([row.path for row in plug(torch.nn.Sequential(FFN(8, 16)), spec).sites])\n'
        "print([row.layer for row in plug(torch.nn.Sequential(Conv2d(3, 8, 1)), dict(spec, sites='all')).sites])\n"
    )
    assert lines_of(code, 'mmdet') == ["['0.layers.1']", "['Conv2d']"]


@pytest.mark.slow
def test_blocks_of_diffusers_are_known_where_there_is_no_accelerate() -> None:
    pytest.importorskip('diffusers')
    code = (
        'from torch import nn\n'
        'from diffusers.models.attention import FeedForward\n'
        "spec = dict(type='ASR', attention=dict(type='SE'))\n"
        'print([row.path for row in asr_downstream.plug(nn.Sequential(FeedForward(8)), spec).sites])\n'
    )
    assert lines_of(code, 'accelerate') == ["['0.net.2']"]


@pytest.mark.parametrize('first', ['the user', 'the adapter'])
def test_what_a_user_registers_wins_over_the_adapter(first: str) -> None:
    if first == 'the adapter':
        assert [row.path for row in plug(nn.Sequential(BasicBlock()), ASR).sites] == ['0.norm2']
    register_site(NAME, 'first')
    assert [row.path for row in plug(nn.Sequential(BasicBlock()), ASR).sites] == ['0.first']
    assert known_sites()[NAME].ends == ('first',)


def test_an_unknown_block_is_answered_with_all_known_ones() -> None:
    register_site('mine.Mine', 'bn')
    with pytest.raises(PlugError, match='no residual block that is known') as raised:
        plug(nn.Sequential(nn.BatchNorm2d(8)), ASR)
    for name in (
        'resnet.Bottleneck',
        'transformer.FFN',
        'resnet.ResnetBlock2D',
        'modeling_vit.ViTMLP',
        'convnext.CNBlock',
        'vision_transformer.ResPostBlock',
        'resnet_cifar.BasicBlock',
        'mine.Mine',
    ):
        assert name in str(raised.value)


def test_the_table_stands_in_one_order() -> None:
    register_site('mine.Mine', 'bn')
    register_site('timm.models.convnext.ConvNeXtBlock', 'norm')  # one that is known stays in its place
    packages = list(dict.fromkeys(name.partition('.')[0] for name in known_sites()))
    libraries = ['mmdet', 'mmcv', 'diffusers', 'transformers', 'torchvision', 'timm']
    assert packages == [*libraries, 'asr_downstream', 'mine']
