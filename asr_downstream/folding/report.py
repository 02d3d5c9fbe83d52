"""Reports of folding: the sites that were folded, and the measurements of calibrating. Both print as tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from asr_downstream.console.text import Printed
from asr_downstream.folding.constancy import Constancy
from asr_downstream.folding.verify import Verification

__all__ = ['Calibration', 'FoldReport', 'FoldedSite', 'Trial']


@dataclass(frozen=True)
class Trial:
    """One attempt at folding: how many groups stayed unfolded, and how much that changed the model.

    Attributes:
        kept: number of groups that stay as they are.
        change: of the outputs, root mean square over that of the outputs.
        metric: of the folded model, if one was given.
        drop: of the metric, or without one the change of the outputs; ``max_drop`` bounds it.
    """

    kept: int
    change: float
    metric: float | None
    drop: float


@dataclass(frozen=True, repr=False)
class Calibration(Printed):
    """Measurements of calibrated folding.

    Attributes:
        sites: constancy of every site with input-dependent gates, least constant last.
        kept: paths of the sites that stay unfolded.
        trials: what was tried, the one taken last.
        metric_before: of the model as it was, if a metric was given.
        refined: batch norm statistics were estimated again.
    """

    sites: tuple[Constancy, ...]
    kept: tuple[str, ...]
    trials: tuple[Trial, ...]
    metric_before: float | None = None
    refined: bool = False

    @property
    def change(self) -> float:
        """Relative change of the outputs of the folded model."""
        return self.trials[-1].change

    @property
    def metric_after(self) -> float | None:
        """Metric of the folded model."""
        return self.trials[-1].metric

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            'sites': [
                {
                    'path': s.path,
                    'over_samples': s.over_samples,
                    'over_channels': s.over_channels,
                    'stripe_ratio': s.ratio,
                    'samples': s.samples,
                    'folded': s.path not in self.kept,
                }
                for s in self.sites
            ],
            'trials': [vars(t) for t in self.trials],
            'metric_before': self.metric_before,
            'metric_after': self.metric_after,
            'output_change': self.change,
            'batch_norms_refined': self.refined,
        }

    def parts(self) -> list[Table | str]:
        table = Table(
            'site', 'std over samples', 'std over channels', 'stripe ratio', '', title='constancy of the gates'
        )
        for s in self.sites:
            numbers = (f'{v:.4f}' for v in (s.over_samples, s.over_channels, s.ratio))
            table.add_row(s.path, *numbers, 'kept' if s.path in self.kept else 'folded')
        lines: list[Table | str] = [table, f'outputs change by {self.change:.2%} (root mean square)']
        if self.metric_before is not None:
            lines.append(f'metric: {self.metric_before:.4f} before, {self.metric_after:.4f} after')
        if self.kept:
            lines.append(f'kept unfolded, within the budget: {", ".join(self.kept)}')
        return lines


@dataclass(frozen=True)
class FoldedSite:
    """One folded site.

    Attributes:
        path: name in ``named_modules()``.
        layer: name of the stock class.
        channels: number of gates; of both sides, if there are.
        gate_min, gate_mean, gate_max: of the constant gates that were folded.
        rounding: largest difference between the folded weight or bias and its float64 value, over the largest
            magnitude; half a unit in the last place of the dtype, or less.
        kept: input-dependent gates stay at this site (``dynamic='keep'``).
        saturated: what is odd about the gates, if all of them are at one end, see
            `asr_downstream.plugging.gating.gates.saturation`.
        side: what the gates scaled: ``'output'``, ``'input'`` or ``'both'``.
        shift: the largest magnitude of the shift that was folded into the bias; None: there was none.
    """

    path: str
    layer: str
    channels: int
    gate_min: float
    gate_mean: float
    gate_max: float
    rounding: float
    kept: bool = False
    saturated: str = ''
    side: str = 'output'
    shift: float | None = None


@dataclass(frozen=True, repr=False)
class FoldReport(Printed):
    """Report of `fold`.

    Attributes:
        sites: the folded sites, in the order of ``named_modules()``.
        message: one line for a person.
        spec: of the plugs, by path of the plugged part.
        calibration: what ``fold(calibrate=...)`` measured.
        checked: what ``fold(check=...)`` found, plugged against folded.
    """

    sites: tuple[FoldedSite, ...] = ()
    message: str = ''
    spec: Any = field(default=None, compare=False)
    calibration: Calibration | None = field(default=None, compare=False)
    checked: Verification | None = field(default=None, compare=False)

    @property
    def already_stock(self) -> bool:
        """There was nothing to fold."""
        return not self.sites and self.calibration is None

    def parts(self) -> list[Table | str]:
        return [*(self.calibration.parts() if self.calibration is not None else ()), self.message]
