"""Ways to run the LSTMs of all heads. They give equal results; which one is fastest depends on device and shape.

Each takes the heads and the tokens of each head, a list of ``(B, N, inputs)``, and returns a list of
``(B, N, ahead + back)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from asr_downstream.far.model.head import Direction, HeadLSTM, run_direction, to_dense
from asr_downstream.far.model.ops.lstm import DTYPES, lstm_heads, operator

__all__ = ['ENOUGH', 'EXECUTIONS', 'choose', 'multiply_adds', 'pick', 'rules']

Run = Callable[[Sequence[HeadLSTM], Sequence[Tensor]], list[Tensor]]


def run_loop(heads: Sequence[HeadLSTM], tokens: Sequence[Tensor]) -> list[Tensor]:
    """One `torch.nn.LSTM` after the other."""
    return [head(x) for head, x in zip(heads, tokens, strict=True)]


def run_threads(heads: Sequence[HeadLSTM], tokens: Sequence[Tensor]) -> list[Tensor]:
    """Directions of all heads side by side, each on a thread of its own: an LSTM of 64 units cannot use two."""
    if watched():
        return run_loop(heads, tokens)
    jobs = [(d, x) for head, x in zip(heads, tokens, strict=True) for d in head.directions]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def work(job: tuple[Direction, Tensor]) -> Tensor:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return run_direction(*job)

    return joined(heads, tokens, list(threads(torch.get_num_threads()).map(work, jobs)))


@cache
def threads(count: int) -> ThreadPoolExecutor:
    """Threads on which an operation does not start threads of its own."""
    pool, all_there = ThreadPoolExecutor(count, 'far'), Barrier(count)

    def start(_: int) -> None:
        all_there.wait()  # so that each thread starts once
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    list(pool.map(start, range(count)))
    torch.set_num_threads(before)  # the threads have also set what others start with
    return pool


os.register_at_fork(after_in_child=threads.cache_clear)  # a forked process has none of the threads


def watched() -> bool:
    """Whether operations are recorded or changed on this thread, which others would not be: tracing, export, vmap."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def run_dense(heads: Sequence[HeadLSTM], tokens: Sequence[Tensor]) -> list[Tensor]:
    """One LSTM a direction with block-diagonal weights: a single call, with ``heads`` times the multiply-adds."""
    x = torch.cat([*tokens], -1)
    found: dict[tuple[int, bool], Tensor] = {}
    for reverse in (False, True):
        owners = [(n, d) for n, head in enumerate(heads) for d in head.directions if d.reverse == reverse]
        if owners:
            dense = to_dense([d for _, d in owners])
            if len(owners) < len(heads):  # a head without units here has tokens all the same
                kept = torch.cat([tokens[n] for n, _ in owners], -1)
                out = run_direction(dense, kept)
            else:
                out = run_direction(dense, x)
            for (n, _), part in zip(owners, out.split([d.width for _, d in owners], -1), strict=True):
                found[n, reverse] = part
    return joined(heads, tokens, [found[n, d.reverse] for n, head in enumerate(heads) for d in head.directions])


def run_scan(heads: Sequence[HeadLSTM], tokens: Sequence[Tensor]) -> list[Tensor]:
    """All heads and directions in one batch: the products with the inputs at once, then a loop over the tokens.

    Units that pruning removed from some are filled up with zeros, which stay zero.
    """
    jobs = [(d, x) for head, x in zip(heads, tokens, strict=True) for d in head.directions]
    if not jobs:
        return joined(heads, tokens, [])
    width = max(d.width for d, _ in jobs)
    x = torch.stack([x.flip(1) if d.reverse else x for d, x in jobs])  # (J, B, N, inputs)
    weight_ih = torch.stack([padded(d.weight_ih, d.width, width) for d, _ in jobs])
    weight_hh = torch.stack(
        [torch.nn.functional.pad(padded(d.weight_hh, d.width, width), (0, width - d.width)) for d, _ in jobs]
    )
    bias = torch.stack([padded((d.bias_ih + d.bias_hh)[:, None], d.width, width)[:, 0] for d, _ in jobs])
    count, batch, length, _ = x.shape
    gates = torch.baddbmm(bias[:, None], x.flatten(1, 2), weight_ih.mT).unflatten(1, (batch, length))
    recurrent = weight_hh.mT
    h = c = x.new_zeros(count, batch, width)
    states = []
    for t in range(length):
        i, f, g, o = torch.baddbmm(gates[:, :, t], h, recurrent).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    out = torch.stack(states, 2)  # (J, B, N, width)
    parts = [(s.flip(1) if d.reverse else s)[..., : d.width] for (d, _), s in zip(jobs, out, strict=True)]
    return joined(heads, tokens, parts)


def run_fused(heads: Sequence[HeadLSTM], tokens: Sequence[Tensor]) -> list[Tensor]:
    """All heads, directions and sequences in one operator in C++; where it cannot be used, one after the other."""
    weights = [weight for head in heads for weight in head.weights()]
    owners, reverse = plan(tuple(head.widths for head in heads))
    plain = weights and len(weights) == 4 * len(owners) and weights[0].dtype == tokens[0].dtype
    if not plain or not fits(tokens):
        return run_loop(heads, tokens)
    return lstm_heads(tokens, weights, owners, reverse)


@cache
def plan(widths: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Heads and directions of the LSTMs that have units."""
    found = [(n, bool(back)) for n, pair in enumerate(widths) for back, width in enumerate(pair) if width]
    return tuple(n for n, _ in found), tuple(back for _, back in found)


def fits(tokens: Sequence[Tensor]) -> bool:
    """Whether the operator can run here: on the CPU, without gradients, where nothing is `watched`."""
    return (
        tokens[0].device.type == 'cpu'
        and not torch.is_grad_enabled()
        and tokens[0].dtype in DTYPES
        and not watched()
        and operator().there
    )


def padded(weight: Tensor, width: int, target: int) -> Tensor:
    """Fill each of the four gates up to ``target`` rows with zeros."""
    if width == target:
        return weight
    return torch.nn.functional.pad(weight.unflatten(0, (4, width)), (0, 0, 0, target - width)).flatten(0, 1)


def joined(heads: Sequence[HeadLSTM], tokens: Sequence[Tensor], parts: list[Tensor]) -> list[Tensor]:
    """Join the directions of each head."""
    rest = iter(parts)
    found = []
    for head, x in zip(heads, tokens, strict=True):
        own = [next(rest) for _ in head.directions]
        found.append(torch.cat(own, -1) if own else x[..., :0])
    return found


EXECUTIONS: dict[str, Run] = {
    'loop': run_loop,
    'threads': run_threads,
    'dense': run_dense,
    'scan': run_scan,
    'fused': run_fused,
}
# Which one 'auto' means, by device. CPU: measured, see `tools/benchmark.py far`; elsewhere nothing was measured.
ENOUGH = 50_000_000  # multiply-adds of a forward, below which threads cost more than they save


def rules() -> dict[str, str]:
    """Say what ``execution='auto'`` means here, device by device."""
    plain = 'threads without gradients from 50 million multiply-adds on, where torch has several threads; else loop'
    found = operator()
    return {
        'cpu': f'fused without gradients in float32, bfloat16 and float16; else {plain}'
        if found.there
        else f'{plain}. Slower than fused, {found.reason}',
        'other devices': 'loop; not measured: far.tune(model, call) measures',
    }


def multiply_adds(heads: Sequence[HeadLSTM], tokens: int) -> int:
    """Of all LSTMs, for a number of tokens in all."""
    return tokens * sum(4 * width * (head.inputs + width) for head in heads for width in head.widths)


def choose(heads: Sequence[HeadLSTM], tokens: Sequence[Tensor]) -> str:
    """What ``execution='auto'`` means for these tokens of each head; see `rules`."""
    if fits(tokens):
        return 'fused'
    return pick(tokens[0].device, multiply_adds(heads, tokens[0].shape[0] * tokens[0].shape[1]))


def pick(device: torch.device, work: int) -> str:
    """Choose among the forms that need no operator.

    Args:
        device: of the tokens.
        work: multiply-adds of all LSTMs.

    Hooks on saved tensors, as of activation checkpointing, work on their own thread only, so with gradients the heads
    run one after the other; and so they do where operations are `watched`.
    """
    if device.type != 'cpu' or torch.is_grad_enabled() or torch.get_num_threads() == 1 or work < ENOUGH:
        return 'loop'
    return 'loop' if watched() else 'threads'
