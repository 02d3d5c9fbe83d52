"""Finding runs: folders that a reader knows, and those below them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from asr_downstream.commands.reports.page import Section, Verdict
from asr_downstream.commands.reports.readers import READERS, Reader
from asr_downstream.errors import DataError

__all__ = ['sections_of']

DEPTH = 4
# Folders of runs that are no runs.
PARTS = ('shipped', 'tensorboard', 'data', 'vis_data', 'samples', 'evaluation', 'pictures', 'configs')
NUMBERED = ('checkpoint-', 'pipeline-')


def sections_of(paths: Sequence[Path]) -> list[Section]:
    """Read what is in folders, in the order in which they are given.

    Args:
        paths: folders of runs, or of folders of runs; or files in a run.

    Raises:
        DataError: there is nothing in one of them.
    """
    found: dict[Reader, list[Path]] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f'{path}: no such run')
        folder = path if path.is_dir() else path.parent
        known = list(walk(folder, DEPTH))
        if not known:
            raise DataError(
                f'{path}: has no run; give the folder of a training, of an ablation, of an analysis, or of the demo'
            )
        for reader, run in known:
            runs = found.setdefault(reader, [])
            if run.resolve() not in [each.resolve() for each in runs]:
                runs.append(run)
    sections = []
    for reader in [reader for reader in READERS if reader in found]:
        groups = [found[reader]] if reader.together else [[run] for run in found[reader]]
        sections += [section_of(reader, group) for group in groups]
    return sections


def section_of(reader: Reader, folders: Sequence[Path]) -> Section:
    """Read folders; where a file holds something else than it should, the section says so."""
    try:
        return reader.read(folders)
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as error:
        names = ', '.join(folder.name for folder in folders)
        text = f'{names}: cannot be read, a file is damaged ({type(error).__name__}: {error}).'
        return Section(f'{type(reader).__name__}: {names}', [Verdict(text, 'bad')])


def walk(folder: Path, depth: int) -> Iterator[tuple[Reader, Path]]:
    """Runs in a folder: the folder itself, else those below it."""
    reader = next((reader for reader in READERS if reader.matches(folder)), None)
    if reader is not None:
        yield reader, folder
    if depth and (reader is None or not reader.whole):
        for below in sorted(path for path in folder.glob('*') if path.is_dir() and not path.is_symlink()):
            if below.name in PARTS or below.name.startswith(('.', *NUMBERED)):
                continue
            for each, run in walk(below, depth - 1):
                # the trainings of the demo are part of its sections
                if reader is None or not each.together:
                    yield each, run
