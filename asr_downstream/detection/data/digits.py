"""A small detection set from real pixels: scikit-learn's 1,797 handwritten digits, placed on cluttered pictures.

The digits (8x8, 17 grey levels; E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998; CC BY 4.0) come inside
scikit-learn. Each picture holds a few of them, scaled 2.5 to 5 times, over noise, strokes and scraps of other digits.
Training and validation pictures use different digits. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from asr_downstream.console.progress import bar
from asr_downstream.errors import DataError
from asr_downstream.files.atomic import check_could_write, whole_folder

__all__ = ['make_digits']

SIDE = 160  # px
SPLITS = {'train': 480, 'val': 120}  # pictures
CLASSES = tuple(str(digit) for digit in range(10))
Box = tuple[int, int, int, int]


def make_digits(out: Path, seed: int = 0, sizes: dict[str, int] | None = None) -> dict[str, Path]:
    """Write the set under ``out``: ``annotations/{train,val}.json`` in COCO format and ``{train,val}/*.png``.

    It is made in a folder beside ``out`` and renamed when complete; an existing set of this kind is replaced.

    Args:
        out: folder to write.
        seed: of everything that is drawn.
        sizes: pictures in each split; by default 480 and 120.

    Returns:
        The annotation file of each split.

    Raises:
        DataError: ``out`` exists and is not such a set, or cannot be written.
    """
    if out.exists() and not is_digits(out) and any(out.iterdir()):
        raise DataError(f'{out}: exists and is not a digits set; give an empty or new folder')
    check_could_write(out)
    pools = digit_pools(seed)
    with whole_folder(out) as building:
        for split, count in {**SPLITS, **(sizes or {})}.items():
            write_split(building, split, count, *pools[split], seed)
    return {split: out / 'annotations' / f'{split}.json' for split in SPLITS}


def is_digits(folder: Path) -> bool:
    """Whether ``folder`` holds a set that `make_digits` wrote."""
    try:
        info = json.loads((folder / 'annotations' / 'val.json').read_text())['info']
    except (OSError, ValueError, KeyError):
        return False
    return info.get('description', '').startswith('Handwritten digits')


def digit_pools(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split scikit-learn's digits into those of the training and of the validation pictures."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    cut = len(order) * 3 // 4
    return {
        'train': (digits.images[order[:cut]], digits.target[order[:cut]]),
        'val': (digits.images[order[cut:]], digits.target[order[cut:]]),
    }


def write_split(root: Path, split: str, count: int, images: np.ndarray, labels: np.ndarray, seed: int) -> None:
    """Draw and write the pictures and the annotation file of one split."""
    rng = np.random.default_rng([seed, *split.encode()])
    folder = root / split
    folder.mkdir(parents=True)
    pictures: list[dict] = []
    annotations: list[dict] = []
    for image_id in bar(range(count), f'digits: drawing {split}'):
        canvas, boxes = draw_picture(rng, images, labels)
        name = f'{image_id:06d}.png'
        Image.fromarray(canvas).save(folder / name)
        pictures.append({'id': image_id, 'file_name': name, 'width': SIDE, 'height': SIDE})
        for label, (x, y, w, h) in boxes:
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': image_id,
                    'category_id': label + 1,
                    'bbox': [x, y, w, h],
                    'area': w * h,
                    'iscrowd': 0,
                }
            )
    content = {
        'info': {'description': f'Handwritten digits of scikit-learn, placed and cluttered; seed {seed}'},
        'images': pictures,
        'annotations': annotations,
        'categories': [{'id': i + 1, 'name': name} for i, name in enumerate(CLASSES)],
    }
    path = root / 'annotations' / f'{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def draw_picture(
    rng: np.random.Generator, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, Box]]]:
    """Draw one picture ``(SIDE, SIDE, 3)`` uint8 and return it with its ``(label, (x, y, w, h))``."""
    canvas = background(rng)
    for _ in range(rng.integers(2, 5)):  # scraps: a few rows or columns of some digit
        scrap = images[rng.integers(len(images))]
        scrap = scrap[:, :3] if rng.random() < 0.5 else scrap[:3]
        paint(canvas, enlarge(scrap, rng.uniform(2, 4)), rng)
    boxes: list[tuple[int, Box]] = []
    for _ in range(rng.integers(2, 6)):
        index = rng.integers(len(images))
        ink = enlarge(images[index], rng.uniform(2.5, 5))
        box = paint(canvas, ink, rng, avoid=[b for _, b in boxes])
        if box is not None:
            boxes.append((int(labels[index]), box))
    noise = rng.normal(0, 6, canvas.shape)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8), boxes


def background(rng: np.random.Generator) -> np.ndarray:
    """A dark colour with a gradient and a few straight strokes; ``(SIDE, SIDE, 3)`` float."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    slope = rng.uniform(-1, 1, 2)
    canvas = rng.uniform(20, 90, 3) + 40 * (slope[0] * x + slope[1] * y)[..., None]
    for _ in range(rng.integers(1, 4)):
        start, end = rng.uniform(0, SIDE, (2, 2))
        t = np.linspace(0, 1, 2 * SIDE)[:, None]
        points = (start + t * (end - start)).astype(int).clip(0, SIDE - 1)
        canvas[points[:, 1], points[:, 0]] = rng.uniform(90, 170, 3)
    return canvas


def enlarge(digit: np.ndarray, scale: float) -> np.ndarray:
    """Scale a digit (values 0 to 16) and cut the empty border; ``(h, w)`` opacity in [0, 1]."""
    height, width = (max(1, round(n * scale)) for n in digit.shape)
    picture = Image.fromarray((digit / 16 * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    ink = np.asarray(picture, dtype=float) / 255
    rows, columns = np.flatnonzero((ink > 0.25).any(1)), np.flatnonzero((ink > 0.25).any(0))
    if not len(rows):
        return np.zeros((1, 1))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def paint(canvas: np.ndarray, ink: np.ndarray, rng: np.random.Generator, avoid: list[Box] | None = None) -> Box | None:
    """Paint ``ink`` in a bright colour at a free place, in place; return its box, or None if there is no room."""
    height, width = ink.shape
    for _ in range(20):
        x, y = int(rng.integers(SIDE - width)), int(rng.integers(SIDE - height))
        if all(x + width < bx or bx + bw < x or y + height < by or by + bh < y for bx, by, bw, bh in avoid or []):
            colour = rng.uniform(150, 255, 3)
            patch = canvas[y : y + height, x : x + width]
            patch += ink[..., None] * (colour - patch)
            return x, y, width, height
    return None
