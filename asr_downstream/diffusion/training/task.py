"""Denoising as a task: a model learns to predict noise, velocity or the image itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from asr_downstream.diffusion.config import SCHEMA
from asr_downstream.diffusion.data import Samples
from asr_downstream.diffusion.evaluation.pictures import grid, save_grid
from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.models.components import Parts
from asr_downstream.diffusion.models.pretrained import PATH, same_schedule
from asr_downstream.diffusion.training.objective import denoising_loss
from asr_downstream.diffusion.training.saved import check_can_save, save_on_the_way
from asr_downstream.engine.config import portable
from asr_downstream.engine.optim import build_optimiser
from asr_downstream.engine.task import Task
from asr_downstream.engine.trackers import Reporter
from asr_downstream.errors import DataError
from asr_downstream.files.configs import plain
from asr_downstream.folding.adapters.base import remember
from asr_downstream.plugging.learning.choose import KEPT, Learning, choose, words_of
from asr_downstream.plugging.learning.restrict import restrict, trained_beside_gates, warn_of_another_start

__all__ = ['Denoising', 'learning_of']


def learning_of(config: Config, model: nn.Module) -> Learning:
    """What learns in a model by a config; the model is not changed.

    Raises:
        PlugError: ``learns`` means nothing in it.
    """
    learning = choose(model, plain(config.learns))
    return learning.measured(model, lambda params: build_optimiser([{'params': params}], config))


class Denoising(Task):
    """Denoising, with a grid of samples as validation.

    Args:
        config: a diffusion config.
        parts: of it, with data.
    """

    schema = SCHEMA
    fixed: tuple[str, ...] = (
        'model', 'plug', 'replace', 'learns', 'condition', 'vae', 'noise_scheduler', 'snr_gamma',
        'weighting_scheme', 'logit_mean', 'logit_std', 'mode_scale',
    )  # fmt: skip

    def __init__(self, config: Config, parts: Parts) -> None:
        self.config = config
        self.parts = parts
        self.model = parts.model
        self.images = parts.images
        options = plain(config.sampler_kwargs)
        self.sampler = build_sampler(config.sampler, parts.scheduler, options, parts.vae is not None)
        check_can_save(config, self.model)
        restrict(self.model, learning_of(config, self.model))
        if 'gates' in words_of(plain(config.learns)) and PATH in config.model:
            warn_of_another_start(self.model)

    def same(self, key: str, before: Any, now: Any) -> bool:
        """Compare noise schedules by what they are for the model, and what learns by what it means."""
        if key == 'learns':
            return words_of(before) == words_of(now)
        if key == 'noise_scheduler' and isinstance(before, dict) and isinstance(now, dict):
            return same_schedule(before, now)
        return super().same(key, before, now)

    def begin(self, run: Path | None) -> None:
        """Remember the base of a training in which not everything learns, for files of its gates."""
        if KEPT in vars(self.model):
            remember(self.model, trained_beside_gates(self.model), run)

    def samples(self) -> Samples:
        """See `Parts.samples`."""
        return self.parts.samples()

    def to(self, device: torch.device) -> None:
        """See `Parts.to`."""
        self.parts.to(device)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode images and ``condition``, in float32: half precision would change the noise level."""
        image = self.parts.encode(batch['image'])
        return {**batch, 'image': image, 'condition': self.parts.conditioned(batch)}

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model: the noisy images, how noisy they are, and the condition."""
        noisy = self.parts.process.noisy(batch['image'], batch['noise'], batch['timestep'])
        return {self.parts.input_name: noisy, 'timestep': batch['timestep'], **batch['condition']}

    def objective(self, output: Any, batch: dict[str, Any]) -> Tensor:
        """Loss of what the model returned for `inputs`."""
        return denoising_loss(self.parts.process, output.sample, batch, self.config.snr_gamma)

    def validates_at_start(self) -> bool:
        """Whether to write a grid of the baseline: by the config, which may leave it to the model."""
        asked = self.config.validate_at_start
        return PATH in self.config.model if asked is None else bool(asked)

    def validate(self, model: nn.Module, step: int, run: Path, reporter: Reporter) -> None:
        """Write ``samples/step-<step>.png``: always the same noise."""
        config = self.config
        try:
            images = generate(
                model, self.parts, self.sampler, range(config.num_validation_images), config.num_inference_steps,
                config.seed, config.train_batch_size, config.guidance_scale,
            )  # fmt: skip
        except DataError as error:  # whether the training itself diverged, the loop sees
            reporter.say(f'step {step}: no samples: {error}')
            return
        captions = [self.parts.condition.caption(number) for number in range(len(images))]
        save_grid(run / 'samples' / f'step-{step:07d}.png', images, captions=captions)
        reporter.picture(step, grid(images, captions=captions))

    def saved(self, checkpoint: Path, step: int, reporter: Reporter) -> None:
        """Write a pipeline, if it is time."""
        every = self.config.save_pipeline_steps
        if every and (step % every == 0 or step == self.config.max_train_steps):
            save_on_the_way(checkpoint, self.config.checkpoints_total_limit, reporter.say)

    def config_text(self) -> str:
        """Resolved config, with the classes or prompts that the data gave."""
        condition = self.parts.condition.complete(self.config.to_dict()['condition'])
        return portable(self.config, condition=condition)
