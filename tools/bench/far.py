"""Multi-head LSTMs: the ways to run their heads against a plain loop, and the module against attention over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from asr_downstream.console.text import render
from asr_downstream.far.model.lstm import MultiHeadLSTM
from asr_downstream.far.prune.budgets import forward
from asr_downstream.measure.timing import faster_from, paired_times, ratio

__all__ = [
    'CASES',
    'MEMBERS',
    'Attention',
    'crossovers',
    'execution_table',
    'measure_execution',
    'measure_tokens',
    'token_table',
]

LOOP, AUTO, SINGLE = 'loop', 'auto', 'loop, one thread'
EXECUTED = (LOOP, AUTO, 'threads', 'scan', 'dense')
MEMBERS = {'FAR-100': 64, 'FAR-50': 32, 'FAR-25': 16}  # hidden units of a head and direction
TOKENS, BATCHES = (64, 128, 197, 256, 512, 1024, 2048, 4096), (1, 16, 32)
MOST = 1 << 14  # tokens in a batch


@dataclass(frozen=True)
class FarCase:
    """Sizes of a DeiT."""

    name: str
    channels: int
    heads: int


CASES = (FarCase('Tiny', 192, 3), FarCase('Small', 384, 6), FarCase('Base', 768, 12))


class Attention(nn.Module):
    """Self-attention as in DeiT, with PyTorch's fused product: ``(B, N, C) -> (B, N, C)``."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def build(case: FarCase, execution: str = AUTO, widths: Sequence[tuple[int, int]] | None = None) -> nn.Module:
    """Form M3 with an output projection of the teacher's size, from one seed."""
    torch.manual_seed(0)
    mixer = MultiHeadLSTM(case.channels, case.heads, execution=execution, widths=widths)
    return nn.Sequential(mixer, nn.Linear(case.channels, case.channels)).eval()


def measure_execution(case: FarCase, batch: int, rounds: int, tokens: int = 197) -> dict[str, Any]:
    """Time a forward with each way to run the heads.

    Returns:
        ``speedup``: name -> how many times as fast as the loop; ``difference``: the largest between their outputs.
    """
    x = torch.randn(batch, tokens, case.channels)
    modules = {name: build(case, name) for name in EXECUTED}
    calls = {name: forward(module, {'input': x}) for name, module in modules.items()}
    outputs = {name: call() for name, call in calls.items()}
    calls[SINGLE] = on_one_thread(calls[LOOP])
    times = paired_times(calls, rounds, f'{case.name}, batch {batch}', threads=torch.get_num_threads())
    return {
        'case': case.name,
        'heads': case.heads,
        'batch': batch,
        'tokens': tokens,
        'rounds': rounds,
        'speedup': {name: ratio(times[LOOP], times[name]) for name in calls},
        'difference': max(float((out - outputs[LOOP]).abs().max()) for out in outputs.values()),
        'threads': torch.get_num_threads(),
    }


def on_one_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same with one thread of PyTorch: LSTMs this small may be faster so."""

    def alone() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return alone


def measure_tokens(case: FarCase, rounds: int) -> list[dict[str, Any]]:
    """Time a forward of the members of a family against attention over numbers of tokens, on one thread.

    Returns:
        A row a shape, with ``ratio``: member -> of its time to that of attention, and ``attention``: its milliseconds.
    """
    torch.manual_seed(0)
    attention = Attention(case.channels, case.heads).eval()
    members = {name: build(case, widths=[(units, units)] * case.heads) for name, units in MEMBERS.items()}
    rows = []
    for batch in BATCHES:
        for tokens in TOKENS:
            if batch * tokens > MOST:
                continue
            x = torch.randn(batch, tokens, case.channels)
            calls = {'attention': forward(attention, {'x': x})}
            calls |= {name: forward(module, {'input': x}) for name, module in members.items()}
            times = paired_times(calls, rounds, f'{case.name}, batch {batch}, {tokens} tokens', warmup=1)
            found = {name: ratio(times[name], times['attention']) for name in members}
            milliseconds = median(times['attention'])
            rows.append(
                {'case': case.name, 'batch': batch, 'tokens': tokens, 'ratio': found, 'attention': milliseconds}
            )
    return rows


def execution_table(results: list[dict[str, Any]]) -> str:
    """Print how fast each way is."""
    first = results[0]
    title = f'times as fast as a loop over nn.LSTM, {first["tokens"]} tokens, {first["threads"]} threads'
    names = [name for name in first['speedup'] if name != LOOP]
    out = Table('module', 'heads', 'batch', *names, title=f'{title}, {first["rounds"]} paired rounds')
    for result in results:
        speedups = (str(result['speedup'][name]) for name in names)
        out.add_row(result['case'], str(result['heads']), str(result['batch']), *speedups)
    worst = max(result['difference'] for result in results)
    return f'{render(out)}\nall give the same output to {worst:.1e}'


def token_table(rows: list[dict[str, Any]]) -> str:
    """Print the ratios, and where they cross 1."""
    out = Table(
        'module',
        'batch',
        'tokens',
        *MEMBERS,
        title='time of the LSTMs, ratio to attention (SDPA) with its projections, one thread',
    )
    for column in out.columns[1:3]:
        column.justify = 'right'
    before = None
    for row in rows:
        if before not in (None, row['case']):
            out.add_section()
        before = row['case']
        ratios = (str(row['ratio'][name]) for name in MEMBERS)
        out.add_row(row['case'], str(row['batch']), str(row['tokens']), *ratios)
    return '\n'.join([render(out), *crossovers(rows)])


def crossovers(rows: list[dict[str, Any]]) -> list[str]:
    """Say, for each module, batch and member, from how many tokens on the LSTMs are faster in all longer rows."""
    lines = []
    for case, batch in dict.fromkeys((row['case'], row['batch']) for row in rows):
        parts = []
        for name in MEMBERS:
            own = {r['tokens']: r['ratio'][name] for r in rows if (r['case'], r['batch']) == (case, batch)}
            start = faster_from(own)
            parts.append(f'{name} {f"from {start} tokens on" if start is not None else f"not at {max(own)} tokens"}')
        lines.append(f'{case}, batch {batch}, faster than attention: {", ".join(parts)}')
    return lines
