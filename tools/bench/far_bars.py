"""What FAR promises of its latency on the CPU, as bars: LSTMs against the attention that they replace."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import nn

from asr_downstream import far
from asr_downstream.console.text import render
from asr_downstream.far.model.backends import rules
from asr_downstream.far.prune.budgets import forward
from asr_downstream.measure.timing import Ratio, paired_times, ratio
from bench.far import MEMBERS, Attention, FarCase, build

__all__ = ['bar_table', 'measure_bars', 'measure_models']

TOKENS, BATCHES = 197, (1, 16)
ATTENTION, TEACHER, UNEVEN = 'attention', 'teacher', 'FAR-50, uneven'
MOST = {'FAR-100': 1.3, 'FAR-50': 0.85}  # times the attention, with its projections
MODEL, MODEL_MOST = 'FAR-50', 1.0  # times the teacher


def uneven(heads: int) -> list[tuple[int, int]]:
    """Widths as a threshold leaves them: other ones in every direction, 32 on the average."""
    drawn = torch.randint(-12, 13, (heads,), generator=torch.Generator().manual_seed(0)).tolist()
    return [(32 + n, 32 - n) for n in drawn]


def measure_bars(case: FarCase, rounds: int) -> list[dict[str, Any]]:
    """Time the members of a family against attention, at the tokens of DeiT, on one thread.

    Returns:
        A row a batch, with ``ratio``: member -> of its time to that of attention.
    """
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {ATTENTION: Attention(case.channels, case.heads).eval()}
    modules |= {name: build(case, widths=[(units, units)] * case.heads) for name, units in MEMBERS.items()}
    modules[UNEVEN] = build(case, widths=uneven(case.heads))
    rows = []
    for batch in BATCHES:
        x = torch.randn(batch, TOKENS, case.channels)
        calls: dict[str, Callable[[], Any]] = {
            name: forward(module, {'x' if name == ATTENTION else 'input': x}) for name, module in modules.items()
        }
        rows.append(timed(case.name, batch, calls, ATTENTION, rounds))
    return rows


def measure_models(rounds: int) -> list[dict[str, Any]]:
    """Time a whole DeiT-Tiny with half of the units in place of its attentions against itself, on one thread.

    Returns:
        As of `measure_bars`; nothing where transformers is not installed.
    """
    if importlib.util.find_spec('transformers') is None:
        return []
    from transformers import DeiTConfig, DeiTForImageClassification

    torch.manual_seed(0)
    config = DeiTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=1000)
    models = {name: DeiTForImageClassification(config).eval() for name in (TEACHER, MODEL)}
    pair = (MEMBERS[MODEL], MEMBERS[MODEL])
    paths = [f'deit.layers.{n}.attention' for n in range(config.num_hidden_layers)]
    widths = {path: [pair] * config.num_attention_heads for path in paths}
    far.replace(models[MODEL], dict(type='FAR', layers=paths, widths=widths))
    rows = []
    for batch in BATCHES:
        inputs = {'pixel_values': torch.randn(batch, 3, 224, 224)}
        calls = {name: forward(model, inputs) for name, model in models.items()}
        rows.append(timed('DeiT-Tiny', batch, calls, TEACHER, rounds))
    return rows


def timed(case: str, batch: int, calls: dict[str, Callable[[], Any]], base: str, rounds: int) -> dict[str, Any]:
    """Ratios of the times of calls to that of one of them."""
    times = paired_times(calls, rounds, f'{case}, batch {batch}', threads=1)
    found = {name: ratio(times[name], times[base]) for name in calls if name != base}
    return {'case': case, 'batch': batch, 'base': base, 'rounds': rounds, 'ratio': found}


def bars_of(row: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    """Bars of a row: what is held -> its figure and whether it is met."""
    found: dict[str, Ratio] = row['ratio']
    most = MOST if row['base'] == ATTENTION else {MODEL: MODEL_MOST}
    bars = {
        f'{name} at most {bound}': (found[name].median, found[name].median <= bound) for name, bound in most.items()
    }
    if found.keys() >= MEMBERS.keys():
        order = [found[name].median for name in sorted(MEMBERS, key=lambda name: MEMBERS[name])]
        bars['fewer units, faster'] = (order[0] / order[-1], order == sorted(order))
    return bars


def bar_table(rows: list[dict[str, Any]]) -> str:
    """Print the ratios, and which bars are met."""
    names = [*MEMBERS, UNEVEN]
    title = f'time, ratio to attention or teacher; {TOKENS} tokens, one thread, {rows[0]["rounds"]} paired rounds'
    out = Table('module', 'batch', 'against', *names, title=title)
    lines = [f'auto on the CPU: {rules()["cpu"]}']
    for row in rows:
        ratios = (str(row['ratio'].get(name, '')) for name in names)
        out.add_row(row['case'], str(row['batch']), row['base'], *ratios)
        for what, (figure, met) in bars_of(row).items():
            lines.append(f'{"met   " if met else "MISSED"} {row["case"]}, batch {row["batch"]}: {what}: {figure:.3f}')
    return '\n'.join([render(out), *lines])
