"""What `make` is asked for: parts, what each needs of the set-up, and the commands that run it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType

from environment.display import clock
from environment.steps import Interrupted, Setup, Step, StepFailed

PARTS = ('diffusion', 'far', 'detection')

__all__ = ['GOALS', 'PARTS', 'Command', 'Goal', 'reach']


@dataclass(frozen=True)
class Command:
    """A command of a goal.

    Attributes:
        words: ``{python}`` and ``{bin}`` are the environment's.
        env: further environment variables.
        must: nothing runs after it has failed.
    """

    words: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    must: bool = False


@dataclass(frozen=True)
class Goal:
    """Parts that run as soon as they can, those that can at once together.

    Attributes:
        parts: name -> steps of the set-up that it needs, in the order in which they run.
        commands: of some of the parts.
    """

    parts: dict[str, tuple[str, ...]]
    commands: Callable[[Sequence[str]], list[Command]]


def nothing(parts: Sequence[str]) -> list[Command]:
    """Only set up."""
    return []


def demo(parts: Sequence[str]) -> list[Command]:
    """The demo."""
    only = () if tuple(parts) == PARTS else ('--only', *parts)
    return [Command(('{python}', 'tools/demo.py', *only))]


def quality(parts: Sequence[str]) -> list[Command]:
    """Lint, types, layers of imports."""
    lines = ('ruff check .', 'ruff format --check .', 'mypy', 'lint-imports --no-cache')
    return [Command((f'{{bin}}/{line.split()[0]}', *line.split()[1:]), must=True) for line in lines]


def test(parts: Sequence[str]) -> list[Command]:
    """Quality, and the fast tests that need mmcv, or those that do not, or both in one run."""
    commands = quality(parts) if 'quality' in parts else []
    which = {(True, True): '', (True, False): ' and not det', (False, True): ' and det'}
    chosen = 'rest' in parts, 'detection' in parts
    if any(chosen):
        words = ('{python}', '-m', 'pytest', '-n', 'logical', '--dist', 'worksteal', '-m', f'not slow{which[chosen]}')
        commands.append(Command(words, {'OMP_NUM_THREADS': '1'}))
    return commands


def docs(parts: Sequence[str]) -> list[Command]:
    """The site; strict: a dead link or a page outside of the navigation is an error."""
    return [Command(('{python}', '-m', 'mkdocs', 'build', '--strict'), {'NO_MKDOCS_2_WARNING': '1'})]


WORK = ('dev', 'diffusion', 'far', 'operator', 'export')
DEMO: dict[str, tuple[str, ...]] = {**{name: (name,) for name in PARTS}, 'far': ('far', 'operator')}
GOALS = {
    'setup': Goal({**DEMO, 'dev': ('dev',)}, nothing),
    'demo': Goal(DEMO, demo),
    'quality': Goal({'quality': WORK}, quality),
    'test': Goal({'quality': WORK, 'rest': WORK, 'detection': (*WORK, 'detection')}, test),
    'docs': Goal({'docs': ('docs',)}, docs),
}


class Beside(threading.Thread):
    """Does a slow step while others are done."""

    def __init__(self, setup: Setup, step: Step) -> None:
        super().__init__(daemon=True)
        self.setup, self.step = setup, step
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do the step, and keep what it raises."""
        try:
            self.setup.do(self.step)
        except BaseException as error:
            self.error = error
            if not isinstance(error, Interrupted):
                self.setup.display.line(f'{self.step.title}: failed; why is said at the end')

    def wait(self) -> None:
        """Wait for its end, and raise what it has raised."""
        while self.is_alive():
            self.join(0.2)  # signals are handled in between
        if self.error is not None:
            raise self.error


class Way:
    """The way to a goal: parts run as soon as they can, slow steps of the others are done meanwhile.

    Args:
        setup: steps and display.
        goal: what is run.
        parts: which of its parts, in order.
    """

    def __init__(self, setup: Setup, goal: Goal, parts: Sequence[str]) -> None:
        self.setup, self.goal, self.left = setup, goal, list(parts)
        self.beside: dict[str, Beside] = {}
        self.failed: dict[str, str] = {}
        self.results: list[tuple[list[str], int]] = []

    def go(self) -> int:
        """Set up and run, and return the exit status.

        Raises:
            Interrupted: the program was told to stop.
        """
        while self.left:
            ready = []
            while self.left and not self.due(self.left[:1]):
                ready.append(self.left.pop(0))
            self.start_slow_steps(ready)
            if not ready:
                self.set_up(self.due(self.left[:1])[0])
            elif not self.run(ready):
                self.left = []
        return self.end()

    def due(self, parts: Sequence[str]) -> list[Step]:
        """Steps that some parts still need."""
        return self.setup.due([step for part in parts for step in self.goal.parts[part]])

    def start_slow_steps(self, ready: list[str]) -> None:
        """Start those of all that is left, if nothing before them is to be done."""
        for step in self.due(self.left):
            if step.beside and step.name not in self.beside and not self.setup.due(step.needs):
                if self.setup.gives_way and any(step not in self.due([part]) for part in [*ready, *self.left]):
                    self.setup.low.add(step.name)  # something else is to run
                self.beside[step.name] = Beside(self.setup, step)
                self.beside[step.name].start()

    def set_up(self, step: Step) -> None:
        """Do a step, or wait for it. Parts that need a step that failed are left out."""
        try:
            if step.name in self.beside:
                self.beside[step.name].wait()
            else:
                self.setup.do(step)
        except StepFailed as error:
            if step.optional:
                self.setup.skipped.add(step.name)
                self.setup.display.line(f'{error}\nWhat comes now can do without.')
                return
            self.failed[step.name] = str(error)
            self.left = [part for part in self.left if step not in self.due([part])]

    def run(self, parts: list[str]) -> bool:
        """Run parts that are set up; return whether others may follow."""
        status = 0
        for command in self.goal.commands(parts):
            found = self.call(command, parts)
            status = status or found
            if found and command.must:
                break
        else:
            command = Command(())
        self.results.append((parts, status))
        return not (status and command.must)

    def call(self, command: Command, parts: list[str]) -> int:
        """Run a command and return its exit status; what it prints comes between what is said of slow steps."""
        setup, display = self.setup, self.setup.display
        places = {'python': str(setup.python), 'bin': str(setup.python.parent)}
        words = [word.format_map(places) for word in command.words]
        display.line(f'$ {" ".join(command.words).format_map({"python": "python", "bin": "."})}')
        if not any(thread.is_alive() for thread in self.beside.values()):
            return setup.end(setup.start(words, env=command.env, stdout=None))
        env, start, name = dict(command.env), time.monotonic(), ', '.join(parts)
        if display.terminal:
            size = shutil.get_terminal_size()
            env |= {'COLUMNS': str(size.columns), 'LINES': str(size.lines), 'PY_COLORS': '1'}
        process = setup.start(words, env=env, stderr=subprocess.STDOUT if display.terminal else None)
        assert process.stdout is not None
        for line in process.stdout:
            display.line(line.rstrip('\n').rpartition('\r')[2])
            if display.terminal:
                display.state('run', f'{name} {clock(time.monotonic() - start)}')
        display.state('run', '')
        return setup.end(process)

    def end(self) -> int:
        """Say what failed, and return the exit status."""
        say = self.setup.display.line
        if len(self.results) > 1 or self.failed:
            for parts, status in self.results:
                say(f'{", ".join(parts)}: {f"exit status {status}" if status else "passed"}')
        for message in self.failed.values():
            say(f'\n{message}')
        return next((status for _, status in self.results if status), 1 if self.failed else 0)


def reach(setup: Setup, goal: Goal, parts: Sequence[str]) -> int:
    """Set up what parts of a goal need, run them, and return the exit status; 128 + a signal that stopped it."""

    def stop(number: int, frame: FrameType | None) -> None:
        setup.stop(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        status = Way(setup, goal, parts).go()
    except Interrupted:
        setup.display.line('stopped; the same command continues')
        status = 128 + setup.stopped
    finally:
        setup.close()
    return status
