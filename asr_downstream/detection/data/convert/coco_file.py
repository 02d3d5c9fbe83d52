"""The COCO file that a conversion writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asr_downstream.console.text import some
from asr_downstream.errors import DataError
from asr_downstream.files.atomic import check_could_write, write_together

__all__ = ['check_target', 'coco_of', 'is_within', 'write_splits']


def check_target(root: Path, overwrite: bool) -> None:
    """Refuse to replace ``annotations/{train,val}.json``, unless told to; before the work.

    Raises:
        DataError: they are there.
    """
    there = [p for p in (root / 'annotations' / f'{name}.json' for name in ('train', 'val')) if p.exists()]
    if there and not overwrite:
        raise DataError(f'{some([str(p) for p in there])}: is there already; --overwrite replaces it')
    check_could_write(root / 'annotations')


def write_splits(
    root: Path, found: Mapping[str, list[dict[str, Any]]], classes: Sequence[str], sources: Mapping[str, str]
) -> list[str]:
    """Write ``annotations/{split}.json``, all or none.

    Args:
        root: of the data set.
        found: split -> images, see `coco_of`.
        classes: names, in the order of their numbers.
        sources: split -> where it is from, for people.

    Returns:
        One line a split.
    """
    lines, contents = [], {}
    for name, images in found.items():
        content = contents[root / 'annotations' / f'{name}.json'] = coco_of(images, classes)
        boxes = len(content['annotations'])
        lines.append(f'{name} ({sources[name]}): {len(images)} images, {boxes} boxes, {len(classes)} classes')
    write_together({path: writer(content) for path, content in contents.items()})
    return lines


def writer(content: Any) -> Callable[[Path], Any]:
    """What writes ``content`` as JSON to a path."""
    return lambda path: path.write_text(json.dumps(content))


def is_within(path: Path, root: Path) -> bool:
    """Whether ``path`` starts from ``root`` without going up: it becomes a name in a file."""
    return path.is_relative_to(root) and '..' not in path.relative_to(root).parts


def coco_of(images: list[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """The content of a COCO file.

    Args:
        images: ``file_name``, ``width``, ``height`` and ``objects``, each of which has ``name``, ``bbox`` (left, top,
            width, height in pixels) and, if it is to be ignored, ``crowd``; and may have ``segmentation``.
        classes: names, in the order of their numbers.
    """
    numbers = {name: number for number, name in enumerate(classes, 1)}
    content: dict[str, list[dict[str, Any]]] = {
        'images': [],
        'annotations': [],
        'categories': [{'id': number, 'name': name} for name, number in numbers.items()],
    }
    for number, image in enumerate(images, 1):
        content['images'].append({'id': number, **{k: image[k] for k in ('file_name', 'width', 'height')}})
        for entry in image['objects']:
            content['annotations'].append(
                {
                    'id': len(content['annotations']) + 1,
                    'image_id': number,
                    'category_id': numbers[entry['name']],
                    'bbox': entry['bbox'],
                    'area': entry['bbox'][2] * entry['bbox'][3],
                    'iscrowd': entry.get('crowd', 0),
                    **({'segmentation': entry['segmentation']} if 'segmentation' in entry else {}),
                }
            )
    return content
