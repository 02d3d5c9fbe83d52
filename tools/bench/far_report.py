"""The benchmark of FAR in three parts, each printed when it is done, and the page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import write_atomically
from bench.far import CASES, FarCase, execution_table, measure_execution, measure_tokens, token_table
from bench.far_bars import bar_table, measure_bars, measure_models

__all__ = ['CASES', 'PARTS', 'measure', 'write']

PARTS = ('bars', 'execution', 'tokens')
BARRED = ('Tiny', 'Small')
BEGIN, END = '<!-- far {}: written by tools/benchmark.py far -->', '<!-- end -->'


def measure(
    cases: Sequence[FarCase], rounds: int, parts: Sequence[str] = PARTS
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure parts of the benchmark and print each.

    Args:
        cases: sizes of modules.
        rounds: paired rounds; the parts with many rows take a share of them.
        parts: of `PARTS`.

    Returns:
        The results, for the JSON, and the texts, by part.
    """
    results: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for part in parts:
        if part == 'bars':
            rows = [row for case in cases if case.name in BARRED for row in measure_bars(case, rounds)]
            if any(case.name == 'Tiny' for case in cases):
                rows += measure_models(rounds)
            if not rows:
                continue
            results[part], texts[part] = rows, bar_table(rows)
        elif part == 'execution':
            rows = [measure_execution(case, batch, rounds) for case in cases for batch in (1, 16)]
            results[part], texts[part] = rows, execution_table(rows)
        else:
            rows = [row for case in cases for row in measure_tokens(case, max(3, rounds // 3))]
            results[part], texts[part] = rows, token_table(rows)
        print(texts[part], flush=True)
    return results, texts


def write(page: Path, texts: dict[str, str]) -> None:
    """Put what was printed between the marks of a page.

    Raises:
        AsrError: the page has no such marks.
    """
    content = page.read_text(encoding='utf-8')
    for part, text in texts.items():
        before, mark, rest = content.partition(BEGIN.format(part))
        _, end, after = rest.partition(END)
        if not end:
            raise AsrError(f'{page}: has no {BEGIN.format(part)} ... {END}, between which the figures would go')
        lines = '\n'.join(line.rstrip() for line in text.splitlines())
        content = f'{before}{mark}\n\n```text\n{lines}\n```\n\n{end}{after}'
    write_atomically(page, lambda path: path.write_text(content, encoding='utf-8'))
