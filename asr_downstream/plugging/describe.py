"""`describe`: the table of the sites of a plugged model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from asr_downstream.console.text import Printed, some
from asr_downstream.errors import PlugError
from asr_downstream.modules.affine import output_channels
from asr_downstream.modules.check import check_module
from asr_downstream.plugging.attach import orphans
from asr_downstream.plugging.gating.gates import ConstantGate, Gate, side_of
from asr_downstream.plugging.gating.shared_unit import SharedUnit
from asr_downstream.plugging.gating.sides import INPUT, OUTPUT
from asr_downstream.plugging.kernels.gated_batch_norm import fusible
from asr_downstream.plugging.kernels.memory import LOW, PLAIN, chosen
from asr_downstream.plugging.kernels.recompute import regainable
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.learning.choose import KEPT, Learning
from asr_downstream.plugging.save import starts
from asr_downstream.plugging.sites import find_sites

__all__ = ['Description', 'SharedRow', 'SiteRow', 'StartRow', 'check_connected', 'describe']


@dataclass(frozen=True)
class SiteRow:
    """One site: where it is, what it is, and what scales it.

    Attributes:
        path: name in ``named_modules()``.
        layer: name of the stock class.
        channels: number of gates, of the output if it has some.
        plug: such as ``'ASR(SE) + Attention(SE)'``, ``'ASR(SE) + shift'``, ``'input ASR(SE)'`` or
            ``'Start(0.5) + ASR(SE)'``.
        parameters: number of parameters that the plug added here, without shared ones.
        folds: whether all its gates are constant.
        memory: form of its input-dependent gates in training, ``'plain'`` or ``'low'``; ``''`` without such.
        side: what the gates scale: ``'output'``, ``'input'`` or ``'both'``.
    """

    path: str
    layer: str
    channels: int
    plug: str
    parameters: int
    folds: bool
    memory: str = ''
    side: str = OUTPUT


@dataclass(frozen=True)
class StartRow:
    """A layer that was scaled when it was plugged and is stock, see `asr_downstream.plugging.plugs.start`.

    Attributes:
        path: name in ``named_modules()``.
        layer: name of its class.
        channels: number of its output channels.
        value: by what it was multiplied.
    """

    path: str
    layer: str
    channels: int
    value: float


@dataclass(frozen=True)
class SharedRow:
    """An attention that sites share.

    Attributes:
        name: of the stage.
        attention: its class.
        sites: paths of the sites, in the order in which a state runs along them.
        parameters: number of its parameters.
    """

    name: str
    attention: str
    sites: tuple[str, ...]
    parameters: int


@dataclass(frozen=True, repr=False)
class Description(Printed):
    """The sites of a model; prints as a table.

    Attributes:
        model: class name of the model.
        sites: one row a site with gates, in the order of ``named_modules()``.
        shared: one row a shared attention.
        candidates: where nothing is plugged: paths of the layers that ``sites='residual'`` means.
        learning: what learns, where that is not everything; see `asr_downstream.plugging.learning.restrict.restrict`.
        starts: one row a site without gates that was scaled.
    """

    model: str
    sites: tuple[SiteRow, ...]
    shared: tuple[SharedRow, ...] = ()
    candidates: tuple[str, ...] = ()
    learning: Learning | None = None
    starts: tuple[StartRow, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters that plugging added."""
        return sum(row.parameters for row in self.sites) + sum(unit.parameters for unit in self.shared)

    def parts(self) -> list[Table | str]:
        return [*self.tables(), *([] if self.learning is None else self.learning.parts())]

    def tables(self) -> list[Table | str]:
        """Return the table of the sites, or a line that says what could be one."""
        if not self.sites and not self.starts:
            found = f"sites='residual' means {some(list(self.candidates))}"
            return [f'{self.model}: no plugged sites; {found if self.candidates else "no residual block is known"}']
        sites = len(self.sites) + len(self.starts)
        table = Table(title=f'{self.model}: {sites} sites, {self.parameters:,} parameters added')
        for name, justify in (('site', 'left'), ('layer', 'left'), ('channels', 'right'), ('plug', 'left')):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        table.add_column('parameters', justify='right')
        table.add_column('folds')
        forms, sides = any(row.memory for row in self.sites), any(row.side != OUTPUT for row in self.sites)
        for name in ['memory'] * forms + ['side'] * sides:
            table.add_column(name)
        for row in self.sites:
            folds = 'exactly' if row.folds else 'no: depends on the input'
            cells = row.path, row.layer, str(row.channels), row.plug, f'{row.parameters:,}', folds
            table.add_row(*cells, *[row.memory] * forms, *[row.side] * sides)
        for start in self.starts:
            table.add_row(start.path, start.layer, str(start.channels), start_label(start.value), '0', 'is stock')
        for unit in self.shared:
            if unit is self.shared[0]:
                table.add_section()
            count = f'{len(unit.sites)} sites'
            table.add_row(unit.name, count, '', f'shared {unit.attention}', f'{unit.parameters:,}', '')
        return [table]


def describe(model: nn.Module) -> Description:
    """List the plugged sites of ``model``: path, stock class, channels, plug, parameters added, whether it folds.

    Of a stock model, say which sites there are to plug.
    """
    check_module(model, 'describe')
    rows = []
    units: dict[SharedUnit, list[str]] = {}
    scaled = starts(model)
    for path, layer in model.named_modules():
        if not isinstance(layer, Plugged):
            continue
        gates: list[Gate] = [*(layer.gate or ()), *(layer.dynamic or ())]  # type: ignore[attr-defined]
        for gate in gates:
            if (unit := gate.site_attention.unit) is not None:
                units.setdefault(unit, []).append(path)
        outputs = [gate for gate in gates if gate.side == OUTPUT]
        rows.append(
            SiteRow(
                path=path,
                layer=layer.stock.__name__,
                channels=(outputs or gates)[0].channels,
                plug=' + '.join([*([start_label(scaled.pop(path))] if path in scaled else []), *label(gates)]),
                parameters=sum(p.numel() for gate in gates for p in gate.parameters()),
                folds=all(isinstance(gate, ConstantGate) for gate in gates),
                memory=training_form(layer),
                side=side_of(gates),
            )
        )
    check_connected(model)
    shared = tuple(shared_row(unit, paths) for unit, paths in units.items())
    found = () if rows or scaled else candidates(model)
    stock = tuple(start_row(path, model.get_submodule(path), value) for path, value in scaled.items())
    return Description(type(model).__name__, tuple(rows), shared, found, vars(model).get(KEPT), stock)


def start_row(path: str, layer: nn.Module, value: float) -> StartRow:
    """Row of a stock layer that was scaled."""
    return StartRow(path, type(layer).__name__, output_channels(layer), value)


def start_label(value: float) -> str:
    """What the column of plugs says of a scaled layer."""
    return f'Start({value:g})'


def shared_row(unit: SharedUnit, paths: list[str]) -> SharedRow:
    """Row of an attention that the sites of these paths share."""
    parameters = sum(p.numel() for p in unit.parameters())
    return SharedRow(unit.name, type(unit.attention).__name__, tuple(paths), parameters)


def training_form(layer: Any) -> str:
    """Which form a plugged layer trains in: ``'plain'`` or ``'low'``; ``''`` without input-dependent gates."""
    if layer.dynamic is None:
        return ''
    batch_norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
    has_low = fusible(layer) if batch_norm else layer.recomputes and regainable(layer)
    return LOW if has_low and chosen(layer) == LOW else PLAIN


def candidates(model: nn.Module) -> tuple[str, ...]:
    """Paths of the layers that ``sites='residual'`` means; none where no block is known."""
    try:
        return tuple(site.path for site in find_sites(model))
    except PlugError:
        return ()


def label(gates: list[Gate]) -> list[str]:
    """Name gates as the spec does; equal neighbours are counted: ``['ASR(SE) x2', 'Attention(ECA)']``.

    Those of the input come first, as they do in the forward, and a shift after its gates.
    """
    names: list[list] = []
    for gate in sorted(gates, key=lambda gate: gate.side == OUTPUT):
        plug = 'DIA' if gate.site_attention.unit is not None else 'Attention'
        plug = 'ASR' if isinstance(gate, ConstantGate) else plug
        name = f'{"input " * (gate.side == INPUT)}{plug}({attention_name(gate)})'
        if names and names[-1][0] == name:
            names[-1][1] += 1
        else:
            names.append([name, 1])
        if getattr(gate, 'bias', None) is not None:
            names.append(['shift', 1])
    return [name if count == 1 else f'{name} x{count}' for name, count in names]


def attention_name(gate: Gate) -> str:
    """Class of a gate's attention, its own or a shared one."""
    return type(gate.site_attention.original).__name__


def check_connected(model: nn.Module) -> None:
    """Refuse a model with gates that a converter has disconnected.

    Raises:
        PlugError: see `asr_downstream.plugging.attach.rebind`.
    """
    if paths := orphans(model):
        raise PlugError(
            f'{some(paths, 1)}: has gates that are not used any more: the layer was rebuilt, as '
            f'convert_sync_batchnorm does; call asr_downstream.rebind(model) after such a conversion'
        )
