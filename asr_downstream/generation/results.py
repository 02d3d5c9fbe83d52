"""Results of evaluations: numbers with their provenance. What was measured differently never shares a column."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from asr_downstream.description import render
from asr_downstream.files import write_json

__all__ = ['FILE', 'Result', 'read_results', 'save_results', 'tables']

FILE = 'evaluation.json'
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
        numbers: keys of `COLUMNS`; pixels in [0, 255], speed as time over that of the unfolded model.
    """

    run: str
    arm: str
    step: int
    weights: str
    provenance: dict[str, Any]
    numbers: dict[str, float]

    @property
    def key(self) -> str:
        """What a result replaces: the same arm, weights and provenance."""
        return json.dumps([self.run, self.arm, self.step, self.weights, self.provenance], sort_keys=True)


def read_results(folder: Path) -> list[Result]:
    """Results kept with a run."""
    path = folder / FILE
    return [Result(**row) for row in json.loads(path.read_text())] if path.is_file() else []


def save_results(folder: Path, new: Iterable[Result]) -> None:
    """Keep results with a run, in place of earlier ones of the same arm, weights and provenance."""
    rows = {result.key: result for result in [*read_results(folder), *new]}
    write_json(folder / FILE, [asdict(row) for row in rows.values()])


def tables(results: Iterable[Result]) -> str:
    """One table for each provenance, which is written below it."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(result.provenance, sort_keys=True), []).append(result)
    return '\n\n'.join(one_table(rows) for rows in groups.values())


def one_table(rows: list[Result]) -> str:
    """Table of results of one provenance."""
    present = [name for name in COLUMNS if any(name in row.numbers for row in rows)]
    table = Table()
    for head in ('run', 'step', 'arm'):
        table.add_column(head, no_wrap=True)
    for name in present:
        table.add_column(HEADS.get(name, name), justify='right')
    for row in rows:
        cells = [COLUMNS[name].format(row.numbers[name]) if name in row.numbers else '' for name in present]
        table.add_row(row.run, str(row.step), row.arm, *cells)
    provenance = ', '.join(f'{key} {value}' for key, value in rows[0].provenance.items() if key != 'versions')
    versions = ', '.join(f'{k} {v}' for k, v in rows[0].provenance.get('versions', {}).items())
    return f'{render(table, width=180)}\n{provenance}\n{versions}'
