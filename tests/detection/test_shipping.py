"""The four detectors of the configs: folded, they load strictly into stock where this package cannot be imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import randomise

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from asr_downstream.detection.config import load_config
from asr_downstream.detection.export import fold_checkpoint
from asr_downstream.detection.models.detectors import build_detector

MODELS = [
    ('retinanet/retinanet_r18', ()),
    ('faster_rcnn/faster-rcnn_r18', pytest.mark.slow),
    ('retinanet/retinanet_r50', pytest.mark.slow),
    ('faster_rcnn/faster-rcnn_r50', pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize('name', [pytest.param(n, marks=m) for n, m in MODELS])
@pytest.mark.parametrize('arm', ['asr-se', pytest.param('asr-eca', marks=pytest.mark.slow)])
def test_stock_config_loads_the_folded_checkpoint_strictly(name: str, arm: str, tool: object, tmp_path: Path) -> None:
    config = load_config(Path(f'det_configs/{name}-{arm}-c3-c5_fpn_1x_coco.py'))
    model = randomise(build_detector(config))
    checkpoint = tmp_path / 'epoch_12.pth'
    torch.save({'state_dict': model.state_dict(), 'meta': {'epoch': 12}}, checkpoint)
    report = fold_checkpoint(config, checkpoint, tmp_path / 'shipped/model.pth')
    assert report['feature_map_difference']['float64']['relative'] < 1e-10

    stock = Path(f'det_configs/{name}_fpn_1x_coco.py')  # the config of the user who never heard of a plug
    done = tool('test_stock', stock, tmp_path / 'shipped/model.pth')
    assert done.returncode == 0, done.stderr
    assert 'loaded strictly into mmdet.models.detectors' in done.stdout
