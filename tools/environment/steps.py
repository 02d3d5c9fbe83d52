"""Steps of a set-up: what each needs, whether it was done, and how its command is run."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from environment.display import Display, clock

ROOT = Path(__file__).resolve().parent.parent.parent
CONSTRAINTS = ROOT / 'constraints.txt'
GUARD = Path(__file__).with_name('guard.py')
# Modules are compiled when they are first imported, and kept: where the environment forbids it, every start of a
# program compiles torch and diffusers again, for three to fifteen seconds. An empty value is as none.
BYTECODE = {'PYTHONDONTWRITEBYTECODE': ''}
NINJA = re.compile(r'^\s*\[(\d+)/(\d+)\]')

__all__ = ['CONSTRAINTS', 'ROOT', 'Interrupted', 'Setup', 'Step', 'StepFailed', 'pin']


class StepFailed(Exception):
    """A step of the set-up failed; the message is for the user."""


class Interrupted(Exception):
    """The program was told to stop."""


@dataclass(frozen=True)
class Step:
    """A step. It is done once, and again when one that it needs, its command, pins or files are others.

    Attributes:
        name: of its stamp and its log.
        needs: names of the steps before it.
        command: words, in which ``{python}``, ``{constraints}``, ``{torch}`` (pinned) and ``{wheel}`` (of mmcv) are put
            in; or a function of the set-up and the step.
        advice: what to do when it fails.
        title: what is shown.
        pins: packages whose version in the constraints it depends on.
        files: files of the checkout that it depends on.
        beside: it takes minutes; what does not need it goes on meanwhile.
        optional: what needs it can do without; that it failed is said, and it is tried again by the next set-up.
    """

    name: str
    needs: tuple[str, ...]
    command: tuple[str, ...] | Callable[[Setup, Step], None]
    advice: str
    title: str = ''
    pins: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    beside: bool = False
    optional: bool = False


def pin(package: str) -> str:
    """Version of ``package`` in the constraints file, as a requirement.

    Raises:
        StepFailed: it is not there.
    """
    for line in CONSTRAINTS.read_text().splitlines():
        if line.split('==')[0] == package:
            return line.split()[0]
    raise StepFailed(f'{CONSTRAINTS.name} does not pin {package}')


@dataclass
class Setup:
    """The steps of one environment, their stamps and logs, and the processes that run for it.

    Attributes:
        venv: folder of the environment.
        steps: by name.
        display: where progress is shown.
        skipped: optional steps that failed.
        gives_way: whether slow steps get only what nothing else wants of the processors, while other parts run.
        low: the steps that do.
        stopped: the signal that told the program to stop, 0 before.
    """

    venv: Path
    steps: Mapping[str, Step]
    display: Display = field(default_factory=Display)
    skipped: set[str] = field(default_factory=set)
    gives_way: bool = True
    low: set[str] = field(default_factory=set)
    stopped: int = 0
    processes: set[subprocess.Popen[str]] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return self.venv / 'bin' / 'python'

    def log(self, name: str) -> Path:
        """Log of a step."""
        return self.venv / 'logs' / f'{name.replace(" ", "-")}.log'

    def fingerprint(self, step: Step) -> str:
        """Text that changes with everything that the step depends on."""
        command = step.command if isinstance(step.command, tuple) else step.command.__name__
        parts = [sys.version, repr(command), *(pin(p) for p in step.pins)]
        parts += [(ROOT / name).read_text() for name in step.files]
        parts += [self.fingerprint(self.steps[name]) for name in step.needs]
        return hashlib.sha256('\n'.join(parts).encode()).hexdigest()

    def done(self, name: str) -> bool:
        """Whether a step was done as it would be done now."""
        stamp = self.venv / '.steps' / name
        return stamp.is_file() and stamp.read_text() == self.fingerprint(self.steps[name])

    def due(self, names: Sequence[str]) -> list[Step]:
        """Steps that ``names`` need, they among them, and that were not done, in order."""
        wanted: set[str] = set()
        new = list(names)
        while new:
            wanted |= set(new)
            new = [need for name in new for need in self.steps[name].needs]
        return [step for name, step in self.steps.items() if name in wanted - self.skipped and not self.done(name)]

    def do(self, step: Step) -> None:
        """Do a step and stamp it.

        Raises:
            StepFailed: with the end of its output, the advice, and where its log is.
            Interrupted: the program was told to stop.
        """
        start = time.monotonic()
        title = step.title or step.name
        try:
            if isinstance(step.command, tuple):
                self.run(step, self.words(step.command))
            else:
                step.command(self, step)
        except (StepFailed, OSError) as error:
            if self.stopped:  # which is why
                raise Interrupted from None
            raise StepFailed(
                f'set-up failed at step "{step.name}":\n{error}\n\nWhat to do: {step.advice}\n'
                f'The whole output is in {self.log(step.name)}. The same command continues from this step.'
            ) from error
        finally:
            self.display.state(step.name, '')
        stamp = self.venv / '.steps' / step.name
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(self.fingerprint(step))
        self.display.line(f'{title}: done in {clock(time.monotonic() - start)}')

    def words(self, command: Sequence[str]) -> list[str]:
        """A command with the places of this environment put in."""
        places = {'python': str(self.python), 'constraints': str(CONSTRAINTS), 'torch': pin('torch')}
        if '{wheel}' in command:
            places['wheel'] = str(next((self.venv / 'wheels').glob('*.whl'), 'no wheel of mmcv'))
        return [word.format_map(places) for word in command]

    def run(self, step: Step, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Run a command of a step; its output goes to the log, its progress to the display.

        Raises:
            StepFailed: it failed; with the end of its output.
            Interrupted: the program was told to stop.
        """
        start, title = time.monotonic(), step.title or step.name
        tail: list[str] = []
        path = self.log(step.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('a') as log:
            log.write(f'\n$ {" ".join(command)}\n')
            process = self.start(command, low=step.name in self.low, env=env, stderr=subprocess.STDOUT)
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                tail = [*tail[-11:], line.rstrip()]
                seconds = time.monotonic() - start
                built = NINJA.match(line)
                if built:
                    done, files = int(built[1]), int(built[2])
                    left = clock(seconds / max(1, done) * (files - done))
                    self.display.state(step.name, f'{title}: {done} of {files} files, about {left} left')
                elif step.name not in self.display.states:
                    self.display.state(step.name, f'{title} ...')
        status = self.end(process)
        if status != 0:
            raise StepFailed('\n'.join([*(f'    {line[:160]}' for line in tail), f'exit code {status}']))

    def start(
        self,
        command: Sequence[str],
        low: bool = False,
        env: Mapping[str, str] | None = None,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command, which ends when this program does.

        Raises:
            Interrupted: the program was told to stop.
        """
        words = [sys.executable, str(GUARD), *(['--low'] if low else []), *command]
        with self.lock:
            if self.stopped:
                raise Interrupted
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, text=True, errors='replace', cwd=ROOT,
                env={**os.environ, **BYTECODE, **(env or {})},
            )  # fmt: skip
            self.processes.add(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> int:
        """Wait for a command and return its exit status.

        Raises:
            Interrupted: the program was told to stop.
        """
        status = process.wait()
        with self.lock:
            self.processes.discard(process)
            if self.stopped:
                raise Interrupted
        return status

    def stop(self, number: int) -> None:
        """Pass a signal on to what is running, and start nothing more."""
        self.stopped = self.stopped or number
        for process in list(self.processes):
            if process.poll() is None:
                process.send_signal(number)

    def close(self) -> None:
        """End what is still running."""
        self.stopped = self.stopped or signal.SIGTERM
        for process in list(self.processes):
            if process.stdin is not None:
                process.stdin.close()
        for process in list(self.processes):
            process.wait()
