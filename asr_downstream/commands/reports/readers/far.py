"""FAR: teacher, students and pruned members; ``evaluation.json`` of `evaluate-far`, logs of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_downstream.commands.reports.data import aligned, is_number, json_of, numbers, rows_of, text_of, thinned
from asr_downstream.commands.reports.page import Chart, Curve, Picture, Section, Table, Verdict
from asr_downstream.commands.reports.readers.base import Reader, config_facts, version_facts

__all__ = ['Far', 'family_section']

TEACHER = 'teacher'
NEAR = 0.01
NUMBERS = ('accuracy', 'parameters', 'gmacs', 'units')


class Far(Reader):
    """A FAR family."""

    together = False

    def matches(self, folder: Path) -> bool:
        return isinstance(json_of(folder / 'evaluation.json').get('models'), dict) or any(
            folder.glob('shipped/*/far.json')
        )

    def read(self, folders: Sequence[Path]) -> Section:
        [folder] = folders
        return family_section(folder, json_of(folder / 'evaluation.json'), f'FAR: {folder.resolve().name}')


def family_section(folder: Path, found: dict[str, Any], title: str) -> Section:
    """Section of a family.

    Args:
        folder: of the family.
        found: ``models`` by name, ``images``, ``relations`` and ``versions``, as far as they are there.
        title: of the section.
    """
    section = Section(title)
    models = {n: m for n, m in (found.get('models') or {}).items() if isinstance(m, dict)}
    section.verdicts = verdicts(models) or [Verdict('Was not evaluated yet (asr-downstream evaluate-far).')]
    if models:
        section.tables = [table(models, found)]
    relations = found.get('relations')
    if isinstance(relations, dict) and relations:
        rows = list(zip(relations, aligned([average(scores) for scores in relations.values()]), strict=True))
        note = 'Mean cosine of the rows of the maps: who looks at whom.'
        section.tables.append(Table('Similarity to the attention of the teacher', ['model', 'cosine'], rows, note))
    section.charts = stage_charts(folder)
    if (folder / 'relations.png').is_file():
        section.pictures = [Picture(folder / 'relations.png', 'Token relations: who looks at whom', wide=True)]
    section.facts = [('folder', str(folder)), *facts(folder), *version_facts(found.get('versions'))]
    return section


def verdicts(models: dict[str, dict[str, Any]]) -> list[Verdict]:
    """How far the best member is from its teacher."""
    teacher = models.get(TEACHER, {}).get('accuracy')
    others = {n: m['accuracy'] for n, m in models.items() if n != TEACHER and is_number(m.get('accuracy'))}
    if not is_number(teacher) or not others:
        return []
    best = max(others, key=lambda name: others[name])
    gap = teacher - others[best]
    how = f'{abs(gap) * 100:.1f} points {"behind" if gap > 0 else "before"}' if gap else 'equal to'
    text = f'{best} is {how} its teacher: accuracy {others[best]:.4f}, {teacher:.4f}.'
    return [Verdict(text, 'good' if gap <= NEAR else 'bad')]


def average(scores: Any) -> Any:
    """Mean of the scores of a model, which may be one."""
    found = [value for value in scores.values() if is_number(value)] if isinstance(scores, dict) else [scores]
    return sum(found) / len(found) if found and all(map(is_number, found)) else None


def table(models: dict[str, dict[str, Any]], found: dict[str, Any]) -> Table:
    """Accuracy and cost of the members."""
    heads = ['model', 'accuracy', 'parameters', 'GMACs', 'hidden units', 'time / teacher, batch 1', 'batch 32']
    columns = [aligned([each.get(key) for each in models.values()]) for key in NUMBERS]
    columns += [aligned([latency(each, batch) for each in models.values()]) for batch in (1, 32)]
    rows = list(zip(models, *columns, strict=True))
    images = found.get('images')
    return Table(
        'Teacher and members', heads, rows, f'On {text_of(images)} images that were held out.' if images else ''
    )


def latency(model: dict[str, Any], batch: int) -> Any:
    """Median of the time of a model over that of the teacher."""
    found = model.get('latency')
    found = found.get(str(batch), found.get(batch)) if isinstance(found, dict) else None
    return found[0] if isinstance(found, list | tuple) and found else None


def logs_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Logs of the stages, by the time at which they began."""
    paths = [*folder.glob('*/log.jsonl'), *folder.glob('*.jsonl')]
    paths.sort(key=lambda path: path.stat().st_mtime)
    return {p.parent.name if p.name == 'log.jsonl' else p.stem: list(rows_of(p)) for p in paths}


def stage_charts(folder: Path) -> list[Chart]:
    """Loss and accuracy of the stages by epoch."""
    logs = logs_of(folder)
    found = []
    for key, title, log in (('loss', 'Training loss by stage', True), ('val/accuracy', 'Accuracy by stage', False)):
        curves = [Curve(name, points) for name, rows in logs.items() if (points := by_epoch(rows, key))]
        if curves:
            found.append(Chart(title, 'epoch of the stage', key.rpartition('/')[2], curves, log=log))
    return found


def by_epoch(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Points of a log by epoch; validations have the epoch of the line before."""
    epoch, known = 0.0, []
    for row in rows:
        epoch = row['epoch'] if is_number(row.get('epoch')) else epoch
        known.append({**row, 'epoch': epoch})
    return thinned(numbers(known, 'epoch', key))


def facts(folder: Path) -> list[tuple[str, str]]:
    """Provenance of the stages: what their configs say."""
    found = []
    for path in sorted(folder.glob('*/config.py')):
        about = dict(config_facts(path.parent))
        found.append((f'{path.parent.name}', ', '.join(f'{k} {v}' for k, v in about.items() if k != 'config')))
    return found
