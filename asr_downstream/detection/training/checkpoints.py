"""Checkpoints of MMEngine's Runner, on the way back: which one a training goes on from, and whether it can.

What is chosen is whole: every part of the file has the sum that was written with it. That holds for files of plain
MMEngine too, since torch keeps a CRC of each part inside.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import write_atomically
from asr_downstream.files.weights import read_checkpoint

__all__ = ['newest', 'note_last', 'noted', 'problem', 'read_to_resume']

NOTE = 'last_checkpoint'


def note_last(work_dir: Path, checkpoint: Path) -> None:
    """Note the last checkpoint as MMEngine does, but relative to the folder, so that a copied run finds its own."""
    relative = os.path.relpath(checkpoint, work_dir)
    name = str(checkpoint.absolute()) if relative.startswith(os.pardir) else relative
    write_atomically(work_dir / NOTE, lambda p: p.write_text(name))


def noted(work_dir: Path) -> Path | None:
    """Checkpoint that the note of a run names: relative, or as plain MMEngine writes it.

    Returns:
        A path, which need not exist, or None without a note. What a copied run names is looked for in the copy first.
    """
    try:
        text = (work_dir / NOTE).read_text().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    if not text:  # MMEngine was killed while it wrote
        return None
    places = [work_dir / Path(text).name, work_dir / text, Path(text)]
    return next((place for place in places if place.is_file()), places[1])


def newest(work_dir: Path, config: Config, trust: bool = False, say: Callable[[str], None] = print) -> Path | None:
    """Find the checkpoint that a run goes on from: the one that is noted, else the one with the most steps.

    Args:
        work_dir: folder of the run.
        config: of the training.
        trust: read what needs unpickling.
        say: called with a line for each that was skipped, and why.

    Returns:
        A whole checkpoint, or None if there is none of a training, whole or not.

    Raises:
        CheckpointError: there are some, but none is whole.
    """
    first = noted(work_dir)
    skipped = False
    if first is not None:
        try:
            read_to_resume(first, config, trust)
            return first
        except CheckpointError as error:
            say(f'{error}; skipped')
            skipped = True
    found = []
    for path in sorted(work_dir.glob('*.pth')):
        if path == first or not path.is_file():
            continue
        try:
            checkpoint = read_checkpoint(path, trust, mmap=True)
        except CheckpointError as error:
            say(f'{error}; skipped')
            skipped = True
            continue
        if unfit(checkpoint, config) is None:  # else of the weights alone, such as the best ones
            meta = checkpoint['meta']
            found.append((meta['iter'], meta['epoch'], path.stat().st_mtime, path))
    for *_, path in sorted(found, reverse=True):
        if (reason := problem(path)) is None:
            return path
        say(f'{path}: {reason}; skipped')
        skipped = True
    if skipped:
        raise CheckpointError(f'{work_dir}: has no whole checkpoint to resume from; start without --resume')
    return None


def read_to_resume(path: Path, config: Config, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint to go on from; its weights stay on the disk until they are used.

    Raises:
        CheckpointError: it is missing or damaged, or says too little of its training.
    """
    checkpoint = read_checkpoint(path, trust, mmap=True)
    reason = problem(path) or unfit(checkpoint, config)
    if reason is not None:
        raise CheckpointError(f'{path}: {reason}')
    return checkpoint


def problem(path: Path) -> str | None:
    """Say what is wrong with a file that torch can open; None: every part has its sum.

    torch reads weights without looking at the sums. Files of torch before 1.6 have none.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        return f'is damaged ({error}); take another one'
    return None if bad is None else f'is damaged ({bad} has changed since it was written); take another one'


def unfit(checkpoint: Mapping[str, Any], config: Config) -> str | None:
    """Say why a training cannot go on from a checkpoint; None: it can."""
    meta = checkpoint.get('meta')
    if not isinstance(meta, Mapping) or not {'epoch', 'iter'} <= meta.keys():
        return 'does not say how far it is (meta with epoch and iter); start from its weights with --load-from'
    for key in ('epoch', 'iter'):
        if not isinstance(meta[key], int) or meta[key] < 0:
            return f'says {key}={meta[key]!r}; expected a whole number, 0 or more: take another one'
    weights = 'start from its weights with --load-from'
    if 'optimizer' not in checkpoint:
        return f'has no state of the optimiser (save_optimizer=False, or a best or published one); {weights}'
    if 'param_schedulers' not in checkpoint and config.get('param_scheduler'):
        return f'has no state of the learning rate (save_param_scheduler=False); {weights}'
    if 'message_hub' not in checkpoint:
        return f'has no message_hub, which MMEngine resumes from; {weights}'
    return None
