"""Ablations: ``ablation.json`` of `asr-downstream ablate`, and the runs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_downstream.commands.reports.data import aligned, is_number, json_of, mean_of, spread_text, text_of
from asr_downstream.commands.reports.page import Arm, Arms, Chart, Curve, Picture, Section, Table, Verdict
from asr_downstream.commands.reports.readers.base import Reader, loss_of, pictures_of, version_facts

__all__ = ['Ablation']

FILE = 'ablation.json'
NOTE = (
    'Marks: seeds. Bar: 95% t interval of the mean, of one arm each. A thick bar is a verdict, which takes into '
    'account how many arms there are (Holm).'
)
TONES = {'better': 'good', 'worse': 'bad'}


class Ablation(Reader):
    """An ablation."""

    together = False

    def matches(self, folder: Path) -> bool:
        return (folder / FILE).is_file()

    def read(self, folders: Sequence[Path]) -> Section:
        [folder] = folders
        found = json_of(folder / FILE)
        about = found.get('metric', {})
        metric, scale = str(about.get('name', 'value')), scale_of(about)
        arms = {arm['arm']: arm for arm in found.get('arms', []) if isinstance(arm, dict) and 'arm' in arm}
        comparisons = [each for each in found.get('comparisons', []) if isinstance(each, dict)]
        section = Section(f'Ablation of {found.get("kind", "trainings")}: {folder.resolve().name}')
        any_better = any(each.get('outcome') == 'better' for each in comparisons)
        section.verdicts = [Verdict(str(found.get('verdict', 'No verdict.')), 'good' if any_better else 'plain')]
        section.verdicts += [
            Verdict(str(each.get('sentence')), TONES.get(str(each.get('outcome')), 'plain')) for each in comparisons
        ]
        reference = str(arms.get(found.get('reference'), {}).get('label', found.get('reference')))
        better = 'right' if about.get('higher_is_better', True) else 'left'
        section.arms = [
            Arms(
                f'{metric} minus that of {reference}, seed by seed',
                f'{metric} - {reference} ({better} is better)',
                [arm_of(each, label_of(arms, each), scale) for each in comparisons],
                NOTE,
            )
        ]
        section.tables = [table(metric, arms, scale), runs_table(metric, str(about.get('key', metric)), found, scale)]
        curves = [
            Curve(str(arm.get('label', name)), points)
            for name, arm in arms.items()
            if (points := mean_loss(folder, name, arm.get('seeds', [])))
        ]
        if curves:
            note = 'Mean over seeds of means of neighbouring lines of the logs.'
            section.charts = [Chart('Training loss', 'step', 'loss', curves, log=True, note=note)]
        section.pictures = pictures(folder, arms)
        command = found.get('command')
        section.facts = [
            ('folder', str(folder)),
            *([('command', f'asr-downstream {" ".join(map(str, command))}')] if isinstance(command, list) else []),
            ('correction', text_of(found.get('correction'))),
            *setting_facts(found),
            *version_facts(found.get('versions')),
        ]
        return section


def scale_of(about: dict[str, Any]) -> float:
    """What values are multiplied by to be shown, as in the sentences: 100 for points of accuracy."""
    scale = about.get('scale', 1.0)
    return float(scale) if is_number(scale) else 1.0


def scaled(value: Any, scale: float) -> Any:
    """A value as it is shown; what is no number stays what it is."""
    return value * scale if is_number(value) else value


def label_of(arms: dict[str, Any], comparison: dict[str, Any]) -> str:
    """How an arm is named."""
    name = str(comparison.get('arm'))
    return str(arms.get(name, {}).get('label', name))


def arm_of(comparison: dict[str, Any], label: str, scale: float) -> Arm:
    """Row of an arm."""
    seeds, differences = comparison.get('seeds', []), comparison.get('differences', [])
    points = [(f'seed {s}', d * scale) for s, d in zip(seeds, differences, strict=False) if is_number(d)]
    middle = comparison.get('mean')
    ends = [end * scale for end in comparison.get('interval') or () if is_number(end)]
    known = len(ends) == 2 and is_number(comparison.get('p'))
    return Arm(
        label,
        points,
        middle * scale if is_number(middle) else None,
        (ends[0], ends[1]) if known else None,
        comparison.get('outcome') in TONES,
        str(comparison.get('sentence')),
    )


def table(metric: str, arms: dict[str, Any], scale: float) -> Table:
    """Values of the arms, as trained and folded."""
    rows = []
    for name, arm in arms.items():
        folded = arm.get('folded') or {}
        rows.append(
            [
                str(arm.get('label', name)),
                text_of(arm.get('seeds', [])),
                spread_text(scaled(arm.get('mean'), scale), scaled(arm.get('std'), scale)),
                spread_text(scaled(folded.get('mean'), scale), scaled(folded.get('std'), scale))
                if folded
                else 'nothing to fold',
            ]
        )
    heads = ('arm', 'seeds', f'{metric}, as trained', f'{metric}, folded')
    return Table('Arms', heads, rows, 'Mean and standard deviation over seeds, at the last step.')


def runs_table(metric: str, key: str, found: dict[str, Any], scale: float) -> Table:
    """All runs with their hashes."""
    runs = [run for run in found.get('runs', []) if isinstance(run, dict)]
    trained = [run.get('trained') or {} for run in runs]
    folded = [run.get('folded') or {} for run in runs]
    columns = [
        [str(run.get('arm')) for run in runs],
        [text_of(run.get('seed')) for run in runs],
        aligned([scaled(numbers.get(key), scale) for numbers in trained]),
        aligned([scaled(numbers.get(key), scale) for numbers in folded]),
        [str(run.get('folding') or '') for run in runs],
        aligned([numbers.get('parameters') for numbers in trained]),
        [str(run.get('sha256', ''))[:12] for run in runs],
    ]
    rows = list(zip(*columns, strict=True))
    heads = ('arm', 'seed', metric, 'folded', 'fold', 'parameters', 'hash of the weights')
    return Table(f'All {len(rows)} runs', heads, rows, folded=True)


def mean_loss(folder: Path, arm: str, seeds: list[Any]) -> list[tuple[float, float]]:
    """Loss of the runs of an arm, mean over the seeds at the steps that all have."""
    curves = [dict(points) for seed in seeds if (points := loss_of(folder / 'runs' / f'{arm}-s{seed}'))]
    if not curves:
        return []
    steps = sorted(set.intersection(*map(set, curves)))
    return mean_of([(step, sum(curve[step] for curve in curves) / len(curves)) for step in steps], 60)


def pictures(folder: Path, arms: dict[str, Any]) -> list[Picture]:
    """Pictures of the first run of each arm."""
    found: list[Picture] = []
    for name, arm in arms.items():
        for seed in arm.get('seeds', [])[:1]:
            run = folder / 'runs' / f'{name}-s{seed}'
            found += pictures_of(run, f'{arm.get("label", name)}, seed {seed}', 'evaluation', 'pictures')[:2]
    return found


def setting_facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What all runs share."""
    runs = [run for run in found.get('runs', []) if isinstance(run, dict)]
    setting = runs[0].get('setting') if runs else None
    return [(key, text_of(value)) for key, value in setting.items()] if isinstance(setting, dict) else []
