"""Launches of plugged models over those of the stock model, see `asr_downstream.measure.launches`.

Exact, and so the same in every run. ``plain`` keeps what gates need for the backward pass, ``low memory`` computes it
again (``memory='low'``); an arm without such a word is what plugging gives. Sizes of inputs change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import render
from asr_downstream.measure.launches import Step, count_step, extra
from asr_downstream.models import resnet56
from asr_downstream.plugging.gating.gates import DynamicGate
from bench.forms import (
    LAYER_SCALE,
    LOW,
    PLAIN,
    SCALED,
    SE,
    SPEC,
    STOCK,
    dia,
    low_form,
    mmdet_resnet50,
    plain_form,
    plugged_copy,
)

__all__ = ['ARMS', 'CASES', 'LaunchCase', 'cell', 'count_arms', 'extra_line', 'measure', 'table']

UNET = Path(__file__).resolve().parents[2] / 'diffusion/configs/unet-w32_cifar10.py'
ARMS = {
    SCALED: SPEC,
    'ASR(ECA)': {'type': 'ASR', 'attention': {'type': 'ECA'}},
    'LayerScale': LAYER_SCALE,
    'ASR(DIA)': {**dia(4), 'type': 'ASR'},
    'SE': SE,
    'DIA': dia(4),
}
NAMED = 5  # operators that a line of text names


@dataclass(frozen=True)
class LaunchCase:
    """A model, the shape of its input, and the library that it is of, if that may be missing."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    needs: str | None = None

    @property
    def missing(self) -> bool:
        """Whether its library is not installed."""
        return self.needs is not None and find_spec(self.needs) is None


def cifar_unet() -> nn.Module:
    """The UNet of the configs for CIFAR-10."""
    from asr_downstream.diffusion.config import load_config
    from asr_downstream.diffusion.models.build import build_model
    from bench.unet import Denoiser

    return Denoiser(build_model(load_config(UNET, {}, None)))


CASES = (
    LaunchCase('ResNet-56', resnet56, (4, 3, 32, 32)),
    LaunchCase('mmdet ResNet-50', mmdet_resnet50, (2, 3, 64, 64), needs='mmdet'),
    LaunchCase('UNet for CIFAR-10', cifar_unet, (2, 3, 32, 32), needs='diffusers'),
)


def measure(case: LaunchCase) -> dict[str, Any]:
    """Count all arms of a case in all forms: ``case``, ``input`` (shape), ``launches`` (see `count_arms`)."""
    torch.manual_seed(0)
    stock = case.build()
    arms = {STOCK: stock}
    for name, spec in ARMS.items():
        arms[name] = plugged_copy(stock, spec)
        arms[name + PLAIN] = plain_form(arms[name])
        if any(isinstance(m, DynamicGate) for m in arms[name].modules()):
            arms[name + LOW] = low_form(arms[name])
    return {'case': case.name, 'input': list(case.shape), 'launches': count_arms(arms, torch.randn(case.shape))}


def count_arms(arms: dict[str, nn.Module], x: Tensor) -> dict[str, dict[str, Any]]:
    """Count the launches of models, one of which is ``'stock'``.

    Returns:
        For each arm ``training`` and ``inference``, dicts of ``launches``, ``allocations`` (how many of them),
        ``over_stock`` (ratio), ``extra`` (operator -> launches beyond stock) and ``device`` (what the profiler counts
        on a CUDA device; None without one).
    """
    steps = {name: count_step(model, x) for name, model in arms.items()}
    return {name: figures(step, steps[STOCK]) for name, step in steps.items()}


def figures(step: Step, stock: Step) -> dict[str, Any]:
    """The figures of one arm."""
    return {
        kind: {
            'launches': found.number,
            'allocations': found.allocations,
            'over_stock': found.number / base.number,
            'extra': extra(found, base),
            'device': device,
        }
        for kind, found, base, device in zip(
            ('training', 'inference'),
            (step.training, step.inference),
            (stock.training, stock.inference),
            step.device or (None, None),
            strict=True,
        )
    }


def cell(found: dict[str, Any]) -> str:
    """Ratios to stock of one arm, in training and at inference."""
    return f'{found["training"]["over_stock"]:.3f} / {found["inference"]["over_stock"]:.3f}'


def extra_line(arm: str, found: dict[str, Any]) -> str:
    """Say what an arm launches in a training step beyond stock."""
    more = found['training']['extra']
    named = [f'{name} {count:+}' for name, count in list(more.items())[:NAMED]]
    rest = sum(list(more.values())[NAMED:])
    return f'{arm}: {sum(more.values()):+,} in a training step: ' + ', '.join(
        [*named, *([f'others {rest:+}'] if len(more) > NAMED else [])]
    )


def table(results: list[dict[str, Any]]) -> str:
    """Print the counts, and what the extra ones are."""
    device = any(arm['training']['device'] for result in results for arm in result['launches'].values())
    columns = ['model', 'arm', 'training', 'inference', 'over stock, training / inference']
    out = Table(*columns, *(['device, training / inference'] if device else []), title='launches')
    lines = []
    for result in results:
        for arm, found in result['launches'].items():
            training, inference = found['training'], found['inference']
            seen = [f'{training["device"]:,} / {inference["device"]:,}'] if device else []
            counts = f'{training["launches"]:,}', f'{inference["launches"]:,}'
            out.add_row(result['case'], arm, *counts, cell(found), *seen)
            same = arm.endswith(PLAIN) and found == result['launches'][arm.removesuffix(PLAIN)]
            if arm != STOCK and not same:
                lines.append(f'{result["case"]}, {extra_line(arm, found)}')
        out.add_section()
    return '\n'.join([render(out), *lines])
