"""Pipelines of diffusers that a training writes on its way: ``pipeline-<step>``, beside the checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from asr_downstream.console.text import some
from asr_downstream.diffusion.export import save_pipeline
from asr_downstream.diffusion.runs import load_run
from asr_downstream.engine.state.checkpoints import step_of
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import remove
from asr_downstream.plugging.describe import describe

__all__ = ['check_can_save', 'pipelines_in', 'save_on_the_way']

NAME = re.compile(r'pipeline-(\d+)')


def check_can_save(config: Config, model: Any) -> None:
    """Refuse a ``save_pipeline_steps`` of which nothing would come.

    Raises:
        AsrError: there are no checkpoints to fold then, or the model does not become a pipeline.
    """
    steps, key = config.save_pipeline_steps, f'save_pipeline_steps={config.save_pipeline_steps}'
    if not steps:
        return
    if steps % config.checkpointing_steps:
        raise AsrError(
            f'{key} should be a multiple of checkpointing_steps={config.checkpointing_steps}: a pipeline is made from '
            f'a checkpoint'
        )
    if config.replace is not None:
        raise AsrError(f'{key}: a model whose attention is replaced is none of diffusers; leave it at 0')
    if dynamic := [site.path for site in describe(model).sites if not site.folds]:
        raise AsrError(
            f'{key}: the gates of {some(dynamic)} depend on the image, and fold by calibration alone; leave it at 0, '
            f'and write a pipeline with asr-downstream fold RUN OUT --calibrate'
        )


def save_on_the_way(checkpoint: Path, limit: int | None, say: Callable[[str], None]) -> None:
    """Write the pipeline of a checkpoint; a training goes on also where that fails.

    Args:
        checkpoint: complete.
        limit: pipelines to keep; None: all.
        say: called with a line on what failed.
    """
    out = checkpoint.with_name(f'pipeline-{step_of(checkpoint)}')
    try:
        with torch.random.fork_rng():
            save_pipeline(load_run(checkpoint), out)
        others = [path for path in pipelines_in(checkpoint.parent) if path != out]
        for path in others[: max(0, len(others) + 1 - limit)] if limit is not None else ():
            remove(path)
    except (AsrError, OSError) as error:
        say(f'{out}: no pipeline: {error}')


def pipelines_in(run: Path) -> list[Path]:
    """Pipelines that a training has written, by step."""
    found = [(int(m[1]), p) for p in run.glob('pipeline-*') if p.is_dir() and (m := NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]
