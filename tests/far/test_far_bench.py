"""The benchmark of FAR: its bars, and the page that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench import far_report
from bench.far import MEMBERS, FarCase
from bench.far_bars import ATTENTION, TEACHER, bar_table, bars_of, measure_bars, uneven
from conftest import ROOT

from asr_downstream.errors import AsrError
from asr_downstream.measure.timing import Ratio

TINY = FarCase('Tiny', 16, 2)


def row(base: str, **medians: float) -> dict[str, Any]:
    ratios = {name.replace('_', '-'): Ratio(value, value, value) for name, value in medians.items()}
    return {'case': 'Tiny', 'batch': 1, 'base': base, 'rounds': 3, 'ratio': ratios}


def test_bars_are_met_or_missed() -> None:
    good, bad = (
        row(ATTENTION, FAR_100=1.3, FAR_50=0.85, FAR_25=0.6),
        row(ATTENTION, FAR_100=1.31, FAR_50=0.86, FAR_25=0.9),
    )
    assert [met for _, met in bars_of(good).values()] == [True, True, True]
    assert [met for _, met in bars_of(bad).values()] == [False, False, False]
    assert bars_of(row(TEACHER, FAR_50=0.9)) == {'FAR-50 at most 1.0': (0.9, True)}
    text = bar_table([good, bad, row(TEACHER, FAR_50=1.1)])
    assert text.count('MISSED') == 4
    assert 'MISSED Tiny, batch 1: FAR-50 at most 1.0: 1.100' in text


def test_bars_are_measured() -> None:
    rows = measure_bars(TINY, rounds=2)
    assert [found['batch'] for found in rows] == [1, 16]
    assert all(found['ratio'].keys() >= MEMBERS.keys() for found in rows)
    assert all(sum(pair) == 64 for pair in uneven(12))


def test_figures_are_written_between_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, texts = far_report.measure([TINY], 2, ['execution'])
    assert list(results) == ['execution']
    assert texts['execution'] in capsys.readouterr().out
    page = tmp_path / 'page.md'
    page.write_text((ROOT / 'docs/benchmarks.md').read_text())
    for text in ('earlier figures of', 'figures of'):
        far_report.write(page, {part: f'{text} {part}' for part in far_report.PARTS})
    content = page.read_text()
    assert all(f'```text\nfigures of {part}\n```' in content for part in far_report.PARTS)
    assert 'earlier figures of' not in content
    page.write_text('no marks')
    with pytest.raises(AsrError, match='has no <!-- far bars'):
        far_report.write(page, {'bars': 'text'})
