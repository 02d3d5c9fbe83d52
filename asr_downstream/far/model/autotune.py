"""Choosing how the heads run by measuring it, for one device and one shape of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import nn

from asr_downstream.errors import PlugError
from asr_downstream.far.model.backends import EXECUTIONS
from asr_downstream.far.model.describe import mixers
from asr_downstream.far.model.ops.lstm import operator
from asr_downstream.measure.timing import paired_times

__all__ = ['tune']


def tune(model: nn.Module, call: Callable[[], Any], rounds: int = 5, names: tuple[str, ...] = ()) -> dict[str, float]:
    """Time ``call()`` with every way to run the heads and keep the fastest, in place, for all replacements.

    Args:
        model: with replaced attentions, on its device; what you measure is what you get: wrap ``call`` in
            `torch.inference_mode` for inference.
        call: a forward, or forward and backward; on an accelerator it should synchronise.
        rounds: paired rounds.
        names: of `EXECUTIONS`, to try; default: all that there are here.

    Returns:
        Median milliseconds of each; the fastest is kept in ``execution`` of the modules, and not in the spec of the
        model, which may be loaded on another machine.

    Raises:
        PlugError: nothing is replaced.
    """
    found = [mixer for _, mixer in mixers(model) if mixer.execution]
    if not found:
        raise PlugError(f'{type(model).__name__}: no attention is replaced by LSTMs, so there is nothing to tune')

    def run(name: str) -> Callable[[], Any]:
        def once() -> Any:
            with executed(model, name):
                return call()

        return once

    times = paired_times({name: run(name) for name in names or available()}, rounds, 'tuning', warmup=1)
    medians = {name: median(values) for name, values in times.items()}
    best = min(medians, key=lambda name: medians[name])
    for mixer in found:
        mixer.execution = best
    return medians


def available() -> tuple[str, ...]:
    """Ways to run the heads, without the operator where it is not built."""
    return tuple(name for name in EXECUTIONS if name != 'fused' or operator().there)


@contextmanager
def executed(model: nn.Module, name: str) -> Iterator[None]:
    """Let all replacements run in one way inside the block."""
    found = [mixer for _, mixer in mixers(model) if mixer.execution]
    before = [mixer.execution for mixer in found]
    try:
        for mixer in found:
            mixer.execution = name
        yield
    finally:
        for mixer, old in zip(found, before, strict=True):
            mixer.execution = old
