"""Folded detectors as ONNX and torch.export: feature maps and raw outputs of the head, at other sizes too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import command

pytestmark = pytest.mark.det
runtime = pytest.importorskip('onnxruntime', reason='needs the extra export')
pytest.importorskip('onnxscript', reason='needs the extra export')
pytest.importorskip('mmdet')

from helpers import exports
from helpers.tiny_detection import pictures


@pytest.mark.slow
def test_a_detector_is_exported_at_every_size(tmp_path: Path) -> None:
    data = pictures(tmp_path)
    shipped, out = exports.detector(tmp_path, data), tmp_path / 'out'
    done = command('export', shipped, '--to', 'onnx', '--data', data, '--out', out)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / 'receipt.json').read_text())
    assert found['varies'] == {'image': {'0': 'batch', '2': 'height, a multiple of 32', '3': 'width, a multiple of 32'}}
    assert found['exports']['model.onnx']['relative'] <= 1e-4
    assert found['classes'] == list(map(str, range(10)))
    assert set(found['sources']) == {'detector.pth', 'detector.py'}
    names = [each.name for each in runtime.InferenceSession(str(out / 'model.onnx')).get_outputs()]
    assert [name for name in names if name.startswith('features')] == ['features_0', 'features_1']
    assert len([name for name in names if name.startswith('head')]) == 4


def test_a_detector_with_gates_is_refused(tmp_path: Path) -> None:
    plug = {'type': 'ASR', 'attention': {'type': 'SE', 'reduction': 4}}
    options = {'model.backbone.type': 'asr_downstream.ResNet', 'model.backbone.plug': plug}
    shipped = exports.detector(tmp_path, pictures(tmp_path), stock=False, **options)
    done = command('export', shipped, '--out', tmp_path / 'out')
    assert done.returncode == 1
    assert 'the RetinaNet has gates at' in done.stderr
    assert 'asr-downstream fold CONFIG CHECKPOINT OUT' in done.stderr
    assert not (tmp_path / 'out').exists()
