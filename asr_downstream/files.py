"""Files: written aside and renamed when complete, so that no half-written file carries the final name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from asr_downstream.errors import AsrError

__all__ = ['check_could_write', 'check_writable', 'sha256', 'writable_folder', 'write_atomically', 'write_json']


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside ``path``, flush it to disk, and rename it to ``path``.

    Raises:
        AsrError: the folder cannot be written.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open('rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise AsrError(f'{path}: cannot be written ({error}); check the permissions and the free space') from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON."""
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=2) + '\n'))


def writable_folder(path: Path) -> Path:
    """Make an empty folder, replacing what an interrupted run left under this name."""
    try:
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
    except OSError as error:
        raise AsrError(
            f'{path}: cannot be written ({error}); choose another folder or check the permissions'
        ) from error
    return path


def check_could_write(folder: Path) -> None:
    """Look whether ``folder`` could be written, or made, without making it.

    Raises:
        AsrError: it could not.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise AsrError(f'{folder}: cannot be written ({nearest} does not allow it); choose another folder')


def check_writable(folder: Path) -> None:
    """Make ``folder`` and try to write in it.

    Raises:
        AsrError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise AsrError(f'{folder}: cannot be written ({error}); choose another folder') from error


def sha256(path: Path) -> str:
    """Hash of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
