"""Training of detectors: stop and resume within an epoch, EMA, validation of a folded copy."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

pytest.importorskip('mmdet')
pytestmark = pytest.mark.det

from mmengine.hooks import Hook

from asr_downstream.console.stopping import Stopped, StopSignal
from asr_downstream.detection.config import load_config, stock_config
from asr_downstream.detection.data.digits import make_digits
from asr_downstream.detection.training import train as training
from asr_downstream.detection.training.checkpoints import noted
from asr_downstream.detection.training.launch import join
from asr_downstream.detection.training.loops import StopHook, ValFirst
from asr_downstream.errors import AsrError
from asr_downstream.files.weights import read_checkpoint
from asr_downstream.plugging.layers import Plugged

ASR = 'det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py'
STOCK = 'det_configs/digits/retinanet_r18-w16_fpn_digits.py'
DIA = 'det_configs/digits/retinanet_r18-w16-dia_fpn_digits.py'
Tool = Callable[..., Any]


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'digits'
    make_digits(root, sizes={'train': 24, 'val': 4})
    return root


def configured(digits: Path, path: str = ASR, **options: Any) -> Any:
    """Two epochs of six steps, without workers, so that a run takes seconds."""
    short = {
        'train_cfg.max_epochs': 2,
        'train_cfg.val_interval': 2,
        'train_dataloader.batch_size': 4,
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'test_dataloader.num_workers': 0,
        'default_hooks.checkpoint.interval': 1,
        'log_level': 'ERROR',
    }
    return load_config(ROOT / path, digits, {**short, **options})


def run(config: Any, work_dir: Path, resume: str | None = None, hooks: tuple[Any, ...] = ()) -> tuple[Any, bool]:
    """Train; the last checkpoint, and whether the training is complete."""
    training.prepare(config, work_dir, resume)
    try:
        return training.train(config, hooks), True
    except Stopped:
        return noted(work_dir), False


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)['state_dict']


class StopAt(Hook):
    """Stands in for a user at the keyboard: sends the signal before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.step:
            os.kill(os.getpid(), signal.SIGINT)


class Seen(Hook):
    """Notes the images of every step."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.seen.append((runner.iter, [s.img_id for s in data_batch['data_samples']]))


@pytest.mark.slow
@pytest.mark.parametrize('step', [3, 5, 8])
def test_a_stopped_training_continues_within_the_epoch_as_if_it_had_not_been(
    digits: Path, tmp_path: Path, step: int
) -> None:
    seen: dict[str, list[Any]] = {'whole': [], 'parts': []}
    whole, complete = run(configured(digits), tmp_path / 'whole', hooks=(Seen(seen['whole']),))
    assert complete
    work = tmp_path / 'parts'
    stopped, complete = run(configured(digits), work, hooks=(Seen(seen['parts']), StopAt(step)))
    assert not complete
    assert stopped.name == f'stopped_iter_{step + 1}.pth'
    assert (work / 'last_checkpoint').read_text() == stopped.name
    resumed, complete = run(configured(digits), work, 'latest', hooks=(Seen(seen['parts']),))
    assert complete
    assert seen['parts'] == seen['whole']  # every step once, with the same images
    for key, value in weights(whole).items():  # no augmentation here, so nothing else is random
        torch.testing.assert_close(weights(resumed)[key], value, msg=key)


def test_the_config_of_a_resumed_training_starts_trainings_of_its_own(digits: Path, tmp_path: Path) -> None:
    """Users take it for the next seed: it must not go on from the weights of this one."""
    config = configured(digits, **{'train_cfg.max_epochs': 1})
    run(config, tmp_path / 'a')
    run(configured(digits, **{'train_cfg.max_epochs': 2}), tmp_path / 'a', 'latest')
    [written] = (tmp_path / 'a').glob('*.py')
    again = load_config(written)
    assert not again.resume
    assert again.load_from is None
    training.prepare(again, tmp_path / 'b', None)
    assert not again.resume
    old = load_config(written, options={'resume': True, 'load_from': str(tmp_path / 'a/epoch_1.pth')})
    with pytest.raises(AsrError, match=r'resume=True would go on from .*epoch_1.pth, which is of another folder'):
        training.prepare(old, tmp_path / 'b', None)


def test_each_training_of_a_program_has_its_own_logs(digits: Path, tmp_path: Path) -> None:
    for name in ('a', 'b'):
        run(configured(digits, **{'train_cfg.max_epochs': 1, 'default_hooks.logger.interval': 2}), tmp_path / name)
        [log] = (tmp_path / name).glob('*/vis_data/scalars.json')
        assert len([line for line in log.read_text().splitlines() if '"loss"' in line]) == 3


def test_auto_resumes_what_there_is(digits: Path, tmp_path: Path) -> None:
    config = configured(digits)
    training.prepare(config, tmp_path, 'auto')
    assert not config.get('resume')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    meta = {'epoch': 1, 'iter': 6}
    states = {'optimizer': {}, 'param_schedulers': [], 'message_hub': {}}
    torch.save({'meta': meta, 'state_dict': {'a': torch.zeros(1)}, **states}, tmp_path / 'epoch_1.pth')
    config = configured(digits)
    training.prepare(config, tmp_path, 'auto')
    assert config.resume
    assert config.load_from == str(tmp_path / 'epoch_1.pth')


class Detections(Hook):
    """Keeps what each validation has found."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.found += [(o.pred_instances.bboxes, o.pred_instances.scores) for o in outputs]


class LiveModel(Hook):
    """Compares the live model before and after each validation."""

    def __init__(self) -> None:
        self.metrics: list[Any] = []

    def before_val(self, runner: Any) -> None:
        self.state = {k: v.clone() for k, v in runner.model.state_dict().items()}
        self.modules = [type(m) for m in runner.model.modules()]

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        self.metrics.append(metrics)
        assert any(isinstance(m, Plugged) for m in runner.model.modules())
        assert self.modules == [type(m) for m in runner.model.modules()]
        for key, value in runner.model.state_dict().items():
            assert torch.equal(value, self.state[key]), key


def test_fold_eval_validates_a_folded_copy_and_leaves_the_live_model(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    options = {'train_cfg.val_interval': 1, 'train_dataloader.batch_size': 2, 'model.test_cfg.score_thr': 0.0}
    for fold_eval in (False, True):
        live, seen = LiveModel(), Detections()
        config = configured(digits, **options)
        training.average(config, momentum=0.1)
        config.fold_eval = fold_eval
        classes = []

        def val_step(self: Any, data: Any, classes: list[Any] = classes) -> Any:
            classes.append(any(isinstance(m, Plugged) for m in self.modules()))
            return type(self).test_step(self, data)

        monkeypatch.setattr('mmdet.models.detectors.base.BaseDetector.val_step', val_step, raising=False)
        checkpoint, _ = run(config, tmp_path / str(fold_eval), hooks=(live, seen))
        assert set(classes) == {not fold_eval}
        assert len(live.metrics) == 2
        found[fold_eval] = (seen.found, weights(checkpoint))
    for (boxes, scores), (folded_boxes, folded_scores) in zip(found[False][0], found[True][0], strict=True):
        assert len(scores) > 0
        torch.testing.assert_close(folded_scores, scores, atol=1e-5, rtol=0)
        assert (folded_boxes - boxes).abs().median() < 0.01  # equal scores may change places
    for key, value in found[False][1].items():
        assert torch.equal(found[True][1][key], value), key
    shipped = stock_config(config)
    assert 'asr_downstream' not in shipped.pretty_text
    assert shipped.val_cfg.type == 'ValLoop'
    assert shipped.train_cfg.type == 'EpochBasedTrainLoop'


def test_fold_eval_of_what_does_not_fold_is_refused(digits: Path, tmp_path: Path) -> None:
    config = configured(digits, DIA)
    config.fold_eval = True
    with pytest.raises(AsrError, match='fold_eval=True, but the model has gates that depend on the input'):
        run(config, tmp_path)


def test_averaged_weights_are_what_is_written_and_folds(digits: Path, tmp_path: Path) -> None:
    from asr_downstream.detection.export import fold_checkpoint

    config = configured(digits)
    training.average(config, momentum=0.1)
    training.average(config)  # once is enough
    assert sum(hook['type'] == 'EMAHook' for hook in config.custom_hooks) == 1
    config.fold_eval = True
    checkpoint, _ = run(config, tmp_path)
    raw = read_checkpoint(checkpoint)['ema_state_dict']
    averaged = weights(checkpoint)
    key = 'backbone.layer1.0.bn2.gate.0.psi'
    assert not torch.equal(raw[f'module.{key}'], averaged[key])
    report = fold_checkpoint(configured(digits), checkpoint, tmp_path / 'shipped' / 'a.pth')
    assert report['feature_map_difference']['float64']['relative'] < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize('path', [ASR, DIA])
def test_a_stock_checkpoint_fine_tunes_from_exactly_where_it_stands(digits: Path, tmp_path: Path, path: str) -> None:
    last = Detections()
    keep = {'model.test_cfg.score_thr': 0.0}  # two epochs find nothing with more
    stock, _ = run(configured(digits, STOCK, **keep), tmp_path / 'stock', hooks=(last,))
    found = {}
    for preserve in (True, False):
        first = Detections()
        options = {**keep, 'load_from': str(stock), 'model.backbone.plug.preserve': preserve, 'train_cfg.max_epochs': 1}
        run(configured(digits, path, **options), tmp_path / str(preserve), hooks=(ValFirst(), first))
        found[preserve] = first.found[: len(last.found)]
    assert sum(len(scores) for _, scores in last.found) > 10
    scores = {k: torch.cat([s for _, s in v]) for k, v in {'stock': last.found, **found}.items()}
    boxes = {k: torch.cat([b for b, _ in v]) for k, v in {'stock': last.found, **found}.items()}
    assert torch.equal(scores[True], scores['stock'])
    assert torch.equal(boxes[True], boxes['stock'])
    assert not torch.equal(scores[False], scores['stock'])


def test_reports(tmp_path: Path, digits: Path) -> None:
    config = configured(digits)
    training.report_to(config, ['tensorboard', 'tensorboard'])
    config.visualizer.name = 'reports'  # visualizers live as long as the process
    assert [b.type for b in config.visualizer.vis_backends] == ['LocalVisBackend', 'TensorboardVisBackend']
    run(config, tmp_path)
    assert list(tmp_path.rglob('events.out.tfevents*'))


def test_a_report_that_is_not_installed_says_so(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.REPORTS, 'wandb', ('WandbVisBackend', 'not_installed_here'))
    with pytest.raises(AsrError, match='pip install not_installed_here'):
        training.report_to(configured(digits), ['wandb'])


@pytest.mark.slow
def test_launchers_that_did_not_start_this_process_are_refused(
    digits: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = tool('train_det', ASR, '--data-root', digits, '--launcher', 'pytorch')
    assert lost.returncode == 1
    assert 'tools/dist_train.sh CONFIG GPUS' in lost.stderr
    with pytest.raises(AsrError, match='not started by srun'):
        join(configured(digits), 'slurm')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(AsrError, match='each would train alone: add --launcher pytorch'):
        join(configured(digits), 'none')


def test_processes_ask_each_other_rarely_when_steps_are_fast_and_always_when_they_are_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    slowest = 0.001  # seconds a step, of the slowest process
    runner = type('Runner', (), {'world_size': 2, 'iter': 0})()
    other_stops = 10**9
    monkeypatch.setattr(
        'asr_downstream.detection.training.loops.largest',
        lambda stop, seconds: (asked.append(runner.iter + 1), [float(runner.iter + 1 >= other_stops), slowest])[1],
    )
    stops: list[int] = []
    monkeypatch.setattr(StopHook, 'stop', lambda self, runner, epoch, step: stops.append(step))
    runner.epoch = 0
    hook = StopHook(StopSignal())
    for runner.iter in range(40):
        hook.after_train_iter(runner, 0)
    assert asked == [1, 11, 21, 31]
    asked.clear()
    slowest = 5.0
    for runner.iter in range(40, 50):
        hook.after_train_iter(runner, 0)
    assert asked == list(range(41, 51))
    other_stops = 55  # another process was asked to stop
    for runner.iter in range(50, 55):
        hook.after_train_iter(runner, 0)
    assert stops == [55]


@pytest.mark.slow
def test_an_epoch_of_another_length_starts_again(digits: Path, tmp_path: Path, caplog: Any) -> None:
    work = tmp_path / 'work'
    run(configured(digits), work, hooks=(StopAt(8),))  # the third step of the second epoch of six
    seen: list[Any] = []
    config = configured(digits, **{'train_dataloader.batch_size': 8})
    _, complete = run(config, work, 'latest', hooks=(Seen(seen),))
    assert complete
    assert len(seen) == 3  # the whole second epoch, now of three steps


@pytest.mark.slow
def test_a_resume_at_an_epoch_trains_every_step_of_the_next(digits: Path, tmp_path: Path) -> None:
    work = tmp_path / 'work'
    run(configured(digits, **{'train_cfg.max_epochs': 1}), work)
    seen: list[Any] = []
    run(configured(digits, **{'train_dataloader.batch_size': 8}), work, 'latest', hooks=(Seen(seen),))
    assert len(seen) == 3


def test_a_run_without_checkpoints_says_so(digits: Path, tmp_path: Path) -> None:
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'of_an_earlier_run.pth'))
    assert run(configured(digits, **{'default_hooks.checkpoint': None}), tmp_path) == (None, True)


def test_a_second_training_does_not_write_over_the_first(digits: Path, tmp_path: Path) -> None:
    run(configured(digits, **{'train_cfg.max_epochs': 1}), tmp_path)
    before = (tmp_path / 'epoch_1.pth').read_bytes()
    with pytest.raises(AsrError, match=r'checkpoints of an earlier run; continue it with --resume, or .*--work-dir'):
        training.prepare(configured(digits), tmp_path)
    assert (tmp_path / 'epoch_1.pth').read_bytes() == before
    training.prepare(configured(digits), tmp_path, 'auto')
    config = configured(digits)
    config.resume = True  # as MMEngine's configs say it
    training.prepare(config, tmp_path)


def test_weights_that_torchvision_would_find_are_refused_without_it(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *_: None if name == 'torchvision' else found(name))
    config = configured(digits)
    assert 'torchvision' not in training.plan(config)
    config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='torchvision://resnet18')
    with pytest.raises(AsrError, match='^torchvision://resnet18: torchvision, .* is not installed; install the one of'):
        training.prepare(config, tmp_path)
    assert 'torchvision://resnet18: torchvision, which' in training.plan(config)


def test_what_cannot_be_validated_folded_or_fetched_is_refused(digits: Path, tmp_path: Path) -> None:
    config = configured(digits)
    config.fold_eval, config.val_cfg = True, None
    with pytest.raises(AsrError, match="needs MMEngine's ValLoop, the config has no val_cfg"):
        training.prepare(config, tmp_path)
    config = configured(digits)
    config.load_from = 'https://example.org/a.pth'
    with pytest.raises(AsrError, match=r'a\.pth: MMEngine unpickles what it fetches.*--trust'):
        training.prepare(config, tmp_path)
    training.prepare(config, tmp_path, trust=True)
