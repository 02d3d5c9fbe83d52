"""Logs of a training: log.jsonl, TensorBoard, Weights & Biases, trackio, and a progress bar or lines."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import write_atomically, writing

__all__ = ['Reporter', 'read_log', 'validated']

LINE_SECONDS = 10.0  # between lines where there is no terminal


def read_log(path: Path, last_step: int | None = None, having: str | None = None) -> list[dict[str, Any]]:
    """Read ``log.jsonl``: one dict a line; lines that cannot be read, such as one cut short by a crash, are left out.

    Args:
        path: the file; without it there are no lines.
        last_step: leave out later ones.
        having: leave out lines without this key: validations have no ``loss``, and others nothing else of theirs.
    """
    rows = [row for row in rows_of(path) if row is not None]
    return [r for r in rows if (last_step is None or r['step'] <= last_step) and (having is None or having in r)]


def validated(run: Path, step: int) -> bool:
    """Whether the log of a run has a validation of a step."""
    return any(row['step'] == step and 'loss' not in row for row in read_log(run / 'log.jsonl', last_step=step))


def rows_of(path: Path) -> list[dict[str, Any] | None]:
    """Lines of a log, None for each that cannot be read; without one at the end that was cut short."""
    lines = path.read_bytes().split(b'\n') if path.is_file() else [b'']
    rows = [row_of(line) for line in lines]
    return rows if rows[-1] is not None else rows[:-1]


def row_of(line: bytes) -> dict[str, Any] | None:
    """Content of a line; None: it is none of a log."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get('step')) is int else None


class Reporter:
    """Writes what the main process logs. Steps after ``start``, of a run that crashed, are taken out of the log.

    Args:
        run: folder.
        start: optimiser steps done before.
        since: step of the last line that counts; losses after it are of a window that goes on.
        total: optimiser steps in all.
        backends: ``'tensorboard'``, ``'wandb'``, ``'trackio'``.
        config: of the run, for W&B and trackio.

    Raises:
        AsrError: a back end is not installed, or the log cannot be written.
    """

    def __init__(
        self, run: Path, start: int, since: int, total: int, backends: list[str], config: dict[str, Any]
    ) -> None:
        self.path = run / 'log.jsonl'
        self.take_up(start, since)
        with writing(self.path):
            self.file = self.path.open('a')
        self.total = total
        self.board: Any = None
        self.services: list[tuple[Any, Any]] = []  # a module with the calls of W&B, and its run
        if 'tensorboard' in backends:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise AsrError(
                    f'report_to: tensorboard is not installed ({error}); pip install tensorboard, or report_to=[]'
                ) from error
            self.board = SummaryWriter(str(run / 'tensorboard'), purge_step=start + 1 if start else None)
        if 'wandb' in backends:
            try:
                import wandb
            except ImportError as error:
                raise AsrError(
                    f'report_to: wandb is not installed ({error}); pip install wandb, or leave it out'
                ) from error
            identity = identity_of(run, 'wandb', anew=not start)
            project = os.environ.get('WANDB_PROJECT', 'asr_downstream')
            found = wandb.init(project=project, name=run.name, dir=str(run), config=config, id=identity, resume='allow')
            self.services.append((wandb, found))
        if 'trackio' in backends:
            try:
                import trackio
            except ImportError as error:
                raise AsrError(
                    f'report_to: trackio is not installed ({error}); pip install trackio, or leave it out'
                ) from error
            name = f'{run.name}-{identity_of(run, "trackio", anew=not start)}'  # its runs are told by their names
            project = os.environ.get('TRACKIO_PROJECT', 'asr_downstream')
            self.services.append((trackio, trackio.init(project=project, name=name, config=config, resume='allow')))
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, disable=not self.terminal, dynamic_ncols=True, unit='step')
        self.start, self.clock = start, time.monotonic()
        self.next_line = self.clock

    def take_up(self, start: int, since: int) -> None:
        """Keep the lines of the steps that were done; a log with damage within is kept as it is besides."""
        rows = rows_of(self.path) if start else []
        if None in rows:
            aside = self.path.with_name('damaged-log.jsonl')
            write_atomically(aside, lambda p: shutil.copyfile(self.path, p))
            print(f'{self.path}: line {rows.index(None) + 1} cannot be read; all of it was kept as {aside.name}')
        kept = [r for r in rows if r is not None and r['step'] <= (since if 'loss' in r else start)]
        write_atomically(self.path, lambda p: p.write_text(''.join(json.dumps(row) + '\n' for row in kept)))

    def log(self, row: dict[str, Any]) -> None:
        """Write the line of a step of training; ``row`` has ``step``, ``loss``, ``lr`` and ``images_per_second``."""
        self.write(row)
        step = row['step']
        text = f'loss {row["loss"]:.4f}  lr {row["lr"]:.2e}  {row["images_per_second"]:.1f} images/s'
        self.bar.set_postfix_str(text)
        now = time.monotonic()
        if not self.terminal and (now >= self.next_line or step == self.total):
            left = (now - self.clock) / max(1, step - self.start) * (self.total - step)
            print(f'step {step}/{self.total}  {text}  {timedelta(seconds=round(left))} left', flush=True)
            self.next_line = now + LINE_SECONDS

    def numbers(self, step: int, numbers: dict[str, float]) -> None:
        """Write and say what a validation measured, ``{'val/accuracy': 0.93}``."""
        self.write({'step': step, **numbers})
        self.say(f'step {step}: {", ".join(f"{name} {value:.4g}" for name, value in numbers.items())}')

    def write(self, row: dict[str, Any]) -> None:
        """Write a line of the log, and its numbers to the back ends."""
        with writing(self.path):
            self.file.write(json.dumps(row) + '\n')
            self.file.flush()
        step = row['step']
        numbers = {k: v for k, v in row.items() if k != 'step' and isinstance(v, int | float)}
        with writing(self.path.with_name('tensorboard')):
            for name, value in numbers.items() if self.board is not None else ():
                self.board.add_scalar(name, value, step)
        for _, service in self.services:
            service.log(numbers, step=step)

    def picture(self, step: int, image: Image.Image) -> None:
        """Show a grid of samples in the back ends."""
        if self.board is not None:
            import numpy as np

            self.board.add_image('samples', np.asarray(image), step, dataformats='HWC')
        for module, service in self.services:
            service.log({'samples': module.Image(image)}, step=step)

    def say(self, line: str) -> None:
        """Print a line past the bar."""
        if self.terminal:
            self.bar.write(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Flush and close everything."""
        self.bar.close()
        with suppress(OSError):  # of a full disk, which was said when a line did not fit
            self.file.close()
        ends = [service.finish for _, service in self.services]
        for end in ends if self.board is None else [self.board.close, *ends]:
            with suppress(OSError):
                end()


def identity_of(run: Path, service: str, anew: bool) -> str:
    """What a service knows a run by: of this run alone, whatever others are called.

    Args:
        run: folder, where it is kept.
        service: name.
        anew: whether the run begins.
    """
    path = run / f'{service}_id'
    if anew or not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
