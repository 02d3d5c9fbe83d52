"""Report of removing native attention: each block, where its gates went, and what that did to the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from asr_downstream.console.text import Printed
from asr_downstream.folding.report import Calibration
from asr_downstream.folding.verify import Verification
from asr_downstream.measure.timing import Ratio

__all__ = ['NativeBlock', 'NativeReport']

IN_BUDGET = 'its gates move, and without it more than max_drop would be lost'


@dataclass(frozen=True)
class NativeBlock:
    """One attention block.

    Attributes:
        path: name in ``named_modules()``.
        kind: name of its class.
        channels: number of gates; 0 if they were not measured.
        ratio: stripe ratio of its gates; None if they were not measured.
        layer: what its gates can fold into; '' if there is nothing.
        side: ``'outputs'`` or ``'inputs'`` of that layer.
        error: largest relative difference when that was tried with random gates in float64.
        kept: why the block is still there; '' if it was removed.
    """

    path: str
    kind: str
    channels: int = 0
    ratio: float | None = None
    layer: str = ''
    side: str = ''
    error: float | None = None
    kept: str = ''

    @property
    def place(self) -> str:
        """Side and layer, from where the path of the layer leaves that of the block; '' if there is none."""
        if not self.layer:
            return ''
        ours, theirs = self.path.split('.'), self.layer.split('.')
        same = next(i for i, (a, b) in enumerate(zip([*ours, ''], theirs, strict=False)) if a != b)
        same -= bool(same and theirs[same].isdigit())  # 'layer.1' and not '1'
        return f'{self.side} of {".".join(theirs[same:])}'


@dataclass(frozen=True, repr=False)
class NativeReport(Printed):
    """Report of `asr_downstream.fold_native`.

    Attributes:
        blocks: all attention blocks, in the order of ``named_modules()``.
        calibration: constancy of the gates of those that can be folded, the change of the outputs, and the metric.
        checked: the folded model against the one with the mean gates in the place of the blocks.
        parameters: of the model before and after.
        latency: of the folded model over that of the model, on a batch of the data, in turns; None: not measured.
        batch: shape of that batch.
    """

    blocks: tuple[NativeBlock, ...] = ()
    calibration: Calibration | None = None
    checked: Verification | None = None
    parameters: tuple[int, int] = (0, 0)
    latency: Ratio | None = None
    batch: str = ''

    @property
    def removed(self) -> tuple[str, ...]:
        """Paths of the blocks that are gone: what `asr_downstream.remove_native` needs to build the model again."""
        return tuple(block.path for block in self.blocks if not block.kept)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            'removed': list(self.removed),
            'blocks': [asdict(block) for block in self.blocks],
            'calibration': None if self.calibration is None else self.calibration.as_dict(),
            'fold_difference': None if self.checked is None else self.checked.relative,
            'parameters_before': self.parameters[0],
            'parameters_after': self.parameters[1],
            'latency_ratio': None if self.latency is None else self.latency._asdict(),
            'latency_batch': self.batch,
        }

    def parts(self) -> list[Table | str]:
        table = Table('block', 'class', 'gates', 'stripe ratio', 'folds into', '', title='attention of the model')
        for b in self.blocks:
            ratio = '' if b.ratio is None else f'{b.ratio:.4f}'
            table.add_row(b.path, b.kind, str(b.channels or ''), ratio, b.place, 'kept' if b.kept else 'removed')
        lines: list[Table | str] = [table, f'removed {len(self.removed)} of {len(self.blocks)} blocks']
        lines += [f'kept {b.path}: {b.kept}' for b in self.blocks if b.kept]
        if self.calibration is not None:
            lines.append(f'outputs change by {self.calibration.change:.2%} (root mean square)')
            if self.calibration.metric_before is not None:
                found = self.calibration
                lines.append(f'metric: {found.metric_before:.4f} before, {found.metric_after:.4f} after')
        if self.checked is not None:
            lines.append(f'folding the mean gates changes the outputs by {self.checked.relative:.1e}')
        before, after = self.parameters
        lines.append(f'parameters: {before:,} before, {after:,} after ({after / max(1, before) - 1:+.1%})')
        if self.latency is not None:
            lines.append(f'time of a batch {self.batch}: {self.latency} of what it was (median and quartiles)')
        if self.removed:
            lines.append(
                'the weights of the removed blocks are gone: to load the rest into a fresh model, first '
                'remove_native(model, report.removed), or use a config that has no such attention'
            )
        return lines
