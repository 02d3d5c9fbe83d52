"""Training: MMEngine's Runner, with the data and the checkpoints checked before it starts."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from asr_downstream.checkpoint import read_checkpoint
from asr_downstream.description import describe
from asr_downstream.detection.coco import check_datasets
from asr_downstream.detection.detectors import build_detector
from asr_downstream.errors import CheckpointError
from asr_downstream.files import check_writable
from asr_downstream.layers import rebind

__all__ = ['plan', 'prepare', 'train']


def prepare(config: Config, work_dir: Path, resume: str | None = None, trust: bool = False) -> None:
    """Check everything that a training will read, and set where it writes; changes ``config`` in place.

    Args:
        config: the training config.
        work_dir: folder for logs and checkpoints.
        resume: ``'latest'`` for the newest checkpoint in ``work_dir``, or a checkpoint's path.
        trust: read checkpoints that need unpickling.

    Raises:
        AsrError: data or checkpoint are missing or unsound, or ``work_dir`` cannot be written.
    """
    check_datasets(config, 'train_dataloader', 'val_dataloader')
    check_writable(work_dir)
    config.work_dir = str(work_dir)
    if resume is not None:
        config.load_from = str(latest(work_dir) if resume == 'latest' else Path(resume))
        config.resume = True
    for name in [config.get('load_from'), *pretrained(config.model)]:
        if name and '://' not in name:  # what is fetched by name is mmengine's to read
            read_checkpoint(Path(name), trust)


def pretrained(node: Any) -> Iterator[str]:
    """Checkpoints that the ``init_cfg`` entries of a model's config name."""
    if isinstance(node, dict):
        if node.get('type') == 'Pretrained' and 'checkpoint' in node:
            yield node['checkpoint']
        for value in node.values():
            yield from pretrained(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from pretrained(value)


def latest(work_dir: Path) -> Path:
    """Newest checkpoint of a run, as MMEngine noted it.

    Raises:
        CheckpointError: there is none.
    """
    note = work_dir / 'last_checkpoint'
    if not note.is_file():
        raise CheckpointError(f'{work_dir}: has no checkpoint to resume from; start without --resume')
    return Path(note.read_text().strip())


def train(config: Config) -> Path:
    """Train; prints the plugged sites first.

    Returns:
        The last checkpoint.
    """
    runner = Runner.from_cfg(config)
    rebind(runner.model)  # sync_bn=... has rebuilt its batch norms by now
    runner.logger.info(f'\n{describe(runner.model)}')
    runner.train()
    return latest(Path(config.work_dir))


def plan(config: Config) -> str:
    """Say what a training would do, without doing it: sites, parameters, data, steps."""
    check_datasets(config, 'train_dataloader', 'val_dataloader')
    model = build_detector(config)
    with redirect_stdout(io.StringIO()):
        loader = Runner.build_dataloader(config.train_dataloader)
    total = sum(p.numel() for p in model.parameters())
    foldable = sum(row.parameters for row in describe(model).sites if row.folds)
    epochs = config.train_cfg.get('max_epochs')
    steps = f'{epochs} epochs of {len(loader)} steps' if epochs else f'{config.train_cfg.get("max_iters")} steps'
    return '\n'.join(
        [
            str(describe(model)),
            f'parameters: {total:,}, of which {foldable:,} fold away',
            f'data: {len(loader.dataset)} images in {config.get("data_root")}',
            f'steps: {steps}, batch size {config.train_dataloader.batch_size}',
            f'optimiser: {dict(config.optim_wrapper.optimizer)}',
        ]
    )
