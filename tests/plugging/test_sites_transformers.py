"""Sites of the image models of transformers: the real classes, at tiny size, trained a step, folded and shipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.branches import (
    ASR,
    SE,
    Case,
    assert_branches_end_there,
    assert_folds,
    assert_preserved,
    named,
    stock,
    trained,
)
from torch import Tensor, nn

from asr_downstream import PlugError, describe, fold, plug, verify
from asr_downstream.plugging.sites import find_sites

transformers = pytest.importorskip('transformers')


def model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Makes an image classifier."""

    def build() -> nn.Module:
        config = getattr(transformers, f'{name}Config')(num_labels=3, **settings)
        return getattr(transformers, f'{name}ForImageClassification')(config)

    return build


def images(size: int) -> Callable[[], tuple[Tensor]]:
    def draw() -> tuple[Tensor]:
        return (torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)

    return draw


def after_shortcut(block: Any, x: Tensor) -> Tensor:
    return block.activation(block.shortcut(x))


def unchanged(block: Any, x: Tensor) -> Tensor:
    return x


def bit(block: Any, x: Tensor) -> Tensor:
    return block.activation(x if block.downsample is None else block.downsample(x))


def bit_first(block: Any, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(block.norm1(x))


def halves(prefix: str, *blocks: str) -> tuple[str, ...]:
    return tuple(f'{prefix}.{block}.{end}' for block in blocks for end in ('attention.o_proj', 'mlp.fc2'))


TWO_STAGES = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1])
NEXT = dict(num_stages=2, hidden_sizes=[8, 16], depths=[1, 2], patch_size=2, drop_path_rate=0.1)
BIT = dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], num_groups=4, drop_path_rate=0.1)
VIT = dict(
    image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)
SWIN = dict(image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4)
PLACES = ('0.layers.0', '0.layers.1', '1.layers.0')
LATER = ('0.layers.0', '1.layers.0', '1.layers.1')

CASES = {
    'ResNet, basic': Case(
        model('ResNet', **TWO_STAGES, layer_type='basic'), images(32),
        tuple(f'resnet.encoder.stages.{p}.layer.1.normalization' for p in PLACES), 'ResNetBasicLayer', after_shortcut,
    ),
    'ResNet, bottleneck': Case(
        model('ResNet', **TWO_STAGES), images(32),
        tuple(f'resnet.encoder.stages.{p}.layer.2.normalization' for p in PLACES),
        'ResNetBottleNeckLayer', after_shortcut,
    ),
    'RegNetX': Case(
        model('RegNet', **TWO_STAGES, groups_width=4, layer_type='x'), images(32),
        tuple(f'regnet.encoder.stages.{p}.layer.2.normalization' for p in PLACES), 'RegNetXLayer', after_shortcut,
    ),
    'RegNetY': Case(
        model('RegNet', **TWO_STAGES, groups_width=4, layer_type='y'), images(32),
        tuple(f'regnet.encoder.stages.{p}.layer.3.normalization' for p in PLACES), 'RegNetYLayer', after_shortcut,
    ),
    'ConvNeXt': Case(
        model('ConvNext', **NEXT, layer_scale_init_value=0.5), images(16),
        tuple(f'convnext.encoder.stages.{p}.pwconv2' for p in LATER), 'ConvNextLayer', unchanged,
    ),
    'ConvNeXt without layer scale': Case(
        model('ConvNext', **NEXT, layer_scale_init_value=0.0), images(16),
        tuple(f'convnext.encoder.stages.{p}.pwconv2' for p in LATER), 'ConvNextLayer', unchanged,
    ),
    'ConvNeXtV2': Case(
        model('ConvNextV2', **NEXT), images(16),
        tuple(f'convnextv2.encoder.stages.{p}.pwconv2' for p in LATER), 'ConvNextV2Layer', unchanged,
    ),
    'MobileNetV2': Case(
        model('MobileNetV2', depth_multiplier=0.35, min_depth=8), images(64),
        tuple(f'mobilenet_v2.layer.{i}.reduce_1x1.normalization' for i in (1, 3, 4, 6, 7, 8, 10, 11, 13, 14)),
        'MobileNetV2InvertedResidual', unchanged, without=6,
    ),
    'BiT': Case(
        model('Bit', **BIT, layer_type='preactivation'), images(32),
        tuple(f'bit.encoder.stages.{p}.norm3' for p in LATER), 'BitPreActivationBottleneckLayer', bit_first,
    ),
    'BiT, bottleneck': Case(
        model('Bit', **BIT, layer_type='bottleneck'), images(32),
        tuple(f'bit.encoder.stages.{p}.norm3' for p in LATER), 'BitBottleneckLayer', bit,
    ),
    'ViT': Case(model('ViT', **VIT), images(16), halves('vit.layers', '0', '1'), 'ViTLayer', unchanged),
    'DeiT': Case(model('DeiT', **VIT), images(16), halves('deit.layers', '0', '1'), 'DeiTLayer', unchanged),
    'Swin': Case(
        model('Swin', **SWIN), images(16), halves('swin.encoder.layers', '0.blocks.0', '0.blocks.1', '1.blocks.0'),
        'SwinLayer', unchanged,
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_residual_sites_end_the_branches(case: Case) -> None:
    assert_branches_end_there(case)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_a_trained_model_folds_and_plain_transformers_loads_it(case: Case, tmp_path: Path) -> None:
    folded: Any = assert_folds(case)
    folded.save_pretrained(tmp_path)
    again, said = type(folded).from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(said[what] for what in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    for (name, kept), (other, read) in zip(folded.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(kept, read)
    assert verify(folded, again, case.inputs()).relative <= 1e-12  # weights lie elsewhere in memory: sums may round


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
@pytest.mark.parametrize('spec', [ASR, SE], ids=['constant', 'input-dependent'])
def test_a_preserved_model_is_the_stock_one(case: Case, spec: dict[str, Any]) -> None:
    if spec is ASR:
        assert_preserved(case, spec)
    else:
        assert len(describe(trained(case, spec)).sites) == len(case.sites) - ('Swin' in case.block) * 3


def test_stages_are_the_blocks_of_one_width() -> None:
    """What DIA shares along: blocks, not the halves of a transformer layer."""
    for name, stages in {'ResNet, basic': 2, 'BiT': 2, 'ConvNeXt': 2, 'Swin': 2, 'ViT': 1, 'DeiT': 1}.items():
        assert len({site.stage for site in find_sites(stock(CASES[name]))}) == stages, name


def test_windows_of_swin_get_constant_gates_alone() -> None:
    swin = stock(CASES['Swin'])
    assert [site.path.endswith('o_proj') for site in find_sites(swin)] == [s.windows for s in find_sites(swin)]
    with pytest.raises(PlugError, match='sees windows of an image as samples of their own'):
        plug(swin, dict(SE, sites=['*.o_proj']))
    plug(swin, SE)
    assert [row.path.endswith('mlp.fc2') for row in describe(swin).sites] == [True] * 3


def test_a_convolution_that_standardises_its_weight_is_refused() -> None:
    bit = stock(CASES['BiT'])
    with pytest.raises(PlugError, match=r'conv3.*WeightStandardizedConv2d.*undoes a scale; take the norm before'):
        plug(bit, dict(ASR, sites=['*.conv3']))
    plug(bit, dict(ASR, sites='all'))
    found = [row.path for row in describe(bit).sites]
    assert 'bit.encoder.stages.0.layers.0.norm1' in found
    assert not [path for path in found if 'conv' in path]


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class OlderAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output = Output()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(x)


class Layer(nn.Module):
    def __init__(self, attention: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.attention, self.output = attention, output

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.output(x)


@pytest.mark.parametrize('library', ['ViT', 'DeiT', 'Swin'])
def test_halves_of_older_transformers_are_known(library: str) -> None:
    """4.x and 5.0 keep the projections in modules of their own, with names of their own."""
    module = f'transformers.models.{library.lower()}.modeling_{library.lower()}'
    attention = named(f'{module}.{library}Attention')(type('Attention', (OlderAttention,), {}))
    output = named(f'{module}.{library}Output')(type('Output', (Output,), {}))
    layers = nn.Sequential(*(Layer(attention(), output()) for _ in range(2))).double().eval()
    plug(layers, ASR)
    paths = [row.path for row in describe(layers).sites]
    assert paths == [f'{i}.{end}.dense' for i in (0, 1) for end in ('attention.output', 'output')]
    assert {site.block for site in find_sites(layers)} == {'0', '1'}
    assert verify(layers, fold(layers)[0], torch.randn(2, 5, 16, dtype=torch.float64)).relative <= 1e-10
