"""Ctrl-C ends the demo, and every program of several trainings: none begins after the one that was told to stop."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import command
from helpers.far import write_config
from helpers.kills import Command, run

from asr_downstream.engine.loop import Training

# The demo as it is, which gets Ctrl-C while the last checkpoint of its first training is written: no step comes after.
LAST_MOMENT = """
import os, runpy, signal, sys
from asr_downstream.engine.loop import Training

save = Training.save
def save_and_interrupt(self):
    save(self)
    os.kill(os.getpid(), signal.SIGINT)

Training.save = save_and_interrupt
sys.path.insert(0, 'tools')
sys.argv = ['tools/demo.py', *sys.argv[1:]]
runpy.run_path('tools/demo.py', run_name='__main__')
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_last_moment_of_a_training(tmp_path: Path) -> None:
    words = [sys.executable, '-W', 'ignore', '-c', LAST_MOMENT, '--only', 'diffusion', '--steps', 2, '--out', tmp_path]
    status, text = run(words, tmp_path / 'output.txt')
    assert status == 130, text
    assert 'Traceback' not in text
    assert '1/5  training stock' in text
    assert '2/5' not in text
    assert (tmp_path / 'diffusion/unet-w32_digits/checkpoint-2').is_dir()
    assert not (tmp_path / 'diffusion/unet-w32-asr-se_digits').exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ('part', 'begun', 'later'),
    [
        pytest.param('detection', 'epoch  1/', '3/6', marks=pytest.mark.det),
        ('diffusion', 'step 10/', '2/5'),
        ('far', 'step 10/', 'stage 2/3'),
    ],
)
def test_a_training_of_the_demo(tmp_path: Path, part: str, begun: str, later: str) -> None:
    options = ['--only', part, '--out', tmp_path / 'demo', '--epochs', 8, '--steps', 100_000]
    words = [sys.executable, '-W', 'ignore', 'tools/demo.py', *options]
    with Command(words, tmp_path / 'output.txt') as process:
        assert process.wait_for(lambda: begun in process.text, 300), process.text
        process.send(signal.SIGINT)
        assert process.wait(120) == 130, process.text
    assert later not in process.text
    assert 'Traceback' not in process.text
    for written in (tmp_path / 'demo').glob('retinanet*/*.py'):
        assert 'demos.' not in written.read_text(), 'other programs read it'


@pytest.mark.parametrize('number', [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_last_moment_of_a_stage(tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that was told to stop is the last one, of distillation and of pruning; --resume goes on behind it."""
    path, out = write_config(tmp_path), tmp_path / 'out'
    save = Training.save

    def save_and_stop(self: Training) -> None:
        save(self)
        if self.progress.step == self.config.max_train_steps:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Training, 'save', save_and_stop)
        done = command('distill_far', path, '--output-dir', out)
        assert done.returncode == 128 + number, done.stderr
        stages = [line for line in done.stdout.splitlines() if line.startswith('stage ')]
        assert len(stages) == 1
        assert not (out / 'shipped').exists()
    done = command('distill_far', path, '--output-dir', out, '--resume')
    assert done.returncode == 0, done.stderr
    assert 'stage 1/' in done.stdout
    assert 'finished before' in done.stdout
    with monkeypatch.context() as patch:
        patch.setattr(Training, 'save', save_and_stop)
        done = command('prune_far', path, '--output-dir', out, '--keep', '0.5')
        assert done.returncode == 128 + number, done.stderr
        assert 'sparse' in done.stdout
        assert 'FAR-50' not in done.stdout
        assert not (out / 'FAR-50').exists()
