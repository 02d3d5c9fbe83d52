"""The training objective: predict noise, velocity or the image itself, with min-SNR weights if asked for."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor

__all__ = ['denoising_loss', 'snr_weights', 'target_of']


def target_of(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model should predict, by ``scheduler.config.prediction_type``.

    Args:
        scheduler: a noise scheduler of diffusers.
        clean: ``(B, C, H, W)``.
        noise: ``(B, C, H, W)``.
        timesteps: ``(B,)``.
    """
    if scheduler.config.prediction_type == 'epsilon':
        return noise
    if scheduler.config.prediction_type == 'sample':
        return clean
    return scheduler.get_velocity(clean, noise, timesteps)


def snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights ``(B,)`` (Hang et al., arXiv 2303.09556, section 3.4), for the loss of the predicted quantity.

    ``min(snr, gamma)`` on the loss of the image; divided by ``snr`` for noise, by ``snr + 1`` for velocity.
    """
    snr = compute_snr(scheduler, timesteps)
    least = snr.clamp(max=gamma)
    divisors = {'sample': torch.ones_like(snr), 'epsilon': snr, 'v_prediction': snr + 1}
    return least / divisors[scheduler.config.prediction_type]


def denoising_loss(scheduler: Any, predicted: Tensor, batch: dict[str, Tensor], gamma: float | None) -> Tensor:
    """Mean squared error of a prediction, in float32.

    Args:
        scheduler: a noise scheduler of diffusers.
        predicted: by the model, for what ``scheduler.add_noise`` makes of the batch.
        batch: ``image`` and ``noise`` ``(B, C, H, W)``, ``timestep`` ``(B,)``.
        gamma: of the min-SNR weights; None: all weights are 1.

    Returns:
        A scalar.
    """
    clean, noise, timesteps = batch['image'], batch['noise'], batch['timestep']
    target = target_of(scheduler, clean, noise, timesteps)
    losses = (predicted.float() - target.float()).square().mean((1, 2, 3))
    if gamma is not None:
        losses = losses * snr_weights(scheduler, timesteps, gamma)
    return losses.mean()
