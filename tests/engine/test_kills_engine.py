"""Trainings that are killed again and again, half of the times while they write, end like those that never were."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.diffusion import assert_same, command, losses, write_config
from helpers.far import write_config as write_far_config
from helpers.kills import Command, appears, grows, has_lines, kill_and_resume
from helpers.kills import run as run_command

from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.trackers import read_log

KILLS = 8
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']

Moment = Callable[[], bool]


def moments(run: Path, seed: int) -> list[Moment]:
    """Half of the kills aim at a write, the others at any step; in a random order."""
    draw = random.Random(seed)
    found: list[Moment] = [
        appears(run, '.checkpoint-*.tmp'),
        grows(run, '.checkpoint-*.tmp/optimizer.bin'),
        grows(run, '.checkpoint-*.tmp/ema.safetensors'),
        appears(run, '.checkpoint-*.tmp/manifest.json'),
        *(has_lines(run / 'log.jsonl', draw.randint(1, 4)) for _ in range(KILLS // 2)),
    ]
    draw.shuffle(found)
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    """Lines of a log without the speed."""
    return [{k: v for k, v in row.items() if k != 'images_per_second'} for row in read_log(run / 'log.jsonl')]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_diffusion_training_killed_eight_times(tmp_path: Path) -> None:
    settings = dict(
        max_train_steps=120, checkpointing_steps=5, checkpoints_total_limit=2, logging_steps=3, use_ema=True,
        dataloader_num_workers=1, gradient_accumulation_steps=2, train_batch_size=4,
    )  # fmt: skip
    path, run = write_config(tmp_path, **settings), tmp_path / 'run'
    status, text = run_command(command(path, '--output-dir', tmp_path / 'whole'), tmp_path / 'output.txt')
    assert status == 0, text
    first = command(path, '--output-dir', run)

    def resume() -> list[str]:
        return [*first, '--resume'] if checkpoints.checkpoints_in(run) else first

    kills = kill_and_resume(first, resume, moments(run, 1), tmp_path / 'output.txt')
    assert kills == KILLS
    assert rows(run) == rows(tmp_path / 'whole')
    assert_same(run / 'checkpoint-120', tmp_path / 'whole/checkpoint-120')
    assert [p.name for p in checkpoints.checkpoints_in(run)] == ['checkpoint-115', 'checkpoint-120']
    assert not list(run.glob('.checkpoint-*'))
    print(f'\ndiffusion: {kills} SIGKILLs, {kills} resumes, weights, average and log bit-equal')


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_far_training_killed_eight_times(tmp_path: Path) -> None:
    settings = dict(max_train_steps=40, checkpointing_steps=5, logging_steps=3, use_ema=True, validation_steps=20)
    path, out = write_far_config(tmp_path, **settings), tmp_path / 'out'
    words = [sys.executable, '-W', 'ignore', 'tools/distill_far.py', path, '--output-dir']
    status, text = run_command([*words, tmp_path / 'whole'], tmp_path / 'output.txt')
    assert status == 0, text
    draw = random.Random(2)
    found: list[Moment] = []
    for stage in ('teacher', 'distill', 'finetune'):
        files = ('optimizer.bin', 'ema.safetensors', 'manifest.json')
        found += [grows(out / stage, f'.checkpoint-*.tmp/{draw.choice(files)}')]
        found += [has_lines(out / stage / 'log.jsonl', draw.randint(1, 4))]
    found.insert(4, appears(out / 'distill', '.checkpoint-*.tmp'))
    found += [has_lines(out / 'finetune/log.jsonl', 2)]
    kills = kill_and_resume([*words, out], [*words, out, '--resume'], found, tmp_path / 'output.txt')
    assert kills == KILLS
    for stage in ('teacher', 'distill', 'finetune'):
        assert rows(out / stage) == rows(tmp_path / 'whole' / stage), stage
        assert_same(out / stage / 'checkpoint-40', tmp_path / 'whole' / stage / 'checkpoint-40')
    shipped = sorted(p.relative_to(out) for p in (out / 'shipped').rglob('*.safetensors'))
    assert [p.parent.name for p in shipped] == ['FAR-100', 'teacher']
    for name in shipped:
        assert (out / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()
    print(f'\nFAR: {kills} SIGKILLs, {kills} resumes, weights, averages and logs of 3 stages bit-equal')


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize('rank', [0, 1])
def test_two_processes_one_of_which_is_killed(tmp_path: Path, rank: int) -> None:
    settings = dict(max_train_steps=60, checkpointing_steps=5, logging_steps=3, dataloader_num_workers=1)
    path, run = write_config(tmp_path, **settings), tmp_path / 'run'
    words = [*TORCHRUN, 'diffusion/train.py', path, '--output-dir']
    status, text = run_command([*words, tmp_path / 'whole'], tmp_path / 'output.txt')
    assert status == 0, text
    with Command([*words, run], tmp_path / 'killed.txt') as process:
        assert process.wait_for(lambda: bool(checkpoints.checkpoints_in(run)))
        os.kill(process.children_of(process.process.pid)[rank], signal.SIGKILL)
        assert process.wait(120) != 0
    assert 'train.py", line' not in process.text, process.text
    status, text = run_command([*words, run, '--resume'], tmp_path / 'output.txt')
    assert status == 0, text
    assert rows(run) == rows(tmp_path / 'whole')
    assert_same(run / 'checkpoint-60', tmp_path / 'whole/checkpoint-60')
    print(f'\ntwo processes, rank {rank} killed: resumed, weights, average and log bit-equal')


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path, run = write_config(tmp_path, max_train_steps=100_000, checkpointing_steps=4), tmp_path / 'run'
    with Command(command(path, '--output-dir', run), tmp_path / 'one.txt') as process:
        assert process.wait_for(lambda: bool(checkpoints.checkpoints_in(run)))
        status, text = run_command(command(path, '--output-dir', run, '--resume'), tmp_path / 'two.txt', 60)
        assert status == 1
        assert f'is in use by process {process.process.pid}' in text
    shutil.copy(run / 'log.jsonl', tmp_path / 'log.jsonl')
    assert len(losses(run)) > 3
    with Command(command(path, '--output-dir', run, '--resume'), tmp_path / 'three.txt') as process:
        assert process.wait_for(has_lines(run / 'log.jsonl', 3))
