"""Diffusion configs: MMEngine Config files whose keys are those of `defaults`, here and in the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config

from asr_downstream.diffusion import defaults
from asr_downstream.engine.config import Schema

__all__ = ['SCHEMA', 'load_config']

SCHEMA = Schema(
    name='diffusion',
    folder='diffusion/configs/',
    own=defaults,
    required={'model': "dict(type='UNet2DModel', sample_size=32, ...)"},
)


def load_config(path: Path, options: dict[str, Any] | None = None, data: Path | None = None) -> Config:
    """Read a config, fill in the defaults and check it; see `Schema.load`."""
    return SCHEMA.load(path, options, data)
