"""Stops of trainings: signals to a process group, losses of an interrupted window, two runs in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from conftest import command as run_tool
from helpers.diffusion import assert_same, call, command, losses, write_config
from helpers.engine import Classification, change_progress, config_for, run_of
from helpers.far import write_config as write_far_config
from helpers.kills import Command, has_lines
from helpers.kills import run as run_command

from asr_downstream.console.stopping import Stopped
from asr_downstream.engine.loop import train
from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.trackers import read_log
from asr_downstream.errors import AsrError
from asr_downstream.files.locks import occupied

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


class Stopping(Classification):
    """Is told to stop at step ``at``."""

    at = 16

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize('at', [16, 24])
def test_a_validation_that_a_stop_left_out_is_made_when_the_run_goes_on(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last step, where a run does not go on, it is made at once."""
    settings = dict(max_train_steps=24, validation_steps=8, logging_steps=8, checkpointing_steps=8)
    run_of(tmp_path / 'whole', **settings)
    monkeypatch.setattr(Stopping, 'at', at)
    config = config_for(tmp_path / 'run', **settings)
    with pytest.raises(Stopped):
        train(Stopping(config), config, tmp_path / 'run')
    if at < 24:
        run_of(tmp_path / 'run', 'latest', **settings)
    whole, run = (read_log(tmp_path / name / 'log.jsonl') for name in ('whole', 'run'))
    for row in (*whole, *run):
        row.pop('images_per_second', None)
    assert sum('loss' not in row for row in whole) == 3
    assert run == whole


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('at', [16, *(pytest.param(at, marks=pytest.mark.slow) for at in (13, 20, 1))])
def test_losses_are_those_of_the_uninterrupted_run(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(max_train_steps=23, logging_steps=5, gradient_accumulation_steps=2, checkpointing_steps=7)
    run_of(tmp_path / 'whole', **settings)
    monkeypatch.setattr(Stopping, 'at', at)
    config = config_for(tmp_path / 'run', **settings)
    with pytest.raises(Stopped) as stop:
        train(Stopping(config), config, tmp_path / 'run')
    assert stop.value.status == 143
    assert read_log(tmp_path / 'run/log.jsonl')[-1]['step'] == at  # what there is of the window is shown
    run_of(tmp_path / 'run', 'latest', **settings)
    rows = [read_log(tmp_path / name / 'log.jsonl') for name in ('whole', 'run')]
    for row in (*rows[0], *rows[1]):
        assert row.pop('images_per_second') > 0
    assert rows[0] == rows[1]
    assert [row['step'] for row in rows[0]] == [5, 10, 15, 20, 23]


def test_losses_after_a_crash_between_lines_of_the_log(tmp_path: Path) -> None:
    settings = dict(max_train_steps=12, logging_steps=5, checkpointing_steps=3)
    run_of(tmp_path / 'run', **settings)
    shutil.copytree(tmp_path / 'run', tmp_path / 'whole')
    for step in (9, 12):
        shutil.rmtree(tmp_path / f'run/checkpoint-{step}')
    run_of(tmp_path / 'run', 'latest', **settings)
    assert losses(tmp_path / 'run') == losses(tmp_path / 'whole')


def test_a_checkpoint_of_before_has_no_window(tmp_path: Path) -> None:
    run_of(tmp_path, max_train_steps=3)
    change_progress(tmp_path / 'checkpoint-3', lambda content: content.pop('window', None))
    task, _ = run_of(tmp_path, 'latest', max_train_steps=6)
    assert task.steps == [4, 5, 6]


def test_the_line_of_the_stop_stays_when_its_window_is_not_taken_up(tmp_path: Path) -> None:
    """Windows belong to processes; with another number of them, the log goes on behind the stop."""
    settings = dict(logging_steps=5, checkpointing_steps=7)
    run_of(tmp_path, max_train_steps=7, **settings)
    change_progress(tmp_path / 'checkpoint-7', lambda content: content['window'].append(content['window'][0]))
    run_of(tmp_path, 'latest', max_train_steps=12, **settings)
    assert [row['step'] for row in read_log(tmp_path / 'log.jsonl')] == [5, 7, 10, 12]


# Signals --------------------------------------------------------------------------------------------------------------


def long_run(folder: Path, **settings: Any) -> Path:
    return write_config(folder, max_train_steps=100_000, checkpointing_steps=50_000, **settings)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_process_group_writes_a_checkpoint(tmp_path: Path, number: int, status: int) -> None:
    path, run = long_run(tmp_path, dataloader_num_workers=2), tmp_path / 'run'
    with Command(command(path, '--output-dir', run), tmp_path / 'output.txt') as process:
        assert process.wait_for(has_lines(run / 'log.jsonl', 3))
        process.send(number)
        assert process.wait(60) == status, process.text
    assert 'Traceback' not in process.text
    assert int(checkpoints.find(run).name.rpartition('-')[2]) == losses(run)[-1][0]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize('whom', ['torchrun', 'all', 'twice', 'one rank'])
def test_torchrun_stops_with_a_checkpoint(tmp_path: Path, whom: str) -> None:
    path = long_run(tmp_path, logging_steps=25_000, dataloader_num_workers=1)  # far more than 30 s away
    run = tmp_path / 'run'
    words = [*TORCHRUN, 'diffusion/train.py', path, '--output-dir', run]
    with Command(words, tmp_path / 'output.txt') as process:
        assert process.wait_for(lambda: (run / 'log.jsonl').is_file())
        time.sleep(3)
        ranks = process.process_ids('diffusion/train.py')
        assert len(ranks) == 4  # two processes with a worker each
        if whom == 'one rank':
            os.kill(process.children_of(process.process.pid)[0], signal.SIGTERM)
        else:
            process.process.send_signal(signal.SIGTERM)
        if whom == 'all':  # Slurm signals every process, and torchrun passes it on
            for pid in ranks:
                os.kill(pid, signal.SIGTERM)
        if whom == 'twice':
            time.sleep(0.3)
            process.process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
        process.wait_for_orphans()
    step = int(checkpoints.find(run).name.rpartition('-')[2])
    assert losses(run)[-1][0] == step
    assert 'diffusion/train.py", line' not in process.text, process.text
    assert 'exitcode  : 143' in process.text or 'SignalException' in process.text, process.text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_resume_an_interrupted_window_and_say_the_last_checkpoint_once(tmp_path: Path) -> None:
    settings = dict(logging_steps=5, checkpointing_steps=7, max_train_steps=12, dataloader_num_workers=0)
    path, run = write_config(tmp_path, **settings), tmp_path / 'run'
    words = [*TORCHRUN, 'diffusion/train.py', path, '--output-dir', run]
    status, text = run_command(words, tmp_path / 'output.txt')
    assert status == 0, text
    assert text.count('last checkpoint:') == 1
    shutil.copytree(run, tmp_path / 'whole')
    shutil.rmtree(run / 'checkpoint-12')
    status, text = run_command([*words, '--resume'], tmp_path / 'output.txt')
    assert status == 0, text
    assert losses(run) == losses(tmp_path / 'whole')
    assert_same(run / 'checkpoint-12', tmp_path / 'whole/checkpoint-12')


# Two runs in one folder -----------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    class Meddling(Classification):
        def after_step(self, step: int) -> None:
            if step == 4:
                with pytest.raises(AsrError, match=f'{tmp_path}: is in use by process {os.getpid()}'):
                    run_of(tmp_path, 'latest')

    config = config_for(tmp_path)
    train(Meddling(config), config, tmp_path)
    assert len(read_log(tmp_path / 'log.jsonl')) == 6
    run_of(tmp_path, 'latest', max_train_steps=8)  # it is free again


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    path, run = write_config(tmp_path, max_train_steps=300, checkpointing_steps=100), tmp_path / 'run'
    words = command(path, '--output-dir', run)
    with Command(words, tmp_path / 'one.txt') as one, Command(words, tmp_path / 'two.txt') as two:
        statuses = sorted([one.wait(100), two.wait(100)])
    assert statuses == [0, 1], one.text + two.text
    assert 'is in use by process' in one.text + two.text or 'has checkpoints of an earlier run' in one.text + two.text
    assert [step for step, _ in losses(run)] == list(range(1, 301))


@pytest.mark.parametrize('tool', ['distill_far', 'prune_far'])
def test_stages_in_a_folder_in_use_are_refused(tmp_path: Path, tool: str) -> None:
    path, out = write_far_config(tmp_path), tmp_path / 'out'
    more = ['--keep', '0.5'] if tool == 'prune_far' else []
    with occupied(out):
        done = run_tool(tool, path, '--output-dir', out, *more)
    assert done.returncode == 1
    assert f'{out}: is in use by process' in done.stderr
    assert [p.name for p in out.iterdir()] == ['.lock']


def test_a_run_that_is_complete_is_no_failure_to_resume(tmp_path: Path) -> None:
    path = write_config(tmp_path, max_train_steps=1)
    for options in ((), ('--resume',)):
        done = call('diffusion/train.py', path, '--output-dir', tmp_path / 'run', *options)
        assert done.returncode == 0, done.stderr
        assert f'last checkpoint: {tmp_path / "run/checkpoint-1"}' in done.stdout
    assert 'checkpoint-1: has 1 steps already; raise max_train_steps to go on' in done.stdout


def test_no_document_recommends_a_launcher_that_leaves_one_process_behind() -> None:
    for path in ('README.md', 'docs/diffusion.md', 'docs/machines.md', 'diffusion/README.md', 'diffusion/train.py'):
        assert 'accelerate launch diffusion/train.py' not in (ROOT / path).read_text(), path
    assert (
        'asr_downstream.console.torchrun --nproc_per_node N diffusion/train.py'
        in (ROOT / 'docs/diffusion.md').read_text()
    )
