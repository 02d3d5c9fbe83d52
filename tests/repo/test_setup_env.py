"""The set-up: order of steps, what runs beside a compilation, failures and interruptions."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

# A set-up of quick steps and a slow one, and a goal of three parts. What happens is written to `events` by event.py,
# which then does what a file says.
PROGRAM = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from environment.display import Display
from environment.goals import Command, Goal, reach
from environment.steps import Setup, Step

here = Path(__file__).parent
event = (sys.executable, str(here / 'event.py'))
steps = [
    Step('base', (), (*event, 'base'), 'nothing'),
    Step('slow', ('base',), (*event, 'slow begins', 'slow'), 'install a compiler', title='ops', beside=True),
    Step('one', ('base',), (*event, 'one', 'one'), 'nothing'),
    Step('two', ('base',), (*event, 'two'), 'nothing'),
    Step('three', ('base', 'slow'), (*event, 'three'), 'nothing'),
]
goal = Goal(
    {'1': ('one',), '2': ('two',), '3': ('three',)},
    lambda parts: [Command((*event, 'run ' + ' '.join(parts), 'run'))],
)
gives_way = (here / 'gives way').exists()
setup = Setup(here / 'venv', {step.name: step for step in steps}, Display(every=0), gives_way=gives_way)
sys.exit(reach(setup, goal, sys.argv[2:] or list(goal.parts)))
"""

EVENT = """
import sys
from pathlib import Path

here, name = Path(__file__).parent, sys.argv[1]
with open(here / 'events', 'a') as file:
    file.write(name + '\\n')
if sys.argv[2:]:
    exec((here / sys.argv[2]).read_text())
"""

# The slow step: files of a compilation, one by a process that leaves the group, as ninja's compilers do.
COMPILE = """
import os, subprocess, time
print('[1/3] c++ a.o', 'nice', os.nice(0), flush=True)
child = subprocess.Popen(['sleep', 'SECONDS.MARK'], start_new_session=True)
print('[2/3] c++ b.o', flush=True)
child.wait()
while 'UNTIL' not in (here / 'events').read_text():
    time.sleep(0.05)
if FAILS:
    sys.exit('no compiler')
with open(here / 'events', 'a') as file:
    file.write('slow ends\\n')
"""


class Checkout:
    """A folder with a program that sets up and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = str(os.getpid()) + str(time.monotonic_ns())[-8:]
        self.compile()
        for name, text in {'one': '', 'run': '', 'program.py': PROGRAM, 'event.py': EVENT}.items():
            (folder / name).write_text(text)

    def compile(self, seconds: int = 0, fails: bool = False, until: str = '') -> None:
        """What the slow step does."""
        text = COMPILE.replace('SECONDS', str(seconds)).replace('MARK', self.mark).replace('FAILS', str(fails))
        text = text.replace('UNTIL', until)
        (self.folder / 'slow').write_text(text)

    def start(self, *parts: str) -> subprocess.Popen[str]:
        """Start the program."""
        return subprocess.Popen([*self.words, *parts], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    @property
    def words(self) -> list[str]:
        """Its command line."""
        return [sys.executable, str(self.folder / 'program.py'), str(ROOT / 'tools')]

    def run(self, *parts: str) -> tuple[int, str]:
        """Run the program to its end; return its exit status and what it prints."""
        process = self.start(*parts)
        text, _ = process.communicate(timeout=100)
        return process.returncode, text

    @property
    def events(self) -> list[str]:
        """What has happened until now."""
        path = self.folder / 'events'
        return path.read_text().splitlines() if path.exists() else []

    def forget(self) -> None:
        """Begin a new list of events."""
        (self.folder / 'events').unlink(missing_ok=True)

    def compilers(self) -> list[psutil.Process]:
        """Processes of the slow step that live."""
        found = []
        for process in psutil.process_iter(['cmdline']):
            if any(self.mark in word for word in process.info['cmdline'] or ()):
                found.append(process)
        return found

    def wait_for(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Wait until something holds."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.events
            time.sleep(0.05)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_parts_run_beside_the_slow_step(checkout: Checkout) -> None:
    checkout.compile(until='run 2')
    status, text = checkout.run()
    assert status == 0, text
    order = [event for event in checkout.events if event != 'slow begins']
    assert order == ['base', 'one', 'run 1', 'two', 'run 2', 'slow ends', 'three', 'run 3'], text
    assert 'slow begins' in checkout.events
    assert re.search(r'ops: 2 of 3 files, about \d:\d\d left', text), text
    assert text.splitlines()[-3:] == ['1: passed', '2: passed', '3: passed']


def test_what_programs_compile_is_kept(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PYTHONDONTWRITEBYTECODE', '1')  # else each of their starts compiles torch again
    for name in ('one', 'run'):
        (checkout.folder / name).write_text('assert not sys.dont_write_bytecode')
    status, text = checkout.run('1')
    assert status == 0, text


def test_what_is_set_up_runs_at_once_and_together(checkout: Checkout) -> None:
    checkout.run()
    checkout.forget()
    assert checkout.run()[0] == 0
    assert checkout.events == ['run 1 2 3']


def test_a_part_sets_up_what_it_needs(checkout: Checkout) -> None:
    assert checkout.run('2')[0] == 0
    assert checkout.events == ['base', 'two', 'run 2']


@pytest.mark.parametrize('parts', [pytest.param(('1', '3'), marks=pytest.mark.slow), ('3',)])
def test_the_slow_step_gives_way(checkout: Checkout, parts: tuple[str, ...]) -> None:
    """Where something else runs."""
    (checkout.folder / 'gives way').write_text('')
    assert checkout.run(*parts)[0] == 0
    nice = 19 if len(parts) > 1 else os.nice(0)
    assert f'nice {nice}\n' in (checkout.folder / 'venv/logs/slow.log').read_text()


def test_the_slow_step_fails(checkout: Checkout) -> None:
    """The other parts have run; what failed is said at the end, and done again by the next call."""
    checkout.compile(fails=True)
    status, text = checkout.run()
    assert status == 1
    assert 'run 1' in checkout.events
    assert 'run 2' in checkout.events
    assert 'run 3' not in checkout.events
    end = text.partition('set-up failed at step "slow"')[2]
    log = checkout.folder / 'venv/logs/slow.log'
    for part in ('no compiler', 'exit code 1', 'What to do: install a compiler', str(log), 'same command continues'):
        assert part in end, text
    assert 'no compiler' in log.read_text()
    checkout.compile()
    checkout.forget()
    status, text = checkout.run()
    assert status == 0, text
    assert sorted(checkout.events) == ['run 1 2', 'run 3', 'slow begins', 'slow ends', 'three']


def test_a_quick_step_fails(checkout: Checkout) -> None:
    (checkout.folder / 'one').write_text('raise SystemExit(3)')
    status, text = checkout.run()
    assert status == 1
    assert 'run 1' not in checkout.events
    assert 'run 2' in checkout.events
    assert 'run 3' in checkout.events
    assert re.search(r'(?s)step "one".*exit code 3.*What to do: nothing', text), text


def test_the_status_of_a_part(checkout: Checkout) -> None:
    """The others run all the same."""
    (checkout.folder / 'run').write_text('sys.exit(5 * (name == "run 1"))')
    status, text = checkout.run()
    assert status == 5
    assert text.splitlines()[-3:] == ['1: exit status 5', '2: passed', '3: passed']


@pytest.mark.parametrize(
    'number', [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGKILL))]
)
@pytest.mark.parametrize('moment', ['run 1', 'run 2'])
def test_no_process_is_left_behind(checkout: Checkout, number: signal.Signals, moment: str) -> None:
    """After an interruption, in the program that runs or while waiting for the compilation; and it continues."""
    checkout.compile(300)
    if moment == 'run 1':
        (checkout.folder / 'run').write_text('import time; time.sleep(300)')
    process = checkout.start()
    try:
        checkout.wait_for(lambda: moment in checkout.events and len(checkout.compilers()) >= 1)
        time.sleep(0.3)
        process.send_signal(number)
        process.wait(30)
        checkout.wait_for(lambda: not checkout.compilers(), 20)
    finally:
        process.kill()
        for left in checkout.compilers():
            left.kill()
    assert process.stdout is not None
    text = process.stdout.read()
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), text
    assert 'set-up failed' not in text
    checkout.compile()
    (checkout.folder / 'run').write_text('')
    checkout.forget()
    status, text = checkout.run()
    assert status == 0, text
    assert 'base' not in checkout.events
    assert checkout.events[-2:] == ['three', 'run 3']


def test_a_terminal_shows_both(checkout: Checkout) -> None:
    """One line below has the compilation and the part that runs; lines of the part are above it."""
    checkout.compile(until='run 2')
    (checkout.folder / 'run').write_text('print("a line", flush=True); import time; time.sleep(1); print("another")')
    parent, child = pty.openpty()
    process = subprocess.Popen(checkout.words, stdout=child, stderr=child)
    os.close(child)
    text = b''
    while True:
        try:
            text += os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
    os.close(parent)
    assert process.wait(60) == 0, text
    assert re.search(rb'ops: 2 of 3 files, about \d:\d\d left \| 1 0:', text), text
    shown = [line.rpartition(b'\r\x1b[K')[2].strip() for line in text.split(b'\n')]
    assert b'another' in shown
    assert not [line for line in shown if b'2 of 3 files' in line]  # it was drawn over
