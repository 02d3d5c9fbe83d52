"""Loops and hooks of MMEngine's Runner: training that stops and resumes within an epoch, validation of a folded copy.

The loops have the names of MMEngine's own, so that a shipped config, where ``asr_downstream.`` is taken off, has those.
"""

from __future__ import annotations

import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from mmengine import runner as engine
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, autocast
from mmengine.runner.loops import _update_losses
from torch import nn

from asr_downstream.console.processes import Processes
from asr_downstream.console.stopping import StopSignal
from asr_downstream.detection.training.checkpoints import note_last, noted
from asr_downstream.detection.training.launch import largest
from asr_downstream.detection.training.sampler import draw_by_sample
from asr_downstream.errors import AsrError, DataError
from asr_downstream.folding.exact import fold_exactly
from asr_downstream.registry import LOOPS

__all__ = [
    'POSITION',
    'DivergenceHook',
    'EpochBasedTrainLoop',
    'FoldedValLoop',
    'IterBasedTrainLoop',
    'StopHook',
    'ValFirst',
    'bare',
]


def bare(model: nn.Module) -> nn.Module:
    """Return a model without the wrapper of a launch."""
    return model.module if is_model_wrapper(model) else model  # type: ignore[return-value]


# In the meta of a checkpoint: how far its epoch is.
POSITION = 'asr_downstream_position'
# The same in what earlier versions have written, when a training was stopped.
STOPPED = 'asr_downstream_stopped'


@LOOPS.register_module()
class EpochBasedTrainLoop(engine.EpochBasedTrainLoop):
    """MMEngine's loop, which goes on within an epoch, with the batches that it would have had.

    A resumed training is the uninterrupted one, bit for bit, where the kernels of the model are deterministic: order
    and augmentations of the data and the draws of the model are functions of the seed; of which transforms this does
    not hold says `asr_downstream.detection.training.sampler`. Not gone through again is a validation that was
    interrupted, and with it what hooks and schedules learn from one. Gradients that are being accumulated are lost.
    Where an epoch has another number of batches than before (another batch size, number of processes or data set), it
    starts again.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draws = draw_by_sample(self.dataloader, self.runner.seed)
        self.done = 0  # batches that the epoch has had before a resume
        self.began = 0  # iterations before this epoch

    def run_epoch(self) -> None:
        """Run one epoch, or the rest of it."""
        done, self.done = self.done, 0
        self.began = self._iter - done
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        if self.draws is not None:
            self.draws.epoch, self.draws.skip = self._epoch, done
        batches = self.dataloader if self.draws is not None else islice(self.dataloader, done, None)
        for index, batch in enumerate(batches, done):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1
        self.began = self._iter

    def position(self, meta: dict[str, Any]) -> dict[str, int]:
        """How far the epoch is, for a checkpoint that says where it is written: what `take_up` reads."""
        batches = meta['iter'] - self.began if meta['epoch'] == self._epoch else 0
        return {'epoch': meta['epoch'], 'iter': meta['iter'], 'batches': batches, 'length': len(self.dataloader)}

    def take_up(self, checkpoint: dict[str, Any]) -> None:
        """Find out how far the epoch of a checkpoint is."""
        meta, length = checkpoint['meta'], len(self.dataloader)
        found = position_of(checkpoint)
        if found['batches'] and found['batches'] == found['length']:
            self.done = length
        elif found['length'] == length:
            self.done = found['batches']
        elif found['batches']:
            self.runner.logger.warning(
                f'{found["batches"]} of {found["length"]} batches of an epoch were done, which now has {length}: the '
                f'epoch starts again'
            )
        if self.done:
            self.runner.logger.info(f'passing over the {self.done} batches that this epoch has had')
        self._max_iters = meta['iter'] + (self._max_epochs - meta['epoch']) * length - self.done


def position_of(checkpoint: dict[str, Any]) -> dict[str, int]:
    """How far the epoch of a checkpoint is, also of one that plain MMEngine wrote."""
    meta, known = checkpoint['meta'], checkpoint['message_hub']['runtime_info']
    for found in (meta.get(POSITION), known.get(STOPPED)):
        if found and (found['epoch'], found['iter']) == (meta['epoch'], meta['iter']):
            return found
    length = known.get('max_iters', 0) // max(1, known.get('max_epochs', 1))
    batches = meta['iter'] - meta['epoch'] * length
    return {'batches': batches if 0 <= batches <= length else 0, 'length': length}


@LOOPS.register_module()
class IterBasedTrainLoop(engine.IterBasedTrainLoop):
    """MMEngine's loop without epochs, which draws by sample."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draws = draw_by_sample(self.dataloader, self.runner.seed)

    def run(self) -> Any:
        """Train; a resumed training passes over what it has had: of the indices, or, slowly, of the data."""
        batches = self.dataloader_iterator
        if self.draws is not None and (
            self.fast_forward_on_resume or (batches._resolve_batch_size() and batches._resolve_sampler() is not None)
        ):
            self.draws.number = self._iter
        return super().run()


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
            self.folded, report = fold_exactly(bare(self.runner.model))
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


# What processes tell each other besides 0, to go on, and 1, to stop.
DIVERGED = 2.0


class DivergenceHook(Hook):
    """Ends a training whose loss is not finite, at the step, before a checkpoint of it is written.

    It reads what MMEngine has copied from the accelerator for its log, so that it costs no synchronisation of its own.
    Several processes end when `StopHook` lets them meet, at most ten steps later. A gradient scaler (fp16) leaves out
    steps that it finds too large; with one, ``patience`` losses in a row have to be bad.
    """

    priority = 'LOW'  # before checkpoints

    def __init__(self, patience: int = 20) -> None:
        self.patience = patience
        self.bad = 0
        self.error: AsrError | None = None

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Look at the loss, and at the norm of the gradient, if it is clipped.

        Raises:
            AsrError: it is not finite.
        """
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        scaled = scaler is not None and scaler.is_enabled()
        found = {'loss': runner.message_hub.log_scalars.get('train/loss')}
        if not scaled:
            found['gradient norm'] = runner.message_hub.log_scalars.get('train/grad_norm')
        broken = {name: value.current() for name, value in found.items() if value is not None}
        broken = {name: value for name, value in broken.items() if not math.isfinite(value)}
        self.bad = self.bad + 1 if broken else 0
        if self.bad < (self.patience if scaled else 1) or self.error is not None:
            return
        name, value = next(iter(broken.items()))
        last = noted(Path(runner.work_dir))
        self.error = AsrError(
            f'step {runner.iter + 1}: the {name} is {value}: the training diverged; last checkpoint: {last or "none"}; '
            f'lower the learning rate, or clip gradients (optim_wrapper.clip_grad)'
        )
        if runner.world_size == 1:
            raise self.error


class StopHook(Hook):
    """Writes a checkpoint and ends the training when it was asked to stop.

    Several processes ask each other, so that all stop after the same step: as often as costs nothing, but at least
    every ``patience`` seconds, since a launcher waits half a minute before it kills them.
    """

    priority = 'LOWEST'  # after schedules and averages have made their step

    def __init__(self, signal: StopSignal, patience: float = 2.0, watch: DivergenceHook | None = None) -> None:
        self.signal = signal
        self.watch = watch
        self.patience = patience
        self.interval = 1
        self.next = 0
        self.last = time.monotonic()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Stop, if asked to, or if a process has diverged.

        Raises:
            Stopped: after the checkpoint.
            AsrError: this process has diverged.
            SystemExit: another one has, and says so.
        """
        step = runner.iter + 1
        if runner.world_size > 1 and step < self.next:
            return
        seconds = (time.monotonic() - self.last) / self.interval
        diverged = self.watch is not None and self.watch.error is not None
        stop, slowest = largest(DIVERGED if diverged else float(self.signal.is_set), seconds)
        self.interval = max(1, min(10, int(self.patience / max(slowest, 1e-3))))
        self.next = step + self.interval
        self.last = time.monotonic()
        if stop == DIVERGED:
            raise self.watch.error if self.watch is not None and self.watch.error is not None else SystemExit(1)
        if stop:
            self.stop(runner, epoch=runner.epoch, step=step)

    def after_train_epoch(self, runner: Runner) -> None:
        """Stop before a validation, which may take longer than a launcher waits."""
        if largest(float(self.signal.is_set))[0]:
            self.stop(runner, epoch=runner.epoch + 1, step=runner.iter)

    def stop(self, runner: Runner, epoch: int, step: int) -> None:
        """Write the checkpoint, note it as the last one, and end the training."""
        path = Path(runner.work_dir) / f'stopped_iter_{step}.pth'

        def save() -> None:
            meta = {'epoch': epoch, 'iter': step}
            runner.save_checkpoint(runner.work_dir, path.name, by_epoch=False, meta=meta)
            if runner.rank == 0:
                note_last(Path(runner.work_dir), path)

        Processes.of_launch().together(save)
        raise self.signal.stopped()
