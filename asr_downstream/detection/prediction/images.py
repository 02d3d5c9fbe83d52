"""Images that stand in no data set: files, folders, and what is annotated in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from asr_downstream.console.text import some
from asr_downstream.detection.data.coco import read_annotations
from asr_downstream.detection.evaluation.evaluate import Detections
from asr_downstream.errors import DataError
from asr_downstream.files.folders import files_below, is_image

__all__ = ['Truth', 'find_images']


def find_images(given: Sequence[Path], without: Path) -> dict[str, Path]:
    """Find images: files as they are, folders with all below them.

    Args:
        given: files and folders.
        without: folder that is not looked into, as what is written goes there.

    Returns:
        Name -> file. A name is the path below the folder that was given, or the name of a file.

    Raises:
        DataError: one of them is missing or has no images, or two images have one name.
    """
    found: dict[str, Path] = {}
    for path in given:
        if path.is_file():
            files = {path.name: path}
        elif path.is_dir():
            below = sorted(name for name in files_below(path) if is_image(name))
            files = {
                name: path / name for name in below if not (path / name).resolve().is_relative_to(without.resolve())
            }
            if not files:
                raise DataError(f'{path}: has no images; check the path')
        else:
            raise DataError(f'{path}: no such image or folder')
        if same := [name for name in files if name in found]:
            raise DataError(f'{path}: has {some(same)}, as another that was given; give the folder that has both')
        found |= files
    return found


class Truth:
    """Annotated boxes of images, found by their names.

    Args:
        path: a COCO file.
        names: of the images.

    Raises:
        DataError: it is no COCO file, or has none of the images.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        content = read_annotations(path)
        self.categories = {category['name']: category['id'] for category in content['categories']}
        by_name = {image['file_name']: image['id'] for image in content['images']}
        last = {PurePosixPath(name).name: number for name, number in by_name.items()}
        unique = last if len(last) == len(by_name) else {}
        self.images = {
            name: by_name.get(name, unique.get(PurePosixPath(name).name))
            for name in names
            if name in by_name or PurePosixPath(name).name in unique
        }
        if not self.images:
            raise DataError(f'{path}: has none of the images; its file names are such as {some(list(by_name))}')
        self.boxes: dict[Any, list[Any]] = {}
        for entry in content['annotations']:
            self.boxes.setdefault(entry['image_id'], []).append(entry)

    def of(self, name: str, classes: Sequence[str]) -> Detections | None:
        """Boxes of an image as detections of score 1, of the classes that are known; None: it is not annotated."""
        if name not in self.images:
            return None
        labels = {self.categories[name]: label for label, name in enumerate(classes) if name in self.categories}
        entries = [e for e in self.boxes.get(self.images[name], ()) if e['category_id'] in labels]
        boxes = torch.tensor([e['bbox'] for e in entries], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, torch.ones(len(boxes)), torch.tensor([labels[e['category_id']] for e in entries])
