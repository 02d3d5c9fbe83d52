"""`describe`: the table of the replaced attentions of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from asr_downstream.console.text import Printed
from asr_downstream.errors import PlugError
from asr_downstream.far.model.backends import rules
from asr_downstream.far.model.mixer import Mixer
from asr_downstream.measure.cost import parameters

__all__ = ['Description', 'Row', 'check_replaced', 'describe', 'mixers']


@dataclass(frozen=True)
class Row:
    """One replacement.

    Attributes:
        path: of the attention, in ``named_modules()``.
        variant: M1, M2 or M3.
        channels: of a token.
        widths: hidden units of each head, (ahead, back).
        parameters: of the LSTMs and their projections, or of queries, keys and values, without a projection that is the
            teacher's.
        execution: how the heads run, a key of `EXECUTIONS` or ``'auto'``, see `rules`.
        scan: in which order they read the tokens, a key of `SCANS`; '' where there is no order.
        mixer: what was put in, a key of `MIXERS`.
        heads: their number.
        full: hidden units before pruning; 0 where there are none.
    """

    path: str
    variant: str
    channels: int
    widths: tuple[tuple[int, int], ...]
    parameters: int
    execution: str
    scan: str
    mixer: str
    heads: int
    full: int

    @property
    def units(self) -> int:
        """Hidden units of all heads and directions."""
        return sum(map(sum, self.widths))


@dataclass(frozen=True, repr=False)
class Description(Printed):
    """The replacements of a model; prints as a table."""

    model: str
    rows: tuple[Row, ...]

    def parts(self) -> list[Table | str]:
        if not self.rows:
            return [f'{self.model}: no attention is replaced']
        total = sum(row.parameters for row in self.rows)
        units, full = sum(row.units for row in self.rows), sum(row.full for row in self.rows)
        title = f'{self.model}: {len(self.rows)} attentions replaced, {total:,} parameters'
        title += f', {units:,} of {full:,} units' if full else ''
        table = Table('attention', 'mixer', 'form', 'heads', 'units', 'parameters', 'scan', 'execution', title=title)
        for column in table.columns[3:6]:
            column.justify = 'right'
        for row in self.rows:
            count = f'{row.units:,} of {row.full:,}' if row.full else 'none'
            numbers = str(row.heads), count, f'{row.parameters:,}'
            table.add_row(
                row.path, row.mixer, row.variant, *numbers, row.scan or 'no order', row.execution or 'one way'
            )
        auto = rules() if any(row.execution == 'auto' for row in self.rows) else {}
        return [table, *(f'auto on {device}: {rule}' for device, rule in auto.items())]


def mixers(model: nn.Module) -> Iterator[tuple[str, Mixer]]:
    """What was put into a model, with the paths of the attentions it stands in for."""
    for path, module in model.named_modules():
        if isinstance(module, Mixer):
            yield path.removesuffix('mixer').rstrip('.').removesuffix('.processor'), module


def check_replaced(model: nn.Module) -> None:
    """Refuse a model on which `replace` was not called itself.

    Raises:
        PlugError: nothing is replaced, or a part of it was, whose spec the model does not know.
    """
    if getattr(model, 'replace_spec', None) is None:
        paths = [path for path, _ in mixers(model)]
        what = f'{paths[0]} was replaced in a part of it; give that part' if paths else 'no attention is replaced'
        raise PlugError(f'{type(model).__name__}: {what}, or call replace(model, spec) on the whole model')


def describe(model: nn.Module) -> Description:
    """List the replaced attentions of ``model``: path, form, units, parameters, and how they are run."""
    rows = []
    for path, mixer in mixers(model):
        about = mixer.variant, mixer.channels, tuple(mixer.widths), parameters(mixer), mixer.execution
        rows.append(Row(path, *about, mixer.reads, mixer.name, mixer.count, mixer.full))
    return Description(type(model).__name__, tuple(rows))
