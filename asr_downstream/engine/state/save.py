"""Writing a training checkpoint: weights, their average, optimiser, random states, progress.

accelerate writes optimiser, gradient scaler and random states of every process; the weights are written by name from
the unwrapped model, so that a checkpoint can be read with any number of processes (under FSDP and DeepSpeed besides the
shards that these write and resume from).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from asr_downstream.console.processes import Processes
from asr_downstream.console.text import some
from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.state.ema import EMA
from asr_downstream.engine.state.train_state import AVERAGE, PROGRESS, SHARDED, WEIGHTS, Progress
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import cannot_write, remove, write_json, writing
from asr_downstream.measure.versions import versions
from asr_downstream.plugging.weights import not_finite

__all__ = ['bytes_of', 'save_training']


def save_training(
    run: Path,
    accelerator: Accelerator,
    model: nn.Module,
    ema: EMA | None,
    progress: Progress,
    limit: int | None,
    moments: float = 2,
) -> Path:
    """Write a checkpoint; every process calls this.

    Args:
        run: folder.
        accelerator: of the training.
        model: unwrapped.
        ema: of the training.
        progress: of the training.
        limit: checkpoints to keep; None: all.
        moments: tensors that the optimiser keeps of every parameter.

    Returns:
        ``run/checkpoint-<step>``, complete; older ones beyond ``limit`` are gone.

    Raises:
        AsrError: it cannot be written, or something is not finite. Nothing of it is left.
    """
    target, main = checkpoints.final(run, progress.step), accelerator.is_main_process
    folder, needed = checkpoints.aside(run, progress.step), bytes_of(model, ema, moments)
    sharded = accelerator.distributed_type in SHARDED

    def begin() -> None:
        check_finite(model, ema, None if sharded else accelerator._optimizers[0], progress.step)
        if main:
            check_space(target, needed)
            checkpoints.begin(run, progress.step)

    def write_states() -> None:
        state = accelerator.get_state_dict(accelerator._models[0]) if sharded else model.state_dict()
        # else accelerate writes the weights with the names of the wrapped model
        hook = None if sharded else accelerator.register_save_state_pre_hook(lambda models, given, out: given.clear())
        try:
            with writing(target, needed):
                accelerator.save_state(str(folder))
                if main:
                    write_weights(state, folder / WEIGHTS)
                    if ema is not None:
                        write_weights(ema.state, folder / AVERAGE)
        finally:
            if hook is not None:
                hook.remove()

    def finish() -> None:
        if main:
            with writing(target, needed):
                write_json(folder / PROGRESS, {**asdict(progress), 'versions': versions()})
            checkpoints.prune(run, limit, checkpoints.complete(run, progress.step))

    try:
        for work in (begin, write_states, finish):
            Processes.of_launch().together(work)
    except Exception:
        if main:
            with suppress(OSError):
                remove(folder)
        raise
    return target


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write weights by name."""
    save_file({name: value.contiguous() for name, value in state.items()}, path)


def bytes_of(model: nn.Module, ema: EMA | None, moments: float = 2) -> int:
    """Least size of a checkpoint: weights, their average, and the ``moments`` that the optimiser keeps of each."""
    weights = sum(value.nbytes for value in model.state_dict().values())
    state = int(moments * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad))
    return weights + state + (0 if ema is None else sum(value.nbytes for value in ema.state.values()))


def check_space(target: Path, needed: int) -> None:
    """Refuse to begin what cannot be finished.

    Args:
        target: file or folder to write, in a folder that is there.
        needed: bytes.

    Raises:
        AsrError: the disk has less space.
    """
    if shutil.disk_usage(target.parent).free < needed:
        raise cannot_write(target, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), needed)


def check_finite(model: nn.Module, ema: EMA | None, optimiser: Any, step: int) -> None:
    """Refuse to write weights, an average or a state of the optimiser that are not finite.

    Raises:
        AsrError: the training diverged.
    """
    broken = not_finite(model.state_dict(), model)
    broken += [f'{name} of the average' for name in (not_finite(ema.state, model) if ema is not None else ())]
    for name, parameter in model.named_parameters() if optimiser is not None else ():
        state = {k: v for k, v in optimiser.state.get(parameter, {}).items() if isinstance(v, Tensor)}
        broken += [f'{key} of {name}' for key in not_finite(state)]
    if broken:
        raise AsrError(
            f'step {step}: {some(broken)} {"is" if len(broken) == 1 else "are"} not finite: the training diverged, and '
            f'no checkpoint was written; go on from an earlier one with a lower learning_rate, or with bf16 or no '
            f'mixed_precision'
        )
