"""The result of an ablation: a verdict, a table, JSON with named fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from asr_downstream.commands.ablation.arms import ARMS, STOCK, Arm
from asr_downstream.commands.ablation.figure import draw
from asr_downstream.commands.ablation.records import Record, by_arm, check_alike, spread
from asr_downstream.commands.ablation.statistics import LEAST, LEVEL, Comparison, Metric, compare, overall
from asr_downstream.console.text import Printed
from asr_downstream.errors import AsrError, did_you_mean
from asr_downstream.files.atomic import check_writable, write_atomically, write_json
from asr_downstream.measure.versions import versions

__all__ = ['FILE', 'Result', 'result_of', 'write']

FILE = 'ablation.json'
HEADS = ('arm', 'seeds', 'trained', 'difference', '95% interval', 'p, Holm', 'verdict', 'folded', 'parameters')


@dataclass(frozen=True, repr=False)
class Result(Printed):
    """An ablation with its verdicts.

    Attributes:
        kind: of the trainings, ``'detection'``.
        key: of the metric in the records.
        metric: what the verdicts are about, of the model as it was trained.
        reference: name of the arm that the others are compared with.
        records: of all runs.
        values: arm -> seed -> value.
        folded: the same, folded.
        comparisons: arm -> its comparison.
        labels: arm -> how it is named.
    """

    kind: str
    key: str
    metric: Metric
    reference: str
    records: Sequence[Record]
    values: Mapping[str, Mapping[int, float]]
    folded: Mapping[str, Mapping[int, float]]
    comparisons: Mapping[str, Comparison]
    labels: Mapping[str, str]

    @property
    def verdicts(self) -> list[str]:
        """The answer, and a sentence for each arm."""
        found = list(self.comparisons.values())
        return [overall(found), *map(str, found)]

    def parts(self) -> list[Table | str]:
        """Return the table and the verdicts."""
        table = Table(title=f'{self.kind}: {self.metric.name}, mean and standard deviation over seeds; last step')
        for number, head in enumerate(self.heads()):
            table.add_column(head, justify='left' if number < 2 else 'right')
        for row in self.rows():
            table.add_row(*row)
        return [table, *self.verdicts, NOTE_ON_LEVEL]

    def heads(self) -> list[str]:
        """Heads of the table."""
        reference = self.labels[self.reference]
        named = {'trained': self.metric.name, 'difference': f'{self.metric.name} - {reference}'}
        return [named.get(head, head) for head in HEADS]

    def rows(self) -> list[list[str]]:
        """Cells of the table, one row an arm."""
        return [self.row(arm) for arm in self.values]

    def row(self, arm: str) -> list[str]:
        """Cells of one arm."""
        runs = [record for record in self.records if record.arm == arm]
        comparison = self.comparisons.get(arm)
        folded = self.folded.get(arm)
        how = next((f' ({record.folding})' for record in runs if record.folding), '')
        shipped = {record.folded['parameters'] for record in runs if record.folded and 'parameters' in record.folded}
        sizes = [*{record.trained['parameters'] for record in runs if 'parameters' in record.trained}, *shipped]
        return [
            self.labels[arm],
            ', '.join(map(str, self.values[arm])),
            self.spread(self.values[arm]),
            *(self.compared(comparison) if comparison else [''] * 4),
            self.spread(folded) + how if folded else '',
            ' -> '.join(f'{round(size):,}' for size in sizes),
        ]

    def spread(self, values: Mapping[int, float]) -> str:
        """Mean and standard deviation."""
        middle, deviation = spread(list(values.values()))
        return self.metric.text(middle) + ('' if deviation is None else f' ± {self.metric.text(deviation)}')

    def compared(self, comparison: Comparison) -> list[str]:
        """Cells of a comparison: mean and spread, interval, corrected p, outcome."""
        text = self.metric.text
        mean = '' if math.isnan(comparison.mean) else text(comparison.mean, True)
        mean += '' if math.isnan(comparison.std) else f' ± {text(comparison.std)}'
        known = not math.isnan(comparison.p)
        ends = f'[{text(comparison.low, True)}, {text(comparison.high, True)}]' if known else ''
        return [mean, ends, f'{comparison.corrected:.2g}' if known else '', comparison.short]

    def markdown(self) -> str:
        """The same for a document."""
        heads = self.heads()
        lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
        lines += [f'| {" | ".join(plain(cell) for cell in row)} |' for row in self.rows()]
        first, *others = self.verdicts
        return '\n'.join([f'**{first}**', '', *lines, '', *(f'- {line}' for line in others), '', NOTE_ON_LEVEL, ''])

    def as_dict(self) -> dict[str, Any]:
        """All of it, with named fields."""
        return {
            'kind': self.kind,
            'metric': {
                'name': self.metric.name,
                'key': self.key,
                'scale': self.metric.scale,
                'higher_is_better': self.metric.higher,
                'rounded_to': self.metric.step,
            },
            'reference': self.reference,
            'verdict': self.verdicts[0],
            'level': LEVEL,
            'least_seeds': LEAST,
            'correction': 'holm',
            'arms': [self.arm_as_dict(arm) for arm in self.values],
            'comparisons': [
                {
                    'arm': arm,
                    'reference': self.reference,
                    'seeds': list(c.seeds),
                    'differences': list(c.differences),
                    'mean': number(c.mean),
                    'std': number(c.std),
                    'interval': [number(c.low), number(c.high)],
                    'p': number(c.p),
                    'p_holm': number(c.corrected),
                    'outcome': c.outcome,
                    'sentence': str(c),
                }
                for arm, c in self.comparisons.items()
            ],
            'runs': [
                {
                    'arm': record.arm,
                    'seed': record.seed,
                    'trained': record.trained,
                    'folded': record.folded,
                    'folding': record.folding,
                    'setting': record.setting,
                    **record.about,
                }
                for record in self.records
            ],
            'versions': versions(),
        }

    def arm_as_dict(self, arm: str) -> dict[str, Any]:
        """One arm."""
        values, folded = self.values[arm], self.folded.get(arm)
        middle, deviation = spread(list(values.values()))
        found: dict[str, Any] = {
            'arm': arm,
            'label': self.labels[arm],
            'seeds': list(values),
            'values': list(values.values()),
            'mean': middle,
            'std': deviation,
        }
        if folded:
            folded_middle, folded_deviation = spread(list(folded.values()))
            found['folded'] = {
                'seeds': list(folded),
                'values': list(folded.values()),
                'mean': folded_middle,
                'std': folded_deviation,
            }
        return found


NOTE_ON_LEVEL = (
    f'Intervals are of one arm each; verdicts hold the chance that any of them is false to {LEVEL:.0%} (t tests of the '
    f'differences by seed, p corrected over the arms by Holm).'
)


def plain(cell: str) -> str:
    """A cell of a table of Markdown."""
    return ' '.join(cell.replace('|', '\\|').split())


def number(value: float) -> float | None:
    """A number for JSON, which knows no NaN."""
    return value if math.isfinite(value) else None


def result_of(
    kind: str,
    metric_key: str,
    metric: Metric,
    records: Sequence[Record],
    reference: str | None = None,
    arms: Mapping[str, Arm] | None = None,
) -> Result:
    """Compare the arms of runs.

    Args:
        kind: of the trainings.
        metric_key: of the metric in the records.
        metric: what it is.
        records: of the runs.
        reference: arm to compare with; default: stock, or the first one.
        arms: name -> arm, for their order and labels.

    Raises:
        AsrError: there are no runs, or they cannot be compared.
    """
    if not records:
        raise AsrError('no run has come to its end; there is nothing to compare')
    check_alike(records)
    values = by_arm(records, metric_key)
    known = {**ARMS, **(arms or {})}
    order = [*(name for name in known if name in values), *(name for name in values if name not in known)]
    values = {arm: values[arm] for arm in order}
    if reference is None:
        reference = STOCK if STOCK in values else order[0]
    if reference not in values:
        raise AsrError(f'--reference: no complete run of {reference!r}; {did_you_mean(reference, values)}')
    values = {reference: values[reference], **values}
    labels = {arm: known[arm].label if arm in known else arm for arm in values}
    return Result(
        kind,
        metric_key,
        metric,
        reference,
        records,
        values,
        by_arm(records, metric_key, folded=True),
        compare(values, reference, metric, labels),
        labels,
    )


def write(result: Result, out: Path, more: Mapping[str, Any], say: Callable[[str], None] = print) -> None:
    """Write ``ablation.json``, ``ablation.md`` and the figure ``ablation.svg`` and ``.png``.

    Args:
        result: what to write.
        out: folder.
        more: further fields of the JSON.
        say: takes the line that names them.
    """
    check_writable(out)
    write_json(out / FILE, {**result.as_dict(), **more})
    write_atomically(out / 'ablation.md', lambda p: p.write_text(result.markdown()))
    draw(out / 'ablation', result.values, result.comparisons, result.labels, result.metric)
    say(f'{out}: {FILE}, ablation.md, ablation.svg, ablation.png')
