"""Analyses: the JSON of `analyze` and the figures beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from asr_downstream.commands.reports.data import aligned, is_number, json_of, text_of, value_in
from asr_downstream.commands.reports.page import Chart, Curve, Picture, Section, Table, Verdict
from asr_downstream.commands.reports.readers.base import SUFFIXES, Reader, version_facts

__all__ = ['Analysis']

Runs = dict[str, dict[str, Any]]
TITLES = {
    'stripes': 'stripes of the gates',
    'correlation': 'correlation of the gates',
    'noise': 'noise',
    'relations': 'token relations',
    'cost': 'cost of attention',
}
COST = {
    'model.parameters': 'parameters',
    'without_attention.parameters': 'without attention',
    'model.launches': 'operators of a forward',
    'without_attention.launches': 'without attention',
    'model.saved_bytes': 'bytes saved for the backward pass',
    'without_attention.saved_bytes': 'without attention',
    'latency_ratio.median': 'time / without attention',
}


class Analysis(Reader):
    """A folder of analyses: all that are in it."""

    together = False

    def matches(self, folder: Path) -> bool:
        return bool(found_in(folder))

    def read(self, folders: Sequence[Path]) -> Section:
        [folder] = folders
        found = found_in(folder)
        section = Section(f'Analysis: {", ".join(TITLES[name] for name in found)}', facts=[('folder', str(folder))])
        for name, content in found.items():
            runs = {str(n): r for n, r in (content.get('runs') or {}).items() if isinstance(r, dict)}
            if name in READ:
                READ[name](section, runs)
            section.facts.append((f'{name}: images', text_of(content.get('images'))))
            section.facts += [(f'{name}: {run}', about(each)) for run, each in runs.items()]
            section.facts += version_facts(content.get('versions'))
        section.pictures = [Picture(path, path.stem, wide=True) for path in figures(folder)]
        section.facts = list(dict.fromkeys(section.facts))
        return section


def found_in(folder: Path) -> Runs:
    """Analyses in a folder."""
    read = {name: json_of(folder / f'{name}.json') for name in TITLES}
    return {name: content for name, content in read.items() if content.get('analysis') == name}


def about(run: dict[str, Any]) -> str:
    """Facts of a run: those values that are single."""
    return ', '.join(f'{key} {text_of(value)}' for key, value in run.items() if isinstance(value, str | int | float))


def stripes(section: Section, runs: Runs) -> None:
    """Whether gates depend on the image, and what is lost without that."""
    for name, run in runs.items():
        test = run.get('functional_test') or {}
        if is_number(test.get('change')):
            metric, before, after = (text_of(test.get(key)) for key in ('metric', 'before', 'after'))
            kept = f'; {metric} {before} before, {after} after' if is_number(test.get('after')) else ''
            text = f'{name}: gates of {text_of(test.get("replaced"))} sites replaced by their mean: outputs change by '
            section.verdicts.append(Verdict(f'{text}{test["change"]:.2%}{kept}.'))
    tests = [run.get('functional_test') or {} for run in runs.values()]
    columns = [[ratio(run) for run in runs.values()]]
    columns += [[test.get(key) for test in tests] for key in ('change', 'before', 'after')]
    heads = ['run', 'mean stripe ratio', 'outputs change by', 'metric before', 'after']
    note = 'Stripe ratio: 0 for constant gates, 1 where gates move over images as much as channels differ.'
    add(section, 'Stripes', heads, runs, columns, note)


def ratio(run: dict[str, Any]) -> float | None:
    """Mean stripe ratio of the sites."""
    sites = [site for site in run.get('sites') or () if isinstance(site, dict)]
    known = [site['stripe_ratio'] for site in sites if is_number(site.get('stripe_ratio'))]
    return mean(known) if known else None


def correlation(section: Section, runs: Runs) -> None:
    """Whether the sites of a stage say the same."""
    columns = [[run.get('mean') for run in runs.values()]]
    note = "Pearson's correlation of the gates of two sites of a stage, mean over pairs and images."
    add(section, 'Correlation', ['run', 'mean correlation'], runs, columns, note)


def cost(section: Section, runs: Runs) -> None:
    """What attention costs."""
    columns = [[value_in(run, key) for run in runs.values()] for key in COST]
    add(section, 'Cost', ['run', *COST.values()], runs, columns)


def noise(section: Section, runs: Runs) -> None:
    """What is left of the metric under noise: a chart a kind."""
    charts: dict[str, list[Curve]] = {}
    metric = next((str(run.get('metric')) for run in runs.values() if run.get('metric')), 'metric')
    for name, run in runs.items():
        for curve in [each for each in run.get('curves') or () if isinstance(each, dict)]:
            pairs = zip(curve.get('strengths') or (), curve.get('values') or (), strict=False)
            points = [(x, y) for x, y in pairs if is_number(x) and is_number(y)]
            arm = str(curve.get('arm', name))
            arm = arm if len(runs) == 1 else f'{name}, {arm}'
            charts.setdefault(str(curve.get('kind')), []).append(Curve(arm, points))
    section.charts += [Chart(f'Noise: {kind}', 'strength', metric, curves) for kind, curves in charts.items()]


def add(
    section: Section, title: str, heads: list[str], runs: Runs, columns: Sequence[Sequence[Any]], note: str = ''
) -> None:
    """Add a table with a row a run, if there is a number in it."""
    if any(is_number(value) for column in columns for value in column):
        rows = list(zip(runs, *(aligned(list(column)) for column in columns), strict=True))
        section.tables.append(Table(title, heads, rows, note))


READ: dict[str, Callable[[Section, Runs], None]] = {
    'stripes': stripes,
    'correlation': correlation,
    'cost': cost,
    'noise': noise,
}


def figures(folder: Path) -> list[Path]:
    """Figures of a folder: as PNG, whose size is known."""
    return sorted(path for path in folder.glob('*') if path.suffix in SUFFIXES)
