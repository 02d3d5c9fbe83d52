"""Files below a folder, whatever else a file system holds: links in circles, pipes, sockets, devices."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path, PurePosixPath

from asr_downstream.console.text import some
from asr_downstream.errors import DataError

__all__ = ['IMAGES', 'config_of_run', 'configs_in', 'files_below', 'is_image']

IMAGES = frozenset(('.png', '.jpg', '.jpeg', '.bmp', '.webp', '.gif', '.tif', '.tiff', '.ppm', '.pgm'))

WEIGHTS = ('.pth', '.safetensors')

# What the entry of a folder is.
FILE, FOLDER, LINK, ODD = 'file', 'folder', 'link', 'odd'


def configs_in(folder: Path) -> list[Path]:
    """Configs of trainings in the folder of a run: a model that was shipped into it has one too, beside its weights."""
    return sorted(path for path in folder.glob('*.py') if not any(path.with_suffix(end).exists() for end in WEIGHTS))


def config_of_run(folder: Path) -> Path:
    """The config of a run.

    Raises:
        DataError: there is none, or several.
    """
    found = configs_in(folder)
    if len(found) != 1:
        names = f'several configs, {some([path.name for path in found])}; leave that of its training' if found else ''
        raise DataError(f'{folder}: has {names or "no config of a training"}')
    return found[0]


def files_below(root: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, with forward slashes.

    Links to folders are followed, but each folder is read once, so that links in a circle end and no file is counted
    twice. What is left out is said in a warning.

    Raises:
        DataError: a folder cannot be read.
    """
    found: list[str] = []
    odd: list[str] = []
    links: list[Path] = []
    seen: set[tuple[int, int]] = set()
    folders = [root]
    while folders or links:
        # Links come last: a folder has its own name, not that of a link to it.
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                odd.append(f'{folder}: is read already')
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    path, kind = folder / entry.name, kind_of(entry)
                    if kind == FILE:
                        found.append(path.relative_to(root).as_posix())
                    elif kind == ODD:
                        odd.append(f'{path}: is no file')
                    else:
                        (links if kind == LINK else folders).append(path)
        except OSError as error:
            raise DataError(f'{folder}: cannot be read ({error.strerror or error}); mend or remove it') from error
    if odd:
        warnings.warn(f'left out: {some(sorted(odd))}', stacklevel=2)
    return found


def kind_of(entry: os.DirEntry[str]) -> str:
    """Kind of an entry; a link to nothing counts as a file, which cannot be decoded then and has a name."""
    if entry.is_file(follow_symlinks=False):
        return FILE
    if entry.is_dir(follow_symlinks=False):
        return FOLDER
    try:
        mode = entry.stat().st_mode
    except OSError:
        return FILE
    return FILE if stat.S_ISREG(mode) else LINK if stat.S_ISDIR(mode) else ODD


def is_image(path: str) -> bool:
    """Whether a path looks like an image; hidden files and folders do not, nor what macOS adds to archives."""
    parts = PurePosixPath(path).parts
    return PurePosixPath(path).suffix.lower() in IMAGES and not any(p.startswith(('.', '__MACOSX')) for p in parts)
