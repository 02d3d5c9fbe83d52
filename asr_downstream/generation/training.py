"""Training of a diffusion model: the task `Denoising`, by the engine."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config

from asr_downstream.engine import training as engine
from asr_downstream.engine.config import work_dir_of
from asr_downstream.generation.denoising import Denoising
from asr_downstream.generation.parts import build_parts

__all__ = ['train']


def train(config: Config, resume: str | None = None) -> Path:
    """Train a diffusion model; every process of ``accelerate launch`` calls this.

    Args:
        config: see `asr_downstream.generation.config.load_config`.
        resume: ``'latest'`` for the newest complete checkpoint of the run, or the folder of one.

    Returns:
        The last checkpoint.

    Raises:
        AsrError: config, data or checkpoint do not fit, or the loss is not finite.
    """
    run = work_dir_of(config)
    engine.check_folder(run, resume)  # said before the model is built, which may take a while
    return engine.train(Denoising(config, build_parts(config)), config, run, resume)
