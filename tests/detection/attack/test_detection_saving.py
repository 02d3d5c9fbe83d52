"""Detection: checkpoints are whole or not there, the old one goes after the new one, and none is of a lost training."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import files_of_at_most

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.timeout(60)]

from conftest import ROOT
from helpers.tiny_detection import Dead, SignalAt, as_file, run, tiny
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get_file_backend
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner.checkpoint import save_checkpoint

from asr_downstream.detection.training import train as training
from asr_downstream.errors import AsrError
from asr_downstream.files.weights import read_checkpoint

sys.path.insert(0, str(ROOT / 'tools'))
import train_det

ONE = {'default_hooks.checkpoint.max_keep_ckpts': 1}


class At(Hook):
    """Does something at the start of an epoch."""

    def __init__(self, epoch: int, act: Any) -> None:
        self.epoch = epoch
        self.act = act

    def before_train_epoch(self, runner: Any) -> None:
        if runner.epoch == self.epoch:
            self.act()


class Poison(Hook):
    """Makes weights that are not finite, before a step or (``late``) after the last one of an epoch."""

    def __init__(self, step: int, late: bool = False) -> None:
        self.step = step
        self.late = late

    def spoil(self, runner: Any) -> None:
        with torch.no_grad():
            runner.model.bbox_head.retina_reg.weight[0, 0] = float('nan')

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.step and not self.late:
            self.spoil(runner)

    def after_train_epoch(self, runner: Any) -> None:
        if runner.iter == self.step and self.late:
            self.spoil(runner)


@METRICS.register_module()
class Rising(BaseMetric):
    """A metric that gets better with every validation."""

    best = 0.0

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(len(data_samples))

    def compute_metrics(self, results: Any) -> dict[str, float]:
        self.best += 0.1
        return {'coco/bbox_mAP': self.best}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if '.pth' in p.name)


def test_a_full_disk_costs_one_line_and_no_checkpoint(digits: Path, tmp_path: Path) -> None:
    with files_of_at_most(-1) as limit, pytest.raises(AsrError, match=r'epoch_2\.pth: .*free') as error:
        run(tiny(digits, **ONE), tmp_path, hooks=(At(1, lambda: limit(100_000)),))
    assert '\n' not in str(error.value)
    assert names(tmp_path) == ['epoch_1.pth']
    assert read_checkpoint(tmp_path / 'epoch_1.pth')['meta']['epoch'] == 1
    assert (tmp_path / 'last_checkpoint').read_text().strip() == 'epoch_1.pth'


class Watch:
    """Stands in for the moment of a write: notes which checkpoints there are, and can fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
        self.there: list[list[str]] = []
        self.dies = False
        replace = sys.modules['os'].replace

        def watched(source: Any, target: Any) -> None:
            if Path(target).suffix == '.pth':
                self.there.append(names(work))
                if self.dies:
                    raise Dead
            replace(source, target)

        monkeypatch.setattr('os.replace', watched)


def test_a_training_warns_of_nothing_that_it_does_not_do(
    digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tiny(digits, log_level='WARNING', **ONE), tmp_path)
    text = ''.join(capfd.readouterr()) + ''.join(path.read_text() for path in tmp_path.rglob('*.log'))
    assert 'WARNING' not in text


def test_the_old_one_goes_only_after_the_new_one_is_whole(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch, tmp_path)
    best = {'default_hooks.checkpoint.save_best': 'coco/bbox_mAP', 'train_cfg.val_interval': 1, **ONE}
    config = tiny(digits, validate=True, **best)
    config.val_evaluator = {'type': Rising.__name__}
    run(config, tmp_path)
    aside = '.{}.tmp'.format
    one, two = 'epoch_1.pth', 'epoch_2.pth'
    first, second = 'best_coco_bbox_mAP_epoch_1.pth', 'best_coco_bbox_mAP_epoch_2.pth'
    assert watch.there == [
        sorted([aside(one)]),
        sorted([one, aside(first)]),
        sorted([one, first, aside(one)]),  # with the note of the best one
        sorted([one, first, aside(two)]),
        sorted([two, first, aside(second)]),
        sorted([two, first, second, aside(two)]),
    ]
    assert names(tmp_path) == [second, two]


@pytest.mark.slow
def test_what_a_kill_left_over_is_deleted_by_the_resumed_run(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(digits, **ONE, **{'train_cfg.max_epochs': 3})
    monkeypatch.setattr('os.remove', die)  # after the new one was written
    with pytest.raises(Dead):
        run(config, tmp_path)
    monkeypatch.undo()
    assert names(tmp_path) == ['epoch_1.pth', 'epoch_2.pth']
    run(tiny(digits, **ONE, **{'train_cfg.max_epochs': 3}), tmp_path, 'auto')
    assert names(tmp_path) == ['epoch_3.pth']


def die(*args: Any) -> None:
    raise Dead


@pytest.mark.parametrize('write', ['checkpoint', 'backend'])
def test_whatever_mmengine_writes_is_whole_or_not_there(tmp_path: Path, write: str) -> None:
    path = tmp_path / 'published-0123abcd.pth'
    path.write_bytes(b'before')
    with files_of_at_most(1000), pytest.raises((AsrError, OSError)):  # noqa: PT012
        if write == 'checkpoint':  # what CheckpointHook publishes with
            save_checkpoint({'state_dict': {'a': torch.zeros(1000)}}, str(path))
        else:
            get_file_backend(str(path)).put(b'0' * 2000, str(path))
    assert path.read_bytes() == b'before'
    assert list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_not_finite_ends_the_training(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(AsrError, match=r'step 5: the loss is nan.*epoch_1\.pth'):
        run(tiny(digits, **ONE), tmp_path, hooks=(Poison(4),))
    assert names(tmp_path) == ['epoch_1.pth']


@pytest.mark.slow
@pytest.mark.parametrize('averaged', [False, True])
def test_weights_that_are_not_finite_are_never_written(digits: Path, tmp_path: Path, averaged: bool) -> None:
    config = tiny(digits, **ONE)
    if averaged:
        training.average(config)
    with pytest.raises(AsrError, match=r'bbox_head\.retina_reg\.weight.*not finite'):
        run(config, tmp_path, hooks=(Poison(6, late=True),))
    assert names(tmp_path) == ['epoch_1.pth']


def test_a_folder_takes_one_run_at_a_time(digits: Path, tmp_path: Path) -> None:
    from asr_downstream.files.locks import occupied

    with occupied(tmp_path), pytest.raises(AsrError, match=str(tmp_path)):
        run(tiny(digits), tmp_path)
    assert names(tmp_path) == []


TERMINATED = pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)


@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), TERMINATED])
def test_a_stop_is_seen_by_a_loop_over_runs(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    config = tiny(digits, custom_hooks=[{'type': SignalAt.__name__, 'step': 4, 'number': int(number)}])
    with pytest.raises(KeyboardInterrupt) as stopped:
        train_det.main([str(as_file(config, tmp_path)), '--work-dir', str(tmp_path)])
    assert getattr(stopped.value, 'status', None) == status
    assert 'stopped_iter_5.pth' in capsys.readouterr().out
    assert (tmp_path / 'last_checkpoint').read_text().strip() == 'stopped_iter_5.pth'
