"""FAR configs: MMEngine Config files whose keys are those of `asr_downstream.far.defaults` and of every training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmengine.config import Config

from asr_downstream.engine.config import Schema, with_epochs
from asr_downstream.errors import AsrError, did_you_mean
from asr_downstream.far import defaults
from asr_downstream.files.configs import plain

__all__ = ['SCHEMA', 'load_config', 'stage_config', 'with_epochs']

NAME = re.compile(r'[A-Za-z][\w-]*')
RESERVED = ('shipped', 'sparse', 'FAR-')  # how folders beside those of the stages begin
# What teacher, student and pruned members have in common.
WHOLE = (
    'custom_imports', 'task', 'teacher', 'replace', 'data', 'holdout', 'images_per_class', 'image_mean', 'image_std',
    'stages', 'prune',
)  # fmt: skip
SCHEMA = Schema(
    name='FAR',
    folder='tools/far_configs/',
    own=defaults,
    required={'teacher': "dict(type='ViTForImageClassification', image_size=32, patch_size=4, ...)"},
)


def load_config(path: Path, options: dict[str, Any] | None = None, data: Path | None = None) -> Config:
    """Read a config and check all its stages.

    Args:
        path: config file.
        options: overrides, ``{'learning_rate': 1e-3}``; ``{'stages.0.epochs': 1}`` for one stage.
        data: image folder or zip, instead of the one in the config.

    Raises:
        AsrError: the file is missing or no config, or has keys or values that are not known.
        DataError: ``data`` does not exist.
    """
    config = SCHEMA.load(path, options, data)
    if not config.stages:
        raise AsrError(f"{path}: has no stages; add stages = [dict(name='distill', learns='replacements', ...)]")
    names = [stage.get('name') for stage in config.stages]
    fine = [name for name in names if isinstance(name, str) and NAME.fullmatch(name) and not name.startswith(RESERVED)]
    if len(set(fine)) < len(names):
        raise AsrError(
            f'{path}: every stage should have a name of its own, of letters, digits, _ and -, and not beginning '
            f'with {", ".join(RESERVED)}; got {names}'
        )
    if unknown := set(config.prune) - {'sparse', 'finetune'}:
        raise AsrError(f'{path}: prune has {sorted(unknown)}; it has sparse=dict(...) and finetune=dict(...)')
    for name, given in [*((stage['name'], stage) for stage in config.stages), *config.prune.items()]:
        if shared := [key for key in given if key in WHOLE]:
            raise AsrError(f'{path}: {name}: {shared[0]} holds for all stages; give it beside them')
    for name in names:
        stage_config(config, name)
    return config


def stage_config(config: Config, name: str, **changes: Any) -> Config:
    """Config of one stage: the whole config with what the stage says, and ``changes``, put over it.

    Raises:
        AsrError: there is no such stage, or it has keys or values that are not known.
    """
    known = {stage['name']: stage for stage in config.stages}
    if name not in known:
        raise AsrError(f'{config.filename}: has no stage {name!r}; {did_you_mean(name, known)}')
    return derived(config, name, {k: v for k, v in known[name].items() if k != 'name'} | changes)


def derived(config: Config, name: str, changes: dict[str, Any]) -> Config:
    """A config that differs from another in some keys."""
    content = plain(config.to_dict()) | {'stages': []} | plain(changes)
    return SCHEMA.from_dict(content, f'{config.filename}, stage {name}')
