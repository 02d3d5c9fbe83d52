"""The plan of a training, for ``--dry-run``: config, sites, cost, steps, memory."""

from __future__ import annotations

import torch
from mmengine.config import Config
from rich.table import Table

from asr_downstream.console.text import render
from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.diffusion.training.task import Denoising, learning_of
from asr_downstream.engine.loop import recompute_activations
from asr_downstream.files.configs import work_dir_of
from asr_downstream.measure import cost
from asr_downstream.modules.seeds import generator
from asr_downstream.plugging.describe import describe
from asr_downstream.plugging.learning.choose import Learning

__all__ = ['plan']

GIB = 2**30


def plan(config: Config) -> str:
    """Text for ``--dry-run``.

    Raises:
        AsrError: something in the config does not fit.
        DataError: the images are not there.
    """
    parts = build_parts(config)
    assert parts.images is not None
    sites = describe(parts.model)
    task = Denoising(config, parts)
    learning = learning_of(config, parts.model)
    total = cost.parameters(parts.model)
    gmacs = cost.gmacs(lambda: parts.model(**parts.inputs()))
    rows = {
        'output': str(work_dir_of(config)),
        'data': f'{len(parts.images):,} images, {len(parts.images.source.classes)} classes',
        'parameters': f'{total:,}, of which {sites.parameters:,} fold away or go with the plug',
        'learns': str(learning).removeprefix('learns '),
        'GMACs a forward and image': f'{gmacs:.4f} (torch.utils.flop_counter / 2)',
        'steps': steps_of(config, len(parts.images)),
        'memory a process': memory(task, learning),
    }
    table = Table(show_header=False, title='plan')
    for key, value in rows.items():
        table.add_row(key, value)
    return f'{config.pretty_text}\n{sites}\n{render(table)}'


def steps_of(config: Config, images: int) -> str:
    """Steps and epochs of one process."""
    batch = config.train_batch_size * config.gradient_accumulation_steps
    epochs = config.max_train_steps * batch / images
    return f'{config.max_train_steps:,} of {batch} images a process, {epochs:.2f} epochs with one process'


def memory(task: Denoising, learning: Learning) -> str:
    """Weights, gradients, Adam's moments and the average, activations as measured on a batch of one, what is frozen."""
    config, parts = task.config, task.parts
    states = sum(p.nbytes for p in parts.model.parameters()) + learning.gradients + (learning.state or 0)
    states += learning.gradients if config.use_ema else 0  # the average has as many numbers as the gradients
    if config.gradient_checkpointing:
        recompute_activations(parts.model)
    task.train_mode()
    stream = generator('memory')
    batch = {
        'image': torch.randn(1, *parts.shape, generator=stream),
        'noise': torch.randn(1, *parts.shape, generator=stream),
        'timestep': parts.process.draw(stream)[None],
        'condition': parts.condition.arguments(parts.condition.of_samples([0])),
    }
    one = cost.saved_bytes(parts.model, lambda: task.loss(parts.model, batch)[0])
    frozen = [m for m in (parts.vae, parts.condition.encoder) if m is not None]
    states += sum(p.numel() * p.element_size() for module in frozen for p in module.parameters())
    half = config.mixed_precision in ('fp16', 'bf16')
    activations = one * config.train_batch_size / (2 if half else 1)
    note = ', about half of it in half precision' if half else ''
    kept = ['weights, gradients, moments', 'average' if config.use_ema else '', 'frozen parts' if frozen else '']
    return (
        f'{(states + activations) / GIB:.2f} GiB: {states / GIB:.2f} {", ".join(filter(None, kept))}; '
        f'{activations / GIB:.2f} saved activations{note}; plus the workspace of the kernels'
    )
