"""Resume: a run that was stopped, killed or split over processes ends like one that was not; checkpoints."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers.diffusion import (
    ASR,
    DIA,
    UNET,
    assert_same,
    command,
    config_for,
    launch,
    losses,
    weights,
    write_config,
    write_images,
)

from asr_downstream.diffusion.config import load_config
from asr_downstream.diffusion.training.train import train
from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.trackers import read_log
from asr_downstream.errors import AsrError, CheckpointError

SPLIT = dict(train_batch_size=4, gradient_accumulation_steps=2)


# Resume ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'settings',
    [
        {},
        pytest.param(
            {'dataloader_num_workers': 2, 'gradient_accumulation_steps': 2, 'train_batch_size': 4},
            marks=pytest.mark.slow,
        ),
        {'plug': DIA, 'gradient_checkpointing': True, 'use_ema': False, 'snr_gamma': 5.0},
        pytest.param(
            {'plug': None, 'model': dict(type='UNet2DModel', **UNET, dropout=0.3), 'validation_steps': 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=['plain', 'workers', 'dia', 'dropout'],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, settings: dict[str, Any]) -> None:
    train(config_for(tmp_path / 'whole', **settings))
    config = config_for(tmp_path / 'parts', **settings)
    whole, run = tmp_path / 'whole/run', tmp_path / 'parts/run'
    shutil.copytree(whole, run)
    shutil.rmtree(run / 'checkpoint-6')  # as if it had died after step 3; the log goes on to step 6
    torch.rand(17)  # another state of the global random stream
    assert train(config, 'latest') == run / 'checkpoint-6'
    assert_same(whole / 'checkpoint-6', run / 'checkpoint-6')
    assert losses(whole) == losses(run)
    assert len(losses(run)) == 6
    # negative control: the weights do move after step 3
    before, after = weights(run / 'checkpoint-3'), weights(run / 'checkpoint-6')
    assert any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.slow
def test_killed_at_any_step_it_ends_with_the_same_losses_and_weights(tmp_path: Path) -> None:
    settings = dict(max_train_steps=40, checkpointing_steps=4, dataloader_num_workers=1, checkpoints_total_limit=2)
    whole, run = tmp_path / 'whole', tmp_path / 'killed'
    path = write_config(tmp_path, **settings)
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(
        command(path, '--output-dir', run), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    at = 6 + int.from_bytes(os.urandom(1)) % 24
    try:
        while len(read_log(run / 'log.jsonl')) < at and process.poll() is None:
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    killed_at = len(losses(run))
    assert at <= killed_at < 40
    done = launch(path, '--output-dir', run, '--resume', 'latest')
    assert done.returncode == 0, done.stderr
    assert f'resumed from {run}/checkpoint-' in done.stdout
    config = load_config(path)
    config.output_dir = str(whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: sums are split by threads
    try:
        train(config)
    finally:
        torch.set_num_threads(threads)
    assert losses(run) == losses(whole), f'killed after step {killed_at}'
    assert_same(run / 'checkpoint-40', whole / 'checkpoint-40')
    assert [p.name for p in checkpoints.checkpoints_in(run)] == ['checkpoint-36', 'checkpoint-40']


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(tmp_path: Path) -> None:
    one = train(config_for(tmp_path / 'one', plug=[ASR], **{**SPLIT, 'train_batch_size': 8}))
    path = write_config(tmp_path / 'two', plug=[ASR], **SPLIT)
    done = launch(path, '--output-dir', tmp_path / 'two/run', processes=2)
    assert done.returncode == 0, done.stderr
    a, b = weights(one), weights(tmp_path / 'two/run/checkpoint-6')
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=1e-4, atol=2e-5, msg=key)
    start = weights(one.with_name('checkpoint-3'))
    assert max(float((a[k] - start[k]).abs().max()) for k in a) > 1e-3  # negative control
    torch.testing.assert_close(losses(one.parent), losses(tmp_path / 'two/run'), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_stop_together_with_a_checkpoint(tmp_path: Path) -> None:
    path = write_config(tmp_path, max_train_steps=100_000, checkpointing_steps=50_000, logging_steps=5)
    run = tmp_path / 'run'
    words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    words += ['diffusion/train.py', str(path), '--output-dir', str(run)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(read_log(run / 'log.jsonl')) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    found = checkpoints.find(run)
    assert int(found.name.rpartition('-')[2]) == losses(run)[-1][0]


@pytest.mark.slow
def test_two_processes_count_bad_files_together(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'images')
    for name in ('cat/1.png', 'dog/2.png'):
        (folder / name).write_text('hello')
    model = dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3})
    data = dict(type='ImageFolder', path=str(folder), resolution=8, max_bad_share=0.1)
    path = write_config(tmp_path, data=data, model=model, train_batch_size=6)
    done = launch(path, '--output-dir', tmp_path / 'run', processes=2)
    assert done.returncode != 0
    assert '2 of 12 images cannot be decoded, more than max_bad_share=0.1 allows' in done.stderr


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    path = write_config(tmp_path, plug=DIA, dataloader_num_workers=1, **SPLIT)
    run = tmp_path / 'run'
    assert launch(path, '--output-dir', run, processes=2).returncode == 0
    shutil.copytree(run, tmp_path / 'whole')
    shutil.rmtree(run / 'checkpoint-6')
    done = launch(path, '--output-dir', run, '--resume', processes=2)
    assert done.returncode == 0, done.stderr
    assert_same(run / 'checkpoint-6', tmp_path / 'whole/checkpoint-6')
    assert losses(run) == losses(tmp_path / 'whole')
    # the checkpoint is that of the unwrapped model: one process can take it up, and says what changes
    shutil.rmtree(run / 'checkpoint-6')
    done = launch(path, '--output-dir', run, '--resume', run / 'checkpoint-3')
    assert done.returncode == 0, done.stderr
    assert 'processes 2 -> 1; the run goes on, but not bit for bit' in done.stdout


@pytest.mark.slow
def test_interrupting_writes_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    path = write_config(tmp_path, max_train_steps=100_000, checkpointing_steps=50_000)
    run = tmp_path / 'run'
    process = subprocess.Popen(
        command(path, '--output-dir', run), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while len(read_log(run / 'log.jsonl')) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 130, output
    assert 'stopping, with a checkpoint' in output
    found = checkpoints.find(run)
    assert int(found.name.rpartition('-')[2]) == losses(run)[-1][0]


# Checkpoints ----------------------------------------------------------------------------------------------------------


def delete_manifest(checkpoint: Path) -> None:
    (checkpoint / 'manifest.json').unlink()


def delete_file(checkpoint: Path) -> None:
    (checkpoint / 'random_states_0.pkl').unlink()


def truncate(checkpoint: Path) -> None:
    path = checkpoint / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])


def flip_bit(checkpoint: Path) -> None:
    path = checkpoint / 'optimizer.bin'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def garble_manifest(checkpoint: Path) -> None:
    (checkpoint / 'manifest.json').write_text('{"files"')


DAMAGES = {
    delete_manifest: 'has no manifest.json',
    delete_file: 'random_states_0.pkl is missing',
    truncate: 'model.safetensors has .* bytes instead of',
    flip_bit: 'optimizer.bin has changed since it was written',
    garble_manifest: 'manifest.json cannot be read',
}


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints after 3 and 6."""
    folder = tmp_path_factory.mktemp('finished')
    train(config_for(folder))
    return folder


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda f: f.__name__)
def test_latest_is_the_newest_complete_one(
    finished: Path, tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / 'run'
    shutil.copytree(finished / 'run', run)
    damage(run / 'checkpoint-6')
    lines: list[str] = []
    assert checkpoints.find(run, report=lines.append) == run / 'checkpoint-3'
    assert len(lines) == 1
    assert re.search(DAMAGES[damage], lines[0])
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        checkpoints.find(run, str(run / 'checkpoint-6'))
    damage(run / 'checkpoint-3')
    with pytest.raises(CheckpointError, match='no complete checkpoint'):
        checkpoints.find(run, report=lines.append)


def test_unfinished_folders_are_no_checkpoints_and_old_ones_go_last(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        folder = checkpoints.begin(tmp_path, step)
        (folder / 'x').write_text('x')
        target = checkpoints.complete(tmp_path, step)
    (checkpoints.begin(tmp_path, 30) / 'x').write_text('x')  # died while writing
    assert checkpoints.find(tmp_path) == target == tmp_path / 'checkpoint-20'
    checkpoints.prune(tmp_path, 2, target)
    assert [p.name for p in checkpoints.checkpoints_in(tmp_path)] == ['checkpoint-10', 'checkpoint-20']
    checkpoints.prune(tmp_path, 1, target)
    assert checkpoints.checkpoints_in(tmp_path) == [target]


def test_a_resume_that_is_not_there_is_an_error(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='has no checkpoint; train it first'):
        train(config_for(tmp_path), 'latest')
    with pytest.raises(CheckpointError, match='no such checkpoint'):
        train(config_for(tmp_path), str(tmp_path / 'checkpoint-7'))
    shutil.copytree(finished / 'run', tmp_path / 'run', dirs_exist_ok=True)
    with pytest.raises(AsrError, match='has checkpoints of an earlier run; continue it with --resume'):
        train(config_for(tmp_path))
    with pytest.raises(AsrError, match='has 6 steps already'):
        train(config_for(tmp_path), 'latest')
    other = dict(type='DDPMScheduler', num_train_timesteps=100, prediction_type='v_prediction')
    for key, value in {'plug': DIA, 'noise_scheduler': other, 'snr_gamma': 5.0}.items():
        with pytest.raises(CheckpointError, match=f'was trained with {key}='):
            train(config_for(tmp_path, **{'max_train_steps': 9, key: value}), 'latest')
    with pytest.raises(CheckpointError, match='the run went on to checkpoint-6; delete or move'):
        train(config_for(tmp_path, max_train_steps=9), str(tmp_path / 'run/checkpoint-3'))


def test_a_resumed_run_follows_the_config(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished / 'run', tmp_path / 'run')
    settings = dict(max_train_steps=10, learning_rate=1e-3, lr_scheduler='constant', lr_warmup_steps=0)
    train(config_for(tmp_path, **settings, adam_weight_decay=0.5), 'latest')
    assert [row['lr'] for row in read_log(tmp_path / 'run/log.jsonl')[6:]] == [1e-3] * 4
    text = capsys.readouterr().out
    for change in ('max_train_steps 6 -> 10', 'learning_rate 0.002 -> 0.001', 'adam_weight_decay 1e-06 -> 0.5'):
        assert change in text
    group = torch.load(tmp_path / 'run/checkpoint-10/optimizer.bin', weights_only=True)['param_groups'][0]
    assert group['weight_decay'] == 0.5


@pytest.mark.slow
def test_accumulation_may_change_at_a_resume(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / 'run', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run/checkpoint-6')
    last = train(config_for(tmp_path, **SPLIT), 'latest')
    for key, value in weights(finished / 'run/checkpoint-6').items():  # the same samples in two halves
        torch.testing.assert_close(weights(last)[key], value, rtol=1e-4, atol=2e-5, msg=key)


def test_incomplete_checkpoints_are_set_aside_at_a_resume(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / 'run'
    shutil.copytree(finished / 'run', run)
    truncate(run / 'checkpoint-6')
    train(config_for(tmp_path, max_train_steps=5), 'latest')
    assert [p.name for p in checkpoints.checkpoints_in(run)] == ['checkpoint-3', 'checkpoint-5']
    assert (run / 'incomplete-checkpoint-6').is_dir()


def test_a_failed_write_leaves_the_older_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / 'run'
    shutil.copytree(finished / 'run', run)
    shutil.rmtree(run / 'checkpoint-6')

    def full(path: Path) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(checkpoints, 'flush', full)
    with pytest.raises(AsrError, match='checkpoint-6: cannot be written'):
        train(config_for(tmp_path), 'latest')
    monkeypatch.undo()
    assert checkpoints.find(run) == run / 'checkpoint-3'
