"""What a training checkpoint holds, and how a training takes it up again.

accelerate writes optimiser, gradient scaler and random states of every process; the weights are written by name from
the unwrapped model, so that a checkpoint can be read with any number of processes (under FSDP and DeepSpeed besides the
shards that these write and resume from).
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
from asr_downstream.configs import plain
from asr_downstream.engine import checkpoints
from asr_downstream.engine.ema import EMA
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files import write_json
from asr_downstream.sites import some
from asr_downstream.versions import versions

__all__ = [
    'AVERAGE',
    'SHARDED',
    'WEIGHTS',
    'Progress',
    'check_same_run',
    'load_training',
    'read_progress',
    'save_training',
]

WEIGHTS, AVERAGE, PROGRESS = 'model.safetensors', 'ema.safetensors', 'progress.json'
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


# What may change; the run then goes on, but not as without the stop.
COURSE = (
    'seed', 'processes', 'images', 'train_batch_size', 'gradient_accumulation_steps', 'max_train_steps',
    'learning_rate', 'lr_scheduler', 'lr_scheduler_kwargs', 'lr_warmup_steps', 'max_grad_norm', 'mixed_precision',
    'gradient_checkpointing', 'adam_beta1', 'adam_beta2', 'adam_weight_decay', 'adam_epsilon',
    'use_ema', 'ema_max_decay', 'ema_inv_gamma', 'ema_power',
)  # fmt: skip


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        step: optimiser steps done.
        scheduled: of these, the ones that the learning rate has followed; fp16 skips some.
        settings: keys of the config, and ``processes`` and ``images``.
        bad: indices of images that could not be decoded.
    """

    step: int
    scheduled: int
    settings: dict[str, Any]
    bad: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, config: Config, processes: int, images: int, fixed: tuple[str, ...]) -> Progress:
        """Start of a training; ``fixed`` are the keys that its checkpoints are bound to."""
        known = {'processes': processes, 'images': images}
        settings = {key: known[key] if key in known else plain(config[key]) for key in (*fixed, *COURSE)}
        return cls(step=0, scheduled=0, settings=as_json(settings))


def save_training(
    run: Path, accelerator: Accelerator, model: nn.Module, ema: EMA | None, progress: Progress, limit: int | None
) -> Path:
    """Write a checkpoint; every process calls this.

    Returns:
        ``run/checkpoint-<step>``, complete; older ones beyond ``limit`` are gone.
    """
    check_finite(model, progress.step)
    if accelerator.is_main_process:
        checkpoints.begin(run, progress.step)
    accelerator.wait_for_everyone()
    folder = checkpoints.aside(run, progress.step)

    sharded = accelerator.distributed_type in SHARDED
    state = accelerator.get_state_dict(accelerator._models[0]) if sharded else model.state_dict()
    # else accelerate writes the weights with the names of the wrapped model
    hook = None if sharded else accelerator.register_save_state_pre_hook(lambda models, weights, out: weights.clear())
    accelerator.save_state(str(folder))
    if hook is not None:
        hook.remove()
    if accelerator.is_main_process:
        save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            save_file({k: v.contiguous() for k, v in ema.state.items()}, folder / AVERAGE)
        write_json(folder / PROGRESS, {**asdict(progress), 'versions': versions()})
        checkpoints.prune(run, limit, checkpoints.complete(run, progress.step))
    accelerator.wait_for_everyone()
    return checkpoints.final(run, progress.step)


def check_finite(model: nn.Module, step: int) -> None:
    """Refuse to write weights that are not finite.

    Raises:
        AsrError: the training diverged.
    """
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise AsrError(
            f'step {step}: {some(broken)} are not finite: the training diverged, and no checkpoint was written; go on '
            f'from an earlier one with a lower learning_rate, or with bf16 or no mixed_precision'
        )


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
    try:
        accelerator.load_state(str(checkpoint))
    except AsrError:
        raise
    except ValueError as error:  # of the optimiser
        raise CheckpointError(f'{checkpoint}: does not fit what the config trains ({error})') from error
    accelerator.step = 0  # forwards since the last optimiser step: checkpoints are written right after one
    if hook is not None:
        hook.remove()
    if ema is not None:
        if not (checkpoint / AVERAGE).is_file():
            raise CheckpointError(
                f'{checkpoint}: has no average of the weights, but the config says use_ema=True; resume with '
                f'--cfg-options use_ema=False'
            )
        ema.load(load_file(checkpoint / AVERAGE))


def check_same_run(
    found: Progress,
    expected: Progress,
    checkpoint: Path,
    fixed: tuple[str, ...],
    defaults: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Refuse a checkpoint of another training; say what makes the continuation differ from an uninterrupted run.

    Args:
        found: in the checkpoint.
        expected: by the config.
        checkpoint: for messages.
        fixed: keys that a checkpoint is bound to.
        defaults: of the keys; a checkpoint that is older than a key was made with its default.
        say: called with the difference.

    Raises:
        CheckpointError: the value of a fixed key differs.
    """
    now = expected.settings
    before = {key: as_json(defaults.get(key)) for key in now} | found.settings
    for key in fixed:
        if before[key] != now[key]:
            raise CheckpointError(
                f'{checkpoint}: was trained with {key}={before[key]}, the config says {now[key]}; use the config of '
                f'that run'
            )
    if changed := [key for key in COURSE if before[key] != now[key]]:
        what = ', '.join(f'{key} {before[key]} -> {now[key]}' for key in changed)
        say(f'{checkpoint}: {what}; the run goes on, but not bit for bit as without the stop')


def as_json(value: Any) -> Any:
    """Copy a value as it will be read again from a checkpoint."""
    return json.loads(json.dumps(plain(value)))
