"""Loops and hooks of MMEngine's Runner: training that stops and resumes within an epoch, validation of a folded copy.

The loops have the names of MMEngine's own, so that a shipped config, where ``asr_downstream.`` is taken off, has those.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from mmengine import runner as engine
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, autocast
from mmengine.runner.loops import _update_losses
from torch import nn

from asr_downstream.detection.processes import largest
from asr_downstream.errors import DataError
from asr_downstream.files import write_atomically
from asr_downstream.folding import fold
from asr_downstream.registry import LOOPS
from asr_downstream.stopping import StopSignal

__all__ = ['EpochBasedTrainLoop', 'FoldedValLoop', 'StopHook', 'Stopped', 'ValFirst', 'bare']


class Stopped(Exception):  # noqa: N818
    """The training was asked to stop, and has written a checkpoint."""


def bare(model: nn.Module) -> nn.Module:
    """Return a model without the wrapper of a launch."""
    return model.module if is_model_wrapper(model) else model  # type: ignore[return-value]


# Where a stopped training notes in its checkpoint how far the epoch was.
STOPPED = 'asr_downstream_stopped'


@LOOPS.register_module()
class EpochBasedTrainLoop(engine.EpochBasedTrainLoop):
    """MMEngine's loop, which after a stop within an epoch passes over the batches that the epoch has had.

    Their order is a function of seed and epoch; augmentations are drawn anew. Where an epoch has another number of
    batches than before (another batch size, number of processes or data set), the epoch starts again.
    """

    def run_epoch(self) -> None:
        """Run one epoch, or the rest of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done = self.passed()
        for index, batch in enumerate(self.dataloader):
            if index >= done:
                self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def passed(self) -> int:
        """Number of batches that this epoch has had before a stop."""
        note = self.runner.message_hub.get_info(STOPPED, {})
        if (note.get('epoch'), note.get('iter')) != (self._epoch, self._iter):
            return 0
        if note['length'] != len(self.dataloader):
            self.runner.logger.warning(
                f'stopped after {note["batches"]} of {note["length"]} batches of an epoch, which now has '
                f'{len(self.dataloader)}: the epoch starts again'
            )
            return 0
        self.runner.logger.info(f'passing over the {note["batches"]} batches that this epoch has had')
        return note['batches']


@LOOPS.register_module(name='ValLoop')
class FoldedValLoop(engine.ValLoop):
    """MMEngine's validation, of a folded copy (``fold_eval=True``); the live model is not touched.

    Hooks see the live model; with EMAHook, which puts the averaged weights into it, those are folded.
    """

    folded: nn.Module | None = None
    val_loss: dict[str, Any]

    def run(self) -> dict[str, Any]:
        """Validate."""
        try:
            return super().run()
        finally:
            self.folded = None

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Validate one batch."""
        if self.folded is None:
            self.folded, report = fold(bare(self.runner.model))
            self.runner.logger.info(f'validating a folded copy: {report}')
        self.runner.call_hook('before_val_iter', batch_idx=idx, data_batch=data_batch)
        with autocast(enabled=self.fp16):
            outputs = self.folded.val_step(data_batch)  # type: ignore[operator]
        outputs, self.val_loss = _update_losses(outputs, self.val_loss)
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook('after_val_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs)


class ValFirst(Hook):
    """Validates before the first step: what a fine-tuning starts from."""

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        """Validate, with the weights as loaded."""
        if runner.val_loop is None:
            raise DataError('--val-first: the config has no val_dataloader, val_evaluator and val_cfg')
        runner.val_loop.run()


class StopHook(Hook):
    """Writes a checkpoint and ends the training when it was asked to stop.

    Several processes ask each other, so that all stop after the same step: as often as costs nothing, but at least
    every ``patience`` seconds, since a launcher waits half a minute before it kills them.
    """

    priority = 'LOWEST'  # after schedules and averages have made their step

    def __init__(self, signal: StopSignal, patience: float = 2.0) -> None:
        self.signal = signal
        self.patience = patience
        self.interval = 1
        self.next = 0
        self.last = time.monotonic()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Stop, if asked to.

        Raises:
            Stopped: with the path of the checkpoint.
        """
        step = runner.iter + 1
        if runner.world_size > 1 and step < self.next:
            return
        seconds = (time.monotonic() - self.last) / self.interval
        stop, slowest = largest(float(self.signal.is_set), seconds)
        self.interval = max(1, min(10, int(self.patience / max(slowest, 1e-3))))
        self.next = step + self.interval
        self.last = time.monotonic()
        if stop:
            self.stop(runner, batch_idx + 1, epoch=runner.epoch, step=step)

    def after_train_epoch(self, runner: Runner) -> None:
        """Stop before a validation, which may take longer than a launcher waits."""
        if largest(float(self.signal.is_set))[0]:
            self.stop(runner, 0, epoch=runner.epoch + 1, step=runner.iter)

    def stop(self, runner: Runner, batches: int, epoch: int, step: int) -> None:
        """Write the checkpoint, note it as the last one, and end the training."""
        length = len(runner.train_dataloader)
        note = {'epoch': epoch, 'iter': step, 'batches': batches, 'length': length}
        runner.message_hub.update_info(STOPPED, note)
        name = f'stopped_iter_{step}.pth'
        runner.save_checkpoint(runner.work_dir, name, by_epoch=False, meta={'epoch': epoch, 'iter': step})
        path = Path(runner.work_dir) / name
        if runner.rank == 0:
            write_atomically(Path(runner.work_dir) / 'last_checkpoint', lambda p: p.write_text(str(path)))
        raise Stopped(path)
