"""Images of ``--data`` as inputs of classifiers and diffusion models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from asr_downstream.engine.data.images import Images, build_images, in_range
from asr_downstream.errors import DataError

__all__ = ['DIGITS', 'open_images', 'tensors_of']

DIGITS = 'digits'  # instead of a path: the digits that need no download


def open_images(data: Path, resolution: int, channels: int) -> Images:
    """Open a folder or zip file of images, or `DIGITS`.

    Raises:
        DataError: there are none.
    """
    if str(data) == DIGITS and not data.exists():
        spec = {'type': 'Digits'}
    elif not data.exists():
        raise DataError(f'{data}: no such image folder or zip file; check --data')
    else:
        spec = {'type': 'ImageFolder' if data.is_dir() else 'Zip', 'path': str(data)}
    return build_images({**spec, 'resolution': resolution}, channels)


def tensors_of(images: Images, count: int) -> tuple[Tensor, list[int]]:
    """Read images spread over the whole set.

    Returns:
        The images in [-1, 1], and which they are.
    """
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().unique().tolist()
    found = [images.decodable_pixels(index) for index in chosen]
    return in_range(torch.stack([torch.from_numpy(pixels) for pixels, _ in found])), [used for _, used in found]
