"""Analyses of trained classifiers: what is opened is what was trained, and images are changed where they should be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import command
from helpers.classification import evaluated, run_of

from asr_downstream.classification.analysis import limits
from asr_downstream.classification.plugs import PLUGS
from asr_downstream.engine.data.labelled import normal
from asr_downstream.errors import CheckpointError
from asr_downstream.folding.analysis.attacks import fgsm
from asr_downstream.folding.analysis.runs import OpenRun, Wanted, open_run

MEAN = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.3, 0.25, 0.2])


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp('runs')
    return {arm: (folder / arm, evaluated(folder / arm, plug=PLUGS[arm], **MEAN)) for arm in ('stock', 'se', 'asr-se')}


def opened(runs: Any, arm: str) -> OpenRun:
    return open_run(runs[arm][0], Wanted(images=40))


@pytest.mark.parametrize('arm', ['stock', 'se'])
def test_what_is_opened_has_the_accuracy_of_the_run(runs: Any, arm: str) -> None:
    run = opened(runs, arm)
    assert run.kind == 'classification'
    assert run.metric is not None
    assert run.metric.measure(run.model) == runs[arm][1]['accuracy']['plugged']
    batches = list(run.data())
    assert sum(len(next(iter(batch.values()))) for batch in batches) == 40
    for first, again in zip(batches, run.data(), strict=True):
        assert all(first[key].equal(again[key]) for key in first)
    assert run.step(run.model, batches[0]).shape == (32, 10)


def test_images_are_changed_between_black_and_white(runs: Any) -> None:
    run = opened(runs, 'stock')
    assert run.changed is not None
    batch = next(iter(run.data()))
    (name,) = batch
    seen = []

    def white(images: torch.Tensor, black: Any, most: Any) -> torch.Tensor:
        assert (images >= black - 1e-5).all()
        assert (images <= most + 1e-5).all()
        seen.append(len(images))
        return torch.zeros_like(images) + most

    with run.changed(run.model, white):
        found = run.step(run.model, batch)
    mean, std = torch.tensor(MEAN['image_mean']), torch.tensor(MEAN['image_std'])
    wanted = run.model(((1 - mean) / std)[:, None, None].expand_as(batch[name]).contiguous())
    assert seen == [32]
    assert (found - wanted).abs().max() < 1e-5
    assert run.step(run.model, batch).equal(run.model(**batch)), 'the change ends with the block'


def test_an_attack_of_no_strength_changes_nothing_and_others_lower_accuracy(runs: Any) -> None:
    run = opened(runs, 'stock')
    assert run.attack is not None
    plain = runs['stock'][1]['accuracy']['plugged']
    assert run.attack(run.model, fgsm(0.0)) == plain
    assert run.attack(run.model, fgsm(0.5)) < plain
    assert all(value.grad is None for value in run.model.parameters())


def test_the_command_measures_stripes_and_noise(runs: Any, tmp_path: Path) -> None:
    folders = [f'{arm}={folder}' for arm, (folder, _) in runs.items()]
    done = command('analyze', 'stripes', *folders[1:], '--images', '32', '--out', tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'stripes.json').read_text())['runs']
    assert all(site['stripe_ratio'] == 0 for site in found['asr-se']['sites'])
    assert any(site['stripe_ratio'] > 0 for site in found['se']['sites'])
    done = command(
        'analyze', 'noise', *folders[1:], '--fold', '--kinds', 'batch-norm', 'fgsm', '--images', '32', '--out', tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert 'accuracy' in (tmp_path / 'noise.json').read_text()


def test_folders_that_are_no_complete_runs_are_named(tmp_path: Path) -> None:
    run = run_of(tmp_path / 'run')[1].parent
    with pytest.raises(CheckpointError, match=r'has no ema.safetensors; was it trained with use_ema=False'):
        open_run(run, Wanted(ema=True))
    (run / 'config.py').unlink()
    with pytest.raises(CheckpointError, match='is no run'):
        open_run(run, Wanted(), 'classification')


def test_limits_of_images_without_normalisation() -> None:
    task: Any = SimpleNamespace(normal=normal(None, None, 3))
    black, white = limits(task, torch.zeros(1))
    assert (float(black), float(white)) == (-1, 1)
