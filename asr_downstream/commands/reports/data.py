"""Files of runs, read as data: JSON, logs line by line, configs without running them."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from asr_downstream.files.atomic import read_json

__all__ = [
    'aligned',
    'is_number',
    'json_of',
    'literals',
    'mean_of',
    'numbers',
    'rows_of',
    'spread_text',
    'text_of',
    'thinned',
    'value_in',
]

LARGEST = 64 << 20  # bytes of a file that is read
LARGEST_NUMBER = 1e100  # sums and squares of such are numbers still
POINTS = 300  # of a curve


def json_of(path: Path, kind: type = dict) -> Any:
    """Content of a JSON file; empty if it is not there, damaged, or of another kind."""
    try:
        content = read_json(path) if path.stat().st_size <= LARGEST else None
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, kind) else kind()


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a log; those that cannot be read are left out."""
    try:
        lines = path.read_bytes().splitlines() if path.stat().st_size <= LARGEST else []
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def numbers(rows: list[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """Points of a log: finite numbers alone; of lines for the same x the last counts."""
    found = {row[x]: row[y] for row in rows if is_number(row.get(x)) and is_number(row.get(y))}
    return sorted(found.items())


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, and of a size that anything here has."""
    return type(value) in (int, float) and -LARGEST_NUMBER < value < LARGEST_NUMBER


def mean_of(points: list[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """Means of neighbours, so that at most so many points are left; x is that of the last of each."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def thinned(points: list[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """Means of neighbours, for a curve that is noisy from line to line."""
    return mean_of(points, most)


def literals(path: Path) -> dict[str, Any]:
    """Top-level values of a Python config that are literals or ``dict(...)``; nothing is run."""
    try:
        tree = ast.parse(path.read_text(encoding='utf-8')) if path.stat().st_size <= 1 << 20 else None
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    found: dict[str, Any] = {}
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = literal(node.value)
            except (ValueError, RecursionError):
                continue
    return found


def literal(node: ast.expr) -> Any:
    """Value of an expression that is a literal.

    Raises:
        ValueError: it is none.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {keyword.arg: literal(keyword.value) for keyword in node.keywords if keyword.arg}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {literal(key): literal(value) for key, value in pairs if key is not None}
    if isinstance(node, ast.List | ast.Tuple):
        return [literal(item) for item in node.elts]
    return ast.literal_eval(node)


def value_in(content: Any, path: str, default: Any = None) -> Any:
    """Value at ``'randomness.seed'`` of nested dicts."""
    for key in path.split('.'):
        if not isinstance(content, Mapping) or key not in content:
            return default
        content = content[key]
    return content


def text_of(value: Any) -> str:
    """A value for a person: numbers short, dicts as ``key value``."""
    if isinstance(value, bool) or value is None:
        return {True: 'yes', False: 'no', None: 'none'}[value]
    if isinstance(value, int):
        return f'{value:,}'
    if isinstance(value, float):
        return f'{value:.4g}'
    if isinstance(value, Mapping):
        return ', '.join(f'{key} {text_of(item) if not isinstance(item, str) else item}' for key, item in value.items())
    if isinstance(value, list | tuple):
        return ', '.join(map(text_of, value))
    return str(value)


def aligned(values: list[Any]) -> list[str]:
    """Texts of a column: whole numbers as such, others with one number of digits; empty for what is no number."""
    found = [value for value in values if is_number(value)]
    if all(isinstance(value, int) for value in found):
        return [f'{value:,}' if is_number(value) else '' for value in values]
    digits = digits_of(max(map(abs, found)), 4)
    return [f'{value:,.{digits}f}' if is_number(value) else '' for value in values]


def digits_of(value: float, significant: int) -> int:
    """Digits after the point, so that so many of a number are shown in all."""
    value = float(f'{value:.{significant - 1}e}')  # 0.0999 is shown as 0.10
    return min(8, max(0, significant - 1 - math.floor(math.log10(value)))) if value else significant - 1


def spread_text(mean: Any, deviation: Any) -> str:
    """Mean and standard deviation, both with the digits that say something."""
    if not is_number(mean):
        return ''
    if not is_number(deviation) or not deviation:
        return text_of(mean)
    digits = digits_of(deviation, 2)
    return f'{mean:.{digits}f} ± {deviation:.{digits}f}'
