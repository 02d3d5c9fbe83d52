"""Pictures as data URIs, made smaller until all of them fit into what a page may weigh."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ['embed']

COLOURS = 1 << 14  # of a drawing; a picture with more is a photograph, which is no smaller as PNG
OPTIONS: dict[str, dict[str, Any]] = {'PNG': {'optimize': True}, 'JPEG': {'quality': 86, 'optimize': True}}
WIDTHS = (1400, 1100, 850, 640, 480, 320)
LARGEST = 64 << 20  # bytes of a file that is read
PIXELS = 80_000_000  # of a picture that is decoded


def embed(path: Path, most: int) -> tuple[str, tuple[int, int]] | None:
    """Read a picture as a data URI of at most so many bytes.

    A PNG or a JPEG, whichever is smaller, with no more pixels across than it needs. An SVG stays as it is: as an image,
    a browser runs and loads nothing in it.

    Args:
        path: of the file.
        most: bytes of the URI.

    Returns:
        The URI and the size in pixels (0, 0 of an SVG); None: it cannot be read, or does not fit.
    """
    try:
        if path.stat().st_size > LARGEST:
            return None
        if path.suffix == '.svg':
            found = uri('svg+xml', path.read_bytes())
            return (found, (0, 0)) if len(found) <= most else None
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with Image.open(path) as file:
                if file.width * file.height > PIXELS:
                    return None
                whole = flattened(file)
    except Exception:  # decoders raise anything for damaged files
        return None
    kinds = ['JPEG'] if whole.getcolors(COLOURS) is None else ['PNG', 'JPEG']
    image: Image.Image
    for width in WIDTHS:
        if width > WIDTHS[-1] and width > whole.width and width != WIDTHS[0]:
            continue
        image = whole
        if image.width > width:
            image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
        found = min((encoded(image, kind) for kind in kinds), key=len)
        if len(found) <= most:
            return found, image.size
    return None


def flattened(image: Image.Image) -> Image.Image:
    """A picture without transparency, on white."""
    if image.mode in ('RGBA', 'LA', 'P'):
        layer = image.convert('RGBA')
        image = Image.new('RGBA', layer.size, 'white')
        image.alpha_composite(layer)
    return image.convert('RGB')


def encoded(image: Image.Image, kind: str) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **OPTIONS[kind])
    return uri(kind.lower(), buffer.getvalue())


def uri(kind: str, content: bytes) -> str:
    """A data URI."""
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
