"""Diffusion models as analyses see them, see `asr_downstream.folding.analysis.runs`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr_downstream.diffusion.evaluation.fold import call
from asr_downstream.diffusion.runs import Run, load_run
from asr_downstream.diffusion.training.objective import denoising_loss
from asr_downstream.folding.analysis.runs import OpenRun, Wanted
from asr_downstream.folding.analysis.stripes import Metric
from asr_downstream.modules.seeds import generator
from asr_downstream.registry import RUNS

__all__ = ['NoisyImages', 'open_diffusion']

LEVELS = 10  # timesteps, evenly spaced, at which every image is seen
BATCH = 40  # samples, four images at all levels


class NoisyImages(Sequence[dict[str, Any]]):
    """Training images with noise of `LEVELS` timesteps, as calls of the model.

    Each image has one noise, the same at all timesteps, so that what differs between timesteps is no matter of chance.

    Args:
        run: loaded with its data.
        images: number of images.
    """

    def __init__(self, run: Run, images: int) -> None:
        self.run, self.samples = run, run.parts.samples()
        self.order = torch.randperm(len(self.samples), generator=generator(run.config.seed, 'analysis'))[
            :images
        ].tolist()
        count = run.parts.process.timesteps
        self.levels = sorted({int((level + 0.5) * count / LEVELS) for level in range(LEVELS)})

    def __len__(self) -> int:
        return -(-len(self.order) * len(self.levels) // BATCH)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        whole = len(self.order) * len(self.levels)
        pairs = [divmod(k, len(self.levels)) for k in range(number * BATCH, min(whole, (number + 1) * BATCH))]
        items = [self.samples[self.order[image], -1 - image] for image, _ in pairs]
        batch = {key: torch.stack([item[key] for item in items]) for key in items[0] if key != 'bad'}
        timestep = torch.tensor([self.levels[level] for _, level in pairs], dtype=self.run.parts.process.dtype)
        parts, device = self.run.parts, next(self.run.parts.model.parameters()).device
        clean, noise, timestep = (
            t.to(device) for t in (parts.encode(batch['image'].to(device)), batch['noise'], timestep)
        )
        return {
            'args': (parts.process.noisy(clean, noise, timestep), timestep),
            'kwargs': parts.condition.arguments(batch['label'].to(device)),
            'truth': {'image': clean, 'noise': noise, 'timestep': timestep},
        }


@RUNS.register_module(name='diffusion')
def open_diffusion(path: Path, wanted: Wanted) -> OpenRun:
    """Open a run of `diffusion/train.py`, or one of its checkpoints.

    The images are training images with noise of ten timesteps; the metric is the denoising loss on the same.

    Raises:
        AsrError: this is no run, or its data are not there.
    """
    run = load_run(path, wanted.data or True, wanted.ema)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    run.parts.to(device)
    run.parts.model.to(device)
    return OpenRun(
        name=path.resolve().name,
        kind='diffusion',
        model=run.parts.model,
        data=partial(NoisyImages, run, wanted.images),
        step=call,
        metric=Metric('denoising loss', partial(loss_over, run, wanted.images), larger=False),
        by=timesteps,
        grouped='timestep',
        folder=run.folder,
        facts={'checkpoint': str(run.checkpoint), 'step': run.step, 'ema': run.ema, 'sha256': run.sha256},
    )


def timesteps(batch: dict[str, Any]) -> Tensor:
    """Timestep of each sample."""
    return batch['args'][1]


@torch.no_grad()
def loss_over(run: Run, images: int, model: nn.Module) -> float:
    """Mean denoising loss, without weights, over the images at all timesteps."""
    total = count = 0.0
    for batch in NoisyImages(run, images):
        size = len(batch['truth']['timestep'])
        total += size * float(
            denoising_loss(run.parts.process, call(model, batch), batch['truth'], None, weighted=False)
        )
        count += size
    return total / count
