"""Paired timing: every round runs each candidate once, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import median, quantiles
from typing import Any, NamedTuple

from torch.utils.benchmark import Timer

from asr_downstream.console.progress import bar

__all__ = ['Ratio', 'faster_from', 'paired_times', 'ratio', 'turns']


class Ratio(NamedTuple):
    """Ratio of two candidates over paired rounds: median and quartiles.

    Attributes:
        median: over the rounds.
        low: lower quartile.
        high: upper quartile.
        fastest: of the shortest times of both, whatever the round; what else a machine does only adds to a time, so
            this is the steadiest number on one that is never quiet. NaN where it was not measured.
    """

    median: float
    low: float
    high: float
    fastest: float = math.nan

    def __str__(self) -> str:
        return f'{self.median:.3f} ({self.low:.3f}-{self.high:.3f})'


def paired_times(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, text: str = 'timing', warmup: int = 2, threads: int = 1
) -> dict[str, list[float]]:
    """Time each candidate once a round; the order turns from round to round.

    Args:
        candidates: what to call.
        rounds: number of rounds that count.
        text: what the progress line says.
        warmup: calls of each candidate before the first round.
        threads: of PyTorch on the CPU.

    Returns:
        Milliseconds of each candidate, one number a round.
    """
    timers = {name: Timer('call()', globals={'call': call}, num_threads=threads) for name, call in candidates.items()}
    for timer in timers.values():
        timer.timeit(warmup)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for order in turns(list(candidates), rounds, text):
        for name in order:
            times[name].append(timers[name].timeit(1).median * 1e3)
    return times


def turns(names: list[str], rounds: int, text: str) -> Iterator[list[str]]:
    """Yield the names once a round, each time beginning one further, with a progress line."""
    for number in bar(range(rounds), text):
        shift = number % max(1, len(names))
        yield names[shift:] + names[:shift]


def ratio(times: list[float], base: list[float]) -> Ratio:
    """Median and quartiles of the ratio, round by round, and that of the fastest rounds."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return Ratio(median(ratios), low, high, min(times) / min(base))


def faster_from(ratios: Mapping[int, Ratio]) -> int | None:
    """Size from which on all larger ones are faster, their upper quartiles below 1; None: the largest is not.

    Args:
        ratios: size, such as a number of tokens, -> ratio of times.
    """
    start = None
    for size in sorted(ratios, reverse=True):
        if ratios[size].high >= 1:
            break
        start = size
    return start
