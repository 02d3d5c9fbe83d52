"""Sites of torchvision and timm: blocks with their names and structure, trained a step and folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import timm_like as timm
from helpers import torchvision_like as torchvision
from helpers.branches import (
    ASR,
    SE,
    Case,
    assert_branches_end_there,
    assert_folds,
    assert_preserved,
    first,
    stock,
    trained,
)
from torch import Tensor, nn

from asr_downstream import PlugError, describe, fold, fuse_conv_bn, plug, rebind, verify
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.sites import find_sites


def stages(*blocks: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Makes a network of blocks: those of each stage are in a sequence of their own."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(*(block() for block in blocks)))

    return build


def images() -> tuple[Tensor]:
    return (torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)


def tokens() -> tuple[Tensor]:
    return (torch.randn(4, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),)


def sequence(*blocks: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(16, 16), nn.Sequential(*(block() for block in blocks)))


def ends(*names: str) -> tuple[str, ...]:
    return tuple(f'1.{i}.{name}' for i in (0, 1) for name in names)


def relu_of(shortcut: str) -> Callable[[Any, Tensor], Tensor]:
    def rest(block: Any, x: Tensor) -> Tensor:
        own = getattr(block, shortcut)
        return (x if own is None else own(x)).relu()

    return rest


def unchanged(block: Any, x: Tensor) -> Tensor:
    return x


def preactivated(block: Any, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(block.norm1(x))


def attention_alone(block: Any, x: Tensor) -> Tensor:
    y = block.ln_1(x)
    return x + block.self_attention(y, y, y, need_weights=False)[0]


TORCHVISION = {
    'ResNet, basic': Case(
        stages(lambda: torchvision.BasicBlock(16, 16), lambda: torchvision.BasicBlock(16, 32, 2)), images,
        ends('bn2'), 'BasicBlock', relu_of('downsample'),
    ),
    'ResNet, bottleneck': Case(
        stages(lambda: torchvision.Bottleneck(16, 32, 2), lambda: torchvision.Bottleneck(32, 32)), images,
        ends('bn3'), 'Bottleneck', relu_of('downsample'),
    ),
    'RegNetX': Case(
        stages(lambda: torchvision.ResBottleneckBlock(16, 32, 2), lambda: torchvision.ResBottleneckBlock(32, 32)),
        images, ends('f.c.1'), 'ResBottleneckBlock', relu_of('proj'),
    ),
    'RegNetY': Case(
        stages(
            lambda: torchvision.ResBottleneckBlock(16, 16, 1, 4), lambda: torchvision.ResBottleneckBlock(16, 8, 2, 4)
        ), images, ends('f.c.1'), 'ResBottleneckBlock', relu_of('proj'),
    ),
    'ConvNeXt': Case(
        stages(lambda: torchvision.CNBlock(16), lambda: torchvision.CNBlock(16)), images,
        ends('block.5'), 'CNBlock', unchanged,
    ),
    'ViT': Case(
        sequence(lambda: torchvision.EncoderBlock(16, 32), lambda: torchvision.EncoderBlock(16, 32)), tokens,
        ends('mlp.3'), 'EncoderBlock', attention_alone,
    ),
}  # fmt: skip

TIMM = {
    'ResNet, basic': Case(
        stages(lambda: timm.BasicBlock(16, 16), lambda: timm.BasicBlock(16, 32, 2, se=True)), images,
        ends('bn2'), 'BasicBlock', relu_of('downsample'),
    ),
    'ResNet, bottleneck': Case(
        stages(lambda: timm.Bottleneck(16, 32, 2), lambda: timm.Bottleneck(32, 32)), images,
        ends('bn3'), 'Bottleneck', relu_of('downsample'),
    ),
    'RegNet': Case(
        stages(lambda: timm.RegNetBottleneck(16, 32, 2), lambda: timm.RegNetBottleneck(32, 32)), images,
        ends('conv3.bn'), 'RegNetBottleneck', relu_of('downsample'),
    ),
    'RegNetZ': Case(
        stages(lambda: timm.RegNetBottleneck(16, 16), lambda: timm.RegNetBottleneck(16, 32, 2, shortcut=False)), images,
        ('1.0.conv3.bn',), 'RegNetBottleneck', relu_of('downsample'), without=1,
    ),
    'RegNet, preactivated': Case(
        stages(lambda: timm.RegNetPreBottleneck(16, 32, 2), lambda: timm.RegNetPreBottleneck(32, 32)), images,
        ends('conv3'), 'RegNetPreBottleneck', lambda block, x: block.downsample(block.norm1(x)),
    ),
    'BiT, basic': Case(
        stages(lambda: timm.PreActBasic(16, 32), lambda: timm.PreActBasic(32, 32)), images,
        ends('norm2'), 'PreActBasic', preactivated,
    ),
    'BiT': Case(
        stages(lambda: timm.PreActBottleneck(16, 32), lambda: timm.PreActBottleneck(32, 32)), images,
        ends('norm3'), 'PreActBottleneck', preactivated,
    ),
    'ResNetV2 with plain convolutions': Case(
        stages(
            lambda: timm.PreActBottleneck(16, 32, nn.Conv2d), lambda: timm.PreActBottleneck(32, 32, nn.Conv2d)
        ), images,
        ends('conv3'), 'PreActBottleneck', preactivated,
    ),
    'ResNetV2, bottleneck': Case(
        stages(lambda: timm.V2Bottleneck(16), lambda: timm.V2Bottleneck(16)), images,
        ends('norm3'), 'V2Bottleneck', relu_of('downsample'),
    ),
    'ConvNeXt': Case(
        stages(lambda: timm.ConvNeXtBlock(16), lambda: timm.ConvNeXtBlock(16, layer_scale=False)), images,
        ends('mlp.fc2'), 'ConvNeXtBlock', unchanged,
    ),
    'ConvNeXt of convolutions': Case(
        stages(lambda: timm.ConvNeXtBlock(16, True), lambda: timm.ConvNeXtBlock(16, True)), images,
        ends('mlp.fc2'), 'ConvNeXtBlock', unchanged,
    ),
    'ViT': Case(
        sequence(lambda: timm.Block(16), lambda: timm.Block(16, gated=True)), tokens,
        ends('attn.proj', 'mlp.fc2'), 'Block', unchanged,
    ),
    'ViT, norms last': Case(
        sequence(lambda: timm.ResPostBlock(16), lambda: timm.ResPostBlock(16)), tokens,
        ends('norm1', 'norm2'), 'ResPostBlock', unchanged,
    ),
}  # fmt: skip
CASES = {f'torchvision, {k}': v for k, v in TORCHVISION.items()} | {f'timm, {k}': v for k, v in TIMM.items()}


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_residual_sites_end_the_branches(case: Case) -> None:
    assert_branches_end_there(case)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_a_trained_model_folds(case: Case) -> None:
    assert_folds(case)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_a_preserved_model_is_the_stock_one(case: Case) -> None:
    assert_preserved(case, ASR)
    assert len(describe(trained(case, SE)).sites) == len(case.sites)


def test_halves_of_a_transformer_block_belong_to_one_block() -> None:
    assert [site.block for site in find_sites(stock(TIMM['ViT']))] == ['1.0', '1.0', '1.1', '1.1']
    assert [site.block for site in find_sites(stock(TORCHVISION['ViT']))] == ['1.0', '1.1']


# Norms with an activation inside


def norm_act(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), kind(16), nn.Conv2d(16, 4, 1)).double()


@pytest.mark.parametrize('kind', [timm.BatchNormAct2d, timm.GroupNormAct])
@pytest.mark.parametrize('training', [False, True])
def test_an_activation_inside_of_a_norm_comes_after_the_gates(kind: type[nn.Module], training: bool) -> None:
    case = Case(lambda: norm_act(kind), images, ('1',), '', unchanged)
    model = stock(case).train(training)
    plug(model, dict(type='ASR', attention=dict(type='LayerScale'), sites=['1']))
    layer: Any = model[1]
    layer.gate[0].attention.gamma.data.uniform_(0.5, 2)
    x = model[0](images()[0])
    y = layer(x)
    plain = case.build()[1].train(training)
    plain.load_state_dict(layer.state_dict(), strict=False)
    plain.act = nn.Identity()
    expected = (plain(x) * layer.constant().view(1, -1, 1, 1)).relu()
    assert (y - expected).abs().max() <= 1e-12
    assert (y == 0).any()  # the activation is there


def test_a_norm_with_an_activation_is_synchronised_and_bound_again() -> None:
    model = stock(TIMM['RegNet'])
    plug(model, ASR)
    before = first(model(*images())).detach()
    for name, norm in list(model.named_modules()):
        if isinstance(norm, timm.BatchNormAct2d):
            parent, _, child = name.rpartition('.')
            setattr(model.get_submodule(parent), child, synchronised(norm))
    assert rebind(model) == list(TIMM['RegNet'].sites)
    assert isinstance(model.get_submodule('1.0.conv3.bn'), timm.SyncBatchNormAct)
    assert isinstance(model.get_submodule('1.0.conv3.bn'), Plugged)
    assert (first(model(*images())) - before).abs().max() <= 1e-12
    assert verify(model, fold(model)[0], images()).relative <= 1e-10


def synchronised(norm: Any) -> nn.Module:
    """What timm's `convert_sync_batchnorm` does to one of its norms."""
    new: Any = timm.SyncBatchNormAct(norm.num_features, norm.eps, norm.momentum).double().eval()
    new.act, new.drop = norm.act, norm.drop
    new.weight, new.bias = norm.weight, norm.bias
    for name in ('running_mean', 'running_var', 'num_batches_tracked'):
        setattr(new, name, getattr(norm, name))
    for name, child in norm.named_children():
        new.add_module(name, child)
    return new


def test_fusing_keeps_the_activation_of_a_norm() -> None:
    model = stock(TIMM['RegNet'])
    fused, pairs = fuse_conv_bn(model, images()[0])
    assert ('1.0.conv1.conv', '1.0.conv1.bn') in pairs
    assert len(pairs) == 7
    assert verify(model, fused, images()[0]).relative <= 1e-10


# Refusals


@pytest.mark.parametrize(
    ('build', 'pattern', 'message'),
    [
        (TIMM['BiT'].build, '*.conv3', r'StdConv2d.*undoes a scale; take the norm before or after'),
        (
            stages(lambda: torchvision.BasicBlock(16, 16, norm=torchvision.FrozenBatchNorm2d)),
            'residual',
            r'1\.0\.bn2: torchvision.ops.misc.FrozenBatchNorm2d is not.*is a buffer.*take the convolution',
        ),
        (TORCHVISION['ViT'].build, '*.out_proj', 'NonDynamicallyQuantizableLinear'),
    ],
)
def test_layers_that_look_foldable_are_refused_with_the_reason(
    build: Callable[[], nn.Module], pattern: str, message: str
) -> None:
    with pytest.raises(PlugError, match=message):
        plug(build(), dict(ASR, sites=pattern if pattern == 'residual' else [pattern]))


def test_a_convolution_before_a_frozen_norm_is_a_site() -> None:
    """As the message says: a scale passes through a norm whose statistics are fixed."""
    block = lambda: torchvision.BasicBlock(16, 16, norm=torchvision.FrozenBatchNorm2d)  # noqa: E731
    model = stock(Case(stages(block), images, (), '', unchanged))
    plug(model, dict(ASR, sites=['*.conv2']))
    assert verify(model, fold(model)[0], images()).relative <= 1e-10
