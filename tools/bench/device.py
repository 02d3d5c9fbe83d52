"""Plugs on a device: milliseconds, ratios to stock and peak memory, over the ways in which models are run there.

A variant is a way to run: training step or inference; eager, compiled or as a CUDA graph; a precision, a memory layout
and a batch. In each, all arms are timed in paired rounds. An arm that fails in a variant, for want of memory or because
it does not compile, is reported with its reason, and the others go on.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import quantiles
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from asr_downstream.console.text import render
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.measure.device import card, compiled, graphed, paired_device_times, peak_memory, reason
from asr_downstream.measure.timing import Ratio, ratio
from asr_downstream.measure.versions import versions
from bench import launches
from bench.forms import FOLDED, LOW, SCALED, STOCK, Case, plugged_copy
from bench.plug import inference, training_step

__all__ = ['ARMS', 'VARIANTS', 'Variant', 'measure', 'measure_variant', 'models_of', 'table']

ARMS = {
    **{name: launches.ARMS[name] for name in (SCALED, 'ASR(ECA)', 'ASR(DIA)', 'SE', 'DIA')},
    **{name + LOW: {**launches.ARMS[name], 'memory': 'low'} for name in ('SE', 'DIA')},
}
WARMUP = 3
TRAINING, INFERENCE = 'training', 'inference'
STEPS: dict[str, Callable[..., Callable[[], Any]]] = {TRAINING: training_step, INFERENCE: inference}


def same(call: Callable[..., Any], *_: Any) -> Callable[..., Any]:
    """Leave a function as it is."""
    return call


# Name -> what is done to the model, and to the whole call (with the device).
WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    'eager': (same, same),
    'CUDA graph': (same, graphed),
    'compile': (compiled, same),
}
PRECISIONS = {'float32': torch.float32, 'bf16 autocast': torch.bfloat16}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


@dataclass(frozen=True)
class Variant:
    """A way to run a model; names are keys of the tables above."""

    kind: str
    way: str
    precision: str
    layout: str
    batch: int

    @property
    def name(self) -> str:
        """For people and for ``--variant``."""
        return f'{self.kind}, {self.way}, {self.precision}, {self.layout}, batch {self.batch}'


# What is run most first, and what has to compile for minutes last: `measure` may run out of time.
RUNS = (
    (TRAINING, 'eager'),
    (INFERENCE, 'eager'),
    (INFERENCE, 'CUDA graph'),
    (TRAINING, 'compile'),
    (INFERENCE, 'compile'),
)
VARIANTS = tuple(
    Variant(kind, way, precision, layout, batch)
    for (kind, way), batch, precision, layout in product(RUNS, (32, 2, 128), PRECISIONS, LAYOUTS)
)


def measure(
    cases: Sequence[Case],
    device: torch.device,
    rounds: int,
    variants: Sequence[Variant] = VARIANTS,
    minutes: float | None = None,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure all variants of all cases.

    Args:
        cases: models; the batch is that of the variant.
        device: where to run.
        rounds: paired rounds of a variant.
        variants: ways to run, in this order.
        minutes: variants whose turn comes later are left out.
        save: is called with the report after every variant.

    Returns:
        ``device`` (see `asr_downstream.measure.device.card`), ``versions``, ``rounds``, ``variants`` (a list, see
        `measure_variant`) and ``left_out`` (names).
    """
    report: dict[str, Any] = {
        'device': card(device),
        'versions': versions(),
        'rounds': rounds,
        'variants': [],
        'left_out': [],
    }
    end = time.monotonic() + 60 * minutes if minutes is not None else float('inf')
    models = {case.name: models_of(case) for case in cases}
    for variant, case in product(variants, cases):
        if time.monotonic() > end:
            report['left_out'].append(f'{case.name}: {variant.name}')
        else:
            report['variants'].append(measure_variant(case, models[case.name], variant, device, rounds))
        save(report)
    return report


def models_of(case: Case, arms: dict[str, dict[str, Any]] = ARMS, seed: int = 0) -> dict[str, nn.Module]:
    """Stock, plugged and folded models with the same stock weights, on the CPU, in eval mode."""
    torch.manual_seed(seed)
    stock = case.build()
    stock.eval()  # mmdet's ResNet.eval() returns None
    models = {STOCK: stock, **{name: plugged_copy(stock, spec) for name, spec in arms.items()}}
    return {**models, FOLDED: fold_exactly(models[SCALED])[0]}


def measure_variant(
    case: Case, models: dict[str, nn.Module], variant: Variant, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Time the arms of a case in one variant.

    Returns:
        ``case``, the fields of the variant, ``input`` (shape); ``arms``: arm -> ``milliseconds`` (median and
        quartiles), ``over_stock`` (ratio; None if stock failed) and ``peak_memory`` (bytes, weights included; None
        without a CUDA device); ``failed``: arm -> reason.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (variant.batch, 3, case.side, case.side)
    x = torch.randn(shape, generator=generator).to(device, memory_format=LAYOUTS[variant.layout])
    calls: dict[str, Callable[[], Any]] = {}
    memory: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    for arm, model in models.items():
        if arm == FOLDED and variant.kind == TRAINING:
            continue
        try:
            calls[arm], memory[arm] = prepared(model, x, variant)
        except Exception as error:  # out of memory, not compilable, no such thing on this device
            failed[arm] = reason(error)
        release(device)
    times, late = paired_device_times(calls, device, rounds, f'{case.name}: {variant.name}')
    calls.clear()
    release(device)
    if variant.way == 'compile':
        torch.compiler.reset()
    stock = times.get(STOCK)
    return {
        'case': case.name,
        **vars(variant),
        'input': list(shape),
        'arms': {
            arm: {
                'milliseconds': spread(series),
                'over_stock': ratio(series, stock) if stock else None,
                'peak_memory': memory[arm],
            }
            for arm, series in times.items()
        },
        'failed': {**failed, **late},
    }


def prepared(model: nn.Module, x: Tensor, variant: Variant) -> tuple[Callable[[], Any], int | None]:
    """Bring a copy of a model to the device of ``x``, warm it up, and return its call and peak memory."""
    device = x.device
    base = torch.cuda.memory_allocated(device) if device.type == 'cuda' else 0
    own: Any = copy.deepcopy(model)
    own.to(device=device, memory_format=LAYOUTS[variant.layout])
    of_model, of_call = WAYS[variant.way]
    forward = in_precision(of_model(own), PRECISIONS[variant.precision], device)
    call = STEPS[variant.kind](own, x, forward)
    for _ in range(WARMUP):
        call()
    memory = peak_memory(call, device, base)
    call = of_call(call, device)
    call()
    return call, memory


def in_precision(forward: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """A forward under autocast to a dtype; float32 is what it is without."""

    def call(x: Tensor) -> Any:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return forward(x)

    return call


def release(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def spread(series: list[float]) -> Ratio:
    """Median and quartiles."""
    low, middle, high = quantiles(series, n=4) if len(series) > 1 else (series[0],) * 3
    return Ratio(middle, low, high)


def table(report: dict[str, Any]) -> str:
    """Print a report: a row an arm and variant, and what failed or was left out."""
    device = report['device']
    about = ', '.join(f'{key} {device[key]}' for key in ('driver', 'cuda', 'cudnn', 'torch') if device.get(key))
    title = f'{device["name"]} ({about}): paired rounds: {report["rounds"]}'
    out = Table('model', 'variant', 'arm', 'milliseconds', 'over stock', 'peak MiB', title=title)
    lines = []
    for found in report['variants']:
        name = Variant(**{key: found[key] for key in Variant.__dataclass_fields__}).name
        for arm, figures in found['arms'].items():
            memory = figures['peak_memory']
            out.add_row(
                found['case'],
                name,
                arm,
                str(figures['milliseconds']),
                str(figures['over_stock'] or ''),
                '' if memory is None else f'{memory / 2**20:,.1f}',
            )
        out.add_section()
        for why in dict.fromkeys(found['failed'].values()):
            arms = ', '.join(arm for arm, other in found['failed'].items() if other == why)
            lines.append(f'{found["case"]}, {name}: {arms} failed: {why}')
    if report['left_out']:
        lines.append(f'no time left for {len(report["left_out"])} variants, the first {report["left_out"][0]}')
    return '\n'.join([render(out, width=200), *lines])
