"""Noise: how much of a metric is left when images or batch norms are disturbed, by kind and strength.

Strengths are parts of the range from black to white, so that they mean the same for images in any units. Noise of one
strength is the same for every model that is compared: it is drawn in the order of the images, and of batch norms by
their names, which folding does not change. At strength 0 nothing changes, to the last bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import Printed
from asr_downstream.errors import AsrError, did_you_mean
from asr_downstream.folding.analysis.attacks import ATTACKS, Attack
from asr_downstream.folding.analysis.stripes import Metric
from asr_downstream.modules.slots import inside_gate

__all__ = ['IMAGES', 'NORMS', 'STRENGTHS', 'Curve', 'ImageNoise', 'NoiseCurves', 'noise_kinds', 'noisy_norms', 'sweep']

NORMS = 'batch-norm'
# Strengths that are swept, besides 0.
STRENGTHS: dict[str, tuple[float, ...]] = {
    'constant': (0.05, 0.1, 0.2, 0.3),
    'gaussian': (0.02, 0.05, 0.1, 0.2),
    'salt-and-pepper': (0.01, 0.02, 0.05, 0.1),
    NORMS: (0.05, 0.1, 0.2, 0.4),
    'fgsm': (1 / 255, 2 / 255, 4 / 255, 8 / 255),
    'pgd': (1 / 255, 2 / 255, 4 / 255, 8 / 255),
}

# ``(images, black, white, strength, generator) -> what is added to images``, on the CPU.
Draw: TypeAlias = Callable[[Tensor, Any, Any, float, torch.Generator], Tensor]


def constant(images: Tensor, black: Any, white: Any, strength: float, stream: torch.Generator) -> Tensor:
    """All pixels become lighter by the same."""
    return torch.zeros_like(images) + strength * (white - black)


def gaussian(images: Tensor, black: Any, white: Any, strength: float, stream: torch.Generator) -> Tensor:
    """Every value moves by its own amount, normally distributed with this deviation."""
    return torch.randn(images.shape, generator=stream).to(images) * (strength * (white - black))


def salt_and_pepper(images: Tensor, black: Any, white: Any, strength: float, stream: torch.Generator) -> Tensor:
    """This part of the pixels becomes black or white, all colours of a pixel together."""
    chance = torch.rand(images.shape[0], 1, *images.shape[2:], generator=stream).to(images)
    to_black, to_white = (black - images), (white - images)
    nothing = torch.zeros_like(images)
    return torch.where(chance < strength / 2, to_black, torch.where(chance < strength, to_white, nothing))


IMAGES: dict[str, Draw] = {'constant': constant, 'gaussian': gaussian, 'salt-and-pepper': salt_and_pepper}


class ImageNoise:
    """A change of images, see `asr_downstream.folding.analysis.runs.Change`; values stay between black and white.

    Args:
        kind: one of `IMAGES`.
        strength: see the head of this file.
        seed: of what is drawn, from the first images on.
    """

    def __init__(self, kind: str, strength: float, seed: int = 0) -> None:
        self.draw, self.strength = IMAGES[kind], strength
        self.stream = torch.Generator().manual_seed(seed)

    def __call__(self, images: Tensor, black: Any, white: Any) -> Tensor:
        """Disturb images ``(B, C, H, W)``; black and white broadcast with them."""
        black, white = (torch.as_tensor(v, dtype=images.dtype, device=images.device) for v in (black, white))
        added = self.draw(images, black, white, self.strength, self.stream)
        return torch.where(added == 0, images, torch.clamp(images + added, black, white))


@contextmanager
def noisy_norms(model: nn.Module, strength: float, seed: int = 0) -> Iterator[None]:
    """Disturb the running statistics of the batch norms of a model inside the block, those of its gates left out.

    Each mean moves by ``strength`` deviations of its channel, times a normal number; each variance is multiplied by
    ``exp(strength * number)``. The numbers depend on the name of the norm alone.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for path, norm in model.named_modules():
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
                continue
            if norm.running_var is None or inside_gate(model, path):
                continue
            mean, var = norm.running_mean, norm.running_var
            kept += [(mean, mean.clone()), (var, var.clone())]
            stream = torch.Generator().manual_seed(seed ^ zlib.crc32(path.encode()))
            moved, scaled = (torch.randn(mean.shape, generator=stream).to(mean) for _ in range(2))
            with torch.no_grad():
                mean.add_(strength * moved * var.sqrt())
                var.mul_(torch.exp(strength * scaled))
        if not kept:
            raise AsrError(f'{type(model).__name__} has no batch norms with running statistics; leave {NORMS!r} out')
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@dataclass(frozen=True)
class Curve:
    """A metric against the strength of one kind of noise.

    Attributes:
        arm: name of the model.
        kind: of noise.
        strengths: from 0 on.
        values: of the metric.
    """

    arm: str
    kind: str
    strengths: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class NoiseCurves(Printed):
    """Curves of several models.

    Attributes:
        metric: its name.
        curves: one an arm and kind.
    """

    metric: str
    curves: tuple[Curve, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        rows = [{'arm': c.arm, 'kind': c.kind, 'strengths': c.strengths, 'values': c.values} for c in self.curves]
        return {'metric': self.metric, 'curves': [{**row, 'kept': kept(row['values'])} for row in rows]}  # type: ignore[arg-type]

    def parts(self) -> list[Table | str]:
        found: list[Table | str] = []
        for kind in dict.fromkeys(curve.kind for curve in self.curves):
            curves = [curve for curve in self.curves if curve.kind == kind]
            table = Table('', *(f'{s:.3g}' for s in curves[0].strengths), title=f'{self.metric} under {kind} noise')
            for column in table.columns[1:]:
                column.justify = 'right'
            for curve in curves:
                table.add_row(curve.arm, *(f'{value:.4f}' for value in curve.values))
            found.append(table)
        return found


def kept(values: Sequence[float]) -> list[float | None]:
    """Part of the value without noise that is left."""
    return [value / values[0] if values[0] else None for value in values]


def noise_kinds(names: Sequence[str] | None, images: bool, attacks: bool, norms: bool) -> list[str]:
    """Kinds of noise to sweep.

    Args:
        names: wanted; None: all that a run has.
        images: whether its images can be changed.
        attacks: whether it can be attacked.
        norms: whether it has batch norms.

    Raises:
        AsrError: a name is not known, or the run does not have it.
    """
    has = [*IMAGES] * images + [NORMS] * norms + [*ATTACKS] * attacks
    for name in names or ():
        if name not in STRENGTHS:
            raise AsrError(f'noise {name!r} is not known; {did_you_mean(name, STRENGTHS)}')
        if name not in has:
            raise AsrError(f'noise {name!r} is not defined for this kind of run; it has {", ".join(has) or "none"}')
    return list(names or has)


Changed: TypeAlias = Callable[[nn.Module, Any], AbstractContextManager[None]]
Attacked: TypeAlias = Callable[[nn.Module, Attack], float]


def sweep(
    models: Mapping[str, nn.Module],
    metric: Metric,
    kinds: Sequence[str],
    changed: Changed | None = None,
    attack: Attacked | None = None,
    strengths: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
) -> NoiseCurves:
    """Measure a metric of models under noise of growing strength.

    Args:
        models: by name, in eval mode.
        metric: of a model.
        kinds: of noise, see `noise_kinds`.
        changed: see `asr_downstream.folding.analysis.runs.OpenRun`.
        attack: likewise.
        strengths: of each kind, besides 0; default: `STRENGTHS`.
        seed: of what is drawn.
    """
    found = []
    for arm, model in models.items():
        clean = float(metric.measure(model))
        for kind in kinds:
            sizes = (0.0, *(strengths or STRENGTHS)[kind])
            values = [clean]
            for strength in sizes[1:]:
                values.append(measured(model, metric, kind, strength, changed, attack, seed))
            found.append(Curve(arm, kind, sizes, tuple(values)))
    return NoiseCurves(metric.name, tuple(found))


def measured(
    model: nn.Module,
    metric: Metric,
    kind: str,
    strength: float,
    changed: Changed | None,
    attack: Attacked | None,
    seed: int,
) -> float:
    """The metric under one noise."""
    if kind in ATTACKS:
        assert attack is not None
        return float(attack(model, ATTACKS[kind](strength, seed)))
    if kind == NORMS:
        with noisy_norms(model, strength, seed):
            return float(metric.measure(model))
    assert changed is not None
    with changed(model, ImageNoise(kind, strength, seed)):
        return float(metric.measure(model))
