"""Training of a diffusion model: the task `Denoising`, by the engine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config

from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.diffusion.models.pretrained import resumed_schedule
from asr_downstream.diffusion.training.task import Denoising
from asr_downstream.engine import loop as engine
from asr_downstream.engine.state.checkpoints import checkpoints_in
from asr_downstream.engine.state.train_state import read_progress
from asr_downstream.errors import CheckpointError
from asr_downstream.files.configs import work_dir_of
from asr_downstream.plugging.plugs.start import warn_of_pretrained
from asr_downstream.plugging.save import starts

__all__ = ['train']


def train(config: Config, resume: str | None = None) -> Path:
    """Train a diffusion model; every process of ``accelerate launch`` calls this.

    Args:
        config: see `asr_downstream.diffusion.config.load_config`.
        resume: ``'latest'`` for the newest complete checkpoint of the run, or the folder of one.

    Returns:
        The last checkpoint.

    Raises:
        AsrError: config, data or checkpoint do not fit, or the loss is not finite.
    """
    run = work_dir_of(config)
    engine.check_folder(run, resume)  # said before the model is built, which may take a while
    before = None if resume is None else schedule_before(run if resume == 'latest' else Path(resume))
    if before is not None:
        say = print if not int(os.environ.get('RANK', '0')) else lambda line: None
        if schedule := resumed_schedule(config.noise_scheduler, config.model, before, say):
            config.noise_scheduler = schedule  # else the engine refuses the checkpoint
    parts = build_parts(config, trained=before is not None)
    if before is None and config.model.get('pretrained_model_name_or_path'):
        warn_of_pretrained(starts(parts.model))
    return engine.train(Denoising(config, parts), config, run, resume)


def schedule_before(path: Path) -> dict[str, Any] | None:
    """Noise schedule in a checkpoint, or in the newest one of a run that can be read; None: there is none."""
    for checkpoint in (path, *reversed(checkpoints_in(path))):
        with suppress(CheckpointError):
            found = read_progress(checkpoint).settings.get('noise_scheduler')
            return found if isinstance(found, dict) else None
    return None
