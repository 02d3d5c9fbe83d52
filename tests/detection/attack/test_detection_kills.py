"""Detection: trainings that are killed, half of them while they write, end with the weights of one that was not."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from helpers.kills import Command, appears, run

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.slow, pytest.mark.timeout(1800)]

from helpers.tiny_detection import FLIP, as_file, assert_same, pictures, tiny

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


def training(config: Path, work: Path, processes: int = 1, limit: int | None = None) -> list[object]:
    """Command line of a training that goes on if it can; ``limit``: of its files, in kB."""
    words: list[object] = ['tools/dist_train.sh', config, processes, '--work-dir', work, '--resume', 'auto']
    if processes == 1:
        words = [sys.executable, '-W', 'ignore', 'tools/train_det.py', config, *words[3:]]
    if limit is not None:
        words = ['bash', '-c', f'ulimit -f {limit}; exec "$@"', 'bash', *words]
    return ['env', f'PYTHON={sys.executable}', 'PYTHONWARNINGS=ignore', *words]


def finish(config: Path, work: Path, name: str, processes: int = 1) -> Path:
    """Train to the end; the last checkpoint."""
    status, said = run(training(config, work, processes), work.with_suffix('.txt'))
    assert status == 0, said[-3000:]
    return work / LAST[name]


def logs(command: Command, step: int, processes: int = 1) -> Callable[[], bool]:
    """The moment when a step is logged, counted from 1."""
    epoch, batch = divmod(step - 1, LENGTH // processes)
    line = f'Epoch(train) [{epoch + 1}][{batch + 1}/{LENGTH // processes}]'
    return lambda: line in command.text


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory, configs: dict[str, Path]) -> dict[str, Path]:
    """Last checkpoints of the same trainings, never killed."""
    folder = tmp_path_factory.mktemp('whole')
    return {name: finish(config, folder / name, name) for name, config in configs.items()}


def test_eight_kills_of_eight_end_with_the_weights_of_the_uninterrupted_run(
    configs: dict[str, Path], whole: dict[str, Path], tmp_path: Path
) -> None:
    draw = random.Random(SEED)
    inside, rows = 0, []
    for number in range(8):
        name = ('epochs', 'steps')[number // 2 % 2]
        work = tmp_path / f'{name}-{number}'
        with Command(training(configs[name], work), work.with_suffix('.txt')) as command:
            if number % 2:
                moment = (1, 2, 3, 2)[number // 2]  # the first one has none before it
                file = f'epoch_{moment}.pth' if name == 'epochs' else f'iter_{4 * moment}.pth'
                assert command.wait_for(appears(work, f'.{file}.tmp')), command.text[-3000:]
                what = f'write of {file}'
            else:
                moment = draw.randrange(1, EPOCHS * LENGTH)
                assert command.wait_for(logs(command, moment)), command.text[-3000:]
                time.sleep(draw.uniform(0, 0.1))
                what = f'step {moment}'
            assert command.process.poll() is None, command.text[-3000:]
        half = [p.name for p in work.glob('.*.tmp')]
        inside += bool(half)
        there = sorted(p.name for p in work.glob('*.pth'))
        assert_same(finish(configs[name], work, name), whole[name])
        assert sorted(p.name for p in work.rglob('*.pth*')) == [LAST[name]]
        rows.append(f'{name:7} killed at {what:20} left {there}, half-written {half}')
    print('\n'.join(rows))
    print(f'{len(rows)} of 8 kills, {inside} of them within a write: steps, weights and optimiser bit-equal')
    assert inside >= 2  # else nothing was aimed at


def test_a_full_disk_costs_no_checkpoint(configs: dict[str, Path], whole: dict[str, Path], tmp_path: Path) -> None:
    kilobytes = whole['epochs'].stat().st_size // 2 // 1024
    work = tmp_path / 'full'
    with Command(training(configs['epochs'], work), tmp_path / 'first.txt') as command:
        assert command.wait_for(logs(command, LENGTH + 1)), command.text[-3000:]  # the first epoch is written
    status, said = run(training(configs['epochs'], work, limit=kilobytes), tmp_path / 'limited.txt')
    assert status == 1, said[-3000:]
    error = said[said.rindex('error: ') :].strip()
    print(error)
    assert len(error.splitlines()) == 1
    assert 'Traceback' not in said
    assert 'free' in error
    assert [p.name for p in work.rglob('*.pth*')] == ['epoch_1.pth']
    assert_same(finish(configs['epochs'], work, 'epochs'), whole['epochs'])


@pytest.mark.parametrize('rank', [0, 1])
def test_a_launch_that_lost_a_process_goes_on_as_if_it_had_not(
    configs: dict[str, Path], tmp_path: Path, rank: int
) -> None:
    expected = finish(configs['epochs'], tmp_path / 'whole', 'epochs', processes=2)
    work = tmp_path / 'killed'
    with Command(training(configs['epochs'], work, processes=2), tmp_path / 'first.txt') as command:
        assert command.wait_for(logs(command, LENGTH // 2 + 2, processes=2)), command.text[-3000:]
        rank_of(command, rank).kill()
        assert command.wait() == 128 + 9
        said = command.text
    # workers of the killed process may complain, the other process says what happened
    assert f'[rank{1 - rank}]: Traceback' not in said, said[-3000:]
    assert 'another process of the launch has ended' in said
    assert_same(finish(configs['epochs'], work, 'epochs', processes=2), expected)
    print(f'rank {rank} of 2 killed and resumed: steps, weights and optimiser bit-equal')


def rank_of(command: Command, rank: int) -> psutil.Process:
    """Process of a launch."""
    launcher = next(p for p in command.processes() if 'asr_downstream.console.torchrun' in p.cmdline())
    return next(p for p in launcher.children() if p.environ().get('RANK') == str(rank))
