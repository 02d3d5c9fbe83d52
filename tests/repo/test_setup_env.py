"""The set-up: order of steps, what runs beside a compilation, failures, interruptions, and the wheels that are kept."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, pytest_runtest_makereport
from environment import goals, mmcv
from environment.display import Display
from environment.goals import GOALS, PARTS
from environment.ninja import command_of
from environment.steps import Setup, Step, StepFailed, pin

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


def test_an_optional_step_may_fail(tmp_path: Path) -> None:
    steps = {
        'first': Step('first', (), (sys.executable, '-c', 'raise SystemExit("no compiler")'), 'get one', optional=True),
        'second': Step('second', ('first',), (sys.executable, '-c', ''), 'nothing'),
    }
    out = io.StringIO()
    goal = goals.Goal({'part': ('second',)}, lambda parts: [goals.Command((sys.executable, '-c', ''))])
    setup = Setup(tmp_path, steps, Display(out))
    assert goals.Way(setup, goal, ['part']).go() == 0
    assert 'no compiler' in out.getvalue()
    assert 'get one' in out.getvalue()
    assert setup.done('second')
    assert not setup.done('first')


def test_the_status_of_a_part(checkout: Checkout) -> None:
    """The others run all the same."""
    (checkout.folder / 'run').write_text('sys.exit(5 * (name == "run 1"))')
    status, text = checkout.run()
    assert status == 5
    assert text.splitlines()[-3:] == ['1: exit status 5', '2: passed', '3: passed']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
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


def test_a_step_is_done_again_when_what_it_depends_on_changes(tmp_path: Path) -> None:
    file = tmp_path / 'pyproject.toml'
    file.write_text('a')
    steps = {
        'first': Step('first', (), (sys.executable, '-c', ''), 'nothing', files=(str(file),)),
        'second': Step('second', ('first',), (sys.executable, '-c', ''), 'nothing'),
        'other': Step('other', (), (sys.executable, '-c', ''), 'nothing'),
    }
    setup = Setup(tmp_path / 'venv', steps, Display(io.StringIO()))
    for step in setup.due(list(steps)):
        setup.do(step)
    assert not setup.due(list(steps))
    file.write_text('b')
    assert [step.name for step in setup.due(list(steps))] == ['first', 'second']


def steps_of_the_checkout() -> dict[str, Step]:
    import setup_env

    return setup_env.STEPS


def test_only_detection_needs_mmcv(tmp_path: Path) -> None:
    setup = Setup(tmp_path, steps_of_the_checkout())
    for goal in GOALS.values():
        for part, needs in goal.parts.items():
            names = [step.name for step in setup.due(needs)]
            assert ('mmcv' in names) == (part == 'detection'), (part, names)
            assert names[:1] == ['environment']
    assert [step.name for step in setup.due(['far'])] == ['environment', 'torch', 'far']


def test_steps_and_goals_fit_the_checkout() -> None:
    steps = steps_of_the_checkout()
    names = list(steps)
    for name, step in steps.items():
        assert all(names.index(need) < names.index(name) for need in step.needs), name
    extras = re.findall(r'^(\w+) = \[', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
    for step in steps.values():
        for word in step.command if isinstance(step.command, tuple) else ():
            assert not word.startswith('.[') or word[2:-1] in extras
    for goal in GOALS.values():
        assert {need for needs in goal.parts.values() for need in needs} <= set(names)
    import demo

    assert demo.PARTS == PARTS


def test_pins() -> None:
    assert pin('torch') == 'torch==' + torch.__version__.split('+')[0]
    assert pin('onedl-mmcv').startswith('onedl-mmcv==')
    with pytest.raises(StepFailed, match='does not pin torchvision'):
        pin('torchvision')


def test_one_run_of_the_tests_where_all_is_set_up() -> None:
    def marks(parts: Sequence[str]) -> list[str]:
        return [command.words[-1] for command in goals.test(parts) if 'pytest' in command.words]

    assert marks(['quality', 'rest', 'detection']) == ['not slow']
    assert marks(['quality', 'rest']) == ['not slow and not det']
    assert marks(['detection']) == ['not slow and det']
    assert [c.words[0] for c in goals.test(['quality', 'rest'])][:3] == ['{bin}/ruff', '{bin}/ruff', '{bin}/mypy']
    assert goals.demo(PARTS)[0].words == ('{python}', 'tools/demo.py')
    assert goals.demo(['far'])[0].words == ('{python}', 'tools/demo.py', '--only', 'far')


@pytest.mark.parametrize('words', [('demo', 'vit'), ('test', 'far')])
def test_an_unknown_part_is_refused(tmp_path: Path, words: tuple[str, str]) -> None:
    command = [sys.executable, 'tools/setup_env.py', str(tmp_path / 'venv'), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f'no part {words[1]!r}' in done.stderr
    assert 'diffusion, far, detection' in done.stderr
    assert not (tmp_path / 'venv').exists()


@pytest.mark.skipif(shutil.which('make') is None, reason='needs make')
def test_make_passes_the_part_on(tmp_path: Path) -> None:
    command = ['make', 'demo', 'PART=vit', f'VENV={tmp_path / "venv"}', f'PYTHON={sys.executable}']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no part 'vit' of demo" in done.stderr


@pytest.mark.parametrize(('marks', 'outcome'), [(set(), 'failed'), ({'det'}, 'skipped')])
def test_a_test_that_is_skipped_without_mmdetection_is_marked(marks: set[str], outcome: str) -> None:
    reason = ('file', 1, "Skipped: could not import 'mmdet': No module named 'mmdet'")
    report = pytest.TestReport('test', ('file', 1, 'test'), {}, 'skipped', reason, 'call')
    hook = pytest_runtest_makereport(SimpleNamespace(nodeid='test', keywords=marks))
    next(hook)
    with pytest.raises(StopIteration) as end:
        hook.send(report)
    assert end.value.value.outcome == outcome


# --- wheels of mmcv: with a pip and a torch that take no time -------------------------------------------------------

PIP = """
import io, json, os, pathlib, sys, tarfile, zipfile
args = sys.argv[1:]
here = pathlib.Path(os.environ['FAKE'])
with open(here / 'calls', 'a') as file:
    file.write(' '.join(args) + '\\n')
plan = json.loads((here / 'plan').read_text())
def wheel(folder, ops):
    os.makedirs(folder, exist_ok=True)
    with zipfile.ZipFile(f'{folder}/NAME-cp311-cp311-linux_x86_64.whl', 'w') as file:
        file.writestr('mmcv/__init__.py', '')
        if ops is not None:
            file.writestr('mmcv/_ext.py', ops)
if 'download' in args:
    folder = args[args.index('--dest') + 1]
    if plan['ready'] is not None and '--prefer-binary' in args:
        wheel(folder, plan['ready'])
    else:
        os.makedirs(folder)
        with tarfile.open(f'{folder}/NAME.tar.gz', 'w:gz') as file:
            info = tarfile.TarInfo('NAME/setup.py')
            info.size = 4
            file.addfile(info, io.BytesIO(b'pass'))
else:
    assert os.path.isfile(args[-1] + '/setup.py')
    print(sorted(os.listdir(args[-1])))
    print('[1/2] c++', os.environ['CFLAGS'], os.environ['MAX_JOBS'])
    wheel(args[args.index('--wheel-dir') + 1], plan['compiled'])
"""


class Wheels:
    """Environments with a cache, a pip that writes down its calls, and a torch."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.out = folder, io.StringIO()
        name = pin('onedl-mmcv').replace('-', '_').replace('==', '-')
        self.name = f'{name}-cp311-cp311-linux_x86_64.whl'
        fake = folder / 'fake'
        (fake / 'pip').mkdir(parents=True)
        (fake / 'pip/__init__.py').write_text('')
        (fake / 'pip/__main__.py').write_text(PIP.replace('NAME', name))
        self.torch('9.9')
        self.plan(ready=None, compiled='')
        patch.setenv('ASR_CACHE', str(folder / 'cache'))
        patch.setenv('FAKE', str(fake))
        patch.setattr(mmcv, 'ROOT', folder)

    def torch(self, version: str) -> None:
        """Install a torch."""
        text = f'__version__ = {version!r}\nclass cuda: is_available = staticmethod(lambda: False)\n'
        (self.folder / 'fake/torch.py').write_text(text)
        shutil.rmtree(self.folder / 'fake/__pycache__', ignore_errors=True)

    def plan(self, ready: str | None, compiled: str | None) -> None:
        """Code of the ops in the wheel of the index (None: it has none), and in the one that is compiled."""
        (self.folder / 'fake/plan').write_text(json.dumps({'ready': ready, 'compiled': compiled}))

    def environment(self, name: str) -> Setup:
        """Make an environment."""
        python = self.folder / name / 'bin/python'
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f'#!/bin/sh\nPYTHONPATH={self.folder}/fake exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        step = Step('mmcv', (), mmcv.provide_wheel, 'nothing', title='ops', pins=('onedl-mmcv', 'torch'))
        return Setup(self.folder / name, {'mmcv': step}, Display(self.out))

    def provide(self, name: str) -> list[str]:
        """Provide an environment with a wheel; return the calls of pip."""
        calls = self.folder / 'fake/calls'
        calls.unlink(missing_ok=True)
        setup = self.environment(name)
        setup.do(setup.steps['mmcv'])
        assert [path.name for path in (setup.venv / 'wheels').iterdir()] == [self.name]
        assert not list((self.folder).rglob('*.tmp'))
        assert not (setup.venv / 'mmcv').exists()
        return calls.read_text().splitlines() if calls.exists() else []

    @property
    def kept(self) -> list[Path]:
        """Wheels in the cache."""
        return sorted((self.folder / 'cache/wheels').rglob('*.whl'))


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheels:
    return Wheels(tmp_path, monkeypatch)


def test_the_next_checkout_takes_the_wheel_of_the_first(wheels: Wheels) -> None:
    calls = wheels.provide('a')
    assert [call.split()[1] for call in calls] == ['download', 'wheel']
    assert '--prefer-binary' in calls[0]
    log = (wheels.folder / 'a/logs/mmcv.log').read_text()
    assert re.search(r'\[1/2\] c\+\+ .*-g0 \d+', log), log
    [kept] = wheels.kept
    assert kept.parent.name.startswith(f'torch-9.9-{sys.implementation.cache_tag}-')
    assert wheels.provide('b') == []
    assert f'from {kept}' in wheels.out.getvalue()
    wheels.torch('9.10')  # another torch has other wheels
    assert len(wheels.provide('c')) == 2
    assert len(wheels.kept) == 2


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'empty', 'other torch', 'no ops'])
def test_a_broken_wheel_is_noticed_and_built_again(wheels: Wheels, damage: str) -> None:
    wheels.provide('a')
    [kept] = wheels.kept
    content = kept.read_bytes()
    if damage == 'flipped':
        with zipfile.ZipFile(kept, 'a') as file:
            file.writestr('mmcv/nms.py', 'bytes that will be damaged')
        content = kept.read_bytes()
        kept.write_bytes(content.replace(b'will be damaged', b'are now damaged'))
    elif damage in ('other torch', 'no ops'):
        with zipfile.ZipFile(kept, 'w') as file:
            file.writestr('mmcv/_ext.py' if damage == 'other torch' else 'mmcv/__init__.py', 'import not_there')
    else:
        kept.write_bytes(content[: len(content) // 2] if damage == 'cut' else b'')
    assert len(wheels.provide('b')) == 2
    assert 'is not used: ' in wheels.out.getvalue()
    assert wheels.provide('c') == []


def test_a_wheel_of_an_older_checkout_is_taken_over(wheels: Wheels) -> None:
    wheels.provide('a')
    [kept] = wheels.kept
    old = wheels.folder / f'.wheels/{pin("torch").replace("==", "-")}-3.{sys.version_info[1]}'
    old.mkdir(parents=True)
    kept.rename(old / kept.name)
    assert wheels.provide('b') == []
    assert wheels.kept == [kept]


def test_a_ready_wheel_of_the_index_is_taken(wheels: Wheels) -> None:
    wheels.plan(ready='', compiled='')
    assert [call.split()[1] for call in wheels.provide('a')] == ['download']
    wheels.torch('9.10')
    wheels.plan(ready='import not_there', compiled='')  # it is of another torch
    calls = wheels.provide('b')
    assert [call.split()[1] for call in calls] == ['download', 'download', 'wheel']
    assert '--no-binary=onedl-mmcv' in calls[1]
    assert "No module named 'not_there'" in wheels.out.getvalue()


def test_pages_of_ready_wheels(wheels: Wheels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MMCV_LINKS', 'https://example.org/page.html')
    assert '--find-links=https://example.org/page.html' in wheels.provide('a')[0]


def test_a_cache_that_cannot_be_written_is_said(wheels: Wheels, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheels.folder / 'file').write_text('')
    monkeypatch.setenv('ASR_CACHE', str(wheels.folder / 'file/cache'))
    assert len(wheels.provide('a')) == 2
    assert 'is not kept for other checkouts: ' in wheels.out.getvalue()


def test_a_copy_that_fails_leaves_the_wheel_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('from', 'to'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'a.whl').write_text(name)
    (tmp_path / 'to/a.whl.123.tmp').write_text('of one that was killed')

    def full(source: object, target: io.BufferedWriter) -> None:
        target.write(b'half')
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'copyfileobj', full)
        with pytest.raises(OSError, match='No space'):
            mmcv.keep(tmp_path / 'from/a.whl', tmp_path / 'to')
    assert {path.name: path.read_text() for path in (tmp_path / 'to').iterdir()} == {'a.whl': 'to'}
    mmcv.keep(tmp_path / 'from/a.whl', tmp_path / 'to')
    assert (tmp_path / 'to/a.whl').read_text() == 'from'


def test_an_interrupted_compilation_continues(wheels: Wheels) -> None:
    """Objects of an earlier try are where they were; an archive that was cut is downloaded again."""
    wheels.plan(ready=None, compiled='import not_there')
    setup = wheels.environment('a')
    with pytest.raises(StepFailed, match=r'(?s)cannot be used: .*not_there.*logs/mmcv.log'):
        setup.do(setup.steps['mmcv'])
    [tree] = [path for path in (setup.venv / 'mmcv').glob('*/*') if path.name.startswith('onedl') and path.is_dir()]
    (tree / 'a.o').write_text('compiled')
    wheels.plan(ready=None, compiled='')
    calls = wheels.provide('a')
    assert [call.split()[1] for call in calls] == ['wheel']
    assert calls[0].endswith(str(tree))
    assert "'a.o'" in (setup.venv / 'logs/mmcv.log').read_text()


def test_an_archive_that_was_cut_is_downloaded_again(wheels: Wheels) -> None:
    setup = wheels.environment('a')
    source = setup.venv / 'mmcv' / mmcv.kept_in(setup).name / 'source'
    source.mkdir(parents=True)
    archive = source / f'{mmcv.release()}.tar.gz'
    with tarfile.open(archive, 'w:gz') as file:
        file.add(ROOT / 'README.md', f'{mmcv.release()}/README.md')
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(StepFailed, match='was not downloaded whole'):
        setup.do(setup.steps['mmcv'])
    assert len(wheels.provide('a')) == 2


BUILD = """
cxx = c++

cflags = -O1 -I{folder} -c
post_cflags = -std=c++17 -H

rule compile
  command = $cxx $cflags -c $in -o $out $post_cflags

build a.o: compile {folder}/a.cpp
"""


@pytest.mark.skipif(shutil.which('c++') is None, reason='needs a C++ compiler')
def test_the_common_header_is_compiled_once(tmp_path: Path) -> None:
    header = tmp_path / 'mmcv/ops/csrc/common/pytorch_cpp_helper.hpp'
    header.parent.mkdir(parents=True)
    header.write_text('#pragma once\ninline int one() { return 1; }\n')
    (tmp_path / 'a.cpp').write_text(f'#include "{header.relative_to(tmp_path)}"\nint two() {{ return 2 * one(); }}\n')
    work = tmp_path / 'build/temp'
    work.mkdir(parents=True)
    (work / 'build.ninja').write_text(BUILD.format(folder=tmp_path))
    real = shutil.which('ninja', path=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    command = [sys.executable, str(ROOT / 'tools/environment/ninja.py'), str(real), '-v']
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    used = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith('! ')]
    if 'Free Software Foundation' in subprocess.run(['c++', '--version'], capture_output=True, text=True).stdout:
        assert used == [f'! {header}.gch'], done.stdout  # gcc marks a compiled header that it takes with !
    assert (work / 'a.o').exists()
    assert command_of('nothing = 1', header) is None
