"""Training under accelerate: one loop for one process or many, that continues bit for bit where it was stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from mmengine.config import Config
from torch.utils.data import DataLoader

from asr_downstream.errors import AsrError
from asr_downstream.files import check_writable, write_atomically
from asr_downstream.generation import checkpoints
from asr_downstream.generation.conditions import Condition
from asr_downstream.generation.config import work_dir_of
from asr_downstream.generation.data import BadFiles
from asr_downstream.generation.draws import Draws, mix
from asr_downstream.generation.ema import EMA
from asr_downstream.generation.models import plain
from asr_downstream.generation.objective import denoising_loss
from asr_downstream.generation.parts import build_parts
from asr_downstream.generation.pictures import grid, save_grid
from asr_downstream.generation.processes import agree, start_processes
from asr_downstream.generation.reporting import Reporter
from asr_downstream.generation.resuming import (
    Progress,
    check_same_run,
    load_training,
    read_progress,
    save_training,
)
from asr_downstream.generation.sampling import build_sampler, generate
from asr_downstream.stopping import StopSignal

__all__ = ['CONFIG_FILE', 'train']

CONFIG_FILE = 'config.py'  # of a run: the config with all defaults


def train(config: Config, resume: str | None = None) -> Path:
    """Train a diffusion model; every process of ``accelerate launch`` calls this.

    Args:
        config: see `asr_downstream.generation.config.load_config`.
        resume: ``'latest'`` for the newest complete checkpoint of the run, or the folder of one.

    Returns:
        The last checkpoint.

    Raises:
        AsrError: config, data or checkpoint do not fit, or the loss is not finite.
    """
    run = work_dir_of(config)
    check_writable(run)
    accelerator = start_processes(config)
    say = accelerator.print
    start_from = None if resume is None else checkpoints.find(run, resume, say)
    accelerator.wait_for_everyone()
    if start_from is None and checkpoints.checkpoints_in(run):
        raise AsrError(f'{run}: has checkpoints of an earlier run; continue it with --resume, or choose another folder')

    parts = build_parts(config)
    model, total = parts.model, config.max_train_steps
    assert parts.images is not None
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    model.train()
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    if accelerator.state.deepspeed_plugin is not None:  # it cannot see the batch size, since no loader is prepared
        accelerator.state.deepspeed_plugin.deepspeed_config['train_micro_batch_size_per_gpu'] = config.train_batch_size
    wrapped, optimiser = accelerator.prepare(model, optimiser)
    if config.torch_compile:
        model.compile()  # in place: names stay
    parts.to(accelerator.device)
    schedule = get_scheduler(
        config.lr_scheduler, optimiser, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total
    )
    ema = None
    if config.use_ema:
        ema = EMA(model, config.ema_max_decay, config.ema_inv_gamma, config.ema_power)

    progress = Progress.of(config, accelerator.num_processes, len(parts.images))
    if start_from is not None:
        found = read_progress(start_from)
        check_same_run(found, progress, start_from, say)
        if found.step >= total:
            raise AsrError(f'{start_from}: has {found.step} steps already; raise max_train_steps to go on')
        if accelerator.is_main_process:
            checkpoints.set_aside_later(run, start_from)
        accelerator.wait_for_everyone()
        load_training(start_from, accelerator, model, ema)
        progress.step, progress.scheduled, progress.bad = found.step, found.scheduled, found.bad
        set_rates(config, optimiser, schedule, progress.scheduled)
        say(f'resumed from {start_from}, step {progress.step}')

    loader = build_loader(config, parts.samples(), progress.step, accelerator)
    sampler = build_sampler(config.sampler, parts.scheduler)
    reporter = None
    if accelerator.is_main_process:
        write_atomically(run / CONFIG_FILE, lambda p: p.write_text(portable(config, parts.condition)))
        reporter = Reporter(run, progress.step, total, list(config.report_to), plain(config.to_dict()))
    bad = BadFiles(parts.images, reporter.say if reporter else lambda line: None)
    bad.found.update(progress.bad)
    window = Window(accelerator, config)
    norm: Any = 0.0
    checkpoint = start_from
    with ExitStack() as stack:
        if reporter is not None:
            stack.callback(reporter.close)
        stopping = stack.enter_context(StopSignal())
        batches = iter(loader)
        for step in range(progress.step + 1, total + 1):
            torch.manual_seed(mix(config.seed, 'model', accelerator.process_index, step))  # dropout
            for _ in range(config.gradient_accumulation_steps):
                batch = next(batches)
                bad.add(batch.pop('bad').tolist())  # counted when processes meet
                batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items()}
                if config.channels_last:
                    batch['image'] = batch['image'].to(memory_format=torch.channels_last)
                batch['image'] = parts.encode(batch['image'])  # in float32: half precision would change the noise level
                condition = parts.conditioned(batch)
                with accelerator.accumulate(wrapped):
                    with accelerator.autocast():
                        loss = denoising_loss(wrapped, parts.scheduler, batch, condition, config.snr_gamma)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm)
                    optimiser.step()
                    optimiser.zero_grad()
                window.add(loss)
            if not optimiser.step_was_skipped:
                schedule.step()
                progress.scheduled += 1
            if ema is not None:
                ema.update(model, step)
            progress.step = step
            meeting = accelerator.num_processes == 1 or step % config.logging_steps == 0 or step == total
            stop = meeting and agree(accelerator, stopping, bad)
            progress.bad = sorted(bad.found)
            if step % config.logging_steps == 0 or step == total or stop:
                row = window.row(step, schedule.get_last_lr()[0], norm, len(parts.images))
                if not math.isfinite(row['loss']):
                    raise AsrError(
                        f'step {step}: the loss is {row["loss"]} (lr {row["lr"]:.2e}, gradient norm '
                        f'{row["grad_norm"]:.2e}); last checkpoint: {checkpoint}; lower learning_rate, or use bf16 '
                        f'or no mixed_precision'
                    )
                if reporter is not None:
                    reporter.log(row)
            with window.paused():
                if step % config.checkpointing_steps == 0 or step == total or stop:
                    checkpoint = save_training(run, accelerator, model, ema, progress, config.checkpoints_total_limit)
                if config.validation_steps and (step % config.validation_steps == 0 or step == total) and not stop:
                    if reporter is not None:
                        show_samples(run, model, ema, parts, sampler, config, step, reporter)
                    accelerator.wait_for_everyone()
            if stop:
                raise KeyboardInterrupt
        if reporter is not None and str(bad):
            reporter.say(str(bad))
    accelerator.end_training()
    assert checkpoint is not None
    return checkpoint


def set_rates(config: Config, optimiser: Any, schedule: Any, scheduled: int) -> None:
    """Let optimiser and schedule follow the config from here on; a checkpoint brings the settings of its own."""
    schedule.last_epoch = scheduled
    for group, base, factor in zip(optimiser.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group |= {
            'initial_lr': base,
            'lr': base * factor(scheduled),
            'betas': (config.adam_beta1, config.adam_beta2),
            'weight_decay': config.adam_weight_decay,
            'eps': config.adam_epsilon,
        }
    schedule._last_lr = [group['lr'] for group in optimiser.param_groups]


def build_loader(config: Config, samples: Any, done: int, accelerator: Accelerator) -> DataLoader:
    """Loader of the remaining samples of this process."""
    draws = Draws(
        len(samples),
        config.train_batch_size,
        config.gradient_accumulation_steps,
        range(done, config.max_train_steps),
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    return DataLoader(
        samples,
        batch_sampler=draws,
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type == 'cuda',
    )


def portable(config: Config, condition: Condition) -> str:
    """Text of the resolved config, with classes or prompts, and without the folder, which may be moved."""
    content = {**config.to_dict(), 'output_dir': None}
    content['condition'] = condition.complete(content['condition'])
    return f'# Resolved config of a run.\n{Config(content).pretty_text}'


def show_samples(
    run: Path, model: Any, ema: EMA | None, parts: Any, sampler: Any, config: Config, step: int, reporter: Reporter
) -> None:
    """Write ``samples/step-<step>.png``: always the same noise, with the averaged weights."""
    with nullcontext() if ema is None else ema.applied_to(model):
        model.eval()
        try:
            images = generate(
                model, parts, sampler, range(config.num_validation_images), config.num_inference_steps,
                config.seed, config.train_batch_size, config.guidance_scale,
            )  # fmt: skip
        finally:
            model.train()
    save_grid(run / 'samples' / f'step-{step:07d}.png', images)
    reporter.picture(step, grid(images))


class Window:
    """Mean loss and speed since the last line of the log; time for checkpoints and pictures does not count."""

    def __init__(self, accelerator: Accelerator, config: Config) -> None:
        self.accelerator = accelerator
        self.images_a_forward = config.train_batch_size * accelerator.num_processes
        self.accumulation = config.gradient_accumulation_steps
        self.losses: list[torch.Tensor] = []
        self.clock = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """Note the loss of a forward, without waiting for it."""
        self.losses.append(loss.detach())

    def row(self, step: int, lr: Any, norm: Any, images: int) -> dict[str, Any]:
        """Line of the log; starts the next window."""
        mean = self.accelerator.reduce(torch.stack(self.losses).float().mean(), 'mean').item()
        seconds = time.perf_counter() - self.clock
        seen = len(self.losses) * self.images_a_forward
        row = {
            'step': step,
            'epoch': round(step * self.accumulation * self.images_a_forward / images, 4),
            'loss': mean,
            'lr': float(lr),
            'grad_norm': math.nan if norm is None else float(norm),  # DeepSpeed keeps it to itself
            'images_per_second': round(seen / seconds, 2),
        }
        self.losses, self.clock = [], time.perf_counter()
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out."""
        begin = time.perf_counter()
        yield
        self.clock += time.perf_counter() - begin
