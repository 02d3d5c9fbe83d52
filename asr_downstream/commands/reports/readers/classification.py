"""Runs of image classifiers: logs and ``evaluation.json`` of `train-cls`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_downstream.commands.reports.data import aligned, is_number, json_of, numbers, text_of, value_in
from asr_downstream.commands.reports.page import Chart, Curve, Section, Table, Verdict
from asr_downstream.commands.reports.readers.base import (
    Reader,
    config_facts,
    names_of,
    training_chart,
    version_facts,
)

__all__ = ['Classification']

COLUMNS = {
    'accuracy.plugged': 'accuracy',
    'accuracy.folded': 'folded',
    'parameters.plugged': 'parameters',
    'parameters.folded': 'folded',
}


class Classification(Reader):
    """Image classifiers."""

    def matches(self, folder: Path) -> bool:
        return is_number(value_in(json_of(folder / 'evaluation.json'), 'accuracy.plugged'))

    def read(self, folders: Sequence[Path]) -> Section:
        section = Section('Classification')
        names = names_of(folders)
        found = {name: json_of(folder / 'evaluation.json') for name, folder in zip(names, folders, strict=True)}
        section.verdicts = [verdict(name, each) for name, each in found.items()]
        columns = [aligned([value_in(each, key) for each in found.values()]) for key in COLUMNS]
        rows = list(zip(names, *columns, strict=True))
        images = {text_of(each.get('images')) for each in found.values()}
        note = f'Last epoch, on {" or ".join(images)} images that were held out.'
        section.tables = [Table('What was measured', ['run', *COLUMNS.values()], rows, note)]
        section.charts = training_chart(folders, names)
        curves = [Curve(name, validations(each)) for name, each in found.items()]
        if any(len(curve.points) > 1 for curve in curves):
            section.charts.append(Chart('Accuracy on the images held out', 'epoch', 'accuracy', curves))
        for name, folder in zip(names, folders, strict=True):
            section.facts += [(f'{name}: {label}', value) for label, value in facts(folder, found[name])]
        return section


def verdict(name: str, found: dict[str, Any]) -> Verdict:
    """What folding has changed."""
    plugged, folded = value_in(found, 'accuracy.plugged'), value_in(found, 'accuracy.folded')
    text = f'{name}: accuracy {text_of(plugged)}'
    if not is_number(folded) or found.get('plug') is None:
        return Verdict(f'{text}.')
    how = 'folded by calibration' if found.get('calibration') else 'folded'
    text = f'{text}, {text_of(folded)} {how}.'
    return Verdict(text, 'good' if plugged == folded else 'plain' if found.get('calibration') else 'bad')


def validations(found: dict[str, Any]) -> list[tuple[float, float]]:
    """Accuracy by epoch."""
    rows = found.get('validations')
    return (
        numbers([row for row in rows if isinstance(row, dict)], 'epoch', 'accuracy') if isinstance(rows, list) else []
    )


def facts(folder: Path, found: dict[str, Any]) -> list[tuple[str, str]]:
    """Provenance of a run."""
    about = [('folder', str(folder)), *config_facts(folder)]
    about.append(('hash of the weights', text_of(value_in(found, 'weights.sha256', ''))))
    return [*about, *version_facts(found.get('versions'))]
