"""How images become noise, and how a model takes it away again: diffusion, or flow matching.

A scheduler of diffusers says which of the two: `process_of`.

    process = process_of(scheduler)
    noisy = process.noisy(images, noise, timesteps)
    target = process.target(images, noise, timesteps)    # what the model should predict
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr
from torch import Generator, Tensor

from asr_downstream.console.text import some
from asr_downstream.errors import AsrError, did_you_mean

__all__ = ['FLOW', 'Density', 'Flow', 'Process', 'check_schedule', 'process_of']

FLOW = 'FlowMatchEulerDiscreteScheduler'
# Values with which diffusers' own pipelines of these models do not run, or run the wrong way.
FLOW_REFUSED = {
    'use_dynamic_shifting': 'needs a mu that no pipeline of these models gives; set shift instead',
    'invert_sigmas': 'turns image and noise around, and samples noise',
}
PREDICTIONS = ('epsilon', 'v_prediction', 'sample')
# diffusers: critical for the cosine schedule, whose last signal-to-noise ratios are next to nothing.
COSINE = {'lambda_min_clipped': -5.1}


@dataclass(frozen=True)
class Density:
    """Which timesteps a flow is trained at, and how much each counts; the names are those of diffusers' SD3 script.

    Attributes:
        weighting_scheme: ``'logit_normal'``, ``'mode'``, or for uniform timesteps ``'none'``, ``'sigma_sqrt'`` and
            ``'cosmap'``, of which the last two weight the loss.
        logit_mean, logit_std: of ``'logit_normal'``.
        mode_scale: of ``'mode'``.
    """

    weighting_scheme: str = 'logit_normal'
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def draw(self, stream: Generator) -> Tensor:
        """Draw a share of the timesteps, from 0 to 1."""
        return compute_density_for_timestep_sampling(
            self.weighting_scheme, 1, self.logit_mean, self.logit_std, self.mode_scale, generator=stream
        )[0]


class Process:
    """Base class of diffusion and flow matching.

    Attributes:
        samplers: name -> function of the scheduler of the training that makes a sampler; the first is the default.
        dtype: of timesteps.

    Args:
        scheduler: of the training.
        density: of its timesteps; only of a flow.
    """

    samplers: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}
    dtype: ClassVar[torch.dtype] = torch.long

    def __init__(self, scheduler: Any, density: Density | None = None) -> None:
        self.scheduler = scheduler
        self.density = density or Density()
        self.timesteps = int(scheduler.config.num_train_timesteps)

    def draw(self, stream: Generator) -> Tensor:
        """Draw the timestep ``()`` of a training sample."""
        raise NotImplementedError

    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mix images and noise ``(B, C, H, W)`` at timesteps ``(B,)``."""
        raise NotImplementedError

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict, ``(B, C, H, W)``."""
        raise NotImplementedError

    def weights(self, timesteps: Tensor, gamma: float | None) -> Tensor | None:
        """Weights ``(B,)`` of the losses of a training; None: all are 1.

        Args:
            timesteps: ``(B,)``.
            gamma: of min-SNR weights; None for none.
        """
        raise NotImplementedError

    def shipped(self, pipeline: str | None) -> Any:
        """Scheduler that is written beside the model, for a pipeline of diffusers or none."""
        raise NotImplementedError


class Diffusion(Process):
    """Noise by a schedule of betas; the model predicts noise, velocity or image, by ``prediction_type``."""

    samplers = {
        'DDIM': lambda s: diffusers.DDIMScheduler.from_config(s.config),
        'DDPM': lambda s: diffusers.DDPMScheduler.from_config(s.config),
        'DPM-Solver++': lambda s: diffusers.DPMSolverMultistepScheduler.from_config(
            s.config,
            algorithm_type='dpmsolver++',
            **(COSINE if s.config.beta_schedule == 'squaredcos_cap_v2' else {}),
        ),
    }

    def draw(self, stream: Generator) -> Tensor:
        """Draw uniformly."""
        return torch.randint(self.timesteps, (), generator=stream)

    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Process.noisy`."""
        return self.scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What ``prediction_type`` names."""
        kind = self.scheduler.config.prediction_type
        if kind == 'epsilon':
            return noise
        return clean if kind == 'sample' else self.scheduler.get_velocity(clean, noise, timesteps)

    def weights(self, timesteps: Tensor, gamma: float | None) -> Tensor | None:
        """Min-SNR weights (Hang et al., arXiv 2303.09556, section 3.4), for the loss of the predicted quantity.

        ``min(snr, gamma)`` on the loss of the image; divided by ``snr`` for noise, by ``snr + 1`` for velocity.
        """
        if gamma is None:
            return None
        snr = compute_snr(self.scheduler, timesteps)
        divisors = {'sample': torch.ones_like(snr), 'epsilon': snr, 'v_prediction': snr + 1}
        return snr.clamp(max=gamma) / divisors[self.scheduler.config.prediction_type]

    def shipped(self, pipeline: str | None) -> Any:
        """DDPM's scheduler, from which diffusers makes any other."""
        return diffusers.DDPMScheduler.from_config(self.scheduler.config)


def flow_solver(scheduler: Any) -> Any:
    """DPM-Solver++ for a flow: the scheduler of flows itself has not all that latent pipelines call."""
    return diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=scheduler.config.num_train_timesteps,
        prediction_type='flow_prediction',
        use_flow_sigmas=True,
        flow_shift=scheduler.config.shift,
    )


class Flow(Process):
    """Flow matching (arXiv 2210.02747, 2403.03206): ``(1 - sigma) * image + sigma * noise``, sigma from 0 to 1.

    The model predicts the velocity ``noise - image``. A timestep is ``sigma * num_train_timesteps``, and no whole
    number.
    """

    samplers = {
        'Euler': lambda s: type(s).from_config(s.config),
        'DPM-Solver++': flow_solver,
    }
    dtype = torch.float32

    def draw(self, stream: Generator) -> Tensor:
        """Draw one of the timesteps of the scheduler, by the density."""
        index = int(self.density.draw(stream) * self.timesteps)
        return self.scheduler.timesteps[min(index, self.timesteps - 1)].clone()

    def sigmas(self, timesteps: Tensor) -> Tensor:
        """Share of the noise at timesteps."""
        return timesteps / self.timesteps

    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Process.noisy`."""
        sigma = self.sigmas(timesteps).to(clean.dtype).view(-1, *[1] * (clean.ndim - 1))
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity, from image to noise."""
        return noise - clean

    def weights(self, timesteps: Tensor, gamma: float | None) -> Tensor | None:
        """Weights by ``weighting_scheme``."""
        scheme = self.density.weighting_scheme
        if scheme not in ('sigma_sqrt', 'cosmap'):
            return None
        return compute_loss_weighting_for_sd3(scheme, self.sigmas(timesteps))

    def shipped(self, pipeline: str | None) -> Any:
        """Scheduler that the pipeline runs with; only `DDPMPipeline`, and code without pipeline, run that of flows."""
        name = 'Euler' if pipeline in (None, 'DDPMPipeline') else 'DPM-Solver++'
        return self.samplers[name](self.scheduler)


def process_of(scheduler: Any, density: Density | None = None) -> Process:
    """Process that a scheduler of diffusers belongs to."""
    return (Flow if type(scheduler).__name__ == FLOW else Diffusion)(scheduler, density)


def check_schedule(spec: Mapping[str, Any]) -> None:
    """Refuse keys of a ``noise_scheduler`` that mean nothing in its process, or do not work in it.

    Raises:
        AsrError: see above.
    """
    kind = spec.get('prediction_type', 'epsilon')
    if spec.get('type') != FLOW:
        if kind not in PREDICTIONS:
            raise AsrError(f'noise_scheduler: prediction_type={kind!r} is not known; {did_you_mean(kind, PREDICTIONS)}')
        return
    known = inspect.signature(diffusers.FlowMatchEulerDiscreteScheduler).parameters
    diffusion = inspect.signature(diffusers.DDIMScheduler).parameters.keys() | {'variance_type'}
    if strange := [key for key in spec if key in diffusion and key not in known]:
        raise AsrError(
            f'noise_scheduler: {some(strange)} {"has" if len(strange) == 1 else "have"} no meaning in flow matching, '
            f'whose model always predicts noise - image; leave {"it" if len(strange) == 1 else "them"} out'
        )
    for key, why in FLOW_REFUSED.items():
        if spec.get(key):
            raise AsrError(f'noise_scheduler: {key}={spec[key]!r} {why}')
