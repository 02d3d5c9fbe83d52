"""A user's own source, augmentation and task, from a package outside, by the commands of FAR."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.diffusion import assert_refused, call
from helpers.extending import run as command
from helpers.extending import write_package
from helpers.far import write_config

from asr_downstream.errors import AsrError
from asr_downstream.far.config import load_config
from asr_downstream.far.distil.classification import accuracy
from asr_downstream.far.evaluation.evaluate import load_family, task_of


@pytest.fixture(scope='module')
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the package and of stages that were trained with it."""
    folder = write_package(tmp_path_factory.mktemp('own'))
    path = write_config(
        folder,
        custom_imports=dict(imports=['mypackage.sources', 'mypackage.augmentations', 'mypackage.tasks']),
        teacher=dict(
            type='ViTForImageClassification', image_size=8, patch_size=4, num_channels=1, hidden_size=16,
            num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2,
        ),
        data=dict(type='Bars', resolution=8),
        augment=[dict(type='Crop', padding=1), dict(type='Noise', strength=0.05)],
        task=dict(type='Smoothed'),
        stages=[dict(name='teacher', learns='teacher'), dict(name='distill', distance=dict(type='MSE'))],
        max_train_steps=3,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        done = call('tools/distill_far.py', path, '--output-dir', folder / 'out')
        assert done.returncode == 0, done.stderr
        yield folder


def test_stages_are_trained_and_resumed_with_a_task_of_ones_own(own: Path) -> None:
    assert "type='Smoothed'" in (own / 'out/distill/config.py').read_text()
    assert 'mypackage.tasks' in (own / 'out/distill/config.py').read_text()
    done = call('tools/distill_far.py', own / 'tiny.py', '--output-dir', own / 'out', '--resume')
    assert done.returncode == 0, done.stderr
    assert 'distill: finished before' in done.stdout


def test_what_was_shipped_is_evaluated_on_the_task(own: Path) -> None:
    models = load_family(own / 'out')
    assert list(models) == ['teacher', 'FAR-100']
    task = task_of(own / 'out', models['teacher'])
    assert type(task).__name__ == 'Smoothed'
    assert 0 <= accuracy(models['FAR-100'], task) <= 1


@pytest.mark.slow
def test_where_the_package_is_not_one_line_says_so(own: Path) -> None:
    done = command('tools/distill_far.py', own / 'tiny.py', '--output-dir', own / 'other')
    assert_refused(done, 'tiny.py', 'custom_imports', 'mypackage.sources cannot be imported', 'PYTHONPATH')


def test_imports_hold_for_all_stages(tmp_path: Path) -> None:
    path = write_config(tmp_path, stages=[dict(name='a', custom_imports=dict(imports=['os']))])
    with pytest.raises(AsrError, match='custom_imports holds for all stages'):
        load_config(path)
