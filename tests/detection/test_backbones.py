"""Backbones, necks and heads of MMDetection: every family, and what is special about some."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, randomise

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from matrix.backbones import ASR, BACKBONES, DIA, SE, build, check, markdown
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope

from asr_downstream import PlugError, describe, fold, plug, verify

BY_NAME = {backbone.name: backbone for backbone in BACKBONES}
SAMPLE = ('ResNet-18', 'MobileNetV2', 'CSPDarknet, depthwise', 'CSPNeXt (RTMDet)', 'Swin', 'PVTv2', 'VGG (SSD)')


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope('mmdet')


def quiet(config: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return MODELS.build(ConfigDict(config))


def in_eval(model: Any) -> Any:
    model.eval()  # that of some backbones returns None
    return model


@pytest.mark.parametrize('name', [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in BY_NAME])
def test_backbone(name: str) -> None:
    row = check(BY_NAME[name])  # raises where something does not hold
    if name == 'VGG (SSD)':
        assert 'no residual block' in row.reason
    else:
        assert row.count > 2
        assert row.dynamic == ['SE', 'DIA']


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_is_found() -> None:
    table = markdown([check(backbone) for backbone in BACKBONES])
    assert table in (ROOT / 'det_configs/README.md').read_text(), 'python tools/backbones.py --markdown'


def test_blocks_without_a_shortcut_are_no_residual_branches() -> None:
    model = build(BY_NAME['MobileNetV2'], ASR)
    paths = {site.path for site in describe(model).sites}
    for name, block in model.named_modules():
        if type(block).__name__ == 'InvertedResidual':
            assert (f'{name}.linear_conv.bn' in paths) == block.with_res_shortcut
    assert {b.with_res_shortcut for b in model.modules() if type(b).__name__ == 'InvertedResidual'} == {True, False}
    named = build(BY_NAME['MobileNetV2'])
    assert len(plug(named, dict(ASR, sites=['layer*.linear_conv.bn'])).sites) > len(paths)


def test_a_model_of_known_blocks_without_shortcuts_says_so() -> None:
    neck = MODELS.build(dict(type='YOLOXPAFPN', in_channels=[8, 16, 32], out_channels=8))
    with pytest.raises(PlugError, match=r'12 known blocks.*none of them has a shortcut.*sites='):
        plug(neck, ASR)


def test_windows_take_constant_gates_only() -> None:
    swin = BY_NAME['Swin']
    constant = [site.path for site in describe(build(swin, ASR)).sites]
    assert sum('w_msa' in path for path in constant) == 8
    for spec in (SE, DIA):
        assert [s.path for s in describe(build(swin, spec)).sites] == [p for p in constant if 'w_msa' not in p]
    level = dict(type='Attention', attention=dict(type='LayerScale'))
    assert [site.path for site in describe(build(swin, level)).sites] == constant
    with pytest.raises(PlugError, match=r'w_msa\.proj.*windows.*ASR'):
        plug(build(swin), dict(SE, sites=['*.w_msa.proj']))


def test_the_stages_of_a_transformer_are_those_of_its_blocks() -> None:
    units = describe(build(BY_NAME['Swin'], DIA)).shared
    assert [(unit.name, len(unit.sites)) for unit in units] == [(f'stages.{n}.blocks', 2) for n in range(4)]


@pytest.mark.parametrize(
    'name',
    [
        'Swin',
        'PVT',
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ('Hourglass', 'CSPNeXt (RTMDet)', 'EfficientNet-B0', 'HRNet')
        ),
    ],
)
def test_initialisation_is_that_of_the_stock_class_and_leaves_the_gates(name: str) -> None:
    torch.manual_seed(3)
    stock = build(BY_NAME[name])
    stock.init_weights()
    after = torch.rand(1)
    torch.manual_seed(3)
    model = build(BY_NAME[name], ASR)
    gates = {k: v.clone() for k, v in model.state_dict().items() if '.gate.' in k}
    model.init_weights()
    assert torch.equal(torch.rand(1), after), 'no random number was drawn for gates'
    for key, value in {**stock.state_dict(), **gates}.items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_checkpoint_of_a_plugged_transformer_fills_the_gates(tmp_path: Path) -> None:
    source = randomise(build(BY_NAME['Swin'], ASR))
    state = {f'backbone.{key}': value for key, value in source.state_dict().items()}
    torch.save({'state_dict': state}, tmp_path / 'a.pth')
    config = dict(BY_NAME['Swin'].config, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth')))
    model = quiet(dict(config, type='asr_downstream.SwinTransformer', plug=ASR)).double()
    model.init_weights()
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize('name', ['MobileNetV2', 'EfficientNet-ES', 'Swin', 'Res2Net-50', 'HRNet'])
def test_checkpointing_gives_the_same_gradients_with_a_shared_state(name: str) -> None:
    backbone = BY_NAME[name]
    x = torch.randn(2, 3, backbone.side, backbone.side, dtype=torch.float64, requires_grad=True)
    found = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        config = dict(backbone.config, type=f'asr_downstream.{backbone.config["type"]}', plug=DIA, with_cp=with_cp)
        model = quiet(config).double()
        model.train()
        sum(y.square().mean() for y in model(x)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any('shared_attention' in key for key in found[0])
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, msg=key)


def retinanet(**extra: Any) -> dict[str, Any]:
    """A small RetinaNet, with ``extra`` for the detector."""
    return (
        dict(
            type='RetinaNet',
            data_preprocessor=dict(type='DetDataPreprocessor'),
            backbone=dict(type='ResNet', depth=18, base_channels=8, frozen_stages=1),
            neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
            bbox_head=dict(type='RetinaHead', num_classes=3, in_channels=8, feat_channels=8, stacked_convs=2),
            test_cfg=dict(nms_pre=100, score_thr=0.01, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10),
        )
        | extra
    )


def test_a_detector_takes_plugs_anywhere_in_it() -> None:
    sites = ['backbone.layer[34].*.bn2', 'neck.fpn_convs.*.conv', 'bbox_head.cls_convs.*.conv', 'bbox_head.retina_reg']
    config = retinanet(type='asr_downstream.RetinaNet', plug=dict(ASR, sites=sites))
    model = in_eval(randomise(quiet(config)).double())
    assert len(describe(model).sites) == 4 + 4 + 2 + 1
    model.train()
    assert not model.backbone.bn1.training, 'norm_eval stays'
    model.eval()
    folded, _ = fold(model)
    stock = in_eval(quiet(retinanet()).double())
    assert type(folded) is type(stock)
    stock.load_state_dict(folded.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert verify(model, stock, x).relative < 1e-10
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if '.gate.' not in k}, strict=True)
    assert verify(model, stock, x).relative > 1e-3


def test_a_neck_takes_plugs_and_initialises_as_stock() -> None:
    torch.manual_seed(3)
    stock = quiet(retinanet())
    stock.init_weights()
    torch.manual_seed(3)
    plugged = retinanet()
    plugged['neck'].update(type='asr_downstream.FPN', plug=dict(ASR, sites=['fpn_convs.*.conv']))
    model = quiet(plugged)
    model.init_weights()
    assert len(describe(model).sites) == 4
    for key, value in stock.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_plugged_models_pickle() -> None:
    config = dict(BY_NAME['Swin'].config, type='asr_downstream.SwinTransformer', plug=DIA, with_cp=True)
    model = in_eval(quiet(config))
    again = pickle.loads(pickle.dumps(model))
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(model(x), again(x), strict=True):
        assert torch.equal(a, b)
