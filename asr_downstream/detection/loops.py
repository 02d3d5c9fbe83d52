"""Loops and hooks of MMEngine's Runner: training that stops and resumes within an epoch, validation of a folded copy.

The loops have the names of MMEngine's own, so that a shipped config, where ``asr_downstream.`` is taken off, has those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine import runner as engine
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, autocast
from mmengine.runner.loops import _update_losses
from torch import nn

from asr_downstream.detection.processes import any_process
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


@LOOPS.register_module()
class EpochBasedTrainLoop(engine.EpochBasedTrainLoop):
    """MMEngine's loop, which after a resume within an epoch passes over the batches that the epoch has had.

    Their order is a function of seed and epoch; augmentations are drawn anew.
    """

    def run_epoch(self) -> None:
        """Run one epoch, or the rest of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        done = self._iter - self._epoch * len(self.dataloader)
        if not 0 < done <= len(self.dataloader):  # more or fewer batches an epoch than in the run that is resumed
            done = 0
        if done:
            self.runner.logger.info(f'passing over the {done} batches that this epoch has had')
        for index, batch in enumerate(self.dataloader):
            if index >= done:
                self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


@LOOPS.register_module(name='ValLoop')
class FoldedValLoop(engine.ValLoop):
    """MMEngine's validation, of a folded copy (``fold_eval=True``); the live model is not touched."""

    folded: nn.Module
    val_loss: dict[str, Any]

    def run(self) -> dict[str, Any]:
        """Validate; hooks see the live model, and with EMAHook its averaged weights are folded."""
        self.runner.call_hook('before_val')
        self.runner.call_hook('before_val_epoch')
        self.runner.model.eval()
        self.folded, report = fold(bare(self.runner.model))
        self.runner.logger.info(f'validating a folded copy: {report}')
        self.val_loss.clear()
        for index, batch in enumerate(self.dataloader):
            self.run_iter(index, batch)
        metrics = self.evaluator.evaluate(len(self.dataloader.dataset))
        del self.folded
        self.runner.call_hook('after_val_epoch', metrics=metrics)
        self.runner.call_hook('after_val')
        return metrics

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Validate one batch."""
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

    Several processes ask each other every ``interval`` steps, so that all stop after the same one.
    """

    priority = 'LOWEST'  # after schedules and averages have made their step

    def __init__(self, signal: StopSignal, interval: int = 10) -> None:
        self.signal = signal
        self.interval = interval

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Stop, if asked to.

        Raises:
            Stopped: with the path of the checkpoint.
        """
        step = runner.iter + 1
        if runner.world_size > 1 and step % self.interval:
            return
        if not any_process(self.signal.is_set):
            return
        name = f'stopped_iter_{step}.pth'
        runner.save_checkpoint(runner.work_dir, name, by_epoch=False)
        path = Path(runner.work_dir) / name
        if runner.rank == 0:
            write_atomically(Path(runner.work_dir) / 'last_checkpoint', lambda p: p.write_text(str(path)))
        raise Stopped(path)
