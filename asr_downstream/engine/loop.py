"""Training under accelerate: one loop for one process or many, that continues bit for bit where it was stopped."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from mmengine.config import Config
from torch import nn
from torch.utils.data import DataLoader

from asr_downstream.console.processes import Processes
from asr_downstream.console.stopping import StopSignal, leave_stopping_to_the_parent, until_stopped
from asr_downstream.engine.config import CONFIG_FILE, write_config
from asr_downstream.engine.data.images import BadFiles
from asr_downstream.engine.data.sampler import Draws
from asr_downstream.engine.launch import gather_bad, others_may_end, start_processes
from asr_downstream.engine.meters import Window
from asr_downstream.engine.optim import build_optimiser, build_schedule, decays_of, optimiser_of, set_rates
from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.state.ema import EMA
from asr_downstream.engine.state.save import bytes_of, save_training
from asr_downstream.engine.state.train_state import Progress, check_same_run, load_training, read_progress
from asr_downstream.engine.task import Task
from asr_downstream.engine.trackers import Reporter, validated
from asr_downstream.engine.watch import Watch, whole
from asr_downstream.errors import AsrError, CompleteError, OtherProcessError
from asr_downstream.files.atomic import check_writable
from asr_downstream.files.configs import plain
from asr_downstream.files.locks import check_free, occupied
from asr_downstream.folding.analysis.training import FILE, GateRecorder
from asr_downstream.modules.seeds import mix

__all__ = ['check_folder', 'recompute_activations', 'train']


def train(task: Task, config: Config, run: Path, resume: str | None = None) -> Path:
    """Train a task; every process of ``accelerate launch`` calls this.

    Args:
        task: what is learnt.
        config: of the task, see `asr_downstream.engine.config.Schema`.
        run: folder for checkpoints and logs.
        resume: ``'latest'`` for the newest complete checkpoint of the run, or the folder of one.

    Returns:
        The last checkpoint.

    Raises:
        AsrError: config, data or checkpoint do not fit, or the loss is not finite.
    """
    check_folder(run, resume)
    accelerator = start_processes(config)
    training = Training(task, config, run, accelerator)
    with ExitStack() as stack, others_may_end(accelerator):
        Processes.of_launch().together(lambda: training.occupy(stack, resume))
        if resume is not None:
            training.take_up(checkpoints.find(run, resume, accelerator.print))
        training.go_on()
    assert training.checkpoint is not None
    return training.checkpoint


def check_folder(run: Path, resume: str | None) -> None:
    """Refuse a folder that cannot be written, that is in use, or that a new run would share with an earlier one.

    Raises:
        AsrError: see above.
    """
    check_writable(run)
    if not int(os.environ.get('RANK', '0')):
        check_free(run)
    check_is_new(run, resume)


def check_is_new(run: Path, resume: str | None) -> None:
    """Refuse to begin a run where another one was.

    Raises:
        AsrError: see above.
    """
    if resume is None and checkpoints.checkpoints_in(run):
        raise AsrError(f'{run}: has checkpoints of an earlier run; continue it with --resume, or choose another folder')


def recompute_activations(model: nn.Module) -> None:
    """Switch gradient checkpointing on, by the name that diffusers or transformers give it.

    Raises:
        AsrError: the model has none.
    """
    for name in ('enable_gradient_checkpointing', 'gradient_checkpointing_enable'):
        if hasattr(model, name):
            try:
                getattr(model, name)()
            except ValueError as error:
                raise AsrError(f'gradient_checkpointing: {error}') from error
            return
    raise AsrError(f'gradient_checkpointing: {type(model).__name__} has none; leave it off')


class Training:
    """One training from its start, or from a checkpoint, to its end.

    Args:
        task: what is learnt.
        config: of the task.
        run: folder.
        accelerator: of the processes.
    """

    def __init__(self, task: Task, config: Config, run: Path, accelerator: Accelerator) -> None:
        self.task = task
        self.config = config
        self.run = run
        self.accelerator = accelerator
        self.samples = cast(Any, task.samples())  # torch's Dataset knows no length
        self.wrap()
        self.ema = None
        if config.use_ema:
            self.ema = EMA(self.model, config.ema_max_decay, config.ema_inv_gamma, config.ema_power)
        self.progress = Progress.of(config, accelerator.num_processes, len(self.samples), task.fixed)
        self.window = Window(accelerator, config)
        self.moments = optimiser_of(config).moments(config)
        self.checkpoint: Path | None = None
        self.reporter: Reporter | None = None
        self.norm: Any = 0.0

    def wrap(self) -> None:
        """Prepare model and optimiser for the device and the processes."""
        config, accelerator = self.config, self.accelerator
        self.model = self.task.model
        if config.gradient_checkpointing:
            recompute_activations(self.model)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.task.train_mode()
        optimiser = build_optimiser(self.task.parameter_groups(config), config)
        if accelerator.state.deepspeed_plugin is not None:  # it cannot see the batch size: no loader is prepared
            settings = accelerator.state.deepspeed_plugin.deepspeed_config
            settings['train_micro_batch_size_per_gpu'] = config.train_batch_size
        self.wrapped, self.optimiser = accelerator.prepare(self.model, optimiser)
        if config.torch_compile:
            self.model.compile()  # in place: names stay
        self.task.to(accelerator.device)
        self.schedule = build_schedule(self.optimiser, config)

    def occupy(self, stack: ExitStack, resume: str | None) -> None:
        """Lock the folder for this run, on the main process, and check that a checkpoint fits on the disk.

        Raises:
            AsrError: another run has it or was there before, or the room is not there.
        """
        if self.accelerator.is_main_process:
            stack.enter_context(occupied(self.run))
            check_is_new(self.run, resume)
            checkpoints.remove_leftovers(self.run)
            check_writable(self.run, bytes_of(self.model, self.ema, self.moments))

    def take_up(self, start: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: it is of another training.
            CompleteError: it has all steps already.
        """
        say, progress = self.accelerator.print, self.progress
        found = read_progress(start)
        check_same_run(found, progress, start, self.task.fixed, self.task.schema.defaults, say, self.task.same)
        if found.step >= self.config.max_train_steps:
            raise CompleteError(f'{start}: has {found.step} steps already; raise max_train_steps to go on', start)
        if self.accelerator.is_main_process:
            checkpoints.set_aside_later(self.run, start)
        self.accelerator.wait_for_everyone()
        decays = decays_of(self.optimiser)  # of the config; loading brings those of the checkpoint
        Processes.of_launch().together(
            lambda: load_training(start, self.accelerator, self.model, self.ema, found, self.moments)
        )
        progress.step, progress.scheduled, progress.since = found.step, found.scheduled, found.step
        if found.settings.get('images') == progress.settings['images']:  # else they are others
            progress.bad = found.bad
        if len(found.window) == self.accelerator.num_processes:
            progress.since, progress.window = found.since, found.window  # else the line of the stop stays
        set_rates(self.config, self.optimiser, self.schedule, progress.scheduled, decays)
        self.checkpoint = start
        say(f'resumed from {start}, step {progress.step}')

    def go_on(self) -> None:
        """Train to the end.

        Raises:
            Stopped: it was told to stop, and has written a checkpoint; also where that was after the last step.
            AsrError: the loss is not finite, or too many files are bad.
        """
        config, total = self.config, self.config.max_train_steps
        self.task.begin(self.run if self.accelerator.is_main_process else None)
        loader = self.build_loader()
        with ExitStack() as stack:
            self.reporter = self.build_reporter(stack)
            self.gates = self.build_recorder(stack)
            self.bad = BadFiles(self.task.images, self.reporter.say if self.reporter else lambda line: None)
            self.bad.found.update(self.progress.bad)
            self.window.start(self.progress.step)
            if self.progress.window:
                self.window.take_up(self.progress.window[self.accelerator.process_index], self.progress.since)
            self.watch = Watch(self.accelerator)
            stopping = stack.enter_context(until_stopped())
            due = config.validation_steps and self.progress.step % config.validation_steps == 0
            if due and (self.progress.step or self.task.validates_at_start()):
                with self.window.paused():
                    self.validate(self.progress.step, again=self.progress.step > 0)  # if it was not made before a stop
            batches = iter(loader)
            for step in range(self.progress.step + 1, total + 1):
                self.step(step, batches)
                stop = self.meet(step, stopping)
                if step % config.logging_steps == 0 or step == total or stop:
                    self.log(step)
                if step % config.logging_steps == 0:
                    self.window.start(step)
                with self.window.paused():
                    if step % config.checkpointing_steps == 0 or step == total or stop:
                        self.save()
                    due = config.validation_steps and (step % config.validation_steps == 0 or step == total)
                    if due and (not stop or step == total):  # else it is made when the run goes on
                        self.validate(step)
                if stop:
                    raise stopping.stopped()
            if self.reporter is not None and str(self.bad):
                self.reporter.say(str(self.bad))

    def build_loader(self) -> DataLoader:
        """Loader of the remaining samples of this process."""
        config, accelerator = self.config, self.accelerator
        draws = Draws(
            len(self.samples),
            config.train_batch_size,
            config.gradient_accumulation_steps,
            range(self.progress.step, config.max_train_steps),
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        return DataLoader(
            self.samples,
            batch_sampler=draws,
            num_workers=config.dataloader_num_workers,
            pin_memory=accelerator.device.type == 'cuda',
            worker_init_fn=leave_stopping_to_the_parent,
        )

    def build_reporter(self, stack: ExitStack) -> Reporter | None:
        """Write the config, and open the logs; on the main process only."""
        if not self.accelerator.is_main_process:
            return None
        config = self.config
        write_config(self.run / CONFIG_FILE, self.task.config_text())
        backends, settings, progress = list(config.report_to), plain(config.to_dict()), self.progress
        reporter = Reporter(self.run, progress.step, progress.since, config.max_train_steps, backends, settings)
        stack.callback(reporter.close)
        return reporter

    def build_recorder(self, stack: ExitStack) -> GateRecorder | None:
        """Open ``gates.jsonl``, if the config asks for it; on the main process only."""
        if not self.config.gate_steps or not self.accelerator.is_main_process:
            return None
        recorder = GateRecorder(self.model, self.run / FILE, self.config.gate_steps, start=self.progress.step)
        stack.callback(recorder.close)
        return recorder

    def step(self, step: int, batches: Iterator[dict[str, Any]]) -> None:
        """Make one optimiser step."""
        accelerator, config = self.accelerator, self.config
        if self.gates is not None:
            self.gates.before(step)
        torch.manual_seed(mix(config.seed, 'model', accelerator.process_index, step))  # dropout
        self.lost = torch.zeros((), device=accelerator.device)
        for _ in range(config.gradient_accumulation_steps):
            batch = self.receive(next(batches))
            with accelerator.accumulate(self.wrapped):
                with accelerator.autocast():
                    loss, others = self.task.loss(self.wrapped, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    most = math.inf if config.max_grad_norm is None else config.max_grad_norm
                    self.norm = whole(accelerator.clip_grad_norm_(self.wrapped.parameters(), most))
                self.optimiser.step()
                self.optimiser.zero_grad()
            self.window.add(loss, others)
            self.lost += loss.detach().float()
        if self.gates is not None:
            self.gates.after(step)
        if not self.optimiser.step_was_skipped:
            self.schedule.step()
            self.progress.scheduled += 1
        self.task.after_step(step)
        if self.ema is not None:
            self.ema.update(self.model, step)
        self.progress.step = step

    def receive(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take a batch to the device, prepared for the loss; bad files are counted when processes meet."""
        self.bad.add(batch.pop('bad').tolist())
        batch = {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}
        if self.config.channels_last:
            for key, value in batch.items():
                batch[key] = value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
        return self.task.prepare(batch)

    def meet(self, step: int, stopping: StopSignal) -> bool:
        """Agree with the other processes on bad files, and on whether to stop here.

        Raises:
            AsrError: loss or gradients are not finite.
            DataError: too many files are bad.
        """
        config = self.config
        saving = step % config.checkpointing_steps == 0 or step == config.max_train_steps
        try:
            self.watch.count(self.optimiser.step_was_skipped)
            self.watch.tell(step, self.lost, self.norm, stopping.is_set)
            stop = self.watch.heard(at_once=saving)
            if stop and not saving:
                self.watch.heard(at_once=True)
        except OtherProcessError:
            raise
        except AsrError as error:
            raise AsrError(
                f'{error} (lr {self.schedule.get_last_lr()[0]:.2e}); last checkpoint: {self.checkpoint}; lower '
                f'learning_rate, or use bf16 or no mixed_precision'
            ) from error
        if self.accelerator.num_processes == 1 or step % config.logging_steps == 0 or saving or stop:
            gather_bad(self.accelerator, self.bad)
        self.progress.bad = sorted(self.bad.found)
        return stop

    def log(self, step: int) -> None:
        """Write a line of the log."""
        row = self.window.row(step, self.schedule.get_last_lr()[0], self.norm, len(self.samples))
        if self.reporter is not None:
            self.reporter.log(row)

    def save(self) -> None:
        """Write a checkpoint."""
        limit = self.config.checkpoints_total_limit
        self.progress.since = self.window.since
        self.progress.window = gather_object([self.window.state()])
        self.checkpoint = save_training(
            self.run, self.accelerator, self.model, self.ema, self.progress, limit, self.moments
        )
        if self.reporter is not None:
            self.task.saved(self.checkpoint, self.progress.step, self.reporter)
        self.accelerator.wait_for_everyone()

    def validate(self, step: int, again: bool = False) -> None:
        """Let the main process validate the averaged weights, and the others wait; ``again``: if the log lacks it."""
        if self.reporter is not None and not (again and validated(self.run, step)):
            with nullcontext() if self.ema is None else self.ema.applied_to(self.model), torch.no_grad():
                self.model.eval()
                try:
                    self.task.validate(self.model, step, self.run, self.reporter)
                finally:
                    self.task.train_mode()
        self.accelerator.wait_for_everyone()
