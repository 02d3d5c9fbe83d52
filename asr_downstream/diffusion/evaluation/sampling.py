"""Sampling: images from a model, each from a random stream of its own, so that it does not depend on the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.console.processes import ALONE, Processes
from asr_downstream.diffusion.models.components import Parts
from asr_downstream.diffusion.models.pretrained import DEFINING
from asr_downstream.diffusion.models.process import Diffusion, Flow, process_of
from asr_downstream.engine.values import Above, MaxShare, check_values
from asr_downstream.errors import AsrError, DataError, did_you_mean, warn
from asr_downstream.modules.seeds import mix

__all__ = ['build_sampler', 'check_can_sample', 'generate', 'sampler_name']


# Kinds of options that a scheduler of diffusers would only fail on later.
OPTIONS = {'thresholding': bool, 'dynamic_thresholding_ratio': MaxShare, 'sample_max_value': Above}
OF_TRAINING = (*DEFINING, 'use_flow_sigmas', 'flow_shift')
BEYOND, SHARE = 1.5, 0.05  # of pixels in [-1, 1]: a trained model puts next to none there


def build_sampler(
    name: str | None, scheduler: Any, options: Mapping[str, Any] | None = None, latents: bool = False
) -> Any:
    """Make a sampler for a model that was trained with ``scheduler``.

    Args:
        name: DDPM (Ho et al., arXiv 2006.11239), DDIM (arXiv 2010.02502) or DPM-Solver++ (arXiv 2211.01095); of flow
            matching Euler or DPM-Solver++. None: see `sampler_name`.
        scheduler: of the training; the noise schedule and what the model predicts are taken from it.
        options: further arguments of the scheduler of diffusers, such as ``thresholding=True``.
        latents: whether the model denoises latents.

    Raises:
        AsrError: the name is not known, or does not sample such a model, or an option is not one of the sampler.
    """
    name = sampler_name(name, scheduler)
    sampler = process_of(scheduler).samplers[name](scheduler)
    if not options:
        return sampler
    known = set(inspect.signature(type(sampler).__init__).parameters) - {'self', *OF_TRAINING}
    for key in options:
        if key in OF_TRAINING:
            raise AsrError(f'sampler_kwargs: {key} is what the model was trained with; leave it out')
        if key not in known:
            raise AsrError(f'sampler_kwargs: {name} takes no {key!r}; {did_you_mean(key, known)}')
    kinds = {key: kind for key, kind in OPTIONS.items() if key in options}
    check_values(kinds, {key: options[key] for key in kinds}, 'sampler_kwargs')
    if latents and options.get('thresholding'):
        raise AsrError('sampler_kwargs: thresholding is for pixels in [-1, 1]; latents are larger, leave it out')
    try:
        return type(sampler).from_config(sampler.config, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise AsrError(f'sampler_kwargs: {name} does not take {dict(options)} ({error})') from error


def sampler_name(name: str | None, scheduler: Any) -> str:
    """Name of the sampler: the one given, or the first of the noise process, DDIM or of flow matching Euler.

    Raises:
        AsrError: see `build_sampler`.
    """
    fitting = process_of(scheduler).samplers
    if name in fitting or name is None:
        return name or next(iter(fitting))
    if name in {*Diffusion.samplers, *Flow.samplers}:
        raise AsrError(
            f'sampler {name!r} does not sample what was trained with {type(scheduler).__name__}; use '
            f'{", ".join(map(repr, fitting))}'
        )
    raise AsrError(f'sampler {name!r} is not known; {did_you_mean(name, fitting)}')


@torch.no_grad()
def generate(
    model: nn.Module,
    parts: Parts,
    sampler: Any,
    numbers: Sequence[int],
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    guidance_scale: float = 1.0,
    text: str = '',
    describe: Callable[[Sequence[int]], Tensor] | None = None,
    processes: Processes = ALONE,
) -> Tensor:
    """Generate images; all of ``processes`` call this.

    Args:
        model: in eval mode, on any device.
        parts: of its run; the condition says what image ``number`` shows.
        sampler: see `build_sampler`.
        numbers: of the images; image ``n`` of a seed is the same in every batch and with every batch size.
        steps: number of inference steps.
        seed: of the images.
        batch_size: images a forward.
        guidance_scale: 1 is no guidance; more needs a condition that was trained with ``drop``.
        text: of the progress bar; without it there is none.
        describe: numbers to conditions; by default classes or prompts take turns.
        processes: share the batches: a batch is the same images in one process and in many.

    Returns:
        Images ``(N, C, H, W)`` in [0, 1], float32, on the CPU; on all but the first process none.

    Raises:
        AsrError: training mode, too many steps, or guidance without ``drop``.
        DataError: images are not finite.
    """
    if model.training:
        raise AsrError(f'{type(model).__name__} is in training mode: call model.eval() first')
    check_can_sample(parts, sampler, steps, guidance_scale)
    batches = [list(numbers[start : start + batch_size]) for start in range(0, len(numbers), batch_size)]

    def draw(batch: list[int]) -> Tensor:
        described = (describe or parts.condition.of_samples)(batch)
        return generate_batch(model, parts, sampler, batch, described, steps, seed, guidance_scale)

    images = processes.shared(draw, processes.own(batches), len(batches), text)
    return torch.cat(images) if images else torch.empty(0, *parts.shape)


def check_can_sample(parts: Parts, sampler: Any, steps: int, guidance_scale: float = 1.0) -> None:
    """Refuse a sampling that does not fit a run.

    Raises:
        AsrError: too many steps, or guidance without ``drop``.
    """
    if not 1 <= steps <= sampler.config.num_train_timesteps:
        raise AsrError(f'{steps} inference steps: should be between 1 and {sampler.config.num_train_timesteps}')
    if guidance_scale != 1 and not parts.condition.drop:
        raise AsrError('guidance needs a condition that was trained with drop > 0')


def generate_batch(
    model: nn.Module,
    parts: Parts,
    sampler: Any,
    numbers: list[int],
    described: Tensor,
    steps: int,
    seed: int,
    guidance_scale: float,
) -> Tensor:
    """Generate one batch."""
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    streams = [torch.Generator().manual_seed(mix(seed, 'image', number)) for number in numbers]
    x = torch.stack([torch.randn(parts.shape, generator=s) for s in streams]).to(device, dtype)
    described = described.to(device)
    condition, nothing = parts.condition.arguments(described), {}
    if guidance_scale != 1:
        nothing = parts.condition.arguments(described, torch.ones(len(numbers), dtype=torch.bool, device=device))
    sampler.set_timesteps(steps)
    x = x * getattr(sampler, 'init_noise_sigma', 1.0)  # those of flows have none
    scale = getattr(sampler, 'scale_model_input', lambda x, t: x)
    for t in sampler.timesteps:
        scaled = scale(x, t)
        when = t.to(device).expand(len(numbers))
        predicted = model(scaled, when, **condition).sample
        if guidance_scale != 1:
            plain = model(scaled, when, **nothing).sample
            predicted = plain + guidance_scale * (predicted - plain)
        x = sampler.step(predicted, t, x, generator=streams).prev_sample
    hint_at_thresholding(x, sampler, parts)
    images = parts.decode(x).float().cpu()
    if not (x.isfinite().all() and images.isfinite().all()):  # decoding clips infinity to white
        raise DataError(
            f'the generated images are not finite: {type(model).__name__} computes NaN or infinity; the training '
            f'diverged, or the numbers are too large for {str(dtype).removeprefix("torch.")}'
        )
    return images


def hint_at_thresholding(x: Tensor, sampler: Any, parts: Parts) -> None:
    """Warn of pixels far outside of [-1, 1]: DPM-Solver++ clips nothing on its way, other than DDIM and DDPM."""
    if parts.vae is not None or sampler.config.get('thresholding', True):
        return
    beyond = float((x.abs() > BEYOND).float().mean())
    if sampler.config.get('clip_sample') is None and beyond > SHARE:  # it has no such setting
        warn(
            f'{beyond:.0%} of the pixels lie beyond {BEYOND} instead of in [-1, 1], as of a model that has not learnt '
            f'much yet: {type(sampler).__name__} does not clip what it predicts unless it is told to, with '
            f'sampler_kwargs=dict(thresholding=True) in a config, or sample --sampler-kwargs thresholding=True'
        )
