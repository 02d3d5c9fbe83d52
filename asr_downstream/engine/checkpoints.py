"""Training checkpoints: folders that are complete or not there.

A checkpoint is written to a hidden folder, completed by ``manifest.json`` with the size and hash of every file, flushed
to disk and renamed to ``checkpoint-<step>``. Old ones are deleted only after that.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files import flush, sha256, writable_folder, write_json

__all__ = [
    'aside',
    'begin',
    'checkpoints_in',
    'complete',
    'final',
    'find',
    'problem',
    'prune',
    'run_of',
    'set_aside_later',
]

NAME = re.compile(r'checkpoint-(\d+)')
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
    try:
        for path in files:
            flush(path)
        write_json(folder / MANIFEST, {'files': entries})
        flush(folder)
        if target.exists():
            shutil.rmtree(target)
        os.replace(folder, target)
        flush(target.parent)
    except OSError as error:
        raise AsrError(f'{target}: cannot be written ({error}); check the free space') from error
    return target


def prune(run: Path, limit: int | None, keep: Path) -> None:
    """Delete the oldest checkpoints until ``limit`` are left; ``keep``, just completed, is one of them."""
    if limit is None:
        return
    others = [p for p in checkpoints_in(run) if p != keep]
    for path in others[: max(0, len(others) + 1 - limit)]:
        shutil.rmtree(path)


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
        shutil.rmtree(target, ignore_errors=True)
        os.replace(path, target)


def checkpoints_in(run: Path) -> list[Path]:
    """Checkpoints of a run by step, complete or not."""
    found = [(int(m[1]), p) for p in run.glob('checkpoint-*') if p.is_dir() and (m := NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def problem(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint; None: it is complete and every file has its size and hash."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())['files']
    except FileNotFoundError:
        return f'has no {MANIFEST}'
    except (OSError, ValueError, KeyError, TypeError):
        return f'{MANIFEST} cannot be read'
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f'{name} is missing'
        if path.stat().st_size != entry['bytes']:
            return f'{name} has {path.stat().st_size:,} bytes instead of {entry["bytes"]:,}'
        if sha256(path) != entry['sha256']:
            return f'{name} has changed since it was written'
    return None


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
