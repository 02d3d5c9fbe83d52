"""Measuring on a device: times by its events, peak memory, CUDA graphs, compiled functions, and which card it is.

Everything takes the device, and works on the CPU too as far as there is a counterpart there.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from asr_downstream.errors import AsrError
from asr_downstream.measure.timing import turns

__all__ = ['card', 'compiled', 'graphed', 'milliseconds', 'paired_device_times', 'peak_memory', 'reason']

WARMUP = 3  # calls before a recording: libraries choose their algorithms, and optimisers make their state
NUMBERS = itertools.count()


def milliseconds(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Time of a call: between two events on a CUDA device, which starts idle, and by the clock elsewhere.

    Args:
        call: what to time.
        device: where it runs.
        calls: how often it is called on end; the result is the mean.
    """
    if device.type != 'cuda':
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) * 1e3 / calls
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls


def paired_device_times(
    candidates: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, text: str = 'timing', calls: int = 3
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time each candidate once a round; the order turns from round to round. They have been warmed up before.

    Args:
        candidates: what to call.
        device: where they run.
        rounds: number of rounds.
        text: what the progress line says.
        calls: see `milliseconds`.

    Returns:
        Milliseconds of each candidate, one number a round; and of those that failed, which take no further part, why.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    failed: dict[str, str] = {}
    for order in turns(list(candidates), rounds, text):
        for name in order:
            if name in failed:
                continue
            try:
                times[name].append(milliseconds(candidates[name], device, calls))
            except Exception as error:
                failed[name] = reason(error)
                del times[name]
    return times, failed


def peak_memory(call: Callable[[], Any], device: torch.device, base: int = 0) -> int | None:
    """Most bytes that were allocated on a CUDA device during ``call()``; None elsewhere.

    Args:
        call: what to run.
        device: where it runs.
        base: bytes of others, which do not count; see ``torch.cuda.memory_allocated``.
    """
    if device.type != 'cuda':
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - base


def graphed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Record what a call launches as a CUDA graph, which is then launched at once.

    Args:
        call: it reads and writes the same tensors each time, and waits for nothing.
        device: where it runs.

    Returns:
        A function that gives what ``call`` gave; its tensors are written again each time.

    Raises:
        AsrError: the device has no CUDA graphs.
    """
    if device.type != 'cuda':
        raise AsrError(f'CUDA graphs need a CUDA device, this is {device.type}')
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARMUP):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def compiled(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function or module with a cache of its own.

    Compiled code is kept by the code of the function. Candidates of one class would share it: each call would go
    through the guards of the others, and from the eighth on they would run uncompiled without a word.

    Args:
        call: the function or module.
        **options: of `torch.compile`.
    """

    def run(*args: Any) -> Any:
        return call(*args)

    run.__code__ = run.__code__.replace(co_name=f'run_{next(NUMBERS)}')
    return torch.compile(run, **{'fullgraph': True, 'dynamic': False, **options})


def reason(error: Exception) -> str:
    """Why something failed, in one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), '')
    return f'{type(error).__name__}: {first}' if first else type(error).__name__


def card(device: torch.device) -> dict[str, Any]:
    """What a device is: name, and of a CUDA device its memory in bytes, driver, and versions of the libraries."""
    if device.type != 'cuda':
        return {'name': device.type, 'torch': torch.__version__}
    found = torch.cuda.get_device_properties(device)
    return {
        'name': found.name,
        'memory': found.total_memory,
        'capability': f'{found.major}.{found.minor}',
        'driver': driver(),
        'cuda': torch.version.cuda,
        'cudnn': torch.backends.cudnn.version(),
        'tf32': {'cudnn': torch.backends.cudnn.allow_tf32, 'matmul': torch.backends.cuda.matmul.allow_tf32},
        'torch': torch.__version__,
    }


def driver() -> str | None:
    """Version of the driver, as nvidia-smi says; None where it says nothing."""
    program = shutil.which('nvidia-smi')
    if program is None:
        return None
    words = [program, '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None
