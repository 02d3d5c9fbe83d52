"""What a page consists of, as data; `asr_downstream.commands.reports.render` makes HTML of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ['Arm', 'Arms', 'Chart', 'Curve', 'Picture', 'Section', 'Table', 'Verdict', 'unique']


@dataclass(frozen=True)
class Verdict:
    """A sentence that says what came out.

    Attributes:
        text: the sentence.
        tone: ``'good'``, ``'bad'`` or ``'plain'``; the page also says it in a word.
    """

    text: str
    tone: str = 'plain'


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: above it.
        heads: of the columns.
        rows: of texts; the first of each is the head of the row.
        note: below it.
        folded: whether it is shown only when it is opened.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ''
    folded: bool = False


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: of what it is about.
        points: x and y.
    """

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Lines over steps.

    Attributes:
        title: above it.
        x, y: of the axes.
        curves: the lines.
        log: whether y is a logarithmic axis, where all values are positive.
        note: below it.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: bool = False
    note: str = ''


@dataclass(frozen=True)
class Arm:
    """A row of `Arms`.

    Attributes:
        name: of the arm.
        points: a value a seed.
        middle: the mean.
        ends: of its interval; None: there is none.
        sure: whether there is a verdict for or against it.
        text: what the row says in words.
    """

    name: str
    points: Sequence[tuple[str, float]]
    middle: float | None
    ends: tuple[float, float] | None
    sure: bool
    text: str


@dataclass(frozen=True)
class Arms:
    """Differences to a reference, with intervals.

    Attributes:
        title: above it.
        x: of the axis.
        arms: rows.
        note: below it.
    """

    title: str
    x: str
    arms: Sequence[Arm]
    note: str = ''


@dataclass(frozen=True)
class Picture:
    """A picture of a run.

    Attributes:
        path: of a PNG, JPEG or SVG file.
        caption: what it shows.
        wide: whether it takes the width of the page.
    """

    path: Path
    caption: str
    wide: bool = False


@dataclass
class Section:
    """What is said about one thing: an ablation, the detectors, a FAR family.

    Attributes:
        title: of the section.
        verdicts: first of all.
        tables, arms, charts, pictures: in this order.
        facts: provenance, label and value.
    """

    title: str
    verdicts: list[Verdict] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    arms: list[Arms] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


def unique(names: Sequence[str]) -> list[str]:
    """Number the names that stand several times."""
    numbers = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [f'{name} ({n})' if names.count(name) > 1 else name for name, n in zip(names, numbers, strict=True)]
