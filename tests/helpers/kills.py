"""Kill trainings and look at what is left: start a command, wait for a moment, SIGKILL to all of its processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
from conftest import ROOT

__all__ = ['Command', 'appears', 'grows', 'has_lines', 'kill_and_resume', 'run']


class Command:
    """A command in a session of its own; whatever it has started is killed at the end of the block.

    Args:
        words: of the command line.
        output: file for what it prints, stdout and stderr; is appended to.
        **env: further environment variables.
    """

    def __init__(self, words: Sequence[object], output: Path, **env: str) -> None:
        self.output = output
        self.seen: set[psutil.Process] = set()
        with output.open('ab') as file:
            self.process = subprocess.Popen(
                [*map(str, words)], cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def text(self) -> str:
        """What was printed until now."""
        return self.output.read_text(errors='replace')

    def processes(self) -> list[psutil.Process]:
        """Those of the command that live, it first; torchrun gives each of its processes a session of its own.

        Orphans are among them if this was called before they were.
        """
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            found = [parent, *parent.children(recursive=True)]
        self.seen |= set(found)
        return found + [p for p in self.seen - set(found) if p.is_running()]

    def process_ids(self, word: str) -> list[int]:
        """Those whose command line has ``word`` as an argument, without the launcher."""
        return [p.pid for p in self.processes()[1:] if word in p.cmdline()]

    def wait_for_orphans(self, seconds: float = 60) -> None:
        """Wait for the end of what the command has started."""
        psutil.wait_procs(self.processes(), seconds)

    def children_of(self, pid: int) -> list[int]:
        """Processes that a process has started itself."""
        return [p.pid for p in psutil.Process(pid).children()]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Wait until ``condition`` holds.

        Returns:
            False: the command ended before.

        Raises:
            TimeoutError: after ``seconds``; with what was printed.
        """
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return condition()
            if time.monotonic() > end:
                raise TimeoutError(f'not within {seconds} s; it printed:\n{self.text}')
            time.sleep(0.0005)
        return True

    def send(self, number: int) -> None:
        """Send a signal to the process group: the command and what it has forked, without sessions of their own."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL for all processes, all at once, and wait until they are gone."""
        living = self.processes()
        for process in living:  # none may see another one die and tidy up
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        psutil.wait_procs(living, 30)

    def wait(self, seconds: float = 300) -> int:
        """Wait for the end; the exit status.

        Raises:
            TimeoutError: after ``seconds``; with what was printed.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f'did not end within {seconds} s; it printed:\n{self.text}') from error


def run(words: Sequence[object], output: Path, seconds: float = 300, **env: str) -> tuple[int, str]:
    """Run a command to its end; its exit status, and what it printed."""
    begin = output.stat().st_size if output.exists() else 0
    with Command(words, output, **env) as command:
        status = command.wait(seconds)
    return status, output.read_bytes()[begin:].decode(errors='replace')


def kill_and_resume(
    first: Sequence[object],
    resume: Sequence[object] | Callable[[], Sequence[object]],
    moments: Sequence[Callable[[], bool]],
    output: Path,
    seconds: float = 300,
    seed: int = 0,
) -> int:
    """Start a training, kill it at each of the moments, resume it after each, and let the last one end.

    Args:
        first: command line that starts it.
        resume: command line that continues it, or what makes it when it is needed.
        moments: when to kill it, in this order; up to 3 ms are added, drawn from ``seed``, to hit within writes.
        output: file for what all of them print.
        seconds: most for each command.
        seed: of the delays.

    Returns:
        How many times it was killed. It is less than ``moments`` only if it ended before.

    Raises:
        AssertionError: a resumed training ended with an error.
    """
    draw, kills = random.Random(seed), 0
    for number, moment in enumerate(moments):
        words = first if number == 0 else resume() if callable(resume) else resume
        with Command(words, output) as command:
            reached = command.wait_for(moment, seconds)
            time.sleep(draw.uniform(0, 0.003) if reached else 0)
            if command.process.poll() is None:
                kills += 1
            elif command.process.returncode:
                raise AssertionError(f'it ended with {command.process.returncode}:\n{command.text}')
            else:
                return kills
    status, text = run(resume() if callable(resume) else resume, output, seconds)
    assert status == 0, text
    return kills


def appears(folder: Path, pattern: str) -> Callable[[], bool]:
    """The moment when a file or folder like ``pattern`` appears that is not there when it is first asked for."""
    before: set[Path] | None = None

    def moment() -> bool:
        nonlocal before
        found = set(folder.glob(pattern))
        before = found if before is None else before
        return bool(found - before)

    return moment


def grows(folder: Path, pattern: str, least: int = 1) -> Callable[[], bool]:
    """The moment when a file like ``pattern`` is being written: new, with at least ``least`` bytes."""
    before: set[Path] | None = None

    def moment() -> bool:
        nonlocal before
        found = set(folder.glob(pattern))
        before = found if before is None else before
        for path in found - before:
            with suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_size >= least:
                    return True
        return False

    return moment


def has_lines(path: Path, more: int) -> Callable[[], bool]:
    """The moment when a text file has ``more`` lines than when it is first asked for."""
    before: int | None = None

    def moment() -> bool:
        nonlocal before
        found = path.read_bytes().count(b'\n') if path.is_file() else 0
        before = found if before is None else before
        return found >= before + more

    return moment
