"""Diffusion configs: MMEngine Config files whose keys are those of `asr_downstream.generation.defaults`."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config

from asr_downstream.configs import override, read_config
from asr_downstream.errors import AsrError, DataError, did_you_mean
from asr_downstream.generation import defaults

__all__ = ['load_config', 'work_dir_of']

TYPES: dict[str, str] = vars(defaults)['__annotations__']
CHOICES = {
    'mixed_precision': ('no', 'fp16', 'bf16', None),
    'lr_scheduler': ('constant', 'constant_with_warmup', 'linear', 'cosine', 'cosine_with_restarts', 'polynomial'),
    'sampler': ('DDPM', 'DDIM', 'DPM-Solver++'),
}
POSITIVE = (
    'max_train_steps', 'train_batch_size', 'gradient_accumulation_steps', 'learning_rate', 'logging_steps',
    'checkpointing_steps', 'checkpoints_total_limit', 'num_inference_steps', 'max_grad_norm', 'num_validation_images',
)  # fmt: skip


def load_config(path: Path, options: dict[str, Any] | None = None, data: Path | None = None) -> Config:
    """Read a config, fill in the defaults and check it.

    Args:
        path: config file.
        options: overrides, ``{'learning_rate': 1e-3, 'model.layers_per_block': 1}``.
        data: image folder or zip, instead of the one in the config. Without it, a relative ``data.path`` that does not
            exist is looked up under the environment variable ``ASR_DATA_ROOT``, if that is set.

    Raises:
        AsrError: the file is missing or no config, or has keys or values that are not known.
        DataError: ``data`` does not exist.
    """
    path = Path(path)
    given = read_config(path, 'diffusion/configs/')
    config = Config({key: copy.deepcopy(getattr(defaults, key)) for key in TYPES}, filename=str(path))
    for key, value in given.items():
        check_known(key, path)
        config[key] = copy.deepcopy(value)  # a dict replaces the default dict: its keys belong to its type
    for key in options or {}:
        check_known(key.partition('.')[0], Path('--cfg-options'))
    override(config, options, path)
    point_at_data(config, data)
    check(config, path)
    return config


def check_known(key: str, where: Path) -> None:
    """Refuse a key that is not in the defaults."""
    if key not in TYPES:
        raise AsrError(f'{where}: {key!r} is not a key of a diffusion config; {did_you_mean(key, TYPES)}')


def point_at_data(config: Config, data: Path | None) -> None:
    """Find ``data.path``, in place."""
    shared = os.environ.get('ASR_DATA_ROOT')
    if data is not None:
        if not data.exists():
            raise DataError(f'{data}: no such image folder or zip file; check --data')
        config.data.path = str(data)
    elif shared and config.data.get('path') and not Path(config.data.path).exists():
        candidate = Path(shared) / Path(config.data.path).name
        if candidate.exists():
            config.data.path = str(candidate)
    path = Path(config.data.get('path') or '')
    if config.data.get('type') in ('Digits', 'Zip', 'ImageFolder') and config.data.get('path') and path.exists():
        config.data.type = 'Zip' if path.is_file() else 'ImageFolder'  # either will do


def check(config: Config, path: Path) -> None:
    """Refuse values of the wrong kind, before anything is built."""
    for key, kinds in TYPES.items():
        value = config[key]
        if not any(fits(value, kind.strip()) for kind in kinds.split('|')):
            raise AsrError(f'{path}: {key}={value!r} should be {kinds.replace(" | ", " or ")}')
    for key, allowed in CHOICES.items():
        if config[key] not in allowed:
            raise AsrError(
                f'{path}: {key}={config[key]!r} is not known; {did_you_mean(str(config[key]), filter(None, allowed))}'
            )
    for key in POSITIVE:
        if config[key] is not None and not config[key] > 0:
            raise AsrError(f'{path}: {key}={config[key]!r} should be greater than 0')
    for key, example in (('model', "dict(type='UNet2DModel', sample_size=32, ...)"), ('max_train_steps', '10_000')):
        if config[key] is None:
            raise AsrError(f'{path}: has no {key!r}; add {key} = {example}')
    if unknown := set(config.report_to) - {'tensorboard', 'wandb'}:
        raise AsrError(f"{path}: report_to={sorted(unknown)} is not known; use 'tensorboard', 'wandb' or both")


def fits(value: Any, kind: str) -> bool:
    """Whether a value is of an annotated kind; a whole number is a float as well, and True is no number."""
    if kind == 'None':
        return value is None
    if kind == 'dict':
        return isinstance(value, dict)
    allowed = {'int': (int,), 'float': (int, float), 'bool': (bool,), 'str': (str,), 'list': (list, tuple)}[kind]
    return isinstance(value, allowed) and (kind == 'bool' or not isinstance(value, bool))


def work_dir_of(config: Config) -> Path:
    """Folder of the run: ``output_dir``, or ``work_dirs/<config name>``."""
    return Path(config.output_dir or f'work_dirs/{Path(config.filename).stem}')
