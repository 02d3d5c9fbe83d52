"""The training objective: predict what the noise process says, with its weights if asked for."""

from __future__ import annotations

from torch import Tensor

from asr_downstream.diffusion.models.process import Process

__all__ = ['denoising_loss']


def denoising_loss(
    process: Process, predicted: Tensor, batch: dict[str, Tensor], gamma: float | None, weighted: bool = True
) -> Tensor:
    """Mean squared error of a prediction, in float32.

    Args:
        process: of the training.
        predicted: by the model, for what ``process.noisy`` makes of the batch.
        batch: ``image`` and ``noise`` ``(B, C, H, W)``, ``timestep`` ``(B,)``.
        gamma: of the min-SNR weights; None for none.
        weighted: whether samples have the weights of the training; else all are 1.

    Returns:
        A scalar.
    """
    clean, noise, timesteps = batch['image'], batch['noise'], batch['timestep']
    target = process.target(clean, noise, timesteps)
    losses = (predicted.float() - target.float()).square().mean((1, 2, 3))
    weights = process.weights(timesteps, gamma) if weighted else None
    return (losses if weights is None else losses * weights).mean()
