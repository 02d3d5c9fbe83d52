"""What a detector finds in images, written: COCO's JSON and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from pycocotools import mask as masks_of_coco
from rich.table import Table
from torch import nn

from asr_downstream.console.progress import bar
from asr_downstream.console.text import Printed, some
from asr_downstream.detection.evaluation.evaluate import Detections
from asr_downstream.detection.evaluation.pictures import draw_detections
from asr_downstream.detection.prediction.images import Truth
from asr_downstream.detection.prediction.predict import Found, class_names, predict
from asr_downstream.errors import DataError
from asr_downstream.files.atomic import write_json
from asr_downstream.measure.versions import versions

__all__ = ['Predictions', 'predict_images']

PICTURES = 'pictures'
FILE = 'predictions.json'


@dataclass(repr=False)
class Predictions(Printed):
    """What was found in all images.

    Attributes:
        out: the JSON file.
        images: number of images.
        counts: class -> detections of at least ``threshold``.
        threshold: of the counts and the pictures.
        pictures: number of pictures that were written.
        left_out: images that could not be read, with the reason.
    """

    out: Path
    images: int
    counts: dict[str, int]
    threshold: float
    pictures: int = 0
    left_out: list[str] = field(default_factory=list)

    def parts(self) -> list[Table | str]:
        table = Table('class', 'detections', title=f'{self.images:,} images, scores of at least {self.threshold:g}')
        table.columns[1].justify = 'right'
        for name, number in self.counts.items():
            table.add_row(name, f'{number:,}')
        pictures = f', {self.pictures:,} pictures in {self.out.parent / PICTURES}' if self.pictures else ''
        return [table, f'{self.out}: all detections{pictures}', *(f'left out: {line}' for line in self.left_out)]


def predict_images(
    config: Config,
    model: nn.Module,
    images: Mapping[str, Path],
    out: Path,
    truth: Truth | None = None,
    threshold: float = 0.3,
    batch_size: int = 1,
    pictures: bool = True,
    about: Mapping[str, Any] | None = None,
) -> Predictions:
    """Write what a detector finds in images: ``predictions.json``, and a picture of each.

    The JSON is a COCO file whose annotations have scores; ids of images and categories are those of ``truth``, where it
    has them, so that its annotations are results for pycocotools.

    Args:
        config: of the detector.
        model: the detector.
        images: name -> file.
        out: folder to write into.
        truth: annotated boxes, drawn beside what is found.
        threshold: smallest score that is drawn and counted; the JSON has all that the detector gives.
        batch_size: images in a forward.
        pictures: whether to draw.
        about: more to write into the JSON.

    Raises:
        DataError: no image could be read, or a picture would be written over an image.
    """
    classes = class_names(config, model)
    drawn = {name: (out / PICTURES / name).with_suffix('.png') for name in images} if pictures else {}
    check_pictures(drawn, images)
    numbers = numbered(images, truth.images if truth else {})
    categories = numbered(classes, truth.categories if truth else {}, first=1)
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    left_out = []
    workers = config.test_dataloader.get('num_workers', 0) if len(images) > 2 * batch_size else 0
    results = predict(config, model, list(images.values()), batch_size, workers)
    for name, found in zip(bar(list(images), 'predicting'), results, strict=True):
        if isinstance(found, str):
            left_out.append(found)
            continue
        height, width = found.size
        listed.append({'id': numbers[name], 'file_name': name, 'height': height, 'width': width})
        for entry in entries_of(found, classes, categories):
            annotations.append({'id': len(annotations) + 1, 'image_id': numbers[name], **entry})
        counts.update(classes[int(k)] for k, score in zip(*found.detections[:0:-1], strict=True) if score >= threshold)
        if pictures:
            draw(drawn[name], images[name], found, classes, threshold, truth.of(name, classes) if truth else None)
    if not listed:
        raise DataError(
            f'none of {len(images)} images can be read, such as {next(iter(images.values()))}; check the path'
        )
    content = {
        'info': {'description': 'detections', **(about or {}), 'versions': versions()},
        'images': listed,
        'categories': [{'id': number, 'name': name} for name, number in categories.items()],
        'annotations': annotations,
    }
    write_json(out / FILE, content)
    named = {name: counts[name] for name in classes}
    return Predictions(out / FILE, len(listed), named, threshold, len(listed) if pictures else 0, left_out)


def check_pictures(drawn: Mapping[str, Path], images: Mapping[str, Path]) -> None:
    """Refuse pictures that would be written over images or over each other."""
    taken = Counter(drawn.values())
    twice = [name for name, path in drawn.items() if taken[path] > 1]
    if twice:
        raise DataError(f'{some(twice)}: differ in their suffix alone, and have one picture; leave pictures out')
    originals = {path.resolve() for path in images.values()}
    if over := [path for path in drawn.values() if path.resolve() in originals]:
        raise DataError(f'{over[0]}: is one of the images; give another folder')


def numbered(names: Sequence[str] | Mapping[str, Any], known: Mapping[str, Any], first: int = 0) -> dict[str, Any]:
    """Name -> id: the known ones, others count on after the largest."""
    start = max([first - 1, *(number for number in known.values() if isinstance(number, int))]) + 1
    fresh = iter(range(start, start + len(names)))
    return {name: known[name] if name in known else next(fresh) for name in names}


def entries_of(found: Found, classes: Sequence[str], categories: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Detections of one image, as COCO's annotations with scores."""
    for number, (box, score, label) in enumerate(zip(*found.detections, strict=True)):
        x1, y1, x2, y2 = (round(value, 2) for value in box.tolist())
        entry = {
            'category_id': categories[classes[int(label)]],
            'bbox': [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
            'area': round((x2 - x1) * (y2 - y1), 2),
            'iscrowd': 0,
            'score': round(float(score), 5),
        }
        if found.masks is not None:
            code = masks_of_coco.encode(np.asfortranarray(found.masks[number].numpy().astype(np.uint8)))
            entry['segmentation'] = {'size': code['size'], 'counts': code['counts'].decode()}
            entry['area'] = float(masks_of_coco.area(code))
        yield entry


def draw(
    out: Path, image: Path, found: Found, classes: Sequence[str], threshold: float, truth: Detections | None
) -> None:
    """Write one picture: what is annotated, if it is known, beside what is found."""
    arms = ({} if truth is None else {'ground truth': {0: truth}}) | {'detected': {0: found.detections}}
    masks = {} if found.masks is None else {'detected': {0: found.masks}}
    draw_detections(out, {0: image}, arms, classes, threshold, masks=masks, width=6.4)
