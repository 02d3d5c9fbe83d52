"""Pictures of generated images: grids and single files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil, sqrt
from pathlib import Path

from PIL import Image
from torch import Tensor

from asr_downstream.files.atomic import write_atomically

__all__ = ['grid', 'save_grid', 'save_images', 'to_pil']

SHOWN = 64  # pixels a side at which small images are shown


def to_pil(image: Tensor) -> Image.Image:
    """Turn an image ``(C, H, W)`` in [0, 1] into 8 bits."""
    pixels = (image * 255).round().byte().cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def grid(images: Tensor, columns: int | None = None, gap: int = 2, smooth: bool = False) -> Image.Image:
    """Put images ``(N, C, H, W)`` into one; small ones are enlarged by a whole factor, pixel by pixel or smoothly."""
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    count, _, height, width = images.shape
    columns = columns or ceil(sqrt(count))
    factor = max(1, SHOWN // max(height, width))
    height, width = height * factor + gap, width * factor + gap
    sheet = Image.new('RGB', (columns * width - gap, ceil(count / columns) * height - gap), 'white')
    for number, image in enumerate(images):
        tile = to_pil(image).convert('RGB')
        tile = tile.resize((tile.width * factor, tile.height * factor), method)
        sheet.paste(tile, (number % columns * width, number // columns * height))
    return sheet


def save_images(folder: Path, images: Tensor, numbers: Sequence[int]) -> None:
    """Write ``<number>.png`` for each image."""
    for number, image in zip(numbers, images, strict=True):
        write_atomically(folder / f'{number:06d}.png', partial(to_pil(image).save, format='PNG'))


def save_grid(path: Path, images: Tensor, columns: int | None = None) -> None:
    """Write a grid as PNG."""
    write_atomically(path, lambda p: grid(images, columns).save(p, format='PNG'))
