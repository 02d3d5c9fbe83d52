"""Data sets in YOLO's format: what is converted is what was there, and what is no such set is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, command
from PIL import Image

pytestmark = pytest.mark.det
pytest.importorskip('mmdet')

from helpers.tiny_detection import pictures

from asr_downstream.detection.config import load_config
from asr_downstream.detection.data.check import check_set
from asr_downstream.detection.data.convert.yolo import convert_yolo
from asr_downstream.errors import DataError

YAML = 'train: images/train\nval: images/val\nnames: [cat, dog]\n'


def made(root: Path, labels: str = '0 0.5 0.5 0.2 0.4\n', yaml: str = YAML, images: str = 'images') -> Path:
    """The smallest set: one picture of 40x20 a split."""
    for split in ('train', 'val'):
        for kind in (images, 'labels'):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 20)).save(root / images / split / 'a.png')
        (root / 'labels' / split / 'a.txt').write_text(labels)
    (root / 'data.yaml').write_text(yaml)
    return root


def content_of(root: Path, split: str = 'train') -> Any:
    return json.loads((root / 'annotations' / f'{split}.json').read_text())


@pytest.mark.parametrize('layout', ['images/train', 'train/images', '../train/images', 'list', 'path'])
def test_a_set_comes_back_as_it_was(tmp_path: Path, layout: str) -> None:
    """The digits, written in YOLO's format and converted, in the layouts that tools write."""
    digits, root = pictures(tmp_path), tmp_path / 'yolo'
    given = {}
    for split in ('train', 'val'):
        coco = json.loads((digits / 'annotations' / f'{split}.json').read_text())
        inside = split if layout != '../train/images' else f'{split}'
        folders = [
            f'{inside}/{kind}' if 'train/images' in layout else f'{kind}/{split}' for kind in ('images', 'labels')
        ]
        images, labels = (root / folder for folder in folders)
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        order = [each['id'] for each in coco['categories']]
        for image in coco['images']:
            name, width, height = Path(image['file_name']).name, image['width'], image['height']
            (images / name).write_bytes(source(digits, split, name))
            lines = []
            for entry in coco['annotations']:
                if entry['image_id'] == image['id']:
                    x, y, w, h = entry['bbox']
                    parts = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
                    lines.append(' '.join(map(str, (order.index(entry['category_id']), *parts))))
            if lines:
                (labels / name).with_suffix('.txt').write_text('\n'.join(lines))
        given[split] = {'../train/images': f'../{folders[0]}', 'list': f'{split}.txt'}.get(layout, folders[0])
        if layout == 'list':
            (root / f'{split}.txt').write_text('\n'.join(f'./{folders[0]}/{p.name}' for p in sorted(images.iterdir())))
    named = '\n'.join(f'  {number}: "{number}"' for number in range(10))
    path = 'path: .\n' if layout == 'path' else ''
    (root / 'data.yaml').write_text(f'{path}train: {given["train"]}\nval: {given["val"]}\nnc: 10\nnames:\n{named}\n')
    done = command('prepare_data', 'yolo', root)
    assert done.returncode == 0, done.stderr
    check_set(root)
    for split in ('train', 'val'):
        theirs, ours = json.loads((digits / 'annotations' / f'{split}.json').read_text()), content_of(root, split)
        assert boxes(ours) == pytest.approx(boxes(theirs), abs=1e-6)
        assert len(boxes(ours)) > 2
    config = load_config(ROOT / 'det_configs/digits/retinanet_r18-w16_fpn_digits.py', root)
    assert config.train_dataloader.dataset.ann_file.endswith('annotations/train.json')


def source(digits: Path, split: str, name: str) -> bytes:
    return next(path for path in sorted(digits.rglob(name)) if split in path.parts).read_bytes()


def boxes(coco: Any) -> dict[tuple[str, int], float]:
    """(Image, class name, number of the box, side) -> pixels."""
    images = {each['id']: Path(each['file_name']).name for each in coco['images']}
    names = {each['id']: each['name'] for each in coco['categories']}
    rows = sorted((images[e['image_id']], names[e['category_id']], *e['bbox']) for e in coco['annotations'])
    return {(f'{row[0]} {row[1]} {n}', side): row[2 + side] for n, row in enumerate(rows) for side in range(4)}


def test_polygons_keep_their_corners_and_doubles_are_one(tmp_path: Path) -> None:
    root = made(tmp_path, '1 0.25 0.5 0.5 0.5 0.5 1.0\n\n0 0.975 0.5 0.06 0.1\n0 0.975 0.5 0.06 0.1\n')
    convert_yolo(root / 'data.yaml')
    polygon, box = content_of(root)['annotations']
    assert polygon['bbox'] == [10, 10, 10, 10]
    assert polygon['segmentation'] == [[10, 10, 20, 10, 20, 20]]
    assert polygon['category_id'] == 2
    assert box['bbox'] == pytest.approx([37.8, 9, 2.2, 2]), 'cut off at the border'
    assert 'segmentation' not in box


def test_pictures_without_labels_have_no_objects(tmp_path: Path) -> None:
    root = made(tmp_path)
    (root / 'labels/val/a.txt').unlink()
    assert convert_yolo(root)[1].endswith('1 images, 0 boxes, 2 classes')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(labels='2 0.5 0.5 0.1 0.1'), 'a.txt, line 1: class 2, but data.yaml has names of 0 to 1'),
        (dict(labels='0.5 0.5 0.5 0.1 0.1'), 'class 0.5'),
        (dict(labels='0 12 10 4 4'), 'they should be parts of the image, not pixels'),
        (dict(labels='0 nan 0.5 0.1 0.1'), 'numbers outside of 0 to 1'),
        (dict(labels='0 0.5 0.5 0.1'), 'has 3 numbers after the class'),
        (dict(labels='cat 0.5 0.5 0.1 0.1'), 'is no label'),
        (dict(yaml='train: images/train\nval: images/val\nnames: {1: cat}\n'), 'from 0 without gaps'),
        (dict(yaml='train: images/train\nval: images/val\nnames: [a, a]\n'), 'two classes have one name'),
        (dict(yaml='train: images/train\nnames: [a]\n'), 'val should be a folder of images'),
        (dict(yaml=YAML.replace('images/val', 'images/test')), 'no such folder or list'),
        (dict(yaml='!!python/object/apply:os.getcwd []'), 'data.yaml: cannot be read'),
        (dict(yaml='- 1'), 'should have train, val and names'),
    ],
)
def test_what_is_no_such_set_is_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert_yolo(made(tmp_path, **change))
    assert not (tmp_path / 'annotations').exists()


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    convert_yolo(made(tmp_path))
    with pytest.raises(DataError, match='is there already; --overwrite replaces it'):
        convert_yolo(tmp_path)
    assert len(convert_yolo(tmp_path, overwrite=True)) == 2


def test_a_folder_without_the_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='has no data.yaml; expected'):
        convert_yolo(tmp_path)
