"""Training checkpoints: folders that are complete or not there.

A checkpoint is written to a hidden folder, completed by ``manifest.json`` with the size and hash of every file, flushed
to disk and renamed to ``checkpoint-<step>``. Old ones are deleted only after that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import (
    flush,
    open_to_others,
    read_json,
    remove,
    sha256,
    writable_folder,
    write_json,
    writing,
)

__all__ = [
    'aside',
    'begin',
    'checkpoints_in',
    'complete',
    'final',
    'find',
    'problem',
    'prune',
    'remove_leftovers',
    'run_of',
    'set_aside_later',
    'step_of',
]

NAME = re.compile(r'checkpoint-(\d+)')
LEFTOVER = re.compile(r'\.checkpoint-\d+\.tmp|\.(log\.jsonl|config\.py)\.tmp')
MANIFEST = 'manifest.json'


def aside(run: Path, step: int) -> Path:
    """Hidden folder that the checkpoint of ``step`` is written to."""
    return run / f'.checkpoint-{step}.tmp'


def final(run: Path, step: int) -> Path:
    """Folder of the complete checkpoint of ``step``."""
    return run / f'checkpoint-{step}'


def begin(run: Path, step: int) -> Path:
    """Make the hidden folder, empty."""
    return writable_folder(aside(run, step))


def complete(run: Path, step: int) -> Path:
    """Complete a hidden folder: manifest, flush, rename.

    Returns:
        The checkpoint ``checkpoint-<step>``; one that was there under this name is replaced.

    Raises:
        AsrError: it cannot be written.
    """
    folder, target = aside(run, step), final(run, step)
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    entries = {p.relative_to(folder).as_posix(): {'bytes': p.stat().st_size, 'sha256': sha256(p)} for p in files}
    with writing(target):
        open_to_others(folder)
        for path in files:
            flush(path)
        write_json(folder / MANIFEST, {'files': entries})
        flush(folder)
        remove(target)
        os.replace(folder, target)
        flush(target.parent)
    return target


def prune(run: Path, limit: int | None, keep: Path, report: Callable[[str], None] = print) -> None:
    """Delete the oldest checkpoints until ``limit`` are left.

    Args:
        run: folder of the run.
        limit: None: all stay.
        keep: one of them, which was just completed.
        report: called with a line for each that cannot be deleted.
    """
    if limit is None:
        return
    others = [p for p in checkpoints_in(run) if p != keep]
    for path in others[: max(0, len(others) + 1 - limit)]:
        try:
            remove(path)
        except OSError as error:
            report(f'{path}: cannot be deleted ({error.strerror or error}); delete it when the disk fills')


def remove_leftovers(run: Path) -> None:
    """Remove what runs that were killed have left half-written, which keeps a disk full."""
    for path in run.iterdir():
        if LEFTOVER.fullmatch(path.name):
            with suppress(OSError):
                remove(path)


def set_aside_later(run: Path, start: Path) -> None:
    """Rename incomplete checkpoints after ``start``: the run that goes on from there writes its own.

    Raises:
        CheckpointError: a later one is complete: it belongs to another course of the run.
    """
    found = checkpoints_in(run)
    if start.resolve() not in [p.resolve() for p in found]:
        return  # of another run
    later = found[[p.resolve() for p in found].index(start.resolve()) + 1 :]
    if whole := [path.name for path in later if problem(path) is None]:
        raise CheckpointError(
            f'{start}: the run went on to {", ".join(whole)}; delete or move those to go on from here, or choose '
            f'another folder for the new course with --output-dir'
        )
    for path in later:
        target = path.with_name(f'incomplete-{path.name}')
        with writing(target):
            remove(target)
            os.replace(path, target)


def checkpoints_in(run: Path) -> list[Path]:
    """Checkpoints of a run by step, complete or not."""
    found = [(int(m[1]), p) for p in run.glob('checkpoint-*') if p.is_dir() and (m := NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int | None:
    """Step in the name of a checkpoint; None: it has another name."""
    found = NAME.fullmatch(checkpoint.name) or NAME.fullmatch(checkpoint.resolve().name)
    return int(found[1]) if found else None


def problem(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint; None: it is complete and every file has its size and hash."""
    try:
        files = entries_of(read_json(checkpoint / MANIFEST))
    except FileNotFoundError:
        return f'has no {MANIFEST}'
    except (OSError, ValueError) as error:
        return f'{MANIFEST} cannot be read ({error})'
    for name, (size, hashed) in files.items():
        path = checkpoint / name
        try:
            if not path.is_file():
                return f'{name} is missing'
            if path.stat().st_size != size:
                return f'{name} has {path.stat().st_size:,} bytes instead of {size:,}'
            if sha256(path) != hashed:
                return f'{name} has changed since it was written'
        except OSError as error:
            return f'{name} cannot be read ({error})'
    return None


def entries_of(manifest: Any) -> dict[str, tuple[int, str]]:
    """Files of a manifest with their sizes and hashes.

    Raises:
        ValueError: it is not of the form that `complete` writes.
    """
    files = manifest.get('files') if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError('it lists no files')
    found = {}
    for name, entry in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or '..' in path.parts or '\0' in name or not path.parts:
            raise ValueError(f'{name!r} is no file of the checkpoint')
        size, hashed = (entry.get('bytes'), entry.get('sha256')) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or not isinstance(hashed, str):
            raise ValueError(f'{name} has no size and hash')
        found[name] = size, hashed
    return found


def find(run: Path, which: str = 'latest', report: Callable[[str], None] = print) -> Path:
    """Find a checkpoint to read.

    Args:
        run: folder of the run.
        which: ``'latest'`` for the newest complete one, or the path of one.
        report: called with a line for each that was skipped and why.

    Raises:
        CheckpointError: there is none, or the one that was named is not complete.
    """
    if which != 'latest':
        path = Path(which)
        if not path.is_dir():
            names = [p.name for p in checkpoints_in(path.parent)] if path.parent.is_dir() else []
            raise CheckpointError(f'{path}: no such checkpoint; {"there is " + ", ".join(names) if names else ""}')
        if NAME.fullmatch(path.resolve().name) is None:
            return find(path, report=report)  # the folder of a run
        if reason := problem(path):
            raise CheckpointError(f'{path}: {reason}; it cannot be used, take another one')
        return path
    found = checkpoints_in(run)
    for path in reversed(found):
        reason = problem(path)
        if reason is None:
            return path
        report(f'{path}: {reason}; skipped')
    what = 'no complete checkpoint' if found else 'no checkpoint'
    raise CheckpointError(f'{run}: has {what}; train it first, or start without --resume')


def run_of(path: Path) -> Path:
    """Folder of the run that a path, of a run or of a checkpoint, belongs to."""
    path = path.resolve()
    return path.parent if NAME.fullmatch(path.name) else path
