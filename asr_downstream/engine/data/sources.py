"""Image sources: a folder, a zip that is read in place, a Hugging Face data set, and the digits that need no download.

A source has a length, ``read(i)`` for a PIL image, ``name(i)``, ``labels`` (class numbers, or None), ``classes`` (their
names) and ``caption(i)``.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from asr_downstream.console.text import some
from asr_downstream.errors import AsrError, DataError, did_you_mean
from asr_downstream.files.folders import IMAGES, files_below, is_image
from asr_downstream.modules.seeds import generator
from asr_downstream.registry import Registry

__all__ = ['SOURCES', 'Digits', 'Files', 'HubDataset', 'ImageFolder', 'Source', 'Zip']

SOURCES = Registry('image source', error=AsrError, key='data')


class Source:
    """Base class of the image sources."""

    labels: list[int] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        """Decode an image; raises OSError if that is not possible."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where an image comes from, for messages."""
        raise NotImplementedError

    def caption(self, index: int) -> str:
        """Text of an image.

        Raises:
            DataError: there are no texts.
        """
        raise DataError(f'{type(self).__name__}: has no captions; use HubDataset with caption_column=...')


class Files(Source):
    """Images with paths; the classes are the names of the folders they are in, if there are several.

    Args:
        paths: relative paths with forward slashes.
        root: what they are in, for messages.
        classes: images of these alone, whose numbers are 0, 1, ... in the order given; one is enough.
        subset: so many of the images, drawn once and for all, of which fewer are a part; or those whose path fits a
            pattern such as ``'train/*'``. The classes, and their numbers, are those of all images.

    Raises:
        DataError: there are no such images, classes or paths.
    """

    def __init__(
        self, paths: list[str], root: Path, classes: Sequence[str] | None = None, subset: int | str | None = None
    ) -> None:
        self.root = root
        self.paths = sorted(p for p in paths if is_image(p))
        if not self.paths:
            raise DataError(f'{root}: has no images ({", ".join(sorted(IMAGES))}); check the path')
        found = sorted({class_of(p) for p in self.paths})
        if classes is not None:
            self.classes = checked_classes(classes, found, root)
            self.paths = [p for p in self.paths if class_of(p) in self.classes]
        elif len(found) > 1 and '' not in found:
            self.classes = tuple(found)
        if isinstance(subset, str):
            self.paths = matching(self.paths, subset, root)
        elif subset is not None:
            self.paths = [self.paths[index] for index in drawn(len(self.paths), subset, root)]
        if self.classes:
            numbers = {name: number for number, name in enumerate(self.classes)}
            self.labels = [numbers[class_of(p)] for p in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path of the file."""
        return f'{self.root}/{self.paths[index]}'


def class_of(path: str) -> str:
    """Name of the folder that a file is in; '' for none."""
    return PurePosixPath(path).parent.name


def checked_classes(
    classes: Sequence[str], found: Sequence[str], root: object, what: str = 'the folders of images there'
) -> tuple[str, ...]:
    """Classes of a config, if they are among those that were found.

    Args:
        classes: of the config.
        found: names that are there.
        root: what they are in, for messages.
        what: where their names come from, for messages.

    Raises:
        AsrError: they are no list of different names.
        DataError: there are no images of one.
    """
    if not isinstance(classes, list | tuple) or not classes or not all(isinstance(name, str) for name in classes):
        raise AsrError(f"data: classes={classes!r} should be a list of names, such as ['cat', 'dog']")
    if len(set(classes)) < len(classes):
        raise AsrError(f'data: classes={list(classes)} has a name twice')
    there = [name for name in found if name]
    if missing := [name for name in classes if name not in there]:
        raise DataError(f'{root}: has no images of {", ".join(map(repr, missing))}; {what} are {some(there, 20)}')
    return tuple(classes)


def matching(paths: list[str], pattern: str, root: object) -> list[str]:
    """Paths that fit a pattern, in their order.

    Raises:
        DataError: none fits.
    """
    if kept := [path for path in paths if fnmatchcase(path, pattern)]:
        return kept
    raise DataError(f'{root}: no image fits subset={pattern!r}; paths are such as {some(paths, 3)}')


def drawn(count: int, subset: int, root: object, otherwise: str = ", or a pattern such as 'train/*'") -> list[int]:
    """Draw so many of ``count`` images, once and for all: fewer are a part of more. In their order.

    Raises:
        AsrError: it is no such number; ``otherwise`` says what else it may be.
        DataError: there are not so many.
    """
    if type(subset) is not int or subset < 1:
        raise AsrError(f'data: subset={subset!r} should be a number of images{otherwise}')
    if subset > count:
        raise DataError(f'{root}: has {count:,} images, fewer than subset={subset:,}')
    return sorted(torch.randperm(count, generator=generator('subset')).tolist()[:subset])


@SOURCES.register_module()
class ImageFolder(Files):
    """Images below a folder; each folder counts once, see
    `asr_downstream.files.folders.files_below`.

    Args:
        path: the folder.
        classes, subset: see `Files`.
    """

    def __init__(self, path: str, classes: Sequence[str] | None = None, subset: int | str | None = None) -> None:
        root = Path(path)
        if not root.is_dir():
            raise DataError(f'{root}: no such image folder; give one with --data, or set ASR_DATA_ROOT')
        super().__init__(files_below(root), root, classes, subset)

    def read(self, index: int) -> Image.Image:
        """Decode the file."""
        with Image.open(self.root / self.paths[index]) as image:
            image.load()
            return image


@SOURCES.register_module()
class Zip(Files):
    """Images in a zip file, which is not unpacked.

    Args:
        path: the zip file.
        classes, subset: see `Files`.
    """

    def __init__(self, path: str, classes: Sequence[str] | None = None, subset: int | str | None = None) -> None:
        root = Path(path)
        if not root.is_file():
            raise DataError(f'{root}: no such zip file; give one with --data, or set ASR_DATA_ROOT')
        try:
            with zipfile.ZipFile(root) as archive:
                paths = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        except zipfile.BadZipFile as error:
            raise DataError(f'{root}: is no zip file that can be read ({error}); copy it again') from error
        super().__init__(paths, root, classes, subset)
        self.handle: tuple[int, zipfile.ZipFile | None] = (0, None)

    def read(self, index: int) -> Image.Image:
        """Decode an entry; each worker process opens the archive for itself."""
        if self.handle[0] != os.getpid():
            self.handle = os.getpid(), zipfile.ZipFile(self.root)
        assert self.handle[1] is not None
        try:
            with self.handle[1].open(self.paths[index]) as file, Image.open(file) as image:
                image.load()
                return image
        except zipfile.BadZipFile as error:
            raise OSError(str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, 'handle': (0, None)}


@SOURCES.register_module()
class HubDataset(Source):
    """A data set that the ``datasets`` library can load: an id on the Hugging Face hub, or a local one.

    Args:
        path: id or folder.
        name: configuration of the data set.
        split: such as ``'train'``.
        image_column, label_column, caption_column: columns to use; the first of the fitting kind by default.
        classes: images of these labels alone, whose numbers are 0, 1, ... in the order given.
        subset: so many of the images, drawn once and for all, of which fewer are a part.
        **kwargs: for ``datasets.load_dataset``, such as ``revision`` or ``data_dir``.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str | None = 'train',
        image_column: str | None = None,
        label_column: str | None = None,
        caption_column: str | None = None,
        classes: Sequence[str] | None = None,
        subset: int | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise DataError(f'HubDataset needs datasets ({error}); install it with: pip install datasets') from error
        if kwargs.get('streaming'):
            raise DataError(
                f'{path}: streaming data sets have no length and no order that a resumed run could find again; leave '
                f"streaming out, which downloads it once, or a part of it with split='train[:10%]'"
            )
        try:
            self.rows = datasets.load_dataset(path, name, split=split, **kwargs)
        except Exception as error:  # its errors have no common class
            raise DataError(f'{path}: cannot be loaded by datasets ({type(error).__name__}: {error})') from error
        if not isinstance(self.rows, datasets.Dataset):
            raise DataError(f'{path}: split={split!r} is no single one; name one, such as {splits_of(self.rows)}')
        self.path = f'{path}[{split}]'
        features = self.rows.features
        self.image_column = self.column(features, image_column, datasets.Image, 'image')
        found = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
        self.label_column = label_column or (found[0] if found else None)
        if self.label_column is not None:
            self.column(features, self.label_column, datasets.ClassLabel, 'label')
            self.classes = tuple(features[self.label_column].names)
            self.labels = list(self.rows[self.label_column])
        self.numbers: Sequence[int] = range(len(self.rows))  # rows of the images
        if classes is not None:
            self.keep_classes(classes)
        if subset is not None:
            self.keep(drawn(len(self), subset, self.path, '; rows have no paths'))
        if caption_column is not None:
            self.column(features, caption_column, datasets.Value, 'caption')
        self.caption_column = caption_column

    def keep_classes(self, classes: Sequence[str]) -> None:
        """Keep the images of some classes.

        Raises:
            AsrError: see `checked_classes`.
            DataError: there are no labels.
        """
        if self.labels is None:
            raise DataError(f'{self.path}: has no column of labels, which classes={classes!r} could be of')
        names, self.classes = self.classes, checked_classes(classes, self.classes, self.path, 'its classes')
        new = {names.index(name): number for number, name in enumerate(self.classes)}
        there = set(self.labels)
        if empty := [name for name in self.classes if names.index(name) not in there]:
            raise DataError(f'{self.path}: has no images of {", ".join(map(repr, empty))}, though it names the class')
        self.keep([index for index, label in enumerate(self.labels) if label in new])
        self.labels = [new[label] for label in self.labels]

    def keep(self, kept: Sequence[int]) -> None:
        """Keep some of the images."""
        self.numbers = [self.numbers[index] for index in kept]
        if self.labels is not None:
            self.labels = [self.labels[index] for index in kept]

    def column(self, features: Any, name: str | None, kind: type, what: str) -> str:
        """Find a column of a kind."""
        fitting = [c for c, f in features.items() if isinstance(f, kind)]
        if name is not None and name not in fitting:
            raise DataError(f'{self.path}: {name!r} is not a column of {what}s; {did_you_mean(name, fitting)}')
        if not fitting:
            raise DataError(f'{self.path}: has no column of {what}s, only {", ".join(features)}')
        return name or fitting[0]

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int) -> Image.Image:
        """Decode an image."""
        return self.rows[self.numbers[index]][self.image_column]

    def name(self, index: int) -> str:
        """Name of the data set and the row."""
        return f'{self.path} row {self.numbers[index]}'

    def caption(self, index: int) -> str:
        """Text of the caption column."""
        if self.caption_column is None:
            raise DataError(f"{self.path}: name its captions with data=dict(..., caption_column='text')")
        return self.rows[self.numbers[index]][self.caption_column]


def splits_of(rows: Any) -> str:
    """Names of the splits of a data set."""
    return ' or '.join(f'split={name!r}' for name in rows) if isinstance(rows, dict) else "split='train'"


@SOURCES.register_module()
class Digits(Source):
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn (UCI, E. Alpaydin, C. Kaynak, 1998)."""

    classes = tuple('0123456789')

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise AsrError(f'Digits needs scikit-learn ({error}); install it with: pip install scikit-learn') from error
        found = load_digits()
        self.pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
        self.labels = found.target.tolist()

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> Image.Image:
        """Return a digit, white on black."""
        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        """Number of the digit."""
        return f'digit {index}'
