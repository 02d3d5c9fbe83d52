"""DIA and calibrated folding in MMDetection: backbones, with_cp, detectors, tools."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, randomise

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from helpers.backbones import BACKBONES, IDS, X, in_eval, plugged, tiny
from helpers.shared import ASR_DIA, DIA, assert_same
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn

from asr_downstream import FoldError, describe, fold, plug, verify
from asr_downstream.detection.config import load_config, partly_stock_config, stock_config
from asr_downstream.detection.data.digits import make_digits
from asr_downstream.detection.evaluation.calibrate import (
    CalibrationPlan,
    calibration_batches,
    check_reached,
    fold_over_images,
)
from asr_downstream.detection.models.detectors import build_detector, compare_features
from asr_downstream.errors import DataError

CONFIG = Path('det_configs/digits/retinanet_r18-w16-dia_fpn_digits.py')
SPECS = pytest.mark.parametrize('spec', [DIA, ASR_DIA], ids=['DIA', 'ASR-DIA'])
Tool = Callable[..., Any]


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope('mmdet')


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'digits'
    make_digits(root, sizes={'train': 12, 'val': 6})
    return root


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A detector with DIA whose gates move, with random weights."""
    model = build_detector(load_config(ROOT / CONFIG, needs_data=False))
    randomise(model.backbone.shared_attention)
    path = tmp_path / 'epoch_1.pth'
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, path)
    return path


def everything(model: Any) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    outputs = [model(torch.randn(X, dtype=torch.float64)) for _ in range(2)]
    sum(y.square().mean() for of_one in outputs for y in of_one).backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [*(y for of_one in outputs for y in of_one), *grads]


@SPECS
@pytest.mark.parametrize(('backbone', 'end', 'sites'), BACKBONES, ids=IDS)
def test_backbones_train_and_checkpointing_changes_nothing(backbone: dict, end: str, sites: int, spec: dict) -> None:
    model = randomise(plugged(backbone, spec, norm_eval=True).double())
    assert len(describe(model).sites) == sites
    assert [u.name for u in describe(model).shared] == ['layer1', 'layer2', 'layer3', 'layer4']
    model.train()
    expected = everything(model)
    units = [p for n, p in model.named_parameters() if 'shared_attention' in n]
    assert all(p.grad is not None for p in units)
    assert sum(float(p.grad.abs().max()) > 0 for p in units) > len(units) / 2
    checkpointed = plugged(backbone, spec, norm_eval=True, with_cp=True).double()
    checkpointed.load_state_dict(model.state_dict())
    checkpointed.train()
    assert_same(everything(checkpointed), expected)


def test_with_cp_is_given_back_by_folding() -> None:
    for backbone in (b for b, _, _ in BACKBONES[:3]):
        model = in_eval(randomise(plugged(backbone, ASR_DIA, with_cp=True).double()))
        folded, _ = fold(model)
        stock = in_eval(tiny(backbone, with_cp=True).double())
        assert [type(m) for m in folded.modules()] == [type(m) for m in stock.modules()]
        assert folded.layer1[0].with_cp
        stock.load_state_dict(folded.state_dict(), strict=True)
        assert verify(model, stock, torch.randn(X, dtype=torch.float64)).relative < 1e-10
        assert copy.deepcopy(model).layer1[0].with_cp is False


def test_a_live_detector_folds_exactly() -> None:
    config = load_config(ROOT / 'det_configs/digits/retinanet_r18-w16_fpn_digits.py', needs_data=False)
    model = build_detector(config).double()
    stock = copy.deepcopy(model)
    plug(model, ASR_DIA)
    randomise(model)
    folded, _ = fold(model)
    assert compare_features(model, folded).relative < 1e-10
    assert [type(m) for m in folded.modules()] == [type(m) for m in stock.modules()]
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if k in stock.state_dict()})
    assert compare_features(model, stock).relative > 1e-3
    stock.load_state_dict(folded.state_dict(), strict=True)


def test_preserve_starts_where_a_pretrained_backbone_stands(tmp_path: Path) -> None:
    backbone = dict(BACKBONES[1][0], norm_eval=True, frozen_stages=1)
    stock = in_eval(randomise(tiny(backbone)))
    path = tmp_path / 'stock.pth'
    torch.save(stock.state_dict(), path)
    spec = dict(DIA, preserve=True, sites=['layer[234].*.bn3'])
    model = plugged(backbone, spec, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    assert verify(in_eval(model), stock, torch.randn(X)).absolute == 0


def test_calibration_batches_are_training_images_as_in_testing(digits: Path) -> None:
    config = load_config(ROOT / CONFIG, digits)
    batches = calibration_batches(config, 5)
    samples = [s for batch in batches for s in batch['data_samples']]
    assert len(samples) == 5
    assert all('train' in s.img_path for s in samples)
    assert not any(s.get('flip', False) for s in samples)
    again = calibration_batches(config, 5)
    assert torch.equal(again[0]['inputs'][0], batches[0]['inputs'][0])
    assert len(calibration_batches(config, 99)[0]['inputs']) <= 12


def test_a_budget_of_ap_needs_ap(digits: Path) -> None:
    config = load_config(ROOT / CONFIG, digits)
    with pytest.raises(DataError, match='max_drop is about AP'):
        fold_over_images(config, build_detector(config), CalibrationPlan(max_drop=0.1, evaluate=False))
    with pytest.raises(FoldError, match=r'calibrate=loader'):
        fold(build_detector(config))


@pytest.mark.slow
def test_fold_calibrates_and_ships_the_stock_model(tool: Tool, digits: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / 'shipped/detector.pth'
    done = tool('fold', CONFIG, checkpoint, out, '--calibrate', 8, '--data-root', digits)
    assert done.returncode == 0, done.stderr
    assert 'stripe ratio' in done.stdout
    assert 'metric: 0.' in done.stdout
    report = json.loads(out.with_name('fold_report.json').read_text())
    assert len(report['calibration']['sites']) == 6
    assert report['calibration']['output_change'] > 0
    assert report['still_plugged'] == []
    stock = 'det_configs/digits/retinanet_r18-w16_fpn_digits.py'
    done = tool('test_stock', stock, out)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_a_budget_keeps_fits_a_config_with_those_sites_only(tool: Tool, digits: Path, checkpoint: Path) -> None:
    config = load_config(ROOT / CONFIG, digits)
    model = build_detector(config)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)['state_dict'])
    options = dict(calibrate=[torch.randn(2, 3, 64, 64)], step=lambda m, x: m.extract_feat(x))
    change = fold(model, **options)[1].calibration.change
    folded, report = fold(model, **options, max_drop=0.7 * change)
    kept = [row.path for row in describe(folded).sites]
    assert set(kept) == set(report.calibration.kept)
    assert len(kept) in (2, 4)
    partly = partly_stock_config(config, kept)
    assert [set(s['sites']) for s in partly.model.backbone.plug] == [{path.removeprefix('backbone.') for path in kept}]
    shipped = build_detector(partly)
    shipped.load_state_dict(folded.state_dict(), strict=True)
    assert compare_features(shipped, folded).relative == 0
    for nothing in (partly_stock_config(config, []), stock_config(config)):
        assert nothing.model.backbone.type == 'ResNet'
        assert 'plug' not in nothing.model.backbone
    out = checkpoint.with_name('none.pth')
    done = tool('fold', CONFIG, checkpoint, out, '--calibrate', 4, '--max-drop', '-1', '--data-root', digits)
    assert done.returncode == 1
    assert 'the budget leaves every site plugged' in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    'plugs',
    [
        [dict(ASR_DIA, sites=['layer3.*.bn2']), dict(DIA, sites=['layer[23].*.bn2'])],
        [
            dict(DIA, sites=['layer3.*.bn2']),
            dict(type='Attention', attention=dict(type='SE'), sites=['layer[12].*.bn2']),
        ],
        [
            dict(type='Attention', attention=dict(type='LayerScale')),
            dict(type='Attention', attention=dict(type='SE'), skip=['layer1.1.*']),
        ],
    ],
    ids=['ASR+DIA', 'DIA+SE', 'LayerScale+SE'],
)
@pytest.mark.parametrize('share', [0.3, 0.8])
def test_composed_plugs_keep_a_config_that_fits(plugs: list[dict], share: float) -> None:
    config = load_config(ROOT / CONFIG, needs_data=False)
    config.model.backbone.plug = plugs
    model = build_detector(config)
    randomise(model.backbone)
    options = dict(calibrate=[torch.randn(2, 3, 64, 64)], step=lambda m, x: m.extract_feat(x))
    change = fold(model, **options)[1].calibration.change
    folded, report = fold(model, **options, max_drop=share * change)
    shipped = build_detector(partly_stock_config(config, [row.path for row in describe(folded).sites]))
    assert report.calibration.kept
    shipped.load_state_dict(folded.state_dict(), strict=True)
    assert compare_features(shipped, folded).relative == 0


def test_listed_groups_have_no_partial_config() -> None:
    config = load_config(ROOT / CONFIG, needs_data=False)
    config.model.backbone.plug = dict(DIA, share=[['layer1.*'], ['layer2.*'], ['layer3.*']])
    with pytest.raises(FoldError, match='listed groups'):
        partly_stock_config(config, ['backbone.layer2.0.bn2'])


def test_gates_in_dense_heads_are_folded_and_those_behind_boxes_are_refused(digits: Path) -> None:
    config = load_config(ROOT / CONFIG, digits)
    config.model.backbone.plug = None
    model = build_detector(config)
    spec = dict(type='Attention', attention=dict(type='SE'), sites=['bbox_head.cls_convs.*.conv'])
    plug(randomise(model), spec)
    folded, report = fold_over_images(config, model.eval(), CalibrationPlan(images=4, evaluate=False))
    assert len(report.calibration.sites) == len(model.bbox_head.cls_convs)
    assert report.calibration.change > 0, 'the outputs of the head are compared'
    assert not describe(folded).sites
    two = nn.ModuleDict({'backbone': nn.Conv2d(3, 8, 1), 'roi_head': nn.Conv2d(8, 8, 1)})
    plug(two, dict(type='Attention', attention=dict(type='SE'), sites=['roi_head']))
    with pytest.raises(FoldError, match='roi_head: gates that depend on the input, where boxes or queries are seen'):
        check_reached(two)


def test_calibration_images_come_from_inside_of_wrappers(digits: Path) -> None:
    config = load_config(ROOT / CONFIG, digits)
    leaf = config.train_dataloader.dataset.to_dict()
    for wrapped in (
        dict(type='ConcatDataset', datasets=[leaf, leaf]),
        dict(type='RepeatDataset', times=3, dataset=leaf),
        dict(type='MultiImageMixDataset', dataset=leaf, pipeline=[dict(type='Mosaic', img_scale=(64, 64))]),
    ):
        config.train_dataloader.dataset = wrapped
        assert sum(len(batch['inputs']) for batch in calibration_batches(config, 5)) == 5
    with pytest.raises(DataError, match='at least 1 image'):
        CalibrationPlan(images=0)


@pytest.mark.slow
def test_test_det_shows_what_calibration_costs(tool: Tool, digits: Path, checkpoint: Path, tmp_path: Path) -> None:
    options = ('--data-root', digits, '--work-dir', tmp_path)
    done = tool('test_det', CONFIG, checkpoint, '--fold', 'calibrated', '--calibrate', 8, '--refine-norms', *options)
    assert done.returncode == 0, done.stderr
    assert 'outputs change by' in done.stdout
    found = json.loads((tmp_path / 'test.json').read_text())
    assert found['calibration']['batch_norms_refined']
    assert found['folded']['parameters'] < found['unfolded']['parameters']
    done = tool('test_det', CONFIG, checkpoint, '--fold', *options)
    assert done.returncode == 1
    assert 'depend on the input' in done.stderr
    done = tool('test_det', CONFIG, checkpoint, '--calibrate', 8, *options)
    assert done.returncode == 2
    assert '--fold calibrated' in done.stderr


def test_plugs_are_found_in_configs() -> None:
    for name, plug_type in (('dia', 'DIA'), ('dia-se', 'DIA'), ('asr-dia', 'ASR')):
        for detector in ('faster_rcnn/faster-rcnn', 'retinanet/retinanet'):
            config = load_config(ROOT / f'det_configs/{detector}_r50-{name}-c3-c5_fpn_1x_coco.py', needs_data=False)
            assert config.model.backbone.plug.type == plug_type
            assert config.model.backbone.plug.preserve
    assert MODELS.get('asr_downstream.ResNet')


def test_what_a_budget_keeps_of_a_detectors_own_plug_stays_in_the_config() -> None:
    config = load_config(ROOT / 'det_configs/digits/retinanet_r18-w16_fpn_digits.py', needs_data=False)
    sites = ['neck.fpn_convs.*.conv', 'bbox_head.retina_cls']
    spec = dict(type='Attention', attention=dict(type='SE', reduction=4), sites=sites)
    config.model.update(type='asr_downstream.RetinaNet', plug=spec)
    kept = ['neck.fpn_convs.1.conv']
    partly = partly_stock_config(config, kept)
    assert [row.path for row in describe(build_detector(partly)).sites] == kept
