"""Pictures of generated images: grids, with what each image shows written below it, and single files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil, sqrt
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from asr_downstream.files.atomic import write_atomically

__all__ = ['grid', 'save_grid', 'save_images', 'to_pil']

SHOWN = 64  # pixels a side at which small images are shown
LINES = 3  # at most, of a caption


def to_pil(image: Tensor) -> Image.Image:
    """Turn an image ``(C, H, W)`` in [0, 1] into 8 bits."""
    pixels = (image * 255).round().byte().cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def grid(
    images: Tensor, columns: int | None = None, gap: int = 2, smooth: bool = False, captions: Sequence[str] = ()
) -> Image.Image:
    """Put images ``(N, C, H, W)`` into one; small ones are enlarged by a whole factor, pixel by pixel or smoothly.

    Args:
        images: in [0, 1].
        columns: of the grid; default: as many as rows.
        gap: pixels between images.
        smooth: how small images are enlarged.
        captions: a text each, on white below the image; a long one is wrapped, and cut after three lines.
    """
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    count, _, height, width = images.shape
    columns = columns or ceil(sqrt(count))
    factor = max(1, SHOWN // max(height, width))
    font, texts = caption_font(width * factor), []
    if any(captions):
        texts = [wrapped(text, font, width * factor) for text in captions]
    line = sum(font.getmetrics())
    strip = line * max(map(len, texts), default=0)
    height, width = height * factor + strip + gap, width * factor + gap
    sheet = Image.new('RGB', (columns * width - gap, ceil(count / columns) * height - gap), 'white')
    for number, image in enumerate(images):
        tile = to_pil(image).convert('RGB')
        tile = tile.resize((tile.width * factor, tile.height * factor), method)
        x, y = number % columns * width, number // columns * height
        sheet.paste(tile, (x, y))
        for row, text in enumerate(texts[number] if texts else ()):
            ImageDraw.Draw(sheet).text((x, y + tile.height + row * line), text, 'black', font)
    return sheet


def caption_font(width: int) -> ImageFont.FreeTypeFont:
    """Font for captions of images of so many pixels: PIL's own, never too small to read."""
    font = ImageFont.load_default(max(11, width // 24))
    assert isinstance(font, ImageFont.FreeTypeFont)  # what a size asks for
    return font


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of a text no wider than ``width`` pixels, at most `LINES`; what is cut ends with an ellipsis."""
    lines, line = [], ''
    for word in text.split():
        longer = f'{line} {word}'.strip()
        if line and font.getlength(longer) > width:
            lines.append(line)
            longer = word
        while font.getlength(longer) > width and len(longer) > 1:
            most = max(1, max(n for n in range(len(longer)) if font.getlength(longer[:n]) <= width))
            lines.append(longer[:most])
            longer = longer[most:]
        line = longer
    lines = [*lines, line] if line else lines
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while last and font.getlength(f'{last}…') > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], f'{last}…']
    return lines


def save_images(folder: Path, images: Tensor, numbers: Sequence[int]) -> None:
    """Write ``<number>.png`` for each image."""
    for number, image in zip(numbers, images, strict=True):
        write_atomically(folder / f'{number:06d}.png', partial(to_pil(image).save, format='PNG'))


def save_grid(path: Path, images: Tensor, columns: int | None = None, captions: Sequence[str] = ()) -> None:
    """Write a grid as PNG; see `grid`."""
    write_atomically(path, lambda p: grid(images, columns, captions=captions).save(p, format='PNG'))
