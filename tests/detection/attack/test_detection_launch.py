"""Detection: how trainings are launched and ended from outside: the environment, process groups, loader workers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.timeout(240)]

from helpers.tiny_detection import as_file, tiny

COREUTILS = ('bash', 'dirname', 'sed', 'env')


def checkout(tmp_path: Path, python: str | None, venv: bool) -> dict[str, str]:
    """A checkout with the script alone, and an environment with the commands it needs and a ``python3`` or none."""
    (tmp_path / 'tools').mkdir()
    shutil.copy(ROOT / 'tools' / 'dist_train.sh', tmp_path / 'tools')
    path = tmp_path / 'bin'
    path.mkdir()
    for name in COREUTILS:
        (path / name).symlink_to(shutil.which(name) or name)
    places = [path / 'python3'] * (python is not None) + [tmp_path / '.venv' / 'bin' / 'python'] * venv
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f'#!{path / "bash"}\n{python}\n')
        place.chmod(0o755)
    return {'PATH': str(path)}


def dist_train(tmp_path: Path, env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    command = ['bash', str(tmp_path / 'tools' / 'dist_train.sh'), 'config.py', '2', *args]
    return subprocess.run(command, env=env, cwd='/', capture_output=True, text=True, timeout=30, check=False)


ECHO = 'echo "$0 $*"'  # a python that has what is asked for, and says what it would run
BARE = 'exit 1'  # a python that cannot import torch


@pytest.mark.parametrize(('python', 'venv', 'used'), [(ECHO, False, 'bin/python3'), (ECHO, True, '.venv/bin/python')])
def test_dist_train_finds_python_outside_an_activated_environment(
    tmp_path: Path, python: str, venv: bool, used: str
) -> None:
    done = dist_train(tmp_path, checkout(tmp_path, python, venv), '--seed', '3')
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(f'{tmp_path / used} ')
    assert done.stdout.strip().endswith('config.py --launcher pytorch --seed 3')


@pytest.mark.parametrize(('python', 'missing'), [(None, 'no python'), (BARE, 'asr_downstream')])
def test_dist_train_says_what_is_missing(tmp_path: Path, python: str | None, missing: str) -> None:
    done = dist_train(tmp_path, checkout(tmp_path, python, venv=False))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert missing in done.stderr
    assert 'make setup' in done.stderr


@pytest.mark.slow
def test_importing_says_nothing() -> None:
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', 'import asr_downstream.detection, mmdet.datasets; print("else")'],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'else\n'


class Run:
    """A training in a process group of its own."""

    def __init__(self, command: list[Any], log: Path) -> None:
        self.log = log
        env = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
        with log.open('w') as out:
            self.process = subprocess.Popen(
                [str(part) for part in command], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait_for(self, text: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert text in self.log.read_text(), self.log.read_text()[-3000:]

    def signal(self, number: int, group: bool) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=90)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize('group', [True, False])
def test_a_signal_to_a_launch_leaves_a_checkpoint_and_its_status(
    digits: Path, tmp_path: Path, processes: int, number: int, status: int, group: bool
) -> None:
    """To the group: what a terminal, Slurm and Kubernetes send; to the launcher alone: what ``kill`` sends."""
    options = {
        'train_cfg.max_epochs': 10000,
        'train_dataloader.num_workers': 2,
        'train_dataloader.persistent_workers': True,
        'train_dataloader.batch_size': 2,
        'default_hooks.checkpoint.interval': 10000,
        'default_hooks.logger.interval': 1,
        'log_level': 'INFO',
    }
    config = as_file(tiny(digits, **options), tmp_path)
    command: list[Any] = ['tools/dist_train.sh', config, 2, '--work-dir', tmp_path / 'run']
    if processes == 1:
        command = [sys.executable, 'tools/train_det.py', config, '--work-dir', tmp_path / 'run']
    run = Run(command, tmp_path / 'log.txt')
    run.wait_for('Epoch(train)')
    run.signal(number, group)
    found = run.wait()
    said = run.log.read_text()
    assert found == status, said[-3000:]
    assert 'Traceback' not in said, said[-3000:]
    assert list((tmp_path / 'run').glob('stopped_iter_*.pth')), said[-3000:]
    assert said.count('--resume continues from') == 1
