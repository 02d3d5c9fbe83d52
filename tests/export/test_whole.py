"""Whole detectors as one file, and the programs beside files, where nothing but three packages can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, command
from PIL import Image

pytestmark = pytest.mark.det
runtime = pytest.importorskip('onnxruntime', reason='needs the extra export')
pytest.importorskip('onnxscript', reason='needs the extra export')
pytest.importorskip('mmdet')

from helpers import exports
from helpers.tiny_detection import TINY, pictures
from mmengine.runner import Runner

from asr_downstream.commands.exporting.kinds import kind_of
from asr_downstream.commands.exporting.kinds.base import Request
from asr_downstream.commands.exporting.run import export
from asr_downstream.commands.exporting.whole import decode, files
from asr_downstream.commands.exporting.whole.graphs import pixels_graph
from asr_downstream.commands.exporting.whole.plan import NotWhole, plan_of
from asr_downstream.detection.config import load_config
from asr_downstream.detection.data.digits import make_digits
from asr_downstream.detection.evaluation.evaluate import detect
from asr_downstream.detection.models.detectors import build_detector, load_detector
from asr_downstream.errors import AsrError

# Runs a program where only what it may need can be imported.
ALONE = """
import runpy, sys
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'mmdet', 'mmcv', 'mmengine', 'diffusers', 'onnx', 'asr_downstream'):
            raise ImportError(f'{name} must not be needed')
sys.meta_path.insert(0, Closed())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
SMALLER = [
    {'type': 'LoadImageFromFile'},
    {'type': 'Resize', 'scale': (150, 100), 'keep_ratio': True},
    {'type': 'LoadAnnotations', 'with_bbox': True},
    {'type': 'PackDetInputs', 'meta_keys': ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')},
]


def alone(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, '-c', ALONE, *map(str, words)], capture_output=True, text=True, check=False, cwd='/'
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Data, what was shipped, and what was exported of it; its test images are resized."""
    folder = tmp_path_factory.mktemp('whole')
    data = pictures(folder)
    for number, path in enumerate(sorted((data / 'val').glob('*.png'))):  # no two of one size
        with Image.open(path) as image:
            image.resize((160 + 20 * number, 150)).save(path)
    options = {f'{loader}.dataset.pipeline': SMALLER for loader in ('val_dataloader', 'test_dataloader')}
    shipped = exports.detector(folder, data, **options)
    done = command('export', shipped, '--to', 'onnx', '--data', data, '--int8', '--out', folder / 'out')
    assert done.returncode == 0, done.stderr
    return data, shipped, folder / 'out'


def test_boxes_are_those_of_mmdetection(exported: tuple[Path, Path, Path]) -> None:
    data, shipped, out = exported
    found = json.loads((out / 'receipt.json').read_text())
    assert 'whole' not in found
    whole = found['exports']['detector.onnx']
    assert whole['boxes']['images'] == 2
    assert whole['boxes_px'] <= 0.01
    assert {'detector.onnx', 'detector.int8.onnx', 'model.int8.onnx', 'infer.py'} <= set(found['files'])
    assert found['exports']['model.int8.onnx']['bytes'] < found['exports']['model.onnx']['bytes'] * 1.5
    config = load_config(shipped.with_suffix('.py'), data)
    model, _ = load_detector(config, shipped)
    theirs = detect(config, model, 'torch')[1]
    session = runtime.InferenceSession(str(out / 'detector.onnx'))
    ours = detect(config, files.FileDetector(session), 'file')[1]
    assert any(len(boxes) for boxes, _, _ in theirs.values()), 'there is something to compare'
    for image, (boxes, _, _) in theirs.items():  # made with another resizing, so only about
        assert abs(len(boxes) - len(ours[image][0])) <= max(3, len(boxes) // 5)


def test_pixels_are_those_of_mmdetection_but_for_rounding(exported: tuple[Path, Path, Path]) -> None:
    data, shipped, _ = exported
    config = load_config(shipped.with_suffix('.py'), data)
    model: Any = build_detector(config)
    session = runtime.InferenceSession(pixels_graph(plan_of(config, model)).SerializeToString())
    for batch in Runner.build_dataloader({**config.test_dataloader, 'batch_size': 1}):
        given = model.data_preprocessor(batch, False)
        sample = given['data_samples'][0]
        pixels, size, scale = session.run(None, {'image': files.read_image(sample.img_path)})
        assert pixels.shape == tuple(given['inputs'].shape)
        assert tuple(size) == sample.img_shape
        assert np.allclose(scale, sample.scale_factor, rtol=1e-6)
        levels = np.abs(pixels - given['inputs'].numpy()) * 60  # the deviation that the config divides by
        assert levels.max() < 1.01
        assert levels.mean() < 0.2


@pytest.mark.slow
def test_moved_boxes_are_refused(
    exported: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, shipped, _ = exported
    right = decode.Candidates.forward

    def moved(self: Any, pixels: Any, size: Any, scale: Any) -> Any:
        boxes, *rest = right(self, pixels, size, scale)
        return boxes + 0.02, *rest

    monkeypatch.setattr(decode.Candidates, 'forward', moved)
    subject = kind_of(shipped).open(Request(shipped, data))
    with pytest.raises(AsrError, match=r'detector.onnx: its boxes differ from those of MMDetection by 0.0[12]'):
        export(subject, ['onnx'], tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_the_program_beside_it_needs_three_packages(exported: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data, _, out = exported
    images = sorted((data / 'val').glob('*.png'))
    text = alone(out / 'infer.py', *images, '--draw', tmp_path / 'found', '--score', '0.2')
    rows = [json.loads(line) for line in text.splitlines()]
    session = runtime.InferenceSession(str(out / 'detector.onnx'))
    assert len(rows) == len(images)
    assert any(row['found'] for row in rows)
    for row, path in zip(rows, images, strict=True):
        boxes, _, labels = session.run(None, {'image': files.read_image(path)})
        assert [each['class'] for each in row['found']] == [str(label) for label in labels]
        assert np.allclose([each['box'] for each in row['found']], boxes.tolist(), atol=0.01)
        with Image.open(tmp_path / 'found' / path.name) as picture, Image.open(path) as image:
            assert picture.size == image.size
            assert not row['found'] or picture.tobytes() != image.convert('RGB').tobytes()


def test_what_is_not_decoded_is_said() -> None:
    config = load_config(ROOT / 'det_configs/faster_rcnn/faster-rcnn_r18_fpn_1x_coco.py', needs_data=False)
    config.model.backbone.init_cfg = None
    with pytest.raises(NotWhole, match='decoding of FasterRCNN is not written as ONNX'):
        plan_of(config, build_detector(config))


@pytest.mark.slow
def test_ap_of_the_program_is_that_of_mmdetection(tmp_path: Path) -> None:
    """A trained RetinaNet; AP of what the program prints, counted without what wrote the file."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = tmp_path / 'digits'
    make_digits(data)
    keys = ('train_dataloader.num_workers', 'train_dataloader.persistent_workers')
    words = [f'{key}={TINY[key]}' for key in keys] + ['train_cfg.max_epochs=4', 'param_scheduler.1.T_max=4']
    config, run = 'det_configs/digits/retinanet_r18-w16_fpn_digits.py', tmp_path / 'run'
    done = command(
        'train_det', config, '--data-root', data, '--work-dir', run, '--cfg-options', *words,
        'default_hooks.checkpoint.interval=4', 'train_cfg.val_interval=4',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shipped, out = tmp_path / 'shipped.pth', tmp_path / 'out'
    assert command('fold', config, run / 'epoch_4.pth', shipped).returncode == 0
    done = command('export', shipped, '--data', data, '--int8', '--out', out)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / 'receipt.json').read_text())['exports']
    expected = found['MMDetection, whole']['metrics']['AP']
    assert expected > 0.1
    assert abs(found['detector.onnx']['metrics']['AP'] - expected) <= 0.001
    truth = COCO(data / 'annotations/val.json')
    paths = {str(data / 'val' / image['file_name']): key for key, image in truth.imgs.items()}
    numbers = {category['name']: key for key, category in truth.cats.items()}
    rows = map(json.loads, alone(out / 'infer.py', '--score', '0', *paths).splitlines())
    boxes = [
        {'image_id': paths[row['image']], 'category_id': numbers[each['class']], 'score': each['score'],
         'bbox': [each['box'][0], each['box'][1], each['box'][2] - each['box'][0], each['box'][3] - each['box'][1]]}
        for row in rows for each in row['found']
    ]  # fmt: skip
    scores = COCOeval(truth, truth.loadRes(boxes), 'bbox')
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    assert abs(scores.stats[0] - expected) <= 0.001


@pytest.mark.slow
def test_boxes_of_no_image_prove_nothing(tmp_path: Path) -> None:
    data = pictures(tmp_path)
    shipped = exports.detector(tmp_path, data, **{'model.test_cfg.score_thr': 1.0})
    subject = kind_of(shipped).open(Request(shipped, data, 2))
    receipt = export(subject, ['onnx'], tmp_path / 'out')
    assert 'nothing is found in the 2 images' in receipt.about['whole']
    assert not list((tmp_path / 'out').glob('detector*'))
    assert 'infer.py' not in receipt.files
