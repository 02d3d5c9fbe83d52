"""YOLO's format, converted to the COCO format: ``annotations/{train,val}.json`` beside the images.

A ``data.yaml`` names the classes and where images are; beside each folder ``images`` lies ``labels`` with a text a
picture, a line an object: class, then centre, width and height, or the corners of a polygon, as parts of the image.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from asr_downstream.console.progress import bar
from asr_downstream.detection.data.convert.coco_file import check_target, is_within, write_splits
from asr_downstream.detection.data.headers import read_header
from asr_downstream.errors import DataError
from asr_downstream.files.folders import IMAGES, files_below, is_image

__all__ = ['convert_yolo']

FILES = ('data.yaml', 'data.yml', 'dataset.yaml')
TREE = 'ROOT/ { data.yaml  images/{train,val}/*.jpg  labels/{train,val}/*.txt }'


def convert_yolo(root: Path, overwrite: bool = False) -> list[str]:
    """Convert the sets ``train`` and ``val`` of a folder with a ``data.yaml``, or of that file.

    Pictures without a text of labels have no objects. A polygon is kept as the mask, its bounds are the box. What
    reaches over the border by rounding is cut off there.

    Args:
        root: folder, or its ``data.yaml``; ``annotations/`` is written beside that.
        overwrite: replace ``annotations/{train,val}.json``.

    Returns:
        One line a split.

    Raises:
        DataError: something is missing or is no such label, or the files are there already.
    """
    file = root if root.suffix in ('.yaml', '.yml') else next((root / n for n in FILES if (root / n).is_file()), None)
    if file is None or not file.is_file():
        raise DataError(f'{root}: has no data.yaml; expected {TREE}')
    root = file.parent
    check_target(root, overwrite)
    content = read_yaml(file)
    names = names_of(content, file)
    found, sources = {}, {}
    for split in ('train', 'val'):
        given = content.get(split)
        given = [given] if isinstance(given, str) else given
        if not given or not all(isinstance(each, str) for each in given):
            raise DataError(f'{file}: {split} should be a folder of images, or a list of them; expected {TREE}')
        paths = [path for each in given for path in images_of(each, content, file)]
        found[split] = [read(path, names, root) for path in bar(paths, f'{split}: {len(paths)} images')]
        sources[split] = ', '.join(given)
    return write_splits(root, found, names, sources)


def read_yaml(file: Path) -> dict[str, Any]:
    """Content of ``data.yaml``, which is data.

    Raises:
        DataError: it is no table.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f'{file}: cannot be read ({str(error).splitlines()[0]})') from error
    if not isinstance(content, dict):
        raise DataError(f'{file}: should have train, val and names')
    return content


def names_of(content: dict[str, Any], file: Path) -> list[str]:
    """Names of the classes by number.

    Raises:
        DataError: there are none, or numbers or names are missing or twice.
    """
    given = content.get('names')
    names = dict(enumerate(given)) if isinstance(given, list) else given
    if not isinstance(names, dict) or not names or {*names} != {*range(len(names))}:
        raise DataError(f'{file}: names should be a list, or names by number, from 0 without gaps')
    texts = [str(names[number]) for number in range(len(names))]
    if len({*texts}) < len(texts):
        raise DataError(f'{file}: two classes have one name')
    return texts


def images_of(given: str, content: dict[str, Any], file: Path) -> list[Path]:
    """Images of a folder, or of a text that lists them, sorted.

    Raises:
        DataError: there are none.
    """
    bases = [file.parent]
    if isinstance(content.get('path'), str):
        bases.insert(0, file.parent / content['path'])
    # Some tools write ../train/images for a folder that lies beside the file.
    tried = [base / text for text in (given, given.removeprefix('../')) for base in bases]
    place = next((path for path in tried if path.exists()), None)
    if place is None:
        raise DataError(f'{file}: {given}: no such folder or list; looked at {", ".join(map(str, tried))}')
    if place.is_dir():
        paths = [place / name for name in sorted(files_below(place)) if is_image(name)]
    else:
        try:
            lines = place.read_text(encoding='utf-8').split('\n')
        except (OSError, ValueError) as error:
            raise DataError(f'{place}: is no list of images ({error})') from error
        paths = [place.parent / line.strip() for line in lines if line.strip()]
    if not paths:
        raise DataError(f'{place}: has no images ({", ".join(sorted(IMAGES))})')
    return paths


def labels_of(image: Path) -> Path:
    """Text of an image: in ``labels`` in the place of the last ``images`` of its path, or else beside it."""
    parts = [*image.parts]
    if 'images' in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index('images')] = 'labels'
    return Path(*parts).with_suffix('.txt')


def read(image: Path, names: list[str], root: Path) -> dict[str, Any]:
    """Read an image's size and its objects.

    Raises:
        DataError: the image cannot be read, or a line is no label.
    """
    if not image.is_file() or not is_within(image, root):
        raise DataError(f'{image}: no such image in {root}')
    header = read_header(image)
    if header.problem or header.size is None:
        raise DataError(
            f'{image}: cannot be read as an image ({header.problem or "its size is not known"}); take it out'
        )
    text = labels_of(image)
    try:
        lines = text.read_text(encoding='utf-8').splitlines() if text.is_file() else []
    except ValueError as error:
        raise DataError(f'{text}: is no text ({error})') from error
    width, height = header.size
    objects = [
        object_of(line.split(), names, (width, height), f'{text}, line {number}')
        for number, line in enumerate(dict.fromkeys(lines), 1)  # a label that is there twice is one
        if line.strip()
    ]
    return {'file_name': image.relative_to(root).as_posix(), 'width': width, 'height': height, 'objects': objects}


def object_of(words: list[str], names: list[str], size: tuple[int, int], where: str) -> dict[str, Any]:
    """One line of labels.

    Raises:
        DataError: it is none.
    """
    try:
        number, values = float(words[0]), [float(word) for word in words[1:]]
    except ValueError as error:
        raise DataError(f'{where}: is no label ({error})') from error
    if not number.is_integer() or not 0 <= number < len(names):
        raise DataError(f'{where}: class {words[0]}, but data.yaml has names of 0 to {len(names) - 1}')
    polygon = len(values) >= 6 and not len(values) % 2
    if len(values) != 4 and not polygon:
        raise DataError(f'{where}: has {len(values)} numbers after the class; expected 4, or the corners of a polygon')
    if not all(math.isfinite(value) and -0.01 <= value <= 1.01 for value in values):
        raise DataError(f'{where}: has numbers outside of 0 to 1; they should be parts of the image, not pixels')
    if polygon:
        xs, ys = values[0::2], values[1::2]
    else:
        x, y, wide, high = values
        xs, ys = [x - wide / 2, x + wide / 2], [y - high / 2, y + high / 2]
    xs, ys = ([min(max(value, 0.0), 1.0) * side for value in part] for part, side in zip((xs, ys), size, strict=True))
    found: dict[str, Any] = {
        'name': names[int(number)],
        'bbox': [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
    }
    if polygon:
        found['segmentation'] = [[value for corner in zip(xs, ys, strict=True) for value in corner]]
    return found
