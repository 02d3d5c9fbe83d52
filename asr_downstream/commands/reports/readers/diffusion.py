"""Runs of diffusion models: logs, samples, ``evaluation.json`` of `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_downstream.commands.reports.data import aligned, is_number, json_of, rows_of, text_of
from asr_downstream.commands.reports.page import Chart, Curve, Section, Table, Verdict
from asr_downstream.commands.reports.readers.base import (
    Reader,
    config_facts,
    names_of,
    pictures_of,
    training_chart,
    version_facts,
)

__all__ = ['Diffusion']

UNFOLDED, FOLDED = 'unfolded', 'folded'
SAME_GREY = 0.5  # levels of 255
COLUMNS = {
    'fid': 'FID',
    'kid': 'KID',
    'parameters': 'parameters',
    'gmacs': 'GMACs a forward',
    'images_per_second': 'images/s',
    'pixels': 'largest pixel difference, of 255',
}


class Diffusion(Reader):
    """Diffusion models, and whatever the engine trains that has no kind of its own."""

    def matches(self, folder: Path) -> bool:
        return (folder / 'config.py').is_file() and next(rows_of(folder / 'log.jsonl'), None) is not None

    def read(self, folders: Sequence[Path]) -> Section:
        section = Section('Diffusion')
        names = names_of(folders)
        points: list[Curve] = []
        rows: dict[str, list[list[str]]] = {}
        shown: dict[str, list[dict[str, Any]]] = {}
        for name, folder in zip(names, folders, strict=True):
            results = [row for row in json_of(folder / 'evaluation.json', list) if is_result(row)]
            if not results:
                section.verdicts.append(Verdict(f'{name}: was not evaluated yet (asr-downstream evaluate).'))
            section.verdicts += verdicts(name, results)
            for result in results:
                measured = text_of({k: v for k, v in result['provenance'].items() if k != 'versions'})
                shown.setdefault(measured, []).append(result['numbers'])
                rows.setdefault(measured, []).append([name, text_of(result['step']), str(result['arm'])])
            points.append(Curve(name, fids(results)))
            section.facts += [(f'{name}: {label}', value) for label, value in facts(folder, results)]
            section.pictures += (
                pictures_of(folder, name, 'evaluation') or pictures_of(folder, name, 'samples', most=None)[-2:]
            )
        for measured, numbers in shown.items():  # what was measured differently never shares a table
            present = [key for key in COLUMNS if any(is_number(each.get(key)) for each in numbers)]
            cells = zip(*(aligned([each.get(key) for each in numbers]) for key in present), strict=True)
            heads = ['run', 'step', 'arm', *(COLUMNS[key] for key in present)]
            both = [[*head, *each] for head, each in zip(rows[measured], cells, strict=True)]
            section.tables.append(Table('What was measured', heads, both, measured))
        section.charts = training_chart(folders, names)
        curves = [curve for curve in points if len(curve.points) > 1]
        if curves:
            section.charts.append(
                Chart('FID by step, unfolded', 'step', 'FID', curves, log=True, note='Lower is better.')
            )
        return section


def is_result(row: Any) -> bool:
    """Whether a row is one of `evaluate`."""
    kinds = {'arm': str, 'step': int, 'weights': str, 'provenance': dict, 'numbers': dict}
    return isinstance(row, dict) and all(isinstance(row.get(key), kind) for key, kind in kinds.items())


def fids(results: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """FID by step, of the provenance that has most points."""
    groups: dict[str, dict[int, float]] = {}
    for row in results:
        if row['arm'] == UNFOLDED and is_number(row['numbers'].get('fid')):
            groups.setdefault(text_of(row['provenance']), {})[row['step']] = row['numbers']['fid']
    return sorted(max(groups.values(), key=len).items()) if groups else []


def verdicts(name: str, results: list[dict[str, Any]]) -> list[Verdict]:
    """What folding has changed, at the last step."""
    last = max((row['step'] for row in results), default=None)
    of_last = [row for row in results if row['step'] == last]
    before = next((row for row in reversed(of_last) if row['arm'] == UNFOLDED), None)
    if before is None:
        return []
    fid = before['numbers'].get('fid')
    found = []
    for row in of_last:
        if row['arm'] == UNFOLDED or row['provenance'] != before['provenance']:
            continue
        fids = f'FID {text_of(fid)} unfolded, {text_of(row["numbers"].get("fid"))} {row["arm"]}'
        pixels = row['numbers'].get('pixels')
        if row['arm'] != FOLDED:
            found.append(Verdict(f'{name}: folded by calibration: {fids}.'))
            continue
        same = is_number(pixels) and pixels < SAME_GREY
        said = 'the folded model draws the same images' if same else 'folding changes the images'
        found.append(Verdict(f'{name}: {said}: grey levels differ by at most {text_of(pixels)} of 255; {fids}.',
                             'good' if same else 'bad'))  # fmt: skip
    return found or [Verdict(f'{name}: FID {text_of(fid)} at step {text_of(last)}.')]


def facts(folder: Path, results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Provenance of a run."""
    found = [('folder', str(folder)), *config_facts(folder)]
    for row in results[-1:]:
        found += [('hash of the weights', row['weights']), *version_facts(row['provenance'].get('versions'))]
    return found
