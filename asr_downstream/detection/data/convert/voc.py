"""PASCAL VOC, converted to the COCO format: ``annotations/{train,val}.json`` beside the years."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from asr_downstream.console.progress import bar
from asr_downstream.detection.data.convert.coco_file import check_target, is_within, write_splits
from asr_downstream.detection.data.headers import read_header
from asr_downstream.errors import DataError

__all__ = ['CLASSES', 'convert_voc']

CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip
LARGEST = 1e7  # px
TREE = 'ROOT/ { VOC2007/ { Annotations/*.xml  JPEGImages/*.jpg  ImageSets/Main/{train,val,trainval,test}.txt }  ... }'


@dataclass(frozen=True)
class Folders:
    """Where images and annotations lie, and where the names of their images start from."""

    annotations: Path
    images: Path


def convert_voc(root: Path, overwrite: bool = False, split: float | None = None, seed: int = 0) -> list[str]:
    """Convert every year in ``root`` (a VOCdevkit), ``root`` itself if it is a year, or a flat folder.

    With a test set in one of the years, training is on trainval of all years and validation on test, as the literature
    does with 2007 and 2012; without, on train and val. Boxes are pixels that start at 1, both ends included; objects
    marked difficult are to be ignored (``iscrowd``).

    Args:
        root: VOCdevkit, one of its years, or a folder of images and annotations without ImageSets.
        overwrite: replace ``annotations/{train,val}.json``.
        split: of a folder without ImageSets: part of the images, drawn at random, that is for training.
        seed: of that draw.

    Returns:
        One line a split.

    Raises:
        DataError: something is missing or is no such annotation, or the files are there already.
    """
    check_target(root, overwrite)
    years = [p.parent.parent for p in sorted({*root.glob('*/ImageSets/Main'), *root.glob('ImageSets/Main')})]
    if years and split is not None:
        raise DataError(f'{root}: has ImageSets/Main, which say what is for training; leave out --split')
    sets = chosen_by_lists(root, years) if years else chosen_at_random(root, split, seed)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (_, chosen) in sets.items():
        shown = bar(chosen, f'{name}: {len(chosen)} images')
        found[name] = [read(folders, image, root) for folders, image in shown]
    names = {o['name'] for images in found.values() for image in images for o in image['objects']}
    classes = [c for c in CLASSES if c in names] if names <= set(CLASSES) else sorted(names)
    return write_splits(root, found, classes, {name: source for name, (source, _) in sets.items()})


def chosen_by_lists(root: Path, years: list[Path]) -> dict[str, tuple[str, list[tuple[Folders, str]]]]:
    """Images of both splits as ImageSets/Main of the years list them, under the name of the list."""
    tested = any(names_of(year, 'test') for year in years)
    sets = {}
    for split, name in {'train': 'trainval' if tested else 'train', 'val': 'test' if tested else 'val'}.items():
        chosen = [
            (Folders(year / 'Annotations', year / 'JPEGImages'), image)
            for year in years
            for image in names_of(year, name)
        ]
        if not chosen:
            raise DataError(f'{root}: no year has ImageSets/Main/{name}.txt with images in it; expected {TREE}')
        sets[split] = name, chosen
    return sets


def chosen_at_random(root: Path, split: float | None, seed: int) -> dict[str, tuple[str, list[tuple[Folders, str]]]]:
    """Images of both splits of a folder without ImageSets, drawn at random; the same seed draws the same.

    Raises:
        DataError: there are no annotations, or it is not said how to split them.
    """
    places = [root, *(root / name for name in ('Annotations', 'annotations', 'labels', 'xml'))]
    folder = next((place for place in places if any(place.glob('*.xml'))), None)
    if folder is None:
        raise DataError(f'{root}: has no ImageSets/Main; expected {TREE}, or images and *.xml in one folder')
    names = sorted(path.stem for path in folder.glob('*.xml'))
    if split is None:
        raise DataError(
            f'{root}: has no ImageSets/Main, but {len(names)} annotations in {folder}; --split 0.8 trains on 80 % '
            f'of them, drawn at random'
        )
    images = next((root / n for n in ('JPEGImages', 'images', 'Images') if (root / n).is_dir()), folder)
    random.Random(seed).shuffle(names)
    count = min(max(round(split * len(names)), 1), len(names) - 1)
    if not count:
        raise DataError(f'{root}: has {len(names)} annotations, too few to split')
    names = sorted(names[:count]) + sorted(names[count:])
    chosen = [(Folders(folder, images), name) for name in names]
    how = f'{split:g} at random'
    return {'train': (how, chosen[:count]), 'val': (how, chosen[count:])}


def names_of(year: Path, split: str) -> list[str]:
    """Images of a split; none where there is no such list, or its annotations are not public (test of 2012).

    Raises:
        DataError: the list is no text.
    """
    path = year / 'ImageSets' / 'Main' / f'{split}.txt'
    try:
        names = [line.split()[0] for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
    except ValueError as error:
        raise DataError(f'{path}: is no list of images ({error})') from error
    return names if split != 'test' or any((year / 'Annotations' / f'{name}.xml').is_file() for name in names) else []


def read(folders: Folders, name: str, root: Path) -> dict[str, Any]:
    """Read one annotation.

    Raises:
        DataError: it or its image is missing, or it cannot be read.
    """
    path = folders.annotations / f'{name}.xml'
    if not path.is_file():
        raise DataError(f'{path}: no such annotation, but ImageSets/Main names it')
    try:
        tree = ElementTree.parse(path).getroot()
        width, height = (int(float(tree.findtext(f'size/{side}') or 0)) for side in ('width', 'height'))
        objects: list[dict[str, Any]] = [
            {
                'name': (entry.findtext('name') or '').strip(),
                'crowd': int(entry.findtext('difficult') or 0),
                'box': [float(entry.findtext(f'bndbox/{k}', '')) for k in ('xmin', 'ymin', 'xmax', 'ymax')],
            }
            for entry in tree.iter('object')
        ]
    except (ElementTree.ParseError, ValueError, OverflowError, LookupError) as error:
        raise DataError(f'{path}: is not a VOC annotation ({error})') from error
    if not all(entry['name'] for entry in objects):
        raise DataError(f'{path}: has an object without a name')
    if not all(abs(side) < LARGEST for entry in objects for side in entry['box']):
        raise DataError(f'{path}: has a box that is not finite, or larger than any image')
    for entry in objects:  # pixels that start at 1, both ends included
        x1, y1, x2, y2 = entry.pop('box')
        entry['bbox'] = [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]
    image = image_of(folders, name, tree.findtext('filename') or '')
    if not image.is_file() or not is_within(image, root):
        raise DataError(f'{folders.images / name}.jpg: no such image, but there is an annotation of it')
    header = read_header(image)
    if header.problem:
        raise DataError(f'{image}: cannot be read as an image ({header.problem}); take it out, with {path.name}')
    size = header.size or (width, height)
    if 0 not in (width, height) and size != (width, height):  # some labelling tools write no size
        raise DataError(
            f'{path}: says that the image has {width}x{height} pixels, but {image.name} has {size[0]}x{size[1]}: its '
            f'boxes are of another image'
        )
    name = image.relative_to(root).as_posix()
    return {'file_name': name, 'width': size[0], 'height': size[1], 'objects': objects}


def image_of(folders: Folders, name: str, given: str) -> Path:
    """Image of an annotation: of the same name, or else as the annotation calls it."""
    if '\0' in given:
        return folders.images / f'{name}.jpg'
    same = [folders.images / f'{name}{suffix}' for suffix in ('.jpg', '.jpeg', '.png', '.JPG', '.JPEG', '.PNG', '.bmp')]
    return next((path for path in (*same, folders.images / given) if path.is_file()), same[0])
