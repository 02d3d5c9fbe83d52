"""What is wrong with the content of a COCO file, found over whole columns at once: a set has a million boxes.

Some findings would make a training wrong. Others MMDetection deals with by itself, by leaving a box out or cutting it
off, as it does with a few of COCO's own: they are said, and stop nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ['Finding', 'examine', 'finding', 'per_class']

SIDES = 'width and height should be whole numbers'
BEYOND = 1.0  # px that a box may reach beyond its image before that is said: annotations are rounded


@dataclass(frozen=True)
class Finding:
    """Something about a data set.

    Attributes:
        text: how many of what, with the first examples.
        wrong: whether a training would be wrong; otherwise it is only to be said.
    """

    text: str
    wrong: bool = True

    def __str__(self) -> str:
        return f'{"wrong" if self.wrong else "note"}: {self.text}'


def finding(
    found: Sequence[Any], named: Callable[[Any], str], what: tuple[str, str], wrong: bool = True
) -> Iterator[Finding]:
    """A finding with the first examples, none where nothing was found.

    Args:
        found: what was found.
        named: how an example is called.
        what: what it is, of one and of several.
        wrong: see `Finding`.
    """
    if len(found):
        examples = ', '.join([*map(named, found[:3]), *(['...'] if len(found) > 3 else [])])
        yield Finding(f'{len(found):,} {what[len(found) > 1]} ({examples})', wrong)


def short(value: Any) -> str:
    """Text of an example, whatever somebody has put there."""
    text = value if isinstance(value, str) else repr(value)
    return ' '.join((text if len(text) <= 120 else f'{text[:117]}...').split())


def examine(content: Mapping[str, Any], scored: bool = False, masks: bool = False) -> Iterator[Finding]:
    """Examine the content of a COCO file whose entries have all the fields, see `asr_downstream.detection.data.coco`.

    Args:
        content: of the file.
        scored: COCO scores are computed with it, which needs ``iscrowd``; MMDetection trains without.
        masks: ``segmentation`` is used, and not only boxes.
    """
    images, annotations, categories = content['images'], content['annotations'], content['categories']
    for kind, entries in (('image', images), ('annotation', annotations), ('category', categories)):
        yield from ids(kind, [entry['id'] for entry in entries])
    names = [image['file_name'] for image in images]
    odd = [name for name in names if not isinstance(name, str) or not name or '\0' in name]
    yield from finding(odd, short, ('file_name is no text', 'file names are no texts'))
    if not odd and len(set(names)) < len(names):
        several = 'file_name occurs more than once', 'file names occur more than once'
        yield from finding(repeated(names), short, several, wrong=False)
    sides, unsized = sizes(images)
    what = f'image has no size: {SIDES}', f'images have no size: {SIDES}'
    yield from finding(unsized, lambda n: short(images[n]['file_name']), what)
    of_image, of_category = (
        places(annotations, f'{k}_id', o) for k, o in (('image', images), ('category', categories))
    )
    yield from boxes(annotations, of_image, sides)
    for key, index, what in (
        ('image_id', of_image, ('box belongs to no image', 'boxes belong to no image')),
        ('category_id', of_category, ('box is of no category', 'boxes are of no category')),
    ):
        yield from finding(
            np.flatnonzero(index < 0).tolist(),
            lambda n, key=key: f'id {short(annotations[n]["id"])}: {key} {short(annotations[n][key])}',  # type: ignore[misc]
            what,
        )
    if not images:
        yield Finding('it has no images')
    unknown = [a['id'] for a in annotations if scored and a.get('iscrowd') not in (0, 1)]
    what = (
        'annotation has no iscrowd of 0 or 1 (0 is usual), so it cannot be scored',
        'annotations have no iscrowd of 0 or 1 (0 is usual), so they cannot be scored',
    )
    yield from finding(unknown, lambda number: f'id {short(number)}', what)
    odd = [a['id'] for a in annotations if a.get('segmentation') and not is_segmentation(a['segmentation'])]
    what = 'segmentation is neither polygons nor a run-length code', 'segmentations are neither polygons nor codes'
    yield from finding(odd, lambda number: f'id {short(number)}', what, wrong=masks)


def ids(kind: str, values: list[Any]) -> Iterator[Finding]:
    """Ids that are none, or occur twice: later entries would silently take the place of earlier ones."""
    if not set(map(type, values)) <= {int, str}:
        odd = [value for value in values if not is_id(value)]
        what = f'{kind} id is no whole number or text', f'{kind} ids are no whole numbers or texts'
        yield from finding(odd, short, what)
        values = [value for value in values if is_id(value)]
    if len(set(values)) < len(values):
        what = f'{kind} id occurs more than once', f'{kind} ids occur more than once'
        yield from finding(repeated(values), short, what)


def is_id(value: Any) -> bool:
    """Whether a value can be an id."""
    return type(value) in (int, str) or (type(value) is float and value.is_integer())


def repeated(values: list[Any]) -> list[Any]:
    """Values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def places(entries: list[Any], key: str, others: list[Any]) -> np.ndarray:
    """Index into ``others`` of the entry whose id each of ``entries`` names under ``key``; -1 for none."""
    index = {other['id']: n for n, other in enumerate(others) if is_id(other['id'])}
    values = [entry[key] for entry in entries]
    if not set(map(type, values)) <= {int, str}:
        values = [value if is_id(value) else None for value in values]
    return np.fromiter((index.get(value, -1) for value in values), dtype=np.int64, count=len(values))


def sizes(images: list[Any]) -> tuple[np.ndarray, list[int]]:
    """Width and height of every image ``(n, 2)``, and the indices of those that have none."""
    table, odd = table_of([[image['width'], image['height']] for image in images], 2)
    with np.errstate(invalid='ignore'):
        bad = ~((table >= 1) & (table == np.floor(table)) & np.isfinite(table)).all(axis=1)
    bad[odd] = True
    return table, np.flatnonzero(bad).tolist()


def table_of(rows: list[Any], width: int) -> tuple[np.ndarray, list[int]]:
    """Rows of numbers as float64 ``(n, width)``, and the indices of the rows that are none, which are NaN."""
    if not rows:
        return np.zeros((0, width)), []
    try:
        table = np.array(rows)
        if table.dtype.kind in 'if' and table.shape == (len(rows), width):
            return table.astype(np.float64), []
    except (ValueError, OverflowError, RecursionError):  # rows of several lengths, or lists in them
        pass
    table, odd = np.full((len(rows), width), np.nan), []
    for n, row in enumerate(rows):
        if isinstance(row, list) and len(row) == width and all(type(value) in (int, float) for value in row):
            table[n] = [value if abs(value) < 1e300 else np.inf for value in row]  # NaN too becomes infinite
        else:
            odd.append(n)
    return table, odd


def boxes(annotations: list[Any], images: np.ndarray, sides: np.ndarray) -> Iterator[Finding]:
    """Findings about ``bbox`` and ``area``; ``images`` are the indices of their images, ``sides`` the sizes of all."""

    def named(number: int) -> str:
        return f'id {short(annotations[number]["id"])}'

    table, odd = table_of([a['bbox'] for a in annotations], 4)
    areas = table_of([[a['area']] for a in annotations], 1)[0][:, 0]
    with np.errstate(over='ignore', invalid='ignore'):
        finite = np.isfinite(table.astype(np.float32)).all(axis=1)
        finite_area = np.isfinite(areas.astype(np.float32))
        number = np.ones(len(table), dtype=bool)
        number[odd] = False
        x, y, w, h = table.T
        width, height = sides[images].T if len(sides) else np.zeros((2, len(table)))
        small = finite & ((w < 1) | (h < 1))
        placed = finite & ~small & (images >= 0)
        outside = placed & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
        over = np.maximum.reduce([-x, -y, x + w - width, y + h - height])
        beyond = placed & ~outside & (over > BEYOND)
    for which, what in (
        (~number, ('bbox is not four numbers', 'bboxes are not four numbers')),
        (number & ~finite, ('box is not finite', 'boxes are not finite')),
        (~finite_area, ('area is not a finite number', 'areas are not finite numbers')),
    ):
        yield from finding(np.flatnonzero(which).tolist(), named, what)
    for which, (is_, are), rest in (
        (small, ('has no width or height', 'have no width or height'), ' of a pixel, and {} left out'),
        (outside, ('lies outside of its image', 'lie outside of their images'), ', and {} left out'),
        (beyond, ('reaches beyond its image', 'reach beyond their images'), ', and {} cut off'),
        (finite_area & (areas <= 0), ('has an area of 0 or less', 'have areas of 0 or less'), ', and {} left out'),
    ):
        what = f'box {is_}{rest.format("is")}', f'boxes {are}{rest.format("are")}'
        yield from finding(np.flatnonzero(which).tolist(), named, what, wrong=False)


def is_segmentation(value: Any) -> bool:
    """Whether a value can be polygons (empty ones too), or a run-length code; numbers are looked at by their first."""
    if isinstance(value, list):
        return all(isinstance(polygon, list) and (not polygon or type(polygon[0]) in (int, float)) for polygon in value)
    return isinstance(value, dict) and {'counts', 'size'} <= value.keys()


def per_class(content: Mapping[str, Any]) -> dict[str, int]:
    """Number of boxes of each class, in the order of the file."""
    count = Counter(places(content['annotations'], 'category_id', content['categories']).tolist())
    return {category['name']: count[n] for n, category in enumerate(content['categories'])}
