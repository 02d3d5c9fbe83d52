"""PASCAL VOC, converted to the COCO format: ``annotations/{train,val}.json`` beside the years."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from asr_downstream.errors import DataError
from asr_downstream.files import write_json
from asr_downstream.progress import bar
from asr_downstream.sites import some

__all__ = ['CLASSES', 'convert_voc']

CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip
TREE = 'ROOT/ { VOC2007/ { Annotations/*.xml  JPEGImages/*.jpg  ImageSets/Main/{train,val,trainval,test}.txt }  ... }'


def convert_voc(root: Path, overwrite: bool = False) -> list[str]:
    """Convert every year in ``root`` (a VOCdevkit), or ``root`` itself if it is a year.

    With a test set in one of the years, training is on trainval of all years and validation on test, as the literature
    does with 2007 and 2012; without, on train and val. Boxes are pixels that start at 1, both ends included; objects
    marked difficult are to be ignored (``iscrowd``).

    Args:
        root: VOCdevkit or one of its years.
        overwrite: replace ``annotations/{train,val}.json``.

    Returns:
        One line a split.

    Raises:
        DataError: something is missing or is no such annotation, or the files are there already.
    """
    there = [p for p in (root / 'annotations' / f'{split}.json' for split in ('train', 'val')) if p.exists()]
    if there and not overwrite:
        raise DataError(f'{some([str(p) for p in there])}: is there already; --overwrite replaces it')
    years = [p.parent.parent for p in sorted({*root.glob('*/ImageSets/Main'), *root.glob('ImageSets/Main')})]
    if not years:
        raise DataError(f'{root}: has no ImageSets/Main; expected {TREE}')
    tested = any(names_of(year, 'test') for year in years)
    sets = {'train': 'trainval' if tested else 'train', 'val': 'test' if tested else 'val'}
    found: dict[str, list[dict[str, Any]]] = {}
    for split, name in sets.items():
        chosen = [(year, image) for year in years for image in names_of(year, name)]
        if not chosen:
            raise DataError(f'{root}: no year has ImageSets/Main/{name}.txt with images in it; expected {TREE}')
        found[split] = [read(year, image, root) for year, image in bar(chosen, f'{split}: {len(chosen)} images')]
    names = {o['name'] for images in found.values() for image in images for o in image['objects']}
    classes = [c for c in CLASSES if c in names] if names <= set(CLASSES) else sorted(names)
    lines = []
    for split, images in found.items():
        content = coco_of(images, classes)
        write_json(root / 'annotations' / f'{split}.json', content)
        boxes = len(content['annotations'])
        lines.append(f'{split} ({sets[split]}): {len(images)} images, {boxes} boxes, {len(classes)} classes')
    return lines


def names_of(year: Path, split: str) -> list[str]:
    """Images of a split; none where there is no such list, or its annotations are not public (test of 2012)."""
    path = year / 'ImageSets' / 'Main' / f'{split}.txt'
    names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
    return names if split != 'test' or any((year / 'Annotations' / f'{name}.xml').is_file() for name in names) else []


def read(year: Path, name: str, root: Path) -> dict[str, Any]:
    """Read one annotation.

    Raises:
        DataError: it or its image is missing, or it cannot be read.
    """
    path = year / 'Annotations' / f'{name}.xml'
    if not path.is_file():
        raise DataError(f'{path}: no such annotation, but ImageSets/Main names it')
    try:
        tree = ElementTree.parse(path).getroot()
        size = {side: int(tree.findtext(f'size/{side}', '')) for side in ('width', 'height')}
        objects = [
            {
                'name': entry.findtext('name', ''),
                'difficult': int(entry.findtext('difficult') or 0),
                'box': [float(entry.findtext(f'bndbox/{k}', '')) for k in ('xmin', 'ymin', 'xmax', 'ymax')],
            }
            for entry in tree.iter('object')
        ]
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f'{path}: is not a VOC annotation ({error})') from error
    image = year / 'JPEGImages' / f'{name}.jpg'
    if not image.is_file():
        image = year / 'JPEGImages' / (tree.findtext('filename') or '')
    if not image.is_file():
        raise DataError(f'{year / "JPEGImages" / name}.jpg: no such image, but there is an annotation of it')
    return {'file_name': image.relative_to(root).as_posix(), **size, 'objects': objects}


def coco_of(images: list[dict[str, Any]], classes: list[str]) -> dict[str, Any]:
    """The content of a COCO file."""
    content: dict[str, list[dict[str, Any]]] = {
        'images': [],
        'annotations': [],
        'categories': [{'id': number, 'name': name} for number, name in enumerate(classes, 1)],
    }
    for number, image in enumerate(images, 1):
        content['images'].append({'id': number, **{k: image[k] for k in ('file_name', 'width', 'height')}})
        for entry in image['objects']:
            x1, y1, x2, y2 = entry['box']
            width, height = x2 - x1 + 1, y2 - y1 + 1
            content['annotations'].append(
                {
                    'id': len(content['annotations']) + 1,
                    'image_id': number,
                    'category_id': classes.index(entry['name']) + 1,
                    'bbox': [x1 - 1, y1 - 1, width, height],
                    'area': width * height,
                    'iscrowd': entry['difficult'],
                }
            )
    return content
