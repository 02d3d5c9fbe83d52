"""The loop of a diffusion training: options, bad files, divergence, the plan."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.diffusion import (
    ASR,
    DIA,
    UNET,
    assert_same,
    config_for,
    launch,
    losses,
    weights,
    write_config,
    write_images,
)
from PIL import Image

from asr_downstream.diffusion.evaluation.pictures import grid
from asr_downstream.diffusion.evaluation.sampling import build_sampler, generate
from asr_downstream.diffusion.models.components import build_parts
from asr_downstream.diffusion.training.train import train
from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.trackers import read_log
from asr_downstream.errors import AsrError

SPLIT = dict(train_batch_size=4, gradient_accumulation_steps=2)


# The loop -------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    settings = dict(learning_rate=1e18, lr_warmup_steps=0, max_train_steps=20)
    with pytest.raises(AsrError, match=r'step \d+: the loss is (nan|inf) .*last checkpoint: .*lower learning_rate'):
        train(config_for(tmp_path / 'a', checkpointing_steps=20, **settings))
    with pytest.raises(AsrError, match=r'step \d+: the loss is (nan|inf) .*last checkpoint: .*checkpoint-\d+; lower'):
        train(config_for(tmp_path / 'b', checkpointing_steps=1, logging_steps=20, **settings))
    assert checkpoints.checkpoints_in(tmp_path / 'b/run')
    for checkpoint in checkpoints.checkpoints_in(tmp_path / 'b/run'):
        assert all(value.isfinite().all() for value in weights(checkpoint).values())


def test_options_of_the_loop_train(tmp_path: Path) -> None:
    config = config_for(
        tmp_path, channels_last=True, report_to=['tensorboard'],
        lr_scheduler='constant_with_warmup', validation_steps=3, num_validation_images=4, num_inference_steps=3,
        checkpoints_total_limit=1,
    )  # fmt: skip
    last = train(config)
    run = tmp_path / 'run'
    assert checkpoints.checkpoints_in(run) == [last]
    assert sorted(p.name for p in (run / 'samples').iterdir()) == ['step-0000003.png', 'step-0000006.png']
    assert list((run / 'tensorboard').glob('events.*'))
    rows = read_log(run / 'log.jsonl')
    assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row['lr'] for row in rows] == pytest.approx([1e-3, 2e-3, 2e-3, 2e-3, 2e-3, 2e-3])
    assert rows[-1]['epoch'] == pytest.approx(6 * 8 / 1797, abs=1e-4)
    assert json.loads((last / 'progress.json').read_text())['step'] == 6


def test_the_baseline_is_shown_before_the_first_step_and_not_again_on_resume(tmp_path: Path) -> None:
    settings = dict(validation_steps=4, num_validation_images=2, num_inference_steps=2, max_train_steps=4)
    grids = tmp_path / 'run/samples'
    config = config_for(tmp_path, validate_at_start=True, checkpointing_steps=2, use_ema=True, **settings)
    model = build_parts(config).model.eval()
    last = train(config)
    assert sorted(p.name for p in grids.iterdir()) == ['step-0000000.png', 'step-0000004.png']
    parts = build_parts(config)
    images = generate(model, parts, build_sampler(config.sampler, parts.scheduler), range(2), 2, config.seed)
    assert np.array_equal(np.asarray(Image.open(grids / 'step-0000000.png')), np.asarray(grid(images)))
    shutil.rmtree(last)
    (grids / 'step-0000000.png').unlink()
    again = train(config, resume='latest')
    assert [p.name for p in grids.iterdir()] == ['step-0000004.png']
    # The training itself is the same with and without.
    plain = config_for(tmp_path / 'plain', checkpointing_steps=2, use_ema=True, **settings)
    assert_same(again, train(plain))
    assert [p.name for p in (tmp_path / 'plain/run/samples').iterdir()] == ['step-0000004.png']


def test_a_pretrained_model_shows_its_baseline_by_itself(tmp_path: Path) -> None:
    settings = dict(validation_steps=2, num_validation_images=2, num_inference_steps=2, max_train_steps=2, plug=None)
    build_parts(config_for(tmp_path, plug=None)).model.save_pretrained(tmp_path / 'base')
    model = dict(type='UNet2DModel', pretrained_model_name_or_path=str(tmp_path / 'base'))
    for asked, first in ((None, True), (False, False)):
        folder = tmp_path / f'{asked}'
        train(config_for(folder, model=model, validate_at_start=asked, **settings))
        assert (folder / 'run/samples/step-0000000.png').is_file() is first


def test_a_start_on_a_pretrained_model_is_warned_of(tmp_path: Path) -> None:
    build_parts(config_for(tmp_path, plug=None)).model.save_pretrained(tmp_path / 'base')
    model = dict(type='UNet2DModel', pretrained_model_name_or_path=str(tmp_path / 'base'))
    start = dict(type='Start', value=0.5)
    with pytest.warns(UserWarning, match=r'Start\(0.5\) scales pretrained weights at \d+ sites'):
        train(config_for(tmp_path / 'a', model=model, plug=start, max_train_steps=1))
    for name, other in (('b', {'model': model}), ('c', {'plug': start})):
        with warnings.catch_warnings():
            warnings.filterwarnings('error', 'Start')
            train(config_for(tmp_path / name, **{'plug': ASR, 'max_train_steps': 1, **other}))


@pytest.mark.slow
@pytest.mark.parametrize(
    'settings',
    [{'mixed_precision': 'bf16'}, {'torch_compile': True}, {'mixed_precision': 'bf16', 'plug': DIA}],
    ids=['bf16', 'compile', 'bf16-dia'],
)
def test_precision_and_compilation(tmp_path: Path, settings: dict[str, Any]) -> None:
    path = write_config(tmp_path, **settings)
    done = launch(path, '--output-dir', tmp_path / 'run')
    assert done.returncode == 0, done.stderr
    plain = write_config(tmp_path, plug=settings.get('plug', ASR))
    done = launch(plain, '--output-dir', tmp_path / 'plain')
    assert done.returncode == 0, done.stderr
    for (_, ours), (_, theirs) in zip(losses(tmp_path / 'run'), losses(tmp_path / 'plain'), strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)
    if 'mixed_precision' in settings:
        assert losses(tmp_path / 'run') != losses(tmp_path / 'plain')
    assert not any('_orig_mod' in key for key in weights(tmp_path / 'run/checkpoint-6'))


@pytest.mark.slow
def test_bad_images_are_reported_and_too_many_stop_the_run(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'images')
    (folder / 'cat' / '1.png').write_text('hello')
    settings = dict(model=dict(type='UNet2DModel', **{**UNET, 'in_channels': 3, 'out_channels': 3}))
    data = dict(type='ImageFolder', path=str(folder), resolution=8)
    path = write_config(tmp_path, data={**data, 'max_bad_share': 0.2}, **settings)
    done = launch(path, '--output-dir', tmp_path / 'run')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('cat/1.png: cannot be decoded and was replaced') == 1
    assert '1 of 12 images could not be decoded: ' in done.stdout
    with pytest.raises(AsrError, match='max_bad_share'):
        train(config_for(tmp_path / 'strict', data=data, **settings))


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    path = write_config(tmp_path, gradient_checkpointing=True)
    done = launch(path, '--output-dir', tmp_path / 'run', '--dry-run', '--cfg-options', 'train_batch_size=16')
    assert done.returncode == 0, done.stderr
    for part in (
        'train_batch_size = 16', 'learning_rate = 0.002', '12 sites', 'ASR(SE)', 'GMACs', 'GiB', '6 of 16 images',
        'fold away',
    ):  # fmt: skip
        assert part in done.stdout, part
    assert not (tmp_path / 'run').exists()
