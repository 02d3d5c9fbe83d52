"""Detection: trainings that are killed, half of them while they write, end with the weights of one that was not."""

from __future__ import annotations

import os
import random
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
pytestmark = [pytest.mark.det, pytest.mark.slow, pytest.mark.timeout(500)]

from tiny_detection import FLIP, as_file, assert_same, pictures, tiny

SEED = 20
EPOCHS, LENGTH = 4, 6
OPTIONS = {
    'train_cfg.max_epochs': EPOCHS,
    'train_dataloader.batch_size': 2,
    'train_dataloader.num_workers': 1,
    'train_dataloader.persistent_workers': True,
    'train_dataloader.dataset.pipeline': FLIP,
    'default_hooks.checkpoint.max_keep_ckpts': 1,
    'default_hooks.logger.interval': 1,
    'log_level': 'INFO',
    # large enough for a write to take a while
    'model.backbone.base_channels': 16,
    'model.neck.in_channels': [32, 64],
    'model.neck.out_channels': 48,
    'model.bbox_head.in_channels': 48,
    'model.bbox_head.feat_channels': 48,
}
WITHIN = {'default_hooks.checkpoint.by_epoch': False, 'default_hooks.checkpoint.interval': 4}
LAST = {'epochs': f'epoch_{EPOCHS}.pth', 'steps': f'iter_{EPOCHS * LENGTH}.pth'}


@pytest.fixture(scope='module')
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configs with a checkpoint at every epoch, and at every fourth step, which is seldom the end of one."""
    folder = tmp_path_factory.mktemp('configs')
    digits = pictures(folder)
    return {
        'epochs': as_file(tiny(digits, **OPTIONS), folder, 'epochs.py'),
        'steps': as_file(tiny(digits, **OPTIONS, **WITHIN), folder, 'steps.py'),
    }


class Training:
    """`tools/train_det.py`, or two processes of it, in a process group of its own."""

    def __init__(self, config: Path, work: Path, processes: int = 1, limit: int | None = None) -> None:
        self.work = work
        command = ['tools/dist_train.sh', config, processes]
        if processes == 1:
            command = [sys.executable, '-W', 'ignore', 'tools/train_det.py', config]
        work.mkdir(exist_ok=True)
        self.log = work.with_suffix('.txt')
        words = ' '.join(map(str, [*command, '--work-dir', work, '--resume', 'auto']))
        ulimit = f'ulimit -f {limit}; ' if limit else ''
        env = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
        with self.log.open('w') as out:
            self.process = subprocess.Popen(
                ['bash', '-c', f'{ulimit}exec {words}'], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def until(self, come: Any, seconds: float = 120) -> None:
        """Look, without a pause, until something has come or the training has ended."""
        deadline = time.monotonic() + seconds
        while not come() and self.process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]

    def step(self, number: int) -> None:
        """Wait for a line of the log."""
        epoch, batch = divmod(number, LENGTH)
        line = f'Epoch(train)  [{epoch + 1}][{batch + 1}/{LENGTH}]'
        self.until(lambda: time.sleep(0.02) or line in self.log.read_text())  # type: ignore[func-returns-value]

    def write(self, number: int) -> None:
        """Wait for the ``number``-th checkpoint to be begun."""
        for count in range(number):
            self.until(lambda: any(name.endswith('.pth.tmp') for name in os.listdir(self.work)))
            if count + 1 < number:
                self.until(lambda: not any(name.endswith('.pth.tmp') for name in os.listdir(self.work)))

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)

    def end(self) -> int:
        try:
            return self.process.wait(timeout=200)
        finally:
            self.kill()


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory, configs: dict[str, Path]) -> dict[str, Path]:
    """Last checkpoints of the same trainings, never killed."""
    found = {}
    for name, config in configs.items():
        training = Training(config, tmp_path_factory.mktemp('whole') / name)
        assert training.end() == 0, training.log.read_text()[-3000:]
        found[name] = training.work / LAST[name]
    return found


@pytest.mark.xfail(strict=True, reason='flips are drawn anew, checkpoints are lost or half-written')
def test_eight_kills_of_eight_end_with_the_weights_of_the_uninterrupted_run(
    configs: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    draw = random.Random(SEED)
    inside, rows = 0, []
    for number in range(8):
        name = ('epochs', 'steps')[number // 2 % 2]
        work = tmp_path / f'{name}-{number}'
        training = Training(configs[name], work)
        if number % 2:
            moment = draw.randrange(1, 4)
            training.write(moment)
            time.sleep(draw.uniform(0, 0.004))
            what = f'write {moment}'
        else:
            moment = draw.randrange(EPOCHS * LENGTH - 1)
            training.step(moment)
            time.sleep(draw.uniform(0, 0.1))
            what = f'step {moment + 1}'
        assert training.process.poll() is None, training.log.read_text()[-3000:]
        training.kill()
        half = [p.name for p in work.glob('.*.tmp')]
        inside += bool(half)
        there = sorted(p.name for p in work.glob('*.pth'))
        again = Training(configs[name], work)
        assert again.end() == 0, again.log.read_text()[-3000:]
        assert_same(work / LAST[name], whole[name])
        assert sorted(p.name for p in work.rglob('*.pth*')) == [LAST[name]]
        rows.append(f'{name:7} killed at {what:8} there: {there} half-written: {half}')
    print('\n'.join(rows))
    print(f'{len(rows)} of 8 kills, {inside} of them within a write: steps, weights and optimiser bit-equal')
    assert inside >= 2  # else nothing was aimed at


@pytest.mark.xfail(strict=True, reason='the order of deletion and writing')
def test_a_full_disk_costs_no_checkpoint(configs: dict[str, Path], whole: dict[str, Path], tmp_path: Path) -> None:
    size = whole['epochs'].stat().st_size
    work = tmp_path / 'full'
    first = Training(configs['epochs'], work)
    first.step(LENGTH)  # the first epoch is written
    first.kill()
    full = Training(configs['epochs'], work, limit=size // 2 // 1024)
    assert full.end() == 1
    said = full.log.read_text()
    error = said[said.rindex('error: ') :].strip()
    assert len(error.splitlines()) == 1
    assert 'Traceback' not in said
    assert 'free' in error
    print(error)
    assert [p.name for p in work.rglob('*.pth*')] == ['epoch_1.pth']
    again = Training(configs['epochs'], work)
    assert again.end() == 0, again.log.read_text()[-3000:]
    assert_same(work / LAST['epochs'], whole['epochs'])


def ranks(launcher: int) -> list[int]:
    """Processes that a launcher has started, by rank."""
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        with suppress(OSError, ValueError):
            parent = int((folder / 'stat').read_text().rpartition(')')[2].split()[1])
            env = (folder / 'environ').read_bytes().split(b'\0')
            rank = [part for part in env if part.startswith(b'RANK=')]
            if parent == launcher and rank:
                found.append((int(rank[0].removeprefix(b'RANK=')), int(folder.name)))
    return [process for _, process in sorted(found)]


@pytest.mark.xfail(strict=True, reason='flips are drawn anew')
@pytest.mark.parametrize('rank', [0, 1])
def test_a_launch_that_lost_a_process_goes_on_as_if_it_had_not(
    configs: dict[str, Path], tmp_path: Path, rank: int
) -> None:
    expected = Training(configs['epochs'], tmp_path / 'whole', processes=2)
    assert expected.end() == 0, expected.log.read_text()[-3000:]
    killed = Training(configs['epochs'], tmp_path / 'killed', processes=2)
    # each process makes half of the steps of an epoch
    killed.until(lambda: time.sleep(0.02) or f'[2][2/{LENGTH // 2}]' in killed.log.read_text())  # type: ignore[func-returns-value]
    os.kill(ranks(killed.process.pid)[rank], signal.SIGKILL)
    assert killed.end() != 0
    again = Training(configs['epochs'], tmp_path / 'killed', processes=2)
    assert again.end() == 0, again.log.read_text()[-3000:]
    assert_same(tmp_path / 'killed' / LAST['epochs'], tmp_path / 'whole' / LAST['epochs'])
    print(f'rank {rank} of 2 killed and resumed: steps, weights and optimiser bit-equal')
