"""A worse copy of a detection set: blurred, darkened and noisy images with the same boxes, to adapt a detector to.

Each image draws its own strength from the seed and its name, so a part of a set is the same as in the whole.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from asr_downstream.console.progress import bar
from asr_downstream.detection.data.coco import Split, read_annotations
from asr_downstream.detection.data.fit import find_splits
from asr_downstream.errors import DataError
from asr_downstream.files.atomic import check_could_write, whole_folder

__all__ = ['degrade_image', 'degrade_set']

ABOUT = 'degraded.json'  # in the copy: what it was made from, and how
Range = tuple[float, float]


def degrade_set(
    root: Path,
    out: Path,
    blur: Range = (1.0, 3.0),
    light: Range = (0.3, 0.7),
    noise: float = 4.0,
    seed: int = 0,
) -> dict[str, Path]:
    """Write a degraded copy of the COCO-format set in ``root`` under ``out``, with the same layout and annotations.

    Args:
        root: the set.
        out: folder to write; an earlier copy of this kind is replaced.
        blur: least and largest standard deviation of the Gaussian blur, in pixels.
        light: least and largest factor of the brightness.
        noise: standard deviation of the Gaussian noise, in grey levels of 255.
        seed: of everything that is drawn.

    Returns:
        The annotation file of each split.

    Raises:
        DataError: there is no such set, an image cannot be read, ``out`` holds something else, or a range is none.
    """
    for name, (low, high) in (('blur', blur), ('light', light)):
        if not 0 <= low <= high:
            raise DataError(f'{name} {low:g} {high:g}: should be two numbers of at least 0, the smaller one first')
    if noise < 0:
        raise DataError(f'noise {noise:g}: should be at least 0')
    root = root.resolve()
    if out.resolve() == root:
        raise DataError(f'{out}: is the set itself; give another folder for the copy')
    if out.exists() and not (out / ABOUT).is_file() and any(out.iterdir()):
        raise DataError(f'{out}: exists and is not a degraded set; give an empty or new folder')
    check_could_write(out)
    splits = find_splits(root)
    about = {'blur': blur, 'light': light, 'noise': noise, 'seed': seed}
    with whole_folder(out) as building:
        for split, files in splits.items():
            copy_split(root, building, split, files, about)
        (building / ABOUT).write_text(json.dumps(about, indent=1))
    return {split: out / inside(files.annotations, root) for split, files in splits.items()}


def copy_split(root: Path, out: Path, split: str, files: Split, about: dict) -> None:
    """Copy the annotations of a split, and degrade its images."""
    annotations = out / inside(files.annotations, root)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(files.annotations, annotations)
    folder = out / inside(files.images, root)
    for entry in bar(read_annotations(files.annotations)['images'], f'degrading {split}'):
        source, target = files.images / entry['file_name'], folder / entry['file_name']
        if not target.resolve().is_relative_to(out.resolve()):
            raise DataError(f'{files.annotations}: file_name {entry["file_name"]!r} lies outside of {files.images}')
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with Image.open(source) as image:
                pixels = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f'{source}: cannot be read as an image ({error})') from error
        rng = np.random.default_rng([about['seed'], *str(entry['file_name']).encode()])
        worse = degrade_image(pixels, rng, about['blur'], about['light'], about['noise'])
        Image.fromarray(worse).save(target, quality=95)


def degrade_image(pixels: np.ndarray, rng: np.random.Generator, blur: Range, light: Range, noise: float) -> np.ndarray:
    """Blur, darken and add noise.

    Args:
        pixels: ``(H, W, 3)`` uint8.
        rng: what the strengths and the noise are drawn from.
        blur: see `degrade_set`.
        light: likewise.
        noise: likewise.
    """
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(*blur)))
    dark = np.asarray(image, np.float32) * rng.uniform(*light)
    return np.rint(dark + rng.normal(0.0, noise, pixels.shape)).clip(0, 255).astype(np.uint8)


def inside(path: Path, root: Path) -> Path:
    """Path of a file or folder of the set, from its root.

    Raises:
        DataError: it lies elsewhere.
    """
    if not path.resolve().is_relative_to(root):
        raise DataError(f'{path}: lies outside of {root}, so the copy cannot have the same layout')
    return path.resolve().relative_to(root)
