"""Every config of `det_configs`: parsed, built small, plugged, folded, loaded back; boxes and masks."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, randomise

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import nn

from asr_downstream import describe, fold
from asr_downstream.detection.config import load_config, stock_config
from asr_downstream.detection.models.detectors import build_detector, compare_features
from asr_downstream.errors import AsrError
from asr_downstream.far.model.describe import mixers

CONFIGS = sorted(p for p in (ROOT / 'det_configs').rglob('*.py') if '_base_' not in p.parts)
FAST = ('-asr-se', '_digits')  # of R18 only where there is no R50
ALIKE = ('cascade', 'rtmdet-ins', 'dino', 'atss')  # detectors whose parts others have, too
ARMS = ('', '-se', '-asr-se', '-dia', '-asr-dia')
DETECTORS = (
    'faster-rcnn_r50{}-c3-c5_fpn_1x_coco',
    'mask-rcnn_r50{}-c3-c5_fpn_1x_coco',
    'cascade-rcnn_r50{}-c3-c5_fpn_1x_coco',
    'cascade-mask-rcnn_r50{}-c3-c5_fpn_1x_coco',
    'retinanet_r50{}-c3-c5_fpn_1x_coco',
    'fcos_r50-caffe{}-c3-c5_fpn_gn-head_1x_coco',
    'atss_r50{}-c3-c5_fpn_1x_coco',
    'gfl_r50{}-c3-c5_fpn_1x_coco',
    'ssdlite_mobilenetv2-scratch{}_8xb24-600e_coco',
    'yolox_s{}_8xb8-300e_coco',
    'rtmdet_s{}_8xb32-300e_coco',
    'rtmdet-ins_s{}_8xb32-300e_coco',
    'detr_r50{}-c3-c5_8xb2-150e_coco',
    'deformable-detr_r50{}-c3-c5_16xb2-50e_coco',
    'dino-4scale_r50{}-c3-c5_8xb2-12e_coco',
)


RESOLVED = json.loads((ROOT / 'tests/repo/resolved_configs.json').read_text())  # file -> digests, see `resolved`


def params() -> list[Any]:
    def fast(path: Path) -> bool:
        return any(part in path.stem for part in FAST) and not any(part in path.stem for part in ('_r18-asr', *ALIKE))

    return [pytest.param(p, id=p.stem, marks=[] if fast(p) else pytest.mark.slow) for p in CONFIGS]


def shrunk(config: Config) -> Config:
    """The config at a width and depth that a test can afford."""
    model = config.model
    if model.backbone.type.endswith('ResNet'):
        factor = model.backbone.get('base_channels', 64) // 8
        model.backbone.base_channels = 8
        model.neck.in_channels = [c // factor for c in model.neck.in_channels]
    for part in ('encoder', 'decoder'):
        if part in model:
            model[part].num_layers = 2
    if 'num_queries' in model:
        model.num_queries = 20
    if 'roi_head' in model:
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, list) else [heads]:
            head.fc_out_channels = 32
    test = model.test_cfg.get('rcnn', model.test_cfg)
    test.score_thr = 0.0
    test.max_per_img = 5
    return config


def image_inputs(count: int = 1, side: int = 64) -> dict[str, Any]:
    """Arguments of ``detector.predict``: images ``(B, 3, H, W)`` and what is known of them."""
    shape = (side, side)
    meta = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), shape)
    samples = [DetDataSample(metainfo={**meta, 'scale_factor': (1.0, 1.0)}) for _ in range(count)]
    return {'batch_inputs': torch.randn(count, 3, *shape), 'batch_data_samples': samples}


@torch.no_grad()
def detections(model: Any, inputs: dict[str, Any]) -> Any:
    return [sample.pred_instances for sample in model.predict(**copy.deepcopy(inputs), rescale=False)]


def resolved(config: Config) -> str:
    """Hash of all that a config says, bases included, but for the top-level ``plug`` of ``_base_/plugs``.

    It is that of JSON with sorted keys, in which tuples are told from lists. No path of a machine is in it.
    """

    def told_apart(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: told_apart(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return {'tuple': [told_apart(item) for item in value]}
        return [told_apart(item) for item in value] if isinstance(value, list) else value

    content = {key: value for key, value in config.to_dict().items() if key != 'plug'}
    return hashlib.sha256(json.dumps(told_apart(content), sort_keys=True).encode()).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(
    version('onedl-mmdetection') != RESOLVED['onedl-mmdetection'], reason='the bases are those of another MMDetection'
)
def test_configs_say_what_they_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As plain MMEngine reads them, and as `load_config` does; one that is meant to change gets new digests here."""
    monkeypatch.delenv('ASR_DATA_ROOT', raising=False)
    found = {}
    for path in CONFIGS:
        loaded = load_config(path)
        assert 'plug' not in loaded
        plain = Config.fromfile(path)
        assert 'plug' not in stock_config(plain)
        found[path.relative_to(ROOT / 'det_configs').as_posix()] = [resolved(plain), resolved(loaded)]
    assert found == RESOLVED['configs']


@pytest.mark.parametrize('path', params())
def test_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('ASR_DATA_ROOT', raising=False)
    text = path.read_text()
    assert text.startswith(f'# python tools/train_det.py {path.relative_to(ROOT).as_posix()}'), 'opens with its command'
    config = shrunk(load_config(path))
    plain = stock_config(config)
    assert 'asr_downstream' not in plain.pretty_text
    stock = build_detector(plain).double()
    if 'replace' in config.model.backbone:  # see test_far_detection.py
        assert not list(mixers(stock))
        assert list(mixers(build_detector(config)))
        return
    plug = config.model.get('plug') or config.model.backbone.get('plug')
    if plug is None:
        assert plain.model == config.model
        assert not describe(stock).sites
        return
    if plug.type == 'Start':
        model = build_detector(config)
        assert len(describe(model).starts) >= 5
        stock.load_state_dict(model.state_dict(), strict=True)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*sites lie in frozen blocks')
        model = build_detector(config)
    randomise(model.backbone)  # what is random in a head as well saturates its scores
    if hasattr(model, 'level_embed'):
        nn.init.normal_(model.level_embed)  # is empty memory until init_weights()
    model.double()
    rows = describe(model).sites
    assert len(rows) >= 5
    constant = plug.type == 'ASR' or plug.attention.type == 'LayerScale'
    assert all(row.folds == constant for row in rows)
    if not constant:
        assert all(f.isfinite().all() for f in model.extract_feat(image_inputs()['batch_inputs'].double()))
        with pytest.raises(AsrError, match='depend on the input'):
            fold(model)
        return
    folded, _ = fold(model)
    assert type(folded) is type(stock)
    stock.load_state_dict(folded.state_dict(), strict=True)
    assert compare_features(model, stock).relative < 1e-10
    unfolded = build_detector(plain).double()
    own = ('.gate.', 'shared_attention')
    unfolded.load_state_dict({k: v for k, v in model.state_dict().items() if not any(part in k for part in own)})
    assert compare_features(model, unfolded).relative > 1e-3
    same_detections(model.float(), stock.float(), masks='mask' in path.stem or '-ins' in path.stem)


def same_detections(model: nn.Module, stock: nn.Module, masks: bool) -> None:
    inputs = image_inputs()
    for a, b in zip(detections(model, inputs), detections(stock, inputs), strict=True):
        assert len(a) > 0
        assert torch.equal(a.labels, b.labels)
        torch.testing.assert_close(a.bboxes, b.bboxes, atol=1e-2, rtol=0)  # pixels
        torch.testing.assert_close(a.scores, b.scores, atol=1e-3, rtol=0)
        assert ('masks' in a) == masks
        if masks:
            assert a.masks.shape == (len(a), 64, 64)
            assert (a.masks != b.masks).float().mean() < 1e-3  # a logit of 0 may fall on either side


def test_every_detector_has_every_arm() -> None:
    names = {p.stem for p in CONFIGS}
    for detector in DETECTORS:
        for arm in ARMS:
            name = detector.format(arm) if arm else detector.replace('-c3-c5', '').format('')
            assert name in names, name
    for kind in ('faster-rcnn', 'retinanet'):
        for arm in ('', '-se-c3-c5', '-asr-se-c3-c5', '-asr-eca-c3-c5'):
            assert f'{kind}_r18{arm}_fpn_1x_coco' in names
