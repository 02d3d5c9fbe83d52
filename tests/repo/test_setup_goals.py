"""The set-up: which steps a goal needs, in which order, and what runs when they are done."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, pytest_runtest_makereport
from environment import goals
from environment.display import Display
from environment.goals import GOALS, PARTS
from environment.steps import Setup, Step, StepFailed, pin


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
    assert [step.name for step in setup.due(['far'])] == ['environment', 'torch', 'package', 'far']


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
