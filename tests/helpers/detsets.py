"""Tiny data sets of detection, whole ones to be broken by tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
CLASSES = ('cell', 'dust')
Content = dict[str, Any]


def coco(split: str, images: int = 3, boxes: int = 2, classes: Sequence[str] = CLASSES) -> Content:
    """A sound COCO file of cells and dust."""
    return {
        'images': [
            {'id': n, 'file_name': f'{split}{n}.png', 'width': WIDTH, 'height': HEIGHT} for n in range(1, images + 1)
        ],
        'annotations': [
            {
                'id': number + 1, 'image_id': number // boxes + 1, 'category_id': 1 + number % 2,
                'bbox': [4 + number % 6, 5, 20, 16], 'area': 320, 'iscrowd': 0,
                'segmentation': [[4, 5, 24, 5, 24, 21, 4, 21]],
            }
            for number in range(images * boxes)
        ],
        'categories': [{'id': number, 'name': name} for number, name in enumerate(classes, 1)],
    }  # fmt: skip


def tiny_set(
    root: Path, change: Callable[[Content], Any] | None = None, split: str = 'train', classes: Sequence[str] = CLASSES
) -> Path:
    """Write ``annotations/{train,val}.json`` and ``images/``; ``change`` alters the content of one split."""
    (root / 'annotations').mkdir(parents=True)
    (root / 'images').mkdir()
    draw = np.random.default_rng(0)
    for name in ('train', 'val'):
        content = coco(name, classes=classes)
        for image in content['images']:
            pixels = draw.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
            Image.fromarray(pixels).save(root / 'images' / image['file_name'])
        if name == split and change is not None:
            change(content)
        (root / 'annotations' / f'{name}.json').write_text(json.dumps(content))
    return root


VOC = (
    '<annotation><filename>{name}.jpg</filename><size><width>{width}</width><height>{height}</height></size>'
    '<object><name>{kind}</name><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>10</xmax><ymax>40</ymax></bndbox></object>'
    '</annotation>'
)


def flat_voc(root: Path, *names: str, images: str = '', annotations: str = '', year: str = '') -> Path:
    """Images with an annotation beside each, as labelling tools write them; with ``year`` a split of a VOCdevkit."""
    images, annotations = ('JPEGImages', 'Annotations') if year else (images, annotations)
    for folder in (images, annotations, *(['ImageSets/Main'] if year else [])):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new('RGB', (WIDTH, HEIGHT)).save(root / images / f'{name}.jpg')
        kind = 'person' if year or number % 2 else 'cat'
        text = VOC.format(name=name, width=WIDTH, height=HEIGHT, kind=kind)
        (root / annotations / f'{name}.xml').write_text(text)
    if year:
        (root / f'ImageSets/Main/{year}.txt').write_text('\n'.join(names))
    return root
