"""Commands side by side in processes of their own, in the order that they are given, until they are done or stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from asr_downstream.console.stopping import until_stopped
from asr_downstream.errors import AsrError

__all__ = ['Job', 'run_jobs']

LOG = 'output.txt'  # what the commands of a job print, in its folder
PROMPT = '$ asr-downstream '
LOOK_SECONDS = 0.2
GRACE_SECONDS = 10.0  # for a process that was told to end at once
THREADS = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')


@dataclass
class Job:
    """Commands of one folder, one after the other.

    Attributes:
        name: for messages.
        folder: where the log goes.
        steps: each gives the words after ``asr-downstream`` when its turn has come.
        threads: of each command.
        error: what the command that failed said last.
    """

    name: str
    folder: Path
    steps: Sequence[Callable[[], list[str]]]
    threads: int = 1
    error: str | None = field(default=None, init=False)

    @property
    def log(self) -> Path:
        """What its commands have printed."""
        return self.folder / LOG

    def start(self, words: list[str]) -> subprocess.Popen[bytes]:
        """Start one command."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **dict.fromkeys(THREADS, str(self.threads))}
        with self.log.open('ab') as log:
            log.write(f'\n{PROMPT}{" ".join(words)}\n'.encode())
            log.flush()
            command = [sys.executable, '-m', 'asr_downstream', *words]
            return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def said_last(self) -> str:
        """What its last command said: the last line that is an error, or the last line."""
        said = self.log.read_text(errors='replace').rpartition(f'\n{PROMPT}')[2].splitlines()[1:]
        lines = [line.strip() for line in said if line.strip()]
        errors = [line for line in lines if line.startswith('error: ')]
        return (errors or lines or ['nothing was printed'])[-1].removeprefix('error: ')


@dataclass
class Running:
    """A job whose command runs.

    Attributes:
        job: the job.
        steps: those that are still to come.
        process: of the command.
        since: when the job began.
        told: whether it was told to stop.
    """

    job: Job
    steps: Iterator[Callable[[], list[str]]]
    process: subprocess.Popen[bytes]
    since: float
    told: bool = False

    def proceed(self) -> bool:
        """Start the next command, after one that has ended; whether there was one. What fails is noted with the job."""
        if self.process.returncode:
            self.job.error = ended_by(self.process.returncode) or self.job.said_last()
            return False
        step = next(self.steps, None)
        if step is None:
            return False
        try:
            self.process = self.job.start(step())
        except AsrError as error:
            self.job.error = str(error)
        return self.job.error is None

    def tell(self) -> None:
        """Tell the command to stop, once.

        By a termination: on Ctrl-C a terminal has told it already, and for a training that has begun to stop a
        termination changes nothing, as a second Ctrl-C would.
        """
        if not self.told:
            self.told = True
            self.process.terminate()


def run_jobs(jobs: Sequence[Job], side_by_side: int, say: Callable[[str], None]) -> list[Job]:
    """Run jobs, so many at a time.

    A request to stop is passed on to all commands; trainings then write a checkpoint. They are waited for.

    Args:
        jobs: in this order.
        side_by_side: how many at once.
        say: takes a line about each that begins or ends.

    Returns:
        Those that failed, with their errors.

    Raises:
        Stopped: the program was told to stop.
    """
    waiting, running, took = list(jobs), list[Running](), list[float]()
    with until_stopped() as stopping:
        try:
            while running or (waiting and not stopping.is_set):
                while waiting and len(running) < side_by_side and not stopping.is_set:
                    running.append(begin(waiting.pop(0), say))
                time.sleep(LOOK_SECONDS)
                for each in running if stopping.is_set else ():
                    each.tell()
                for each in [each for each in running if each.process.poll() is not None]:
                    if not stopping.is_set and each.proceed():
                        continue
                    running.remove(each)
                    if not stopping.is_set:
                        took.append(time.monotonic() - each.since)
                        say(line_of(each.job, took, len(jobs), side_by_side))
        finally:
            end(running)
    return [job for job in jobs if job.error]


def ended_by(status: int) -> str | None:
    """What to say of a command that a signal has ended, such as that of a kernel which is out of memory."""
    if status >= 0:
        return None
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f'signal {-status}'
    return f'was ended by {name}' + (', as for want of memory' if name == 'SIGKILL' else '')


def begin(job: Job, say: Callable[[str], None]) -> Running:
    """Start the first command of a job."""
    steps = iter(job.steps)
    running = Running(job, steps, job.start(next(steps)()), time.monotonic())
    say(f'{job.name}: started, {job.log}')
    return running


def line_of(job: Job, took: list[float], total: int, side_by_side: int) -> str:
    """What to say of a job that has ended: how, and how long the others may take."""
    how = f'failed: {job.error}' if job.error else f'done in {timedelta(seconds=round(took[-1]))}'
    left = total - len(took)
    rest = timedelta(seconds=round(sum(took) / len(took) * left / side_by_side))
    return f'{job.name}: {how}' + (f'; {left} of {total} left, about {rest}' if left else '')


def end(running: list[Running]) -> None:
    """End at once what still runs, after an error or a second Ctrl-C."""
    for each in running:
        each.process.terminate()
    for each in running:
        with suppress(subprocess.TimeoutExpired):
            each.process.wait(GRACE_SECONDS)
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
