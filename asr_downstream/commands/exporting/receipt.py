"""The receipt of an export: what was written, how far it differs from torch, how fast it is, where it is from."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from rich.table import Table

from asr_downstream.console.text import Printed
from asr_downstream.files.atomic import size
from asr_downstream.measure.versions import versions

__all__ = ['BOXES', 'PARITY', 'RECEIPT', 'Entry', 'Receipt']

RECEIPT = 'receipt.json'
PARITY = 1e-4  # largest difference of an output, relative to its largest magnitude
BOXES = 0.01  # largest difference of matched boxes, pixels
PACKAGES = ('onnx', 'onnxscript', 'onnxruntime', 'transformers')


@dataclass
class Entry:
    """One model, or one file that holds it.

    Attributes:
        name: ``'torch'``, or that of the file.
        relative: largest relative difference of the raw outputs to those of torch.
        bytes: of the file.
        sha256: of the file.
        latency_ms: median time of one call.
        ratio: of that time to torch's, paired.
        metrics: on the data.
        facts: of its format; for whole detectors also how far the boxes are from torch's.
    """

    name: str
    relative: float | None = None
    bytes: int | None = None
    sha256: str | None = None
    latency_ms: float | None = None
    ratio: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(repr=False)
class Receipt(Printed):
    """What an export has written and measured; prints as a table.

    Attributes:
        model: class of the model.
        kind: of model.
        data: what it was compared on.
        entries: torch, then the files.
        varies: what may vary, input by input.
        sources: file that was read -> its hash.
        threads: of the times.
        files: all that was written.
        about: further facts; ``whole``: why a detector has no whole file.
    """

    model: str
    kind: str
    data: str
    entries: list[Entry]
    varies: dict[str, dict[str, str]]
    sources: dict[str, str]
    threads: int
    files: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found = versions()
        for package in PACKAGES:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        exports = {}
        for entry in self.entries:
            given = {key: value for key, value in vars(entry).items() if value not in (None, {})}
            exports[given.pop('name')] = {**given, **given.pop('facts', {})}
        return {
            'model': self.model,
            'kind': self.kind,
            'sources': self.sources,
            'data': self.data,
            'tolerance': PARITY,
            'varies': self.varies,
            'threads': self.threads,
            'exports': exports,
            **self.about,
            'versions': found,
            'files': self.files,
        }

    def parts(self) -> list[Table | str]:
        metrics = list(dict.fromkeys(name for entry in self.entries for name in entry.metrics))
        boxes = any('boxes_px' in entry.facts for entry in self.entries)
        heads = ['size', 'relative difference', *(['boxes, px'] if boxes else []), *metrics, 'latency, ms', 'of torch']
        table = Table('', *heads, title=f'{self.model}; {self.data}; {self.threads} threads')
        for column in table.columns[1:]:
            column.justify = 'right'
        for e in self.entries:
            px = e.facts.get('boxes_px')
            table.add_row(
                e.name,
                '' if e.bytes is None else size(e.bytes),
                '' if e.relative is None else f'{e.relative:.1e}',
                *([('' if px is None else f'{px:.1e}')] if boxes else []),
                *(f'{e.metrics[name]:.4f}' if name in e.metrics else '' for name in metrics),
                '' if e.latency_ms is None else f'{e.latency_ms:.2f}',
                '' if e.ratio is None else f'x {e.ratio:.3f}',
            )
        free = {f'{name} {axis}: {text}' for name, axes in self.varies.items() for axis, text in axes.items()}
        whole = [f'whole: {self.about["whole"]}'] if 'whole' in self.about else []
        return [table, f'may vary: {", ".join(sorted(free)) or "nothing"}', *whole]
