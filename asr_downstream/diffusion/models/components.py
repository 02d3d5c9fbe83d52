"""The parts of a run: model, noise schedule, images, condition, and the VAE of latent models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from mmengine.config import Config
from torch import Tensor

from asr_downstream.diffusion.data import Samples
from asr_downstream.diffusion.defaults import DEFAULT_SCHEDULE
from asr_downstream.diffusion.models.build import build_model, build_scheduler, sample_shape
from asr_downstream.diffusion.models.conditions import Condition, build_condition
from asr_downstream.diffusion.models.pretrained import find_model, load_whole, noise_schedule
from asr_downstream.diffusion.models.process import FLOW, Density, Flow, Process, process_of
from asr_downstream.engine.data.images import Images, build_images
from asr_downstream.errors import AsrError
from asr_downstream.files.configs import plain
from asr_downstream.modules.seeds import generator

__all__ = ['Parts', 'build_parts']


@dataclass
class Parts:
    """Model, schedule, images, condition and VAE of a training, a sampling or an evaluation."""

    model: Any  # of diffusers, whose classes carry no types
    scheduler: Any
    images: Images | None
    condition: Condition
    vae: Any
    seed: int
    density: Density | None = None

    @property
    def process(self) -> Process:
        """How images become noise."""
        return process_of(self.scheduler, self.density)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of what the model denoises."""
        return sample_shape(self.model)

    @property
    def input_name(self) -> str:
        """Name that the model gives what it denoises."""
        return 'hidden_states' if type(self.model).__name__.startswith('DiT') else 'sample'

    def samples(self) -> Samples:
        """Training samples."""
        if self.images is None:
            raise AsrError('the parts were built without data')
        return Samples(self.images, self.shape, self.process.draw, self.seed, self.condition.encode)

    def to(self, device: torch.device) -> None:
        """Move what is frozen: the VAE and the encoder of the condition."""
        for module in (self.vae, self.condition.encoder):
            if module is not None:
                module.to(device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` in [-1, 1] to what the model denoises: the mean latents of the VAE, scaled."""
        if self.vae is None:
            return images
        found = self.vae.encode(images).latent_dist.mean
        return (found - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Map what the model denoises to images in [0, 1]."""
        if self.vae is not None:
            x = self.vae.decode(x / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)).sample
        return (x / 2 + 0.5).clamp(0, 1)

    def inputs(self, batch: int = 1, device: torch.device | str = 'cpu', seed: object = 'inputs') -> dict[str, Any]:
        """Arguments of a forward on noise, at timesteps from the first to the last."""
        stream = generator(seed)
        x = torch.randn(batch, *self.shape, generator=stream).to(device)
        timesteps = torch.linspace(0, self.process.timesteps - 1, batch).long().to(device, self.process.dtype)
        condition = self.condition.arguments(self.condition.of_samples(range(batch)).to(device))
        return {self.input_name: x, 'timestep': timesteps, **condition}

    def conditioned(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of the model for a batch of training samples."""
        dropped = batch['chance'] < self.condition.drop if self.condition.drop else None
        return self.condition.arguments(batch['label'], dropped)


def build_parts(config: Config, plugged: bool = True, data: bool = True, trained: bool = False) -> Parts:
    """Build everything that a config names.

    Args:
        config: a diffusion config; its ``noise_scheduler`` is filled in from the pipeline of a pretrained model.
        plugged: whether to plug the model as it says.
        data: whether to open the images; sampling and folding do not need them.
        trained: whether the config is that of a run, which was trained with the noise schedule that it says.

    Raises:
        AsrError: something is not known or does not fit; the message says which key.
        DataError: the images are not there.
    """
    if not trained or config.noise_scheduler is None:
        config.noise_scheduler = noise_schedule(config.noise_scheduler, config.model, dict(DEFAULT_SCHEDULE))
    model = build_model(config, plugged)
    vae = None
    if config.vae is not None:
        arguments = plain(config.vae)
        if not isinstance(arguments.get('pretrained_model_name_or_path'), str):
            raise AsrError(f"vae: {config.vae} cannot be loaded; give dict(pretrained_model_name_or_path='...')")
        vae = load_whole(diffusers.AutoencoderKL, 'vae', **find_model(arguments, 'AutoencoderKL', 'vae'))
        vae.requires_grad_(False).eval()
    channels, height, width = sample_shape(model)
    images = build_images(config.data, channels if vae is None else vae.config.in_channels) if data else None
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    resolution = config.data.get('resolution')
    if (height * factor, width * factor) != (resolution, resolution):
        raise AsrError(
            f'data: resolution={resolution} does not fit model.sample_size={model.config.sample_size}'
            + (f' with a VAE that divides it by {factor}' if factor > 1 else '; make them equal')
        )
    if vae is not None and vae.config.latent_channels != channels:
        raise AsrError(f'model: in_channels={channels} should be {vae.config.latent_channels}, as the VAE has latents')
    condition = build_condition(config.condition, None if images is None else images.source, model)
    scheduler = build_scheduler(plain(config.noise_scheduler), latents=vae is not None)
    density = check_process(config, process_of(scheduler))
    check_sampling(config, scheduler, condition)
    return Parts(model, scheduler, images, condition, vae, config.seed, density)


def check_process(config: Config, process: Process) -> Density | None:
    """Refuse settings of the other noise process; take the first sampler where the config names none.

    Returns:
        Density of the timesteps; None: they are uniform.
    """
    kind, samplers = type(process.scheduler).__name__, list(process.samplers)
    config.sampler = config.sampler or samplers[0]
    if config.sampler not in samplers:
        raise AsrError(f'sampler={config.sampler!r} does not sample {kind}; use {" or ".join(map(repr, samplers))}')
    flow = isinstance(process, Flow)
    if flow and config.snr_gamma is not None:
        raise AsrError(f'snr_gamma={config.snr_gamma} has no meaning with {kind}; see weighting_scheme')
    if not flow and config.weighting_scheme is not None:
        raise AsrError(
            f'weighting_scheme={config.weighting_scheme!r} has no meaning with {kind}, only with {FLOW}; see snr_gamma'
        )
    given = {key: config[key] for key in ('weighting_scheme', 'logit_mean', 'logit_std', 'mode_scale')}
    return Density(**{**given, 'weighting_scheme': given['weighting_scheme'] or 'logit_normal'}) if flow else None


def check_sampling(config: Config, scheduler: Any, condition: Condition) -> None:
    """Refuse sample grids that would only fail when they are made."""
    most = scheduler.config.num_train_timesteps
    if config.validation_steps and config.num_inference_steps > most:
        raise AsrError(f'num_inference_steps={config.num_inference_steps} should be at most {most}, the timesteps')
    if config.guidance_scale != 1 and not condition.drop:
        raise AsrError(
            f'guidance_scale={config.guidance_scale} needs a condition with drop > 0, such as drop=0.1; without one '
            f'leave it at 1'
        )
