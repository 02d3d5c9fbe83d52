"""Trainings that diverge: noticed at the step, and the checkpoint from before is still there."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusion import write_config
from helpers.engine import Classification, config_for
from helpers.kills import run as run_command
from torch import Tensor, nn

from asr_downstream.engine import watch as watching
from asr_downstream.engine.launch import start_processes
from asr_downstream.engine.loop import Training, train
from asr_downstream.engine.state import checkpoints
from asr_downstream.errors import AsrError
from asr_downstream.files.weights import read_checkpoint
from asr_downstream.plugging.weights import not_finite

SELDOM = dict(max_train_steps=20, logging_steps=20, checkpointing_steps=2, checkpoints_total_limit=1, use_ema=True)


class Diverging(Classification):
    """Has a loss, gradients or weights of another kind from step ``at`` on."""

    at = 5

    def __init__(self, config: Any, kind: str) -> None:
        super().__init__(config)
        self.kind = kind

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, others = super().loss(model, batch)
        if len(self.steps) + 1 < self.at:
            return loss, others
        if self.kind == 'loss':  # of a term without a gradient: the weights do not show it
            return loss + math.nan, others
        if self.kind == 'gradient':  # of a square root at 0: the loss does not show it
            return loss + (0 * self.model[4].weight).abs().sum().sqrt(), others
        return loss, others

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if self.kind == 'weight' and step == self.at:
            with torch.no_grad():
                self.model[4].weight[0, 0] = math.inf


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('loss', 'step 5: the loss is nan'),
        ('gradient', 'step 5: the norm of the gradients is nan'),
        ('weight', 'step 6: the loss is nan'),
    ],
)
def test_a_divergence_is_noticed_at_the_step(tmp_path: Path, kind: str, message: str) -> None:
    config = config_for(tmp_path, **SELDOM)
    with pytest.raises(AsrError, match=message) as caught:
        train(Diverging(config, kind), config, tmp_path)
    assert f'last checkpoint: {tmp_path}/checkpoint-4' in str(caught.value)
    assert checkpoints.find(tmp_path) == tmp_path / 'checkpoint-4'
    for name in ('model', 'ema'):
        state = read_checkpoint(tmp_path / f'checkpoint-4/{name}.safetensors')['state_dict']
        assert not_finite(state) == []


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Diverging, 'at', 6)
    config = config_for(tmp_path, **SELDOM)
    message = r'step 6: 4.weight, 4.weight of the average are not finite: the training diverged, and no checkpoint'
    with pytest.raises(AsrError, match=message):
        train(Diverging(config, 'weight'), config, tmp_path)
    assert [p.name for p in tmp_path.glob('*checkpoint-*')] == ['checkpoint-4']


def test_fp16_that_skips_step_after_step_has_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    monkeypatch.setattr(watching, 'SKIPPED_AT_MOST', 5)
    monkeypatch.setattr(AcceleratedOptimizer, 'step_was_skipped', property(lambda self: True))
    config = config_for(tmp_path, **SELDOM)
    with pytest.raises(AsrError, match='the gradients of the last 6 steps were not finite in fp16.*bf16'):
        train(Classification(config), config, tmp_path)


def test_an_average_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    config = config_for(tmp_path, **SELDOM)
    training = Training(Classification(config), config, tmp_path, start_processes(config))
    training.save()
    assert training.ema is not None
    training.ema.state['4.weight'][0, 0] = math.nan
    training.progress.step = 2
    with pytest.raises(AsrError, match=r'step 2: 4.weight of the average is not finite.*no checkpoint was written'):
        training.save()
    assert [p.name for p in tmp_path.glob('*checkpoint-*')] == ['checkpoint-0']


def test_an_optimiser_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    config = config_for(tmp_path, max_train_steps=2)
    training = Training(Classification(config), config, tmp_path, start_processes(config))
    training.go_on()
    training.optimiser.state[training.model[4].weight]['exp_avg_sq'][0, 0] = math.inf
    training.progress.step = 3
    with pytest.raises(AsrError, match=r'step 3: exp_avg_sq of 4.weight is not finite'):
        training.save()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_processes_notice_a_divergence_of_one(tmp_path: Path) -> None:
    program = tmp_path / 'program.py'
    program.write_text(
        'import sys, os; sys.path[:0] = ["tests", "tests/engine"]\n'
        'from pathlib import Path; from test_divergence import *; from asr_downstream.console import cli\n'
        'def main(argv):\n'
        f'    folder = Path("{tmp_path}/run"); config = config_for(folder, **SELDOM)\n'
        '    task = Diverging(config, "loss" if os.environ["RANK"] == "1" else "none"); train(task, config, folder)\n'
        'cli.run(main)\n'
    )
    words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', program]
    status, text = run_command(words, tmp_path / 'output.txt', 150)
    assert status == 1
    assert text.count('step 5: the loss is nan') == 1, text
    assert 'program.py", line' not in text, text
    assert checkpoints.find(tmp_path / 'run') == tmp_path / 'run/checkpoint-4'


@pytest.mark.parametrize(
    ('key', 'value'),
    [('max_grad_norm', math.inf), ('snr_gamma', math.inf), ('lr_scheduler_kwargs', {'x': [-math.inf, (math.nan,)]})],
)
def test_numbers_that_are_not_finite_are_read_as_they_were_written(tmp_path: Path, key: str, value: Any) -> None:
    from asr_downstream.diffusion.config import load_config
    from asr_downstream.engine.config import portable

    config = load_config(write_config(tmp_path), {key: value})
    path = tmp_path / 'again.py'
    path.write_text(portable(config))
    assert 'float(' in path.read_text()
    assert repr(load_config(path)[key]) == repr(config[key])
    assert portable(load_config(path)) == portable(config)


def test_a_run_without_a_limit_of_the_gradients_can_be_read(tmp_path: Path) -> None:
    from helpers.diffusion import config_for as diffusion_config

    from asr_downstream.diffusion.runs import load_run
    from asr_downstream.diffusion.training.train import train as train_diffusion

    config = diffusion_config(tmp_path, max_train_steps=1)
    config.max_grad_norm = math.inf  # of --cfg-options
    last = train_diffusion(config)
    assert load_run(last).config.max_grad_norm == math.inf


def test_a_config_that_would_not_be_read_again_stops_the_run_before_its_work(tmp_path: Path) -> None:
    from helpers.diffusion import config_for as diffusion_config

    from asr_downstream.diffusion.training.train import train as train_diffusion

    config = diffusion_config(tmp_path, max_train_steps=1)
    config.prompt_note = object()
    with pytest.raises(AsrError, match='config.py: .*cannot be read again'):
        train_diffusion(config)
    assert not (tmp_path / 'run/config.py').exists()
    assert not (tmp_path / 'run/log.jsonl').exists()
