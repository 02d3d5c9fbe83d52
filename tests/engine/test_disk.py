"""Disks that are full: one line, nothing half-written, the checkpoint from before."""

from __future__ import annotations

import shutil
import signal
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from conftest import files_of_at_most
from helpers.diffusion import assert_same, launch, losses, write_config
from helpers.engine import run_of
from helpers.kills import run as run_command

from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.trackers import read_log
from asr_downstream.errors import AsrError

Usage = namedtuple('Usage', 'total used free')


def sizes(run: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in (run / 'checkpoint-6').iterdir()}


@pytest.mark.parametrize(
    'share', [0.1, 0.6, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.02, 0.3, 0.5, 0.7, 0.9, 0.99))]
)
def test_a_disk_that_is_full_leaves_the_checkpoint_from_before(tmp_path: Path, share: float) -> None:
    settings = dict(use_ema=True, width=256, checkpointing_steps=3)
    run = tmp_path / 'run'
    run_of(run, max_train_steps=3, **settings)
    largest = max(p.stat().st_size for p in (run / 'checkpoint-3').iterdir())
    with (
        files_of_at_most(int(largest * share)),
        pytest.raises(AsrError, match=r'checkpoint-6: cannot be written \(.*\); .* needed, .* free: make room'),
    ):
        run_of(run, 'latest', max_train_steps=6, **settings)
    assert not list(run.glob('.checkpoint-*'))
    assert checkpoints.find(run) == run / 'checkpoint-3'
    run_of(run, 'latest', max_train_steps=6, **settings)
    assert [row['step'] for row in read_log(run / 'log.jsonl')] == [1, 2, 3, 4, 5, 6]


def test_a_log_that_cannot_grow_is_one_line(tmp_path: Path) -> None:
    run_of(tmp_path, max_train_steps=39, checkpointing_steps=50)  # the log is larger than the config
    size = (tmp_path / 'log.jsonl').stat().st_size
    with (
        files_of_at_most(size + 10),
        pytest.raises(AsrError, match=r'log.jsonl: cannot be written \(File too large\)'),
    ):
        run_of(tmp_path, 'latest', max_train_steps=60, checkpointing_steps=50)
    run_of(tmp_path, 'latest', max_train_steps=42, checkpointing_steps=50)
    assert [row['step'] for row in read_log(tmp_path / 'log.jsonl')] == list(range(1, 43))


def test_space_for_a_checkpoint_is_looked_for_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(10**9, 10**9 - 5000, 5000))
    steps: list[int] = []

    from helpers.engine import Classification

    monkeypatch.setattr(Classification, 'after_step', lambda self, step: steps.append(step))
    with pytest.raises(AsrError, match=r'run: cannot be written \(No space left.*\); .* kB needed, 5 kB free'):
        run_of(tmp_path / 'run', width=128)
    assert steps == []


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize('processes', [1, 2])
def test_a_training_whose_disk_is_full_goes_on_when_there_is_room(tmp_path: Path, processes: int) -> None:
    assert hasattr(signal, 'SIGXFSZ')
    path = write_config(tmp_path, max_train_steps=9, dataloader_num_workers=1)
    assert launch(path, '--output-dir', tmp_path / 'whole', processes=processes).returncode == 0
    largest = max(p.stat().st_size for p in (tmp_path / 'whole/checkpoint-9').iterdir())
    run, failed = tmp_path / 'run', 0
    first: list[Any] = [path, '--output-dir', run]
    words = ['diffusion/train.py', *first]
    start = [sys.executable, '-W', 'ignore']
    if processes > 1:
        start = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    for share in (0.1, 0.4, 0.6, 0.97):
        limited = ['bash', '-c', f'ulimit -f {int(largest * share) // 1024}; exec "$@"', 'x', *start, *words]
        status, text = run_command(limited, tmp_path / 'output.txt')
        assert status == 1, text
        assert 'train.py", line' not in text, text
        assert text.count('error: ') == 1, text
        assert f'error: {run}/checkpoint-3: cannot be written (' in text
        assert not list(run.glob('.checkpoint-*'))
        failed += 1
    done = launch(*first, processes=processes)
    assert done.returncode == 0, done.stderr
    assert_same(run / 'checkpoint-9', tmp_path / 'whole/checkpoint-9')
    assert losses(run) == losses(tmp_path / 'whole')
    print(f'\ndisk full, {processes} process(es): {failed} of 4 refused in one line, the run after them bit-equal')
