"""Resuming a training from a checkpoint. Every file is checked before it is used."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils.other import load
from mmengine.config import Config
from torch import Tensor, nn

from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.state.ema import EMA
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.atomic import first_line, read_json
from asr_downstream.files.configs import plain
from asr_downstream.files.weights import read_checkpoint, state_dict_of
from asr_downstream.plugging.weights import check_weights_finite, load_state, not_finite

__all__ = [
    'AVERAGE',
    'PROGRESS',
    'SHARDED',
    'WEIGHTS',
    'Progress',
    'check_same_run',
    'load_training',
    'read_progress',
]

WEIGHTS, AVERAGE, PROGRESS, OPTIMISER = 'model.safetensors', 'ema.safetensors', 'progress.json', 'optimizer.bin'
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


# What a checkpoint of any task is bound to: the state of its optimiser is that of no other.
BOUND = ('optimizer',)
# What may change; the run then goes on, but not as without the stop.
COURSE = (
    'seed', 'processes', 'images', 'data', 'train_batch_size', 'gradient_accumulation_steps', 'max_train_steps',
    'learning_rate', 'lr_scheduler', 'lr_scheduler_kwargs', 'lr_warmup_steps', 'max_grad_norm', 'mixed_precision',
    'gradient_checkpointing', 'weight_decay', 'momentum', 'nesterov', 'adam_beta1', 'adam_beta2', 'adam_weight_decay',
    'adam_epsilon',
    'use_ema', 'ema_max_decay', 'ema_inv_gamma', 'ema_power',
)  # fmt: skip
# Of ``data``: where the images lie, and how many may be bad.
PLACES = ('path', 'data_dir', 'cache_dir', 'max_bad_share')


@dataclass
class Progress:
    """Progress of a training.

    Attributes:
        step: optimiser steps done.
        scheduled: of these, the ones that the learning rate has followed; fp16 skips some.
        settings: keys of the config, and ``processes`` and ``images``.
        bad: indices of images that could not be decoded.
        since: step of the last line of the log.
        window: what each process had seen since; see `Window.state`.
    """

    step: int
    scheduled: int
    settings: dict[str, Any]
    bad: list[int] = field(default_factory=list)
    since: int = 0
    window: list[dict[str, Any]] = field(default_factory=list)

    def check(self) -> None:
        """Refuse values that a training never writes.

        Raises:
            ValueError: see above.
        """
        for name in ('step', 'scheduled', 'since'):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= self.step:
                raise ValueError(f'{name} is {value!r}'[:80])
        if not isinstance(self.settings, dict):
            raise ValueError('its settings are no dict')
        images = self.settings.get('images')
        if not isinstance(self.bad, list) or not all(type(i) is int and 0 <= i < (images or 0) for i in self.bad):
            raise ValueError('its bad images are none of the images')
        for state in self.window if isinstance(self.window, list) else [None]:
            try:
                lists = [state['losses'], *state['others'].values()]
                fine = type(state['seconds']) is float and all(type(v) is float for values in lists for v in values)
            except (KeyError, TypeError, AttributeError):
                fine = False
            if not fine:
                raise ValueError('its window of the log is none')

    @classmethod
    def of(cls, config: Config, processes: int, images: int, fixed: tuple[str, ...]) -> Progress:
        """Start of a training; ``fixed`` are the keys that its checkpoints are bound to."""
        known = {'processes': processes, 'images': images, 'data': without_places(plain(config['data']))}
        settings = {key: known[key] if key in known else plain(config[key]) for key in (*fixed, *BOUND, *COURSE)}
        return cls(step=0, scheduled=0, settings=as_json(settings))


def read_progress(checkpoint: Path) -> Progress:
    """Read the progress in a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or says what cannot be.
    """
    path = checkpoint / PROGRESS
    try:
        content = read_json(path)
        content = {'since': content['step'], 'window': [], **content}  # before windows were kept, they ended there
        found = Progress(**{k: content[k] for k in Progress.__dataclass_fields__})
        found.check()
    except KeyError as error:
        raise useless(path, f'has no {error}') from error
    except (OSError, ValueError, TypeError) as error:
        raise useless(path, f'cannot be read ({error})') from error
    if checkpoints.step_of(checkpoint) not in (None, found.step):
        raise useless(path, f'is of step {found.step}')
    return found


def useless(path: Path, reason: str) -> CheckpointError:
    """Error for a file of a checkpoint that is complete but was not written by a training."""
    return CheckpointError(f'{path}: {reason}; resume from an earlier checkpoint')


def load_training(
    checkpoint: Path, accelerator: Accelerator, model: nn.Module, ema: EMA | None, found: Progress, moments: float = 2
) -> None:
    """Load a checkpoint into a prepared training; every process calls this.

    Args:
        checkpoint: complete, by its manifest.
        accelerator: of the training.
        model: of the training.
        ema: of the training.
        found: progress of the checkpoint.
        moments: tensors that the optimiser keeps of every parameter.

    Raises:
        CheckpointError: it was made for another model, without the average that the config asks for, or its files are
            not what a training writes.
    """

    def load_weights(models: list[nn.Module], folder: str) -> None:
        models.clear()
        load_state(model, weights_of(checkpoint / WEIGHTS, model), checkpoint)

    if ema is not None:
        if not (checkpoint / AVERAGE).is_file():
            raise CheckpointError(
                f'{checkpoint}: has no average of the weights, but the config says use_ema=True; resume with '
                f'--cfg-options use_ema=False'
            )
        ema.load(weights_of(checkpoint / AVERAGE, model), checkpoint / AVERAGE)
    states = checkpoint / f'random_states_{accelerator.process_index}.pkl'
    if accelerator.process_index < found.settings.get('processes', 1):
        read_safely(states)  # accelerate passes over one that it cannot read
    sharded = accelerator.distributed_type in SHARDED
    hook = None if sharded else accelerator.register_load_state_pre_hook(load_weights)
    try:
        accelerator.load_state(str(checkpoint))
    except AsrError:
        raise
    except Exception as error:  # torch, accelerate and DeepSpeed raise anything for files that are not theirs
        if not sharded:
            for name in (OPTIMISER, 'scaler.pt' if accelerator.scaler is not None else OPTIMISER):
                read_safely(checkpoint / name)
        raise useless(checkpoint / OPTIMISER, f'does not fit what the config trains ({first_line(error)})') from error
    finally:
        if hook is not None:
            hook.remove()
    accelerator.step = 0  # forwards since the last optimiser step: checkpoints are written right after one
    if not sharded:
        expected = bool(found.scheduled and moments and found.settings.get('momentum', True))
        check_optimiser(accelerator._optimizers[0], model, expected, checkpoint / OPTIMISER)


def weights_of(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read a file of weights of a model.

    Raises:
        CheckpointError: it is damaged, or they are not finite.
    """
    state = state_dict_of(read_checkpoint(path), path)
    check_weights_finite(state, path, model)
    return state


def read_safely(path: Path) -> None:
    """Try to read a file of accelerate's, without running code.

    Raises:
        CheckpointError: it is missing, damaged, or asks for code to be run.
    """
    try:
        load(path, map_location='cpu')
    except Exception as error:
        raise useless(path, f'is missing, damaged or unsafe ({first_line(error)[:120]})') from error


def check_optimiser(optimiser: Any, model: nn.Module, expected: bool, path: Path) -> None:
    """Refuse a state of the optimiser that does not belong to the weights; torch looks at their number alone.

    Args:
        optimiser: of the training.
        model: of the training.
        expected: whether it has a state.
        path: for messages.

    Raises:
        CheckpointError: see above.
    """
    states = optimiser.state
    if expected and not any(states.values()):
        raise useless(path, 'has no state of the optimiser')
    for name, parameter in model.named_parameters():
        for key, value in states.get(parameter, {}).items():
            if key == COUNT and type(value) is int and value >= 0:  # of bitsandbytes
                continue
            if not isinstance(value, Tensor) or (value.ndim and value.shape != shape_of_state(key, parameter)):
                raise useless(path, f'{key} of {name} does not fit it')
            if not_finite({key: value}):
                raise useless(path, f'{key} of {name} is not finite')


# torch's Adafactor keeps the sums of a matrix over one dimension, which stays with length 1.
SUMMED = {'row_var': -1, 'col_var': -2}
# bitsandbytes' 8 bits are places in a map of 256 values, times a scale for every 256 numbers.
COUNT, MAPS, SCALES, LEVELS = 'step', ('qmap1', 'qmap2'), ('absmax1', 'absmax2'), 256


def shape_of_state(key: str, parameter: Tensor) -> tuple[int, ...]:
    """Shape of what an optimiser keeps of a parameter under a key, where that is not one number."""
    if key in MAPS:
        return (LEVELS,)
    if key in SCALES:
        return (math.ceil(parameter.numel() / LEVELS),)
    shape = list(parameter.shape)
    if key in SUMMED and len(shape) > 1:
        shape[SUMMED[key]] = 1
    return tuple(shape)


def check_same_run(
    found: Progress,
    expected: Progress,
    checkpoint: Path,
    fixed: tuple[str, ...],
    defaults: dict[str, Any],
    say: Callable[[str], None],
    same: Callable[[str, Any, Any], bool] = lambda key, before, now: before == now,
) -> None:
    """Refuse a checkpoint of another training; say what makes the continuation differ from an uninterrupted run.

    Args:
        found: in the checkpoint.
        expected: by the config.
        checkpoint: for messages.
        fixed: keys that a checkpoint is bound to.
        defaults: of the keys; a checkpoint that is older than a key was made with its default.
        say: called with the difference.
        same: whether two values of a fixed key mean the same; see `Task.same`.

    Raises:
        CheckpointError: the value of a fixed key differs.
    """
    now = expected.settings
    before = {key: as_json(defaults.get(key)) for key in now} | {'data': now.get('data')} | found.settings
    for key in (*fixed, *BOUND):
        if not same(key, before[key], now[key]):
            raise CheckpointError(
                f'{checkpoint}: was trained with {key}={before[key]}, the config says {now[key]}; use the config of '
                f'that run'
            )
    classes, named = ((settings.get('data') or {}).get('classes') for settings in (before, now))
    if classes != named:
        raise CheckpointError(
            f'{checkpoint}: was trained with data.classes={classes}, the config says {named}: the labels would mean '
            f'others; use the config of that run'
        )
    if changed := [key for key in COURSE if before[key] != now[key]]:
        what = ', '.join(f'{key} {before[key]} -> {now[key]}' for key in changed)
        say(f'{checkpoint}: {what}; the run goes on, but not bit for bit as without the stop')


def without_places(data: dict[str, Any]) -> dict[str, Any]:
    """What the images are, wherever they lie: a folder and its zip have the same."""
    same = ('ImageFolder', 'Zip')
    return {
        key: 'files' if key == 'type' and value in same else value for key, value in data.items() if key not in PLACES
    }


def as_json(value: Any) -> Any:
    """Copy a value as it will be read again from a checkpoint."""
    return json.loads(json.dumps(plain(value)))
