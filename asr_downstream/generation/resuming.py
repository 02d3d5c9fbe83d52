"""What a training checkpoint holds, and how a training takes it up again.

accelerate writes optimiser, gradient scaler and random states of every process; the weights are written by name from
the unwrapped model, so that a checkpoint can be read with any number of processes (FSDP and DeepSpeed write their own).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType
from mmengine.config import Config
from safetensors.torch import load_file, save_file
from torch import nn

from asr_downstream.checkpoint import load_state
from asr_downstream.errors import CheckpointError
from asr_downstream.files import write_json
from asr_downstream.generation import checkpoints
from asr_downstream.generation.ema import EMA
from asr_downstream.generation.models import plain
from asr_downstream.versions import versions

__all__ = ['AVERAGE', 'WEIGHTS', 'Progress', 'check_same_run', 'load_training', 'read_progress', 'save_training']

WEIGHTS, AVERAGE, PROGRESS = 'model.safetensors', 'ema.safetensors', 'progress.json'
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: optimiser steps done.
        seed, processes, batch, accumulation: what the sequence of samples depends on.
        model, plug: specs.
        schedule: state of the learning rate schedule.
        bad: indices of images that could not be decoded.
    """

    step: int
    seed: int
    processes: int
    batch: int
    accumulation: int
    model: dict[str, Any]
    plug: Any
    schedule: dict[str, Any] = field(default_factory=dict)
    bad: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, config: Config, processes: int) -> Progress:
        """Start of a training."""
        return cls(
            step=0,
            seed=config.seed,
            processes=processes,
            batch=config.train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            model=plain(config.model),
            plug=plain(config.plug),
        )


def save_training(
    run: Path, accelerator: Accelerator, model: nn.Module, ema: EMA | None, progress: Progress, limit: int | None
) -> Path:
    """Write a checkpoint; every process calls this.

    Returns:
        ``run/checkpoint-<step>``, complete; older ones beyond ``limit`` are gone.
    """
    name = f'.checkpoint-{progress.step}.tmp'
    if accelerator.is_main_process:
        checkpoints.begin(run, progress.step)
    accelerator.wait_for_everyone()
    folder = run / name

    def save_weights(models: list[nn.Module], weights: list[Any], out: str) -> None:
        weights.clear()  # else accelerate writes them with the names of the wrapped model
        if accelerator.is_main_process:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, Path(out) / WEIGHTS)

    sharded = accelerator.distributed_type in SHARDED
    hook = None if sharded else accelerator.register_save_state_pre_hook(save_weights)
    accelerator.save_state(str(folder))
    if hook is not None:
        hook.remove()
    accelerator.wait_for_everyone()
    target = run / name.removeprefix('.').removesuffix('.tmp')
    if accelerator.is_main_process:
        if ema is not None:
            save_file({k: v.contiguous() for k, v in ema.state.items()}, folder / AVERAGE)
        write_json(folder / PROGRESS, {**asdict(progress), 'versions': versions()})
        target = checkpoints.complete(folder)
        checkpoints.prune(run, limit, target)
    accelerator.wait_for_everyone()
    return target


def read_progress(checkpoint: Path) -> Progress:
    """Read where a training stood."""
    content = json.loads((checkpoint / PROGRESS).read_text())
    return Progress(**{k: content[k] for k in Progress.__dataclass_fields__})


def load_training(checkpoint: Path, accelerator: Accelerator, model: nn.Module, ema: EMA | None) -> None:
    """Load a checkpoint into a prepared training; every process calls this.

    Raises:
        CheckpointError: it was made for another model, or without the average that the config asks for.
    """

    def load_weights(models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_state(model, load_file(Path(folder) / WEIGHTS), checkpoint)

    sharded = accelerator.distributed_type in SHARDED
    hook = None if sharded else accelerator.register_load_state_pre_hook(load_weights)
    accelerator.load_state(str(checkpoint))
    if hook is not None:
        hook.remove()
    if ema is not None:
        if not (checkpoint / AVERAGE).is_file():
            raise CheckpointError(
                f'{checkpoint}: has no average of the weights, but the config says use_ema=True; resume with '
                f'--cfg-options use_ema=False'
            )
        ema.load(load_file(checkpoint / AVERAGE))


def check_same_run(found: Progress, expected: Progress, checkpoint: Path, say: Callable[[str], None]) -> None:
    """Refuse a checkpoint of another model; say what makes the continuation differ from an uninterrupted run.

    Raises:
        CheckpointError: model or plug differ.
    """
    for key in ('model', 'plug'):
        if getattr(found, key) != getattr(expected, key):
            raise CheckpointError(
                f'{checkpoint}: was trained with {key}={getattr(found, key)}, the config says '
                f'{getattr(expected, key)}; use the config of that run'
            )
    changed = [k for k in ('seed', 'processes', 'batch', 'accumulation') if getattr(found, k) != getattr(expected, k)]
    if changed:
        what = ', '.join(f'{k} {getattr(found, k)} -> {getattr(expected, k)}' for k in changed)
        say(f'{checkpoint}: {what}; the run goes on, but not bit for bit as without the stop')
        for key in changed:
            setattr(found, key, getattr(expected, key))
