"""Files and folders: written aside and renamed when complete, so that nothing half-written carries the final name.

What cannot be written becomes one line that says why, how much was needed and how much is free.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from asr_downstream.errors import AsrError

__all__ = [
    'aside',
    'cannot_write',
    'check_could_write',
    'check_writable',
    'files_in',
    'flush',
    'not_ours',
    'open_to_others',
    'read_json',
    'remove',
    'sha256',
    'size',
    'whole_folder',
    'writable_folder',
    'write_atomically',
    'write_json',
    'write_together',
    'writing',
]

# How the writer of torch.save names itself; every other RuntimeError is about something else, such as memory.
TORCH_WRITER = ('inline_container', 'unexpected pos', 'PytorchStreamWriter', 'cannot be opened', 'Parent directory')
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, write: Callable[[Path], Any], needed: int | None = None) -> None:
    """Let ``write`` fill a file beside ``path``, flush it to disk, and rename it to ``path``.

    Args:
        path: the file.
        write: is given the path to write to.
        needed: bytes that it will take, for the message.

    Raises:
        AsrError: it cannot be written; nothing of it is left, and a file that was there under the name still is.
    """
    temporary = aside(path)
    try:
        with writing(path, needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            open_to_others(temporary)
            flush(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_together(writes: dict[Path, Callable[[Path], Any]]) -> None:
    """Write several files that belong together: all of them aside first, so that a full disk leaves none of them.

    Args:
        writes: file -> what is given the path to write to.

    Raises:
        AsrError: one cannot be written; nothing is left of any, and files that were there still are.
    """
    try:
        for path, write in writes.items():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write(aside(path))
                open_to_others(aside(path))
                flush(aside(path))
        for path in writes:
            with writing(path):
                os.replace(aside(path), path)
    finally:
        for path in writes:
            with suppress(OSError):
                aside(path).unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path, needed: int | None = None) -> Iterator[Path]:
    """Let the block fill an empty folder beside ``folder``, and give it that name when the block has ended.

    A folder that was there under the name is deleted only after that.

    Args:
        folder: the folder.
        needed: bytes that it will take, for the message.

    Raises:
        AsrError: it cannot be written. After this, and after any other error of the block, nothing of the new folder
            is left, and the one that was there still is.
    """
    target = folder.absolute()
    old = target.with_name(f'.{target.name}.old')
    building = writable_folder(aside(target))
    try:
        with writing(folder, needed):
            yield building
            open_to_others(building)
            remove(old)  # of a process that was killed just here; the new folder is complete by now
            before = target.is_symlink() or target.exists()
            if before:
                os.replace(target, old)
            try:
                os.replace(building, target)
            except OSError:
                if before:
                    os.replace(old, target)
                raise
            with suppress(OSError):
                remove(old)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def aside(path: Path) -> Path:
    """Where a file or folder is written before it is renamed to ``path``."""
    return path.with_name(f'.{path.name}.tmp')


@contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn whatever fails while ``path`` is written inside the block into the error of `cannot_write`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error, needed) from error
    except RuntimeError as error:  # torch has no class for a disk that is full
        if not any(word in str(error) for word in TORCH_WRITER):
            raise
        raise cannot_write(path, error, needed) from error


def cannot_write(path: Path, error: BaseException, needed: int | None = None) -> AsrError:
    """Make the error for a file or folder that cannot be written.

    Args:
        path: the file or folder.
        error: what was raised.
        needed: bytes that it takes, if that is known.
    """
    with suppress(OSError):
        free = shutil.disk_usage(nearest_existing(path)).free
        space = f'{size(free)} free' if needed is None else f'{size(needed)} needed, {size(free)} free'
        full = isinstance(error, OSError) and error.errno in FULL
        if full or not isinstance(error, OSError) or (needed is not None and free < needed):
            return AsrError(
                f'{path}: cannot be written ({reason_of(error)}); {space}: make room or choose another folder'
            )
    return AsrError(f'{path}: cannot be written ({first_line(error)}); choose another folder or check the permissions')


def reason_of(error: BaseException) -> str:
    """Why something cannot be written; torch names the position in its own file where the disk ended."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = first_line(error)
    return 'not all of it fits' if 'inline_container' in text or 'unexpected pos' in text else text


def first_line(error: BaseException) -> str:
    """First line of what an error says, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def size(count: int) -> str:
    """Write a number of bytes as people do: ``'1.4 GB'``."""
    value = float(count)
    for unit in ('bytes', 'kB', 'MB', 'GB'):
        if value < 1000:
            return f'{value:.3g} {unit}' if unit != 'bytes' else f'{count} bytes'
        value /= 1000
    return f'{value:,.1f} TB'


def open_to_others(path: Path) -> None:
    """Give a file, or every file in a folder, the permissions that new files have here.

    safetensors makes its files for their owner alone, and what is shipped is often served by another user.
    """
    mask = os.umask(0o077)  # there is no other way to ask for it
    os.umask(mask)
    for file in [path] if path.is_file() else path.rglob('*'):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(0o666 & ~mask)


def flush(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Read JSON that anyone may have written.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError('is nested too deeply') from error


def remove(path: Path) -> None:
    """Delete a file or folder; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON."""
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=2) + '\n'))


def writable_folder(path: Path) -> Path:
    """Make an empty folder, replacing what an interrupted run left under this name."""
    try:
        remove(path)
        path.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def check_could_write(folder: Path, needed: int = 1) -> None:
    """Try whether ``folder`` could be written, or made, without making it; call this before the work.

    Args:
        folder: the folder.
        needed: bytes that will be written, at least.

    Raises:
        AsrError: it could not.
    """
    nearest = nearest_existing(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise AsrError(f'{folder}: cannot be written ({nearest} does not allow it); choose another folder')
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(1))
            file.flush()
    except OSError as error:
        raise cannot_write(folder, error, needed) from error
    if shutil.disk_usage(nearest).free < needed:
        raise cannot_write(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), needed)


def nearest_existing(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def check_writable(folder: Path, needed: int = 1) -> None:
    """Make ``folder`` and try to write in it; call this before the work whose results go there.

    Args:
        folder: the folder.
        needed: bytes that will be written, at least.

    Raises:
        AsrError: it cannot be written, or has less space than needed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1))
            file.flush()
    except OSError as error:
        raise cannot_write(folder, error, needed) from error
    if shutil.disk_usage(folder).free < needed:
        raise cannot_write(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), needed)


def sha256(path: Path) -> str:
    """Hash of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def files_in(folder: Path) -> set[str]:
    """Relative paths of all files."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*') if not path.is_dir()}


def not_ours(out: Path, report: str) -> list[str]:
    """What is in the way of a folder: a file, or files that the report in it does not list as written with it.

    Args:
        out: the folder, which may not be there.
        report: name of the report, JSON with a list ``files``.
    """
    if not out.exists():
        return []
    if not out.is_dir():
        return [out.name]
    try:
        ours = set(read_json(out / report)['files'])
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    return sorted(files_in(out) - ours)
