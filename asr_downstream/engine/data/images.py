"""Images as tensors, and the files among them that cannot be decoded."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from asr_downstream.console.progress import bar
from asr_downstream.console.text import some
from asr_downstream.engine.data.sources import SOURCES, Source
from asr_downstream.engine.values import Count, MaxShare, check_values
from asr_downstream.errors import AsrError, DataError
from asr_downstream.files.configs import plain
from asr_downstream.registry import build

__all__ = ['BadFiles', 'Images', 'build_images', 'eight_bits', 'in_range']

MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
# Keys of ``data`` besides those of its source.
IMAGES = {'resolution': Count, 'random_flip': bool, 'max_bad_share': MaxShare}


class Images(Dataset[Tensor]):
    """Images of a source as ``(C, resolution, resolution)`` tensors in [-1, 1].

    The shorter side is resized, the middle is cut out. Item ``i`` raises DataError if it cannot be decoded.

    Args:
        source: see `asr_downstream.engine.data.sources`.
        resolution: height and width, pixels.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        random_flip: whether a training may mirror them.
        max_bad_share: see `BadFiles`.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        channels: int = 3,
        random_flip: bool = False,
        max_bad_share: float = 0.01,
    ) -> None:
        if channels not in MODES:
            raise AsrError(f'data: channels={channels} should be one of {", ".join(map(str, MODES))}')
        self.source = source
        self.resolution = resolution
        self.mode = MODES[channels]
        self.random_flip = random_flip
        self.max_bad_share = max_bad_share
        self.kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        return in_range(torch.from_numpy(self.pixels(index)))

    def keep(self, indices: Sequence[int]) -> None:
        """Decode images and keep their pixels in memory; those that cannot be decoded are tried again when asked."""
        for index in bar(indices, f'reading {len(indices):,} images'):
            with suppress(DataError):
                self.kept[index] = self.pixels(index)

    def pixels(self, index: int) -> np.ndarray:
        """Pixels of an image, ``(C, resolution, resolution)``, 8 bits.

        Raises:
            DataError: it cannot be decoded.
        """
        if index in self.kept:
            return self.kept[index]
        try:
            found = self.source.read(index)
            image = eight_bits(ImageOps.exif_transpose(found), found.format).convert(self.mode)
        except MemoryError:
            raise
        except Exception as error:  # decoders and archives raise anything for damaged files
            raise DataError(f'{self.source.name(index)}: cannot be decoded ({error})') from error
        size = (self.resolution, self.resolution)
        if image.size != size:
            image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        pixels = np.array(image)
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))

    def decodable(self, index: int, among: Sequence[int] | None = None) -> tuple[Tensor, int]:
        """Return the image ``index``, or the next one ``among`` (default: all) that can be decoded, and which it is."""
        pixels, used = self.decodable_pixels(index, among)
        return in_range(torch.from_numpy(pixels)), used

    def decodable_pixels(self, index: int, among: Sequence[int] | None = None) -> tuple[np.ndarray, int]:
        """Likewise, with pixels of 8 bits."""
        among = range(len(self)) if among is None else among
        first = bisect_left(among, index)  # they are in order
        reason = ''
        for offset in range(min(len(among), 100)):
            used = among[(first + offset) % len(among)]
            try:
                return self.pixels(used), used
            except DataError as error:
                reason = reason or str(error)
        raise DataError(f'{reason}; nor can the files after it: are these images?')


def in_range(pixels: Tensor) -> Tensor:
    """Turn pixels of 8 bits into numbers in [-1, 1], on their device."""
    return pixels.float() / 127.5 - 1


def eight_bits(image: Image.Image, file_format: str | None = None) -> Image.Image:
    """Scale grey values of 16 or 32 bits, which PIL would cut off at 255, and undo premultiplied alpha.

    Args:
        image: of any mode.
        file_format: of the file it is from, as PIL names it: some are of 16 bits where PIL gives 32.

    Raises:
        ValueError: the scale of the values is not known.
    """
    if image.mode in ('RGBa', 'La'):
        return image.convert(image.mode.upper())
    if image.mode.startswith('I;16') or (image.mode == 'I' and file_format in ('PPM', 'PNG')):
        return greys(np.asarray(image, dtype=np.float32) / 65535)
    if image.mode == 'I':
        raise ValueError('whole numbers of 32 bits have no known white; save it with 8 or 16 bits')
    if image.mode == 'F':
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError('float values that are not finite')
        if values.min() < 0 or values.max() > 1:
            raise ValueError(
                f'float values from {values.min():g} to {values.max():g}; they should be in [0, 1], from black to white'
            )
        return greys(values)
    return image


def greys(values: np.ndarray) -> Image.Image:
    """Grey image of values in [0, 1]."""
    return Image.fromarray((values * 255).round().astype(np.uint8))


def build_images(spec: dict[str, Any], channels: int) -> Images:
    """Build ``data`` of a config.

    Raises:
        AsrError: a name or an argument is not known.
        DataError: the images are not there.
    """
    arguments = plain(spec)
    own = {k: arguments.pop(k) for k in IMAGES if k in arguments}
    if 'resolution' not in own:
        raise AsrError('data: has no resolution; add resolution=32, the height and width in pixels')
    check_values({key: IMAGES[key] for key in own}, own, 'data')
    return Images(build(SOURCES, arguments), channels=channels, **own)


class BadFiles:
    """Files that could not be decoded: each is reported once, and too many of them stop the run.

    Args:
        images: the images; None where nothing is decoded, so that nothing can be bad.
        report: called with a line for each new one.
    """

    def __init__(self, images: Images | None, report: Callable[[str], None]) -> None:
        self.images = images
        self.report = report
        self.found: set[int] = set()

    def add(self, indices: list[int]) -> None:
        """Note the ``bad`` entries of a batch, and report the new ones."""
        for index in sorted(set(indices) - self.found - {-1}):
            self.found.add(index)
            self.report(f'{self.names([index])[0]}: cannot be decoded and was replaced by the next image')

    def check(self) -> None:
        """Raise if there are too many.

        Raises:
            DataError: more than the stated share of the files is bad.
        """
        if self.images is None:
            return
        allowed = self.images.max_bad_share * len(self.images)
        if len(self.found) > allowed:
            names = self.names(sorted(self.found))
            raise DataError(
                f'{len(names)} of {len(self.images)} images cannot be decoded, more than '
                f'max_bad_share={self.images.max_bad_share:g} allows: {some(names)}; mend or remove them, or raise it '
                f'with --cfg-options data.max_bad_share=...'
            )

    def __str__(self) -> str:
        if not self.found or self.images is None:
            return ''
        names = self.names(sorted(self.found))
        return f'{len(names)} of {len(self.images)} images could not be decoded: {some(names)}'

    def names(self, indices: list[int]) -> list[str]:
        """Where images come from."""
        return [str(index) if self.images is None else self.images.source.name(index) for index in indices]
