"""The gates of a model over data: mean and deviation of every site, and some images in full.

Constant gates (ASR), those that depend on the input (SE, DIA, ...) and those of attention that a library's model has by
itself are seen alike. What is kept does not grow with the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from asr_downstream.errors import AsrError
from asr_downstream.folding.constancy import Constancy, Moments
from asr_downstream.folding.native.blocks import Watched, find_blocks
from asr_downstream.folding.passes import Step, default_step, passes
from asr_downstream.modules.check import check_module
from asr_downstream.plugging.describe import describe
from asr_downstream.plugging.gating.sides import OUTPUT
from asr_downstream.plugging.layers import Plugged
from asr_downstream.plugging.record import record
from asr_downstream.plugging.sites import block_of

__all__ = [
    'CONSTANT',
    'INPUT',
    'KEPT',
    'NATIVE',
    'Group',
    'Place',
    'SiteGates',
    'collect',
    'per_image',
    'places_of',
    'stream',
]

CONSTANT, INPUT, NATIVE = 'constant', 'input-dependent', 'native'  # kinds of gates
KEPT = 64  # images whose gates are kept in full, evenly over the data

By: TypeAlias = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Place:
    """A site or block with gates.

    Attributes:
        path: name in ``named_modules()``.
        stage: path of the parent of the block that it is in; sites of one width in it, one after another, are a stage.
        kind: `CONSTANT`, `INPUT` or `NATIVE`.
        unit: name of the attention that it shares with others; '' if it has its own.
    """

    path: str
    stage: str
    kind: str
    unit: str = ''


@dataclass(frozen=True)
class Group:
    """Gates of the samples of one group, such as those of one timestep.

    Attributes:
        value: of the group.
        mean, std: over its samples, ``(C,)``.
        samples: their number.
    """

    value: float
    mean: Tensor = field(repr=False)
    std: Tensor = field(repr=False)
    samples: int


@dataclass(frozen=True)
class SiteGates:
    """Gates of one site over data.

    Attributes:
        place: the site.
        mean, std: over samples (images, and positions of spatial gates), ``(C,)``, float64.
        samples: number of samples.
        rows: gates of some images, evenly over the data, ``(images, C)``; mean over the positions of spatial gates.
        groups: in the order of their values.
        shown: value of the group, in the middle of all, that ``rows`` are of; None without groups.
    """

    place: Place
    mean: Tensor = field(repr=False)
    std: Tensor = field(repr=False)
    samples: int
    rows: Tensor = field(repr=False)
    groups: tuple[Group, ...] = ()
    shown: float | None = None

    @property
    def constancy(self) -> Constancy:
        """As folding sees it; its ``ratio`` is the stripe ratio."""
        path, over_channels = self.place.path, float(self.mean.std(unbiased=False))
        return Constancy(path, path, self.mean, float(self.std.mean()), over_channels, self.samples)

    @property
    def explained(self) -> float | None:
        """Part of the variance over samples that lies between the groups, all channels together; None without groups.

        0 for gates that do not move.
        """
        if not self.groups:
            return None
        whole = sum(group.samples for group in self.groups)
        centre = torch.stack([g.mean * (g.samples / whole) for g in self.groups]).sum(0)
        between = sum(float((g.mean - centre).square().sum()) * g.samples for g in self.groups)
        within = sum(float(g.std.square().sum()) * g.samples for g in self.groups)
        return between / (between + within) if between + within else 0.0


def places_of(model: nn.Module) -> dict[str, Place]:
    """Sites and blocks of a model that have gates of outputs, by path, in the order of ``named_modules()``."""
    units = {path: unit.name for unit in describe(model).shared for path in unit.sites}
    natives = find_blocks(model)
    found: dict[str, Place] = {}
    for path, module in model.named_modules():
        if path in natives:
            kind = NATIVE
        elif not isinstance(module, Plugged):
            continue
        elif module.dynamic is not None:  # type: ignore[attr-defined]
            kind = INPUT
        elif any(gate.side == OUTPUT for gate in module.gate or ()):  # type: ignore[attr-defined]
            kind = CONSTANT
        else:
            continue
        found[path] = Place(path, block_of(model, path).rpartition('.')[0], kind, units.get(path, ''))
    return found


@torch.no_grad()
def stream(
    model: nn.Module, data: Iterable[Any], step: Step = default_step, text: str = 'gates'
) -> Iterator[tuple[Any, dict[str, list[Tensor]]]]:
    """Run a model over data.

    Args:
        model: plugged, or with attention of its own.
        data: batches.
        step: runs the model on a batch.
        text: what the progress line says.

    Yields:
        A batch, and by path the gates in it, one tensor for each forward through the site: ``(B, C)``, ``(B, C, *)`` of
        a spatial attention, ``(1, C)`` of constant gates.

    Raises:
        DataError: there is no data, or the model does not take it.
        AsrError: a block of its own attention is not what it is known for.
    """
    check_module(model, 'gates')
    paths = list(places_of(model))
    with ExitStack() as stack:
        seen = stack.enter_context(record(model))
        own: dict[str, list[Tensor]] = {}
        watched: dict[str, Watched] = {}
        for path, native in find_blocks(model).items():
            watched[path] = Watched(model.get_submodule(path), native, own.setdefault(path, []).append)
            stack.callback(watched[path].remove)
        for batch in passes(model, data, step, text):
            if odd := next((f'{path}: {block.odd}' for path, block in watched.items() if block.odd), ''):
                raise AsrError(f'{odd}; say what its gates are with register_native')
            gates = {**seen.gates, **own}
            yield batch, {path: list(gates[path]) for path in paths if gates.get(path)}
            for kept in (*seen.gates.values(), *seen.inputs.values(), *seen.states.values(), *own.values()):
                kept.clear()


def per_image(gates: list[Tensor]) -> Tensor:
    """Gates of a site in a batch, one row an image ``(B, C)``, float64: mean over positions, and over forwards.

    Forwards through one site that see other numbers of samples, as a head does, leave those of the first.
    """
    rows = [g.double().flatten(2).mean(-1) if g.dim() > 2 else g.double() for g in gates]
    alike = [r for r in rows if r.shape == rows[0].shape]
    return alike[0] if len(alike) == 1 else torch.stack(alike).mean(0)


class Thinned:
    """Rows of a stream of unknown length, evenly over it and in its order.

    Args:
        most: about how many are wanted; at most twice as many are kept.
    """

    def __init__(self, most: int) -> None:
        self.most, self.stride, self.count = most, 1, 0
        self.kept: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Add rows ``(B, C)``."""
        for row in rows:
            if self.count % self.stride == 0:
                self.kept.append(row)
            self.count += 1
            if len(self.kept) > 2 * self.most:
                self.kept, self.stride = self.kept[::2], 2 * self.stride

    def rows(self) -> Tensor:
        """All that were kept."""
        return torch.stack(self.kept)


def collect(
    model: nn.Module,
    data: Iterable[Any],
    step: Step = default_step,
    by: By | None = None,
    keep: int = KEPT,
    text: str = 'gates',
) -> list[SiteGates]:
    """Measure the gates of all sites of a model over data.

    Args:
        model: plugged, or with attention of its own, in eval mode.
        data: batches.
        step: runs the model on a batch.
        by: of a batch, a number for each of its images, of few values, such as timesteps; statistics are also taken of
            the images of one number.
        keep: about how many images are kept in full.
        text: what the progress line says.

    Returns:
        One entry a site, in the order of ``named_modules()``.

    Raises:
        AsrError: there are no gates, a site that no batch reaches, gates that are not finite; or see `stream`.
    """
    places = places_of(model)
    if not places:
        raise AsrError(
            f'{type(model).__name__} has no gates to look at: it is a stock model or was folded; give a plugged '
            f'one, or name the class of its own attention with register_native'
        )
    moments = {path: Moments() for path in places}
    thinned = {path: Thinned(keep) for path in places}
    groups: dict[str, dict[float, Moments]] = {path: {} for path in places}
    shown: float | None = None
    for batch, gates in stream(model, data, step, text):
        numbers = None if by is None else by(batch).cpu()
        if numbers is not None and shown is None:
            shown = float(numbers.unique().median())
        for path, found in gates.items():
            for g in found:
                moments[path].add(g)
            rows = per_image(found).cpu()
            if numbers is None or len(numbers) != len(rows):
                thinned[path].add(rows)
                continue
            thinned[path].add(rows[numbers == shown])
            for value in numbers.unique().tolist():
                groups[path].setdefault(value, Moments()).add(rows[numbers == value])
    return [finished(place, moments[path], thinned[path], groups[path], shown) for path, place in places.items()]


def finished(
    place: Place, moments: Moments, thinned: Thinned, groups: dict[float, Moments], shown: float | None
) -> SiteGates:
    """What was measured of a site.

    Raises:
        AsrError: it was not reached, or its gates are not finite.
    """
    if not moments.count:
        raise AsrError(f'{place.path}: was not reached by the data; leave the site out, or use other data')
    mean, std = moments.mean.cpu(), moments.std.cpu()
    if not (mean.isfinite().all() and math.isfinite(float(std.sum()))):
        raise AsrError(f'{place.path}: its gates are not finite on this data; the training diverged')
    parts = tuple(
        Group(value, group.mean.cpu(), group.std.cpu(), group.count) for value, group in sorted(groups.items())
    )
    return SiteGates(place, mean, std, moments.count, thinned.rows(), parts, shown if parts else None)
