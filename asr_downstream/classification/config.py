"""Classification configs: MMEngine Config files whose keys are those of `defaults`, here and in the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config

from asr_downstream.classification import defaults
from asr_downstream.classification.plugs import PLUGS
from asr_downstream.engine.config import Schema
from asr_downstream.errors import AsrError, did_you_mean

__all__ = ['SCHEMA', 'load_config']

SCHEMA = Schema(
    name='classification',
    folder='tools/cls_configs/',
    own=defaults,
    required={'model': "dict(type='ResNet', depth=20)"},
)


def load_config(
    path: Path, options: dict[str, Any] | None = None, data: Path | None = None, plug: str | None = None
) -> Config:
    """Read a config, fill in the defaults and check it; see `Schema.load`.

    Args:
        path: config file.
        options: overrides, ``{'learning_rate': 1e-3}``.
        data: image folder or zip, instead of the one in the config.
        plug: name of one of `asr_downstream.classification.plugs.PLUGS`, instead of the plug in the config; options
            change it.

    Raises:
        AsrError: the file is missing or no config, or has keys or values that are not known.
        DataError: ``data`` does not exist.
    """
    if plug is not None and plug not in PLUGS:
        raise AsrError(f'--plug {plug}: is not known; {did_you_mean(plug, PLUGS)}')
    return SCHEMA.load(path, options, data, {} if plug is None else {'plug': PLUGS[plug]})
