"""Image files of a data set: whether they are there, can be read, and have the size that the annotations say."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from PIL import Image, UnidentifiedImageError
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from asr_downstream.console.progress import bar
from asr_downstream.detection.data.soundness import Finding, finding

__all__ = ['examine_files', 'largest', 'missing', 'read_header']

TURNED = ('JPEG', 'MPO', 'PNG')  # formats that OpenCV turns; not WebP and AVIF
ORIENTATION = 0x0112  # in EXIF; 5 to 8 exchange the sides
MANY = 5000  # images, from which on reading them is shown
TAIL = 4096  # bytes at the end of a file where its end mark is looked for
ENDS = {'JPEG': b'\xff\xd9', 'PNG': b'IEND'}


class Header(NamedTuple):
    """What the beginning and the end of an image file say.

    Attributes:
        size: width and height as MMDetection will read it; None of a format whose header is not understood here.
        turned: whether EXIF exchanges the sides.
        problem: why it cannot be read, '' if it can.
        cut: whether the end is missing.
    """

    size: tuple[int, int] | None = None
    turned: bool = False
    problem: str = ''
    cut: bool = False


def missing(names: Sequence[str], images: Path) -> list[str]:
    """Those of the names under ``images`` that are no files; looks at every folder once, and follows links."""
    folders: dict[str, set[str]] = {}
    absent = []
    for name in names:
        folder, _, file = name.rpartition('/')
        if folder not in folders:
            try:
                with os.scandir(images / folder) as entries:
                    folders[folder] = {entry.name for entry in entries if entry.is_file()}
            except (OSError, ValueError):  # a name that the system does not take
                folders[folder] = set()
        if file not in folders[folder]:
            absent.append(name)
    return absent


def examine_files(
    entries: Sequence[Any], images: Path, most: int | None = None, turn: bool = True
) -> Iterator[Finding]:
    """Compare the files of COCO image entries with them.

    Args:
        entries: of the annotation file; their files are there.
        images: folder that ``file_name`` starts from.
        most: look at so many, spread evenly; default: all.
        turn: whether images are turned as EXIF says when they are read, as MMDetection does by default.
    """
    if most is not None and len(entries) > most:
        entries = [entries[n * len(entries) // most] for n in range(most)]
    with ThreadPoolExecutor(8) as pool:
        read: Iterable[Header] = pool.map(lambda entry: read_header(images / entry['file_name'], turn), entries)
        headers = list(bar(read, f'{images.name}: headers of {len(entries):,} images') if len(entries) > MANY else read)
    pairs = list(zip(entries, headers, strict=True))
    unreadable = [(entry, header) for entry, header in pairs if header.problem]
    yield from finding(
        unreadable,
        lambda pair: f'{images / pair[0]["file_name"]}: cannot be read as an image: {pair[1].problem}',
        ('image is damaged', 'images are damaged'),
    )
    other = [(e, h) for e, h in pairs if h.size is not None and h.size != (e['width'], e['height'])]
    yield from finding(
        other, sizes_of, ('image has another size than its file', 'images have other sizes than their files')
    )
    cut = [entry['file_name'] for entry, header in pairs if header.cut]
    yield from finding(cut, str, ('image file is cut off', 'image files are cut off'), wrong=False)


def sizes_of(pair: tuple[Any, Header]) -> str:
    """Both sizes of an image."""
    entry, header = pair
    width, height = header.size or (0, 0)
    as_turned = ' as EXIF turns it' if header.turned else ''
    return f'{entry["file_name"]}: {entry["width"]}x{entry["height"]}, the file {width}x{height}{as_turned}'


def read_header(path: Path, turn: bool = True) -> Header:
    """Read the header of an image file, not its pixels."""
    try:
        if not path.stat().st_size:
            return Header(problem='is empty')
        with path.open('rb') as file:
            image = opened(file)
            if image is None:
                known = cv2.haveImageReader(str(path))  # OpenCV reads formats that Pillow does not
                return Header() if known else Header(problem='is no image')
            width, height = image.size
            turns = turn and image.format in TURNED and 'exif' in image.info
            turned = turns and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            file.seek(max(0, path.stat().st_size - TAIL))
            end = ENDS.get(image.format or '')
            cut = end is not None and end not in file.read()
    except OSError as error:
        return Header(problem=error.strerror or 'is no image')
    except Exception:  # a header that is damaged: struct.error, SyntaxError, ValueError, ...
        return Header(problem='has a damaged header')
    if width * height > largest():
        return Header(problem=f'is too large ({width}x{height}; OpenCV reads up to {largest():,} pixels)')
    return Header((height, width) if turned else (width, height), turned, cut=cut)


def opened(file: Any) -> Image.Image | None:
    """Open an image of any size: Pillow's own limit is that of pictures of the web."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            return Image.open(file)
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError:
        for kind in (PngImageFile, JpegImageFile, TiffImageFile, BmpImageFile):
            file.seek(0)
            try:
                return kind(file)
            except (SyntaxError, OSError):
                continue
        return None


def largest() -> int:
    """Number of pixels that OpenCV reads at most."""
    text = os.environ.get('OPENCV_IO_MAX_IMAGE_PIXELS', '')
    return int(text) if text.isdigit() else 1 << 30
