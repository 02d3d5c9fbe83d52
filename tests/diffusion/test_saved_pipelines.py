"""Pipelines that a training writes on its way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.diffusion import ASR, DIA, assert_same, config_for

from asr_downstream.diffusion.evaluation.fold import fold_run
from asr_downstream.diffusion.runs import load_run
from asr_downstream.diffusion.training import saved
from asr_downstream.diffusion.training.task import Denoising
from asr_downstream.diffusion.training.train import train
from asr_downstream.errors import AsrError
from asr_downstream.files.atomic import not_ours

STEPS = dict(max_train_steps=5, checkpointing_steps=1, save_pipeline_steps=2, use_ema=True, plug=ASR)


def test_a_training_writes_pipelines_that_plain_diffusers_loads(tmp_path: Path) -> None:
    last = train(config_for(tmp_path, checkpoints_total_limit=None, **STEPS))
    run = tmp_path / 'run'
    assert [path.name for path in saved.pipelines_in(run)] == ['pipeline-2', 'pipeline-4', 'pipeline-5']
    assert not [path.name for path in run.glob('.*') if 'pipeline' in path.name]
    for step in (2, 5):
        found = diffusers.DDPMPipeline.from_pretrained(run / f'pipeline-{step}').unet.state_dict()
        expected = fold_run(load_run(run / f'checkpoint-{step}'))[0].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        report = json.loads((run / f'pipeline-{step}/fold_report.json').read_text())
        assert (report['step'], report['ema'], report['pipeline']) == (step, True, True)
        assert 0 <= report['difference']['float32']['model'] < 1e-4
        assert not_ours(run / f'pipeline-{step}', 'fold_report.json') == []  # `fold` may write there again
    # The training is the same with and without.
    assert_same(last, train(config_for(tmp_path / 'plain', **{**STEPS, 'save_pipeline_steps': 0})))
    assert saved.pipelines_in(tmp_path / 'plain/run') == []


def test_as_many_stay_as_checkpoints_and_a_failure_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = saved.save_pipeline

    def failing(run: Any, out: Path) -> None:
        if out.name == 'pipeline-4':
            raise AsrError('the disk is full')
        save(run, out)

    monkeypatch.setattr(saved, 'save_pipeline', failing)
    train(config_for(tmp_path, checkpoints_total_limit=1, **{**STEPS, 'plug': None}))
    assert [path.name for path in saved.pipelines_in(tmp_path / 'run')] == ['pipeline-5']
    assert 'pipeline-4: no pipeline: the disk is full' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(checkpointing_steps=3), 'save_pipeline_steps=2 should be a multiple of checkpointing_steps=3'),
        (dict(plug=DIA), 'save_pipeline_steps=2: the gates of .* depend on the image'),
        (dict(plug=None, replace=dict(type='FAR', variant='M3', layers='all')), 'is none of diffusers'),
    ],
)
def test_what_would_write_none_is_refused_before_the_training(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    from asr_downstream.diffusion.models.components import build_parts

    config = config_for(tmp_path, **{**STEPS, **settings})
    with pytest.raises(AsrError, match=message):
        Denoising(config, build_parts(config))
