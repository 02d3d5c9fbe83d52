"""Detectors whose own attention is removed: that of RTMDet is a stock one again, EfficientNet says what is gone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import command, randomise

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from helpers.tiny_detection import as_file, tiny
from mmengine.config import Config

from asr_downstream.detection.config import load_config
from asr_downstream.detection.evaluation.calibrate import CalibrationPlan
from asr_downstream.detection.models.detectors import build_detector, compare_features, load_detector
from asr_downstream.detection.native import remove_attention
from asr_downstream.errors import FoldError
from asr_downstream.folding.native.blocks import find_blocks

CSPNEXT = dict(
    type='CSPNeXt', widen_factor=0.125, deepen_factor=0.167, out_indices=(2, 3), channel_attention=True, arch='P5'
)
EFFICIENTNET = dict(type='EfficientNet', arch='b0', out_indices=(3, 4))
CHANNELS = {'CSPNeXt': [32, 64], 'EfficientNet': [40, 112]}


def saved(digits: Path, folder: Path, backbone: dict[str, Any], **spec: Any) -> tuple[Path, Path]:
    """Config and checkpoint of a tiny RetinaNet on another backbone."""
    config = tiny(digits, validate=True)
    config.model.backbone = {**backbone, **spec}
    config.model.neck.in_channels = CHANNELS[backbone['type']]
    path = as_file(config, folder)
    model = randomise(build_detector(load_config(path)))
    checkpoint = folder / 'epoch_1.pth'
    torch.save({'state_dict': model.state_dict(), 'meta': {'epoch': 1}}, checkpoint)
    return path, checkpoint


@pytest.mark.slow
def test_a_backbone_with_a_switch_becomes_a_stock_one(digits: Path, tmp_path: Path) -> None:
    path, checkpoint = saved(digits, tmp_path, CSPNEXT)
    out = tmp_path / 'shipped' / 'detector.pth'
    done = command('fold', path, checkpoint, out, '--native', '--calibrate', 4)
    assert done.returncode == 0, done.stderr
    assert 'ChannelAttention' in done.stdout
    assert 'removed 4 of 4 blocks' in done.stdout
    assert 'metric: ' in done.stdout
    shipped = Config.fromfile(out.with_suffix('.py'))
    assert shipped.model.backbone.channel_attention is False
    assert 'removed_attention' not in shipped
    report = json.loads((out.parent / 'fold_report.json').read_text())
    assert len(report['native']['removed']) == 4
    assert all(block['error'] < 1e-10 for block in report['native']['blocks'])
    model, _ = load_detector(load_config(out.with_suffix('.py')), out)
    assert not find_blocks(model)
    before, _ = load_detector(load_config(path), checkpoint)
    assert 1e-6 < compare_features(before, model).relative < 0.5  # gates that were not constant
    assert '4 attention blocks' in (out.parent / 'README.md').read_text()


@pytest.mark.slow
def test_stock_mmdetection_loads_what_is_left(tool: Any, digits: Path, tmp_path: Path) -> None:
    for backbone in (CSPNEXT, EFFICIENTNET):
        folder = tmp_path / backbone['type']
        folder.mkdir()
        path, checkpoint = saved(digits, folder, backbone)
        out = folder / 'shipped' / 'detector.pth'
        remove_attention(load_config(path), checkpoint, out, CalibrationPlan(2, evaluate=False))
        done = tool('test_stock', out.with_suffix('.py'), out)
        assert done.returncode == 0, done.stderr
        assert 'loaded strictly' in done.stdout


@pytest.mark.slow
def test_a_backbone_without_a_switch_names_what_is_gone(digits: Path, tmp_path: Path) -> None:
    path, checkpoint = saved(digits, tmp_path, EFFICIENTNET)
    out = tmp_path / 'shipped' / 'detector.safetensors'
    result = remove_attention(load_config(path), checkpoint, out, CalibrationPlan(2, evaluate=False))
    report = result['report']
    assert {block.kind for block in report.blocks} == {'SELayer'}
    assert result['removed_attention'] == list(report.removed)
    config = load_config(out.with_suffix('.py'))
    assert config.removed_attention == list(report.removed)
    model, _ = load_detector(config, out)
    assert not find_blocks(model)
    card = (out.parent / 'README.md').read_text()
    assert 'for path in model.cfg.removed_attention:' in card
    with pytest.raises(FoldError, match='was removed before'):
        remove_attention(config, out, tmp_path / 'again.pth', CalibrationPlan(2, evaluate=False))


def test_refused(digits: Path, tmp_path: Path) -> None:
    path, checkpoint = saved(digits, tmp_path, CSPNEXT)
    out = tmp_path / 'out.pth'
    for options, message in (
        (('--native',), '--native goes with --calibrate'),
        (('--native', '--calibrate', 2, '--refine-norms'), 'not for --native'),
    ):
        done = command('fold', path, checkpoint, out, *options)
        assert done.returncode == 2
        assert message in done.stderr
    done = command('fold', path, checkpoint, out, '--native', '--calibrate', 2, '--max-drop', '-1')
    assert done.returncode == 1
    assert 'no attention could be removed' in done.stderr
    assert not out.exists()
    plain, other = saved(digits, tmp_path, CSPNEXT, channel_attention=False)
    done = command('fold', plain, other, out, '--native', '--calibrate', 2)
    assert done.returncode == 1
    assert 'no attention that is known' in done.stderr
    done = command('fold', tmp_path / 'run', out, '--native', '--calibrate', 2)
    assert '--native is for a detector' in done.stderr
