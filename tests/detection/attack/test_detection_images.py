"""Image files that cannot be read: one line with the name of the file, wherever images are read."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command, randomise
from helpers.detsets import HEIGHT, WIDTH, tiny_set
from PIL import Image

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.timeout(120)]

from mmengine.registry import TRANSFORMS

from asr_downstream.detection.config import load_config, stock_config
from asr_downstream.detection.data.coco import check_annotations
from asr_downstream.detection.evaluation.calibrate import calibration_batches
from asr_downstream.detection.evaluation.evaluate import evaluate
from asr_downstream.detection.models.detectors import build_detector
from asr_downstream.errors import DataError

DIGITS = ROOT / 'det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py'
OPTIONS = {f'{loader}_dataloader.num_workers': 0 for loader in ('train', 'val', 'test')} | {
    f'{loader}_dataloader.persistent_workers': False for loader in ('train', 'val', 'test')
}

MESSAGE = 'images/{}1.png: cannot be read as an image .*; replace it or take it out'


def huge(path: Path, side: int = 40_000) -> None:
    """A PNG of one colour, small as a file: its pixels would take gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = b''.join(packer.compress(bytes(side // 8 + 1) * 100) for _ in range(side // 100)) + packer.flush()
    header = struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b''))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    'empty': (lambda path: path.write_bytes(b''), 'is empty'),
    'huge': (huge, r'is too large \(40000x40000; OpenCV reads up to 1,073,741,824 pixels\)'),
    'text': (lambda path: path.write_text('no picture'), 'is no image'),
    'a header alone': (lambda path: path.write_bytes(path.read_bytes()[:20]), 'is no image|damaged header'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_what_cannot_be_read_is_found_before_a_training(case: str, tmp_path: Path) -> None:
    damage, message = BROKEN[case]
    root = tiny_set(tmp_path / 'set')
    damage(root / 'images/train2.png')
    with pytest.raises(DataError, match=rf'1 image is damaged \({root}/images/train2.png: cannot be .*: ({message})\)'):
        check_annotations(root / 'annotations/train.json', root / 'images')


def test_a_file_that_is_cut_off_is_said(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set', lambda c: c['images'][1].update(file_name='b.jpg'))
    Image.effect_noise((WIDTH, HEIGHT), 90).convert('RGB').save(tmp_path / 'b.jpg')
    (root / 'images/b.jpg').write_bytes((tmp_path / 'b.jpg').read_bytes()[:-600])
    with pytest.warns(UserWarning, match=r'1 image file is cut off \(b.jpg\)'):
        check_annotations(root / 'annotations/train.json', root / 'images')
    (root / 'images/b.jpg').write_bytes((tmp_path / 'b.jpg').read_bytes() + b'more')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_annotations(root / 'annotations/train.json', root / 'images')


@pytest.mark.parametrize(
    ('case', 'backend'), [('empty', 'cv2'), ('huge', 'cv2'), ('text', 'cv2'), ('empty', 'pillow'), ('text', 'pillow')]
)
def test_loading_names_the_file(case: str, backend: str, tmp_path: Path) -> None:
    """What was whole when the training began, or was not among those that were looked at."""
    path = tiny_set(tmp_path / 'set') / 'images/train1.png'
    BROKEN[case][0](path)
    load = TRANSFORMS.build(dict(type='asr_downstream.LoadImageFromFile', imdecode_backend=backend))
    with pytest.raises(DataError, match=MESSAGE.format('train')):
        load({'img_path': str(path)})


def test_testing_and_calibrating_name_the_file(tmp_path: Path) -> None:
    root = tiny_set(tmp_path / 'set', classes=tuple('0123456789'))
    for split in ('train', 'val'):
        (root / f'images/{split}1.png').write_bytes(b'')
    config = load_config(DIGITS, root, OPTIONS)
    with pytest.raises(DataError, match=MESSAGE.format('val')):
        evaluate(config, build_detector(config), 'detector')
    with pytest.raises(DataError, match=MESSAGE.format('train')):
        calibration_batches(config, 8)


@pytest.mark.slow
def test_the_tools_say_it_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asr_downstream.detection.data import coco

    monkeypatch.setattr(coco, 'examine_files', lambda *a: iter(()))  # as if it broke afterwards
    root = tiny_set(tmp_path / 'set', classes=tuple('0123456789'))
    torch.save({'state_dict': randomise(build_detector(load_config(DIGITS, root))).state_dict()}, tmp_path / 'a.pth')
    for split in ('train', 'val'):
        (root / f'images/{split}1.png').write_bytes(b'')
    for done in (
        command('train_det', DIGITS, '--data-root', root, '--work-dir', tmp_path / 'run'),
        command('test_det', DIGITS, tmp_path / 'a.pth', '--data-root', root, '--work-dir', tmp_path / 'run'),
        command('fold', DIGITS, tmp_path / 'a.pth', tmp_path / 'x.pth', '--calibrate', 4, '--data-root', root),
    ):
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith('error: ')
        assert '1.png: cannot be read as an image' in last


def test_what_is_shipped_loads_images_with_the_class_of_mmcv(tmp_path: Path) -> None:
    stock = stock_config(load_config(DIGITS, tiny_set(tmp_path / 'set', classes=tuple('0123456789'))))
    assert 'asr_downstream' not in stock.pretty_text
    assert stock.train_dataloader.dataset.pipeline[0].type == 'LoadImageFromFile'
