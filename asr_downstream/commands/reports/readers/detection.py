"""Runs of detectors: logs and configs of `train-det`, ``test.json`` of `test-det`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_downstream.commands.reports.data import aligned, is_number, json_of, numbers, rows_of, text_of
from asr_downstream.commands.reports.page import Chart, Curve, Section, Table, Verdict
from asr_downstream.commands.reports.readers.base import (
    Reader,
    config_facts,
    names_of,
    pictures_of,
    training_chart,
    version_facts,
)

__all__ = ['Detection', 'detection_rows', 'validation_chart']

METRICS = ('AP', 'AP50', 'AP75', 'segm_AP', 'segm_AP50')
COST = {'parameters': 'parameters', 'gmacs': 'GMACs', 'latency_ms': 'latency, ms'}
VALIDATED = 'coco/bbox_mAP'


class Detection(Reader):
    """Detectors."""

    def matches(self, folder: Path) -> bool:
        logged = (folder / 'last_checkpoint').is_file() or any(folder.glob('*/vis_data/scalars.json'))
        return logged or 'scored_with' in json_of(folder / 'test.json')

    def read(self, folders: Sequence[Path]) -> Section:
        section = Section('Detection')
        names = names_of(folders)
        tested = {name: json_of(folder / 'test.json') for name, folder in zip(names, folders, strict=True)}
        arms: dict[str, dict[str, Any]] = {}
        for name, found in tested.items():
            if not any(is_number(numbers.get('AP')) for numbers in arms_of(name, found).values()):
                section.verdicts.append(Verdict(f'{name}: was not tested yet (asr-downstream test-det).'))
                continue
            section.verdicts.append(verdict(name, found))
            arms |= arms_of(name, found)
        if arms:
            section.tables = [*detection_rows(arms), *classes(arms)]
        section.charts = training_chart(folders, names) + validation_chart(folders, names)
        for name, folder in zip(names, folders, strict=True):
            section.pictures += pictures_of(folder, name, 'pictures', 'vis', '.')
            section.facts += [(f'{name}: {label}', value) for label, value in facts(folder, tested[name])]
        return section


def arms_of(name: str, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Numbers of a tested run by arm."""
    folded = {how: found[how] for how in ('unfolded', 'folded') if isinstance(found.get(how), dict)}
    return {f'{name}, {how}': numbers for how, numbers in folded.items()} or {name: found}


def verdict(name: str, found: dict[str, Any]) -> Verdict:
    """What testing a run has shown."""
    before, after = found.get('unfolded'), found.get('folded')
    if not isinstance(before, dict) or not isinstance(after, dict):
        return Verdict(f'{name}: AP {text_of(found.get("AP"))}.')
    difference = found.get('difference') or {}
    same = before.get('AP') == after.get('AP')
    aps = f'AP {text_of(before.get("AP"))} unfolded, {text_of(after.get("AP"))} folded'
    if found.get('calibration'):
        return Verdict(f'{name}: folded by calibration: {aps}.', 'good' if same else 'plain')
    exact = same and not difference.get('unmatched')
    moved = f'boxes move by at most {text_of(difference.get("boxes_px"))} px' if exact else ''
    held = f'the folded detector is the trained one: {aps}; {moved}' if exact else f'folding changes it: {aps}'
    return Verdict(f'{name}: {held}.', 'good' if exact else 'bad')


def detection_rows(arms: dict[str, dict[str, Any]], title: str = 'What was measured, at the last epoch') -> list[Table]:
    """Metrics and cost, one row an arm."""
    shown = [name for name in (*METRICS, *COST) if any(is_number(arm.get(name)) for arm in arms.values())]
    columns = [aligned([arm.get(name) for arm in arms.values()]) for name in shown]
    rows = list(zip(arms, *columns, strict=True))
    return [Table(title, ['', *(COST.get(name, name) for name in shown)], rows)] if rows else []


def classes(arms: dict[str, dict[str, Any]]) -> list[Table]:
    """AP by class, one row a class."""
    found = {name: arm['classes'] for name, arm in arms.items() if isinstance(arm.get('classes'), dict)}
    names = list(dict.fromkeys(name for each in found.values() for name in each))
    if not names:
        return []
    rows = [[name, *(text_of(values(each.get(name)).get('AP', '')) for each in found.values())] for name in names]
    return [Table('AP by class', ['class', *found], rows, folded=True)]


def values(entry: Any) -> dict[str, Any]:
    """Numbers of a class."""
    return entry if isinstance(entry, dict) else {}


def validation_chart(folders: Sequence[Path], names: Sequence[str]) -> list[Chart]:
    """AP by epoch, where it was validated more than once."""
    curves = []
    for name, folder in zip(names, folders, strict=True):
        rows = [row for log in sorted(folder.glob('*/vis_data/scalars.json')) for row in rows_of(log)]
        curves.append(Curve(name, numbers(rows, 'step', VALIDATED)))
    curves = [curve for curve in curves if len(curve.points) > 1]
    return [Chart('Validation', 'epoch', 'AP', curves)] if curves else []


def facts(folder: Path, tested: dict[str, Any]) -> list[tuple[str, str]]:
    """Provenance of a run."""
    found = [('folder', str(folder)), *config_facts(folder)]
    labels = {'checkpoint': 'checkpoint', 'sha256': 'hash of the checkpoint', 'data': 'tested on'}
    found += [(label, text_of(tested[key])) for key, label in labels.items() if key in tested]
    return [*found, *version_facts(tested.get('versions'))]
