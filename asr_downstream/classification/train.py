"""Training of a classifier, and its plan."""

from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from rich.table import Table

from asr_downstream.classification.task import Classification
from asr_downstream.console.text import render
from asr_downstream.engine import loop as engine
from asr_downstream.errors import CompleteError
from asr_downstream.files.configs import plain, work_dir_of
from asr_downstream.measure import cost
from asr_downstream.plugging.describe import describe

__all__ = ['plan', 'train']


def train(config: Config, resume: str | None = None) -> tuple[Classification, Path]:
    """Train a classifier; every process of ``accelerate launch`` calls this.

    Args:
        config: see `asr_downstream.classification.config.load_config`.
        resume: ``'latest'`` for the newest complete checkpoint of the run, or the folder of one.

    Returns:
        The task, and the last checkpoint; also of a run that has all its steps.

    Raises:
        AsrError: config, data or checkpoint do not fit, or the loss is not finite.
    """
    run = work_dir_of(config, 'cls')
    engine.check_folder(run, resume)
    task = Classification(config)
    try:
        return task, engine.train(task, task.config, run, resume)
    except CompleteError as complete:
        return task, complete.checkpoint


def plan(config: Config) -> str:
    """Text for ``--dry-run``: sites, cost, steps, rates.

    Raises:
        AsrError: something in the config does not fit.
        DataError: the images are not there.
    """
    task = Classification(config)
    found, settings = describe(task.model), task.config
    example = task.example()
    schedule = f'{settings.lr_scheduler} {plain(settings.lr_scheduler_kwargs) or ""}'.strip()
    rows = {
        'output': str(work_dir_of(config, 'cls')),
        'data': f'{len(task.train_indices):,} images to train on, {len(task.held_out):,} held out, {task.classes} '
        f'classes',
        'parameters': f'{cost.parameters(task.model):,}, of which {found.parameters:,} fold away or go with the plug',
        'GMACs a forward and image': f'{cost.gmacs(lambda: task.model.eval()(example)):.4f}',
        'steps': f'{settings.max_train_steps:,} of {settings.train_batch_size} images a process',
        'rate': f'{settings.optimizer}, {settings.learning_rate:g}, {schedule}',
    }
    table = Table(show_header=False, title='plan')
    for key, value in rows.items():
        table.add_row(key, value)
    return f'{found}\n{render(table)}'
