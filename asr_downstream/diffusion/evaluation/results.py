"""Results of evaluations: numbers with their provenance. What was measured differently never shares a column."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.markup import escape
from rich.table import Table

from asr_downstream.console.text import render
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.atomic import cannot_write, check_writable, first_line, write_json, writing

__all__ = ['FILE', 'Result', 'read_results', 'save_results', 'set_aside_damaged', 'tables']

FILE = 'evaluation.json'
LOCK_SECONDS = 60.0
# Column -> how it is shown.
COLUMNS = {
    'fid': '{:.3f}',
    'kid': '{:.5f}',
    'kid_std': '{:.5f}',
    'images_per_second': '{:.2f}',
    'speed': '{:.3f}',
    'parameters': '{:,}',
    'gmacs': '{:.4f}',
    'pixels': '{:.2e}',
}
HEADS = {
    'fid': 'FID',
    'kid': 'KID',
    'kid_std': 'KID, std of subsets',
    'images_per_second': 'images/s, without VAE',
    'speed': 'time / unfolded',
    'gmacs': 'GMACs a forward',
    'pixels': 'largest pixel difference',
}


@dataclass(frozen=True)
class Result:
    """Numbers of one arm.

    Attributes:
        run: name of the run.
        arm: ``'unfolded'``, ``'folded'`` or ``'calibrated on 64'``.
        step: of the checkpoint.
        weights: hash of the file of weights.
        provenance: all that a number depends on besides the model.
        numbers: keys of `COLUMNS`, and those of metrics of a user; pixels in [0, 255], speed as time over that of the
            unfolded model.
    """

    run: str
    arm: str
    step: int
    weights: str
    provenance: dict[str, Any]
    numbers: dict[str, float]

    @property
    def key(self) -> str:
        """Key of a result: it replaces an earlier one of the same arm, weights and provenance."""
        return json.dumps([self.run, self.arm, self.step, self.weights, self.provenance], sort_keys=True)


def read_results(folder: Path) -> list[Result]:
    """Results kept with a run.

    Raises:
        CheckpointError: their file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        return [as_result(row) for row in as_list(json.loads(path.read_text(encoding='utf-8')))]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f'{path}: is damaged ({first_line(error)[:120]}); move it away, or evaluate again, which sets it aside'
        ) from error


def as_list(content: Any) -> list[Any]:
    """Check that the content of a file is a list."""
    if not isinstance(content, list):
        raise TypeError(f'holds a {type(content).__name__}, not a list')
    return content


def as_result(row: Any) -> Result:
    """Make a result of a dict, if each value is of its kind."""
    result = Result(**row)
    kinds = (result.run, str), (result.arm, str), (result.step, int), (result.weights, str), (result.provenance, dict)
    if not all(type(value) is kind for value, kind in (*kinds, (result.numbers, dict))):
        raise TypeError('a value is of another kind')
    if not isinstance(result.provenance.get('versions', {}), dict):
        raise TypeError('versions are of another kind')
    if not all(type(value) in (int, float) for value in result.numbers.values()):
        raise TypeError('a number is none')
    return result


def set_aside_damaged(folder: Path, say: Callable[[str], None] = print) -> None:
    """Rename a damaged file of results, and say so: a new evaluation writes its own.

    Args:
        folder: of the run.
        say: takes a line for the user.

    Raises:
        AsrError: it cannot be renamed.
    """
    with keeping(folder):
        set_aside(folder, say)


def set_aside(folder: Path, say: Callable[[str], None]) -> list[Result]:
    """Do the work of `set_aside_damaged`, and return the results, if they are not damaged."""
    try:
        return read_results(folder)
    except CheckpointError as error:
        names = (folder / f'{Path(FILE).stem}.damaged{n or ""}.json' for n in itertools.count())
        aside = next(path for path in names if not path.exists())
        with writing(aside):
            (folder / FILE).rename(aside)
        say(f'{error}\nset aside as {aside}')
        return []


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Let one process or thread at a time read, change and write the results of a run; the others wait.

    Raises:
        AsrError: the folder cannot be written, or another one does not come to an end.
    """
    check_writable(folder)
    lock = FileLock(folder / f'.{FILE}.lock', timeout=LOCK_SECONDS, is_singleton=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise AsrError(f'{folder / FILE}: another process has been writing it for {LOCK_SECONDS} s') from error
    except (OSError, NotImplementedError) as error:
        raise cannot_write(folder / FILE, error) from error
    try:
        yield
    finally:
        lock.release()


def save_results(folder: Path, new: Iterable[Result], say: Callable[[str], None] = print) -> None:
    """Keep results with a run, in place of earlier ones of the same arm, weights and provenance.

    Evaluations at the same time lose nothing. A file that was damaged in the meantime is set aside.

    Raises:
        AsrError: the folder cannot be written.
    """
    with keeping(folder):
        rows = {result.key: result for result in [*set_aside(folder, say), *new]}
        write_json(folder / FILE, [asdict(row) for row in rows.values()])


def tables(results: Iterable[Result]) -> str:
    """One table for each provenance, which is written below it."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(result.provenance, sort_keys=True), []).append(result)
    return '\n\n'.join(one_table(rows) for rows in groups.values())


def one_table(rows: list[Result]) -> str:
    """Table of results of one provenance."""
    names = dict.fromkeys(name for row in rows for name in row.numbers)
    present = sorted(
        names, key=lambda name: list(COLUMNS).index(name) if name in COLUMNS else -1
    )  # a user's come first
    table = Table()
    for head in ('run', 'step', 'arm'):
        table.add_column(head, no_wrap=True)
    for name in present:
        table.add_column(HEADS.get(name, escape(name)), justify='right')
    for row in rows:
        cells = [
            COLUMNS.get(name, '{:.4g}').format(row.numbers[name]) if name in row.numbers else '' for name in present
        ]
        table.add_row(row.run, str(row.step), row.arm, *cells)
    provenance = ', '.join(f'{key} {value}' for key, value in rows[0].provenance.items() if key != 'versions')
    versions = ', '.join(f'{k} {v}' for k, v in rows[0].provenance.get('versions', {}).items())
    return f'{render(table, width=180)}\n{provenance}\n{versions}'
