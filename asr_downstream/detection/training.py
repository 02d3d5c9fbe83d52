"""Training: MMEngine's Runner, with the data and the checkpoints checked before it starts."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from asr_downstream.checkpoint import read_checkpoint
from asr_downstream.description import describe
from asr_downstream.detection.coco import check_datasets
from asr_downstream.detection.detectors import build_detector
from asr_downstream.errors import CheckpointError
from asr_downstream.files import writable_folder

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
    writable_folder(work_dir / '.writable').rmdir()
    config.work_dir = str(work_dir)
    if resume is not None:
        config.load_from = str(latest(work_dir) if resume == 'latest' else Path(resume))
        config.resume = True
    local = config.get('load_from')
    if local and '://' not in local:
        read_checkpoint(Path(local), trust)


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
    epochs = config.train_cfg.get('max_epochs')
    steps = f'{epochs} epochs of {len(loader)} steps' if epochs else f'{config.train_cfg.get("max_iters")} steps'
    return '\n'.join(
        [
            str(describe(model)),
            f'parameters: {total:,}, of which {describe(model).parameters:,} fold away',
            f'data: {len(loader.dataset)} images in {config.get("data_root")}',
            f'steps: {steps}, batch size {config.train_dataloader.batch_size}',
            f'optimiser: {dict(config.optim_wrapper.optimizer)}',
        ]
    )
