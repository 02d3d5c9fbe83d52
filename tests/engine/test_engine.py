"""The training engine by itself: a tiny classifier of digits, without diffusers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers.engine import SCHEMA, Classification, config_for, groups_of, run_of
from torch import nn

from asr_downstream.engine.config import portable
from asr_downstream.engine.loop import recompute_activations
from asr_downstream.engine.optim import build_schedule
from asr_downstream.engine.trackers import read_log
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.configs import work_dir_of


def test_the_engine_does_not_import_diffusers() -> None:
    code = 'import sys, asr_downstream.engine.loop as t; print(t.train.__name__, "diffusers" in sys.modules)'
    command = [sys.executable, '-W', 'ignore', '-c', code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == 'train False\n', done.stderr


def test_weight_decay_groups_survive_a_resume(tmp_path: Path) -> None:
    _, last = run_of(tmp_path)
    assert [group['weight_decay'] for group in groups_of(last)] == [0.05, 0.0]
    _, last = run_of(tmp_path, 'latest', max_train_steps=8, adam_weight_decay=0.5, learning_rate=1e-3)
    assert [group['weight_decay'] for group in groups_of(last)] == [0.5, 0.0]
    assert [group['initial_lr'] for group in groups_of(last)] == [1e-3, 1e-3]
    with pytest.raises(CheckpointError, match='was trained with width=16, the config says 8'):
        run_of(tmp_path, 'latest', max_train_steps=9, width=8)


def test_the_log_has_further_scalars_and_validations(tmp_path: Path) -> None:
    task, _ = run_of(tmp_path, validation_steps=4, use_ema=True, logging_steps=3, report_to=['tensorboard'])
    rows = read_log(tmp_path / 'log.jsonl')
    assert [row['step'] for row in rows] == [3, 4, 6, 6]
    assert rows[1] == {'step': 4, 'val/accuracy': 0.5}
    assert [row['step'] for row in read_log(tmp_path / 'log.jsonl', having='loss')] == [3, 6]
    assert all(0 <= row['accuracy'] <= 1 and row['grad_norm'] > 0 for row in (rows[0], rows[2]))
    assert task.seen == [(False, False)] * 2
    assert task.model.training
    assert task.steps == [1, 2, 3, 4, 5, 6]


def test_what_is_frozen_stays_and_what_is_held_is_held(tmp_path: Path) -> None:
    start = Classification(config_for(tmp_path)).model.state_dict()
    task, _ = run_of(tmp_path, use_ema=True, max_grad_norm=0.1)
    end = task.model.state_dict()
    same = {key for key in start if torch.equal(start[key], end[key])}
    assert same == {'1.weight', '1.bias'}
    assert end['4.bias'][0] == 0
    assert task.model[1].weight.grad is None


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = run_of(tmp_path / 'whole', max_train_steps=6)
    (tmp_path / 'whole/checkpoint-6').rename(tmp_path / 'gone')
    again, _ = run_of(tmp_path / 'whole', 'latest')
    assert again.steps == [4, 5, 6]
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


def test_a_checkpoint_that_is_older_than_a_key_had_its_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from asr_downstream.engine.state.train_state import Progress, check_same_run

    now = Progress.of(config_for(tmp_path), 1, 10, ('width',))
    before = Progress(3, 3, {k: v for k, v in now.settings.items() if k not in ('width', 'lr_scheduler_kwargs')})
    lines: list[str] = []
    check_same_run(before, now, tmp_path, ('width',), SCHEMA.defaults, lines.append)
    assert lines == []
    now.settings['lr_scheduler_kwargs'] = {'num_cycles': 2}
    check_same_run(before, now, tmp_path, ('width',), SCHEMA.defaults, lines.append)
    assert "lr_scheduler_kwargs {} -> {'num_cycles': 2}" in lines[0]
    now.settings['width'] = 8
    with pytest.raises(CheckpointError, match='was trained with width=16'):
        check_same_run(before, now, tmp_path, ('width',), SCHEMA.defaults, lines.append)


# Learning rate --------------------------------------------------------------------------------------------------------


def factors(config: Any) -> list[float]:
    optimiser = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    factor = build_schedule(optimiser, config).lr_lambdas[0]
    return [factor(step) for step in range(config.max_train_steps + 1)]


def test_schedules_are_those_of_diffusers(tmp_path: Path) -> None:
    schedules = pytest.importorskip('diffusers.optimization')
    names = ('constant', 'constant_with_warmup', 'linear', 'cosine', 'cosine_with_restarts', 'polynomial')
    for name in names:
        for warmup in (0, 7):
            optimiser = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-2)
            theirs = schedules.get_scheduler(name, optimiser, num_warmup_steps=warmup, num_training_steps=50)
            config = config_for(tmp_path, lr_scheduler=name, lr_warmup_steps=warmup, max_train_steps=50)
            assert factors(config) == [theirs.lr_lambdas[0](step) for step in range(51)], name


def test_arguments_of_a_schedule(tmp_path: Path) -> None:
    settings = dict(lr_scheduler='cosine_with_min_lr', lr_warmup_steps=0, max_train_steps=10)
    assert factors(config_for(tmp_path, **settings, lr_scheduler_kwargs={'min_lr': 1e-3}))[-1] == pytest.approx(0.1)
    settings['lr_scheduler'] = 'cosine_warmup_with_min_lr'
    kwargs = {'min_lr_rate': 0.01, 'warmup_lr_rate': 0.25}
    found = factors(config_for(tmp_path, **{**settings, 'lr_warmup_steps': 4}, lr_scheduler_kwargs=kwargs))
    assert found[0] == 0.25
    assert min(found) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'message'),
    [
        ('cosine_with_min_lr', {'min_rl': 1e-5}, "takes no 'min_rl'; did you mean 'min_lr'"),
        ('constant', {'power': 2}, "constant takes no 'power'; it takes none"),
        ('cosine', {'last_epoch': 2}, "takes no 'last_epoch'"),
        ('cosine_with_min_lr', {}, 'One of min_lr or min_lr_rate should be set'),
        ('cosine', {'num_cycles': 'two'}, 'does not fit'),
        ('polynomial', {'lr_end': 1.0}, 'must be smaller than initial lr'),
    ],
)
def test_arguments_that_do_not_fit_are_errors(tmp_path: Path, name: str, kwargs: Any, message: str) -> None:
    with pytest.raises(AsrError, match=message):
        run_of(tmp_path, lr_scheduler=name, lr_scheduler_kwargs=kwargs)
    assert not list(tmp_path.iterdir())


# Config ---------------------------------------------------------------------------------------------------------------


def test_a_kind_of_config_adds_keys_and_changes_defaults(tmp_path: Path) -> None:
    config = SCHEMA.from_dict({'max_train_steps': 5}, 'stage-1', {'adam_beta2': 0.99})
    assert (config.width, config.learning_rate, config.adam_beta1, config.adam_beta2) == (16, 1e-2, 0.9, 0.99)
    assert work_dir_of(config) == Path('work_dirs/stage-1')
    path = tmp_path / 'a.py'
    path.write_text(portable(config))
    assert SCHEMA.load(path).to_dict() == config.to_dict()
    SCHEMA.defaults['data']['type'] = 'Zip'
    assert SCHEMA.defaults['data']['type'] == 'Digits'
    for content, message in (
        ({'depth': 2}, "stage-1: 'depth' is not a key of a digits config"),
        ({'width': 0, 'max_train_steps': 5}, 'width=0 should be greater than 0'),
        ({}, "has no 'max_train_steps'"),
    ):
        with pytest.raises(AsrError, match=message):
            SCHEMA.from_dict(content, 'stage-1')


def test_gradient_checkpointing_goes_by_either_name() -> None:
    class Theirs(nn.Module):
        on = False

        def gradient_checkpointing_enable(self) -> None:
            self.on = True

    model = Theirs()
    recompute_activations(model)
    assert model.on
    with pytest.raises(AsrError, match='gradient_checkpointing: Linear has none'):
        recompute_activations(nn.Linear(1, 1))
