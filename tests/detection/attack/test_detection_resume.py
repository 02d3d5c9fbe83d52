"""Detection: which checkpoint a training is resumed from, and that it goes on as if it had not ended."""

from __future__ import annotations

import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('mmdet')
pytestmark = [pytest.mark.det, pytest.mark.timeout(60)]

from conftest import ROOT
from helpers.tiny_detection import FLIP, Dead, DieAt, SignalAt, Steps, as_file, assert_same, run, tiny
from mmengine.config import Config
from mmengine.runner import Runner

from asr_downstream.detection.training import train as training
from asr_downstream.detection.training.sampler import draw_by_sample
from asr_downstream.errors import CheckpointError

sys.path.insert(0, str(ROOT / 'tools'))
import train_det

FLIPS = {'train_dataloader.dataset.pipeline': FLIP}


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run of two epochs with random flips, never interrupted."""
    work = tmp_path_factory.mktemp('whole')
    run(tiny(digits, **FLIPS), work)
    return work


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    work = Path(shutil.copytree(whole, tmp_path / 'copied'))
    (work / 'last_checkpoint').write_text(str(work / 'epoch_2.pth'))
    return work


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    header = largest.header_offset  # ends with the lengths of name and padding, which differ from the directory's
    start = header + 30 + sum(struct.unpack('<HH', content[header + 26 : header + 30]))
    content[start + largest.file_size // 2] ^= 1  # in a weight, or a moment of the optimiser: torch.load sees nothing
    path.write_bytes(content)


def resumed_from(digits: Path, work: Path, resume: str = 'auto') -> Path:
    config = tiny(digits, **{'train_cfg.max_epochs': 3})
    training.prepare(config, work, resume)
    return Path(config.load_from)


@pytest.mark.parametrize('resume', ['auto', 'latest'])
def test_an_empty_note_does_not_hide_the_checkpoints(digits: Path, copied: Path, resume: str) -> None:
    (copied / 'last_checkpoint').write_text('')
    assert resumed_from(digits, copied, resume) == copied / 'epoch_2.pth'


def test_a_missing_note_does_not_hide_the_checkpoints(digits: Path, copied: Path) -> None:
    (copied / 'last_checkpoint').unlink()
    config = tiny(digits)
    training.prepare(config, copied, 'auto')
    assert config.get('load_from') == str(copied / 'epoch_2.pth')


@pytest.mark.parametrize('damage', [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_skipped_and_named(
    digits: Path, copied: Path, capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    damage(copied / 'epoch_2.pth')
    assert resumed_from(digits, copied) == copied / 'epoch_1.pth'
    said = [line for line in capsys.readouterr().out.splitlines() if 'epoch_2.pth' in line]
    assert len(said) == 1
    assert 'skipped' in said[0]


def test_a_damaged_checkpoint_that_was_named_is_refused(digits: Path, copied: Path) -> None:
    flip_a_bit(copied / 'epoch_2.pth')
    with pytest.raises(CheckpointError, match=r'epoch_2\.pth: .*(changed|damaged)'):
        resumed_from(digits, copied, str(copied / 'epoch_2.pth'))


def test_a_run_with_nothing_whole_says_so(digits: Path, copied: Path) -> None:
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        truncate(copied / name)
    with pytest.raises(CheckpointError, match='no whole checkpoint'):
        resumed_from(digits, copied)


def test_a_copied_run_resumes_from_the_copy(digits: Path, whole: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(whole, tmp_path / 'copied'))
    (copied / 'last_checkpoint').write_text(str(whole / 'epoch_2.pth'))
    assert resumed_from(digits, copied) == copied / 'epoch_2.pth'  # the run that was copied is still there
    assert (whole / 'last_checkpoint').read_text().strip() == 'epoch_2.pth'


def test_absolute_notes_go_on_working(digits: Path, copied: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / 'elsewhere.pth'
    shutil.move(copied / 'epoch_2.pth', elsewhere)  # out_dir of CheckpointHook
    (copied / 'last_checkpoint').write_text(str(elsewhere))
    assert resumed_from(digits, copied) == elsewhere


@pytest.mark.slow
def test_a_run_of_plain_mmengine_resumes(digits: Path, whole: Path, tmp_path: Path) -> None:
    config = Config(tiny(digits, **{'train_cfg.max_epochs': 1}).to_dict())
    config.work_dir = str(tmp_path)
    Runner.from_cfg(config).train()
    steps = Steps()
    run(tiny(digits), tmp_path, 'latest', hooks=(steps,))
    assert [step for step, _ in steps.seen] == [3, 4, 5]
    assert (tmp_path / 'epoch_2.pth').is_file()


def edited(copied: Path, edit: Any) -> Path:
    checkpoint = torch.load(copied / 'epoch_2.pth', weights_only=False)
    edit(checkpoint)
    torch.save(checkpoint, copied / 'edited.pth')
    return copied / 'edited.pth'


@pytest.mark.parametrize(
    ('edit', 'message'),
    [
        (lambda c: c.update(meta={}), 'does not say how far it is'),
        (lambda c: c.pop('meta'), 'does not say how far it is'),
        (lambda c: c['meta'].update(iter=-5), 'iter=-5'),
        (lambda c: c['meta'].update(epoch='one'), "epoch='one'"),
        (lambda c: c.pop('optimizer'), 'no state of the optimiser'),
        (lambda c: c.pop('param_schedulers'), 'no state of the learning rate'),
        (lambda c: c.pop('message_hub'), 'no message_hub'),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_refused_in_a_line(
    digits: Path, copied: Path, edit: Any, message: str
) -> None:
    path = edited(copied, edit)
    with pytest.raises(CheckpointError, match=rf'edited\.pth: .*{message}') as error:
        resumed_from(digits, copied, str(path))
    assert '\n' not in str(error.value)


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_not_resumed(digits: Path, copied: Path) -> None:
    with pytest.raises(CheckpointError, match='another model'):
        run(tiny(digits, **{'train_cfg.max_epochs': 3, 'model.bbox_head.stacked_convs': 2}), copied, 'latest')


def test_a_checkpoint_of_another_optimiser_is_refused_in_a_line(digits: Path, copied: Path) -> None:
    groups = {'optim_wrapper.paramwise_cfg': {'custom_keys': {'backbone': {'lr_mult': 0.1}}}}
    with pytest.raises(CheckpointError, match=r'epoch_2\.pth: .*optimiser'):
        run(tiny(digits, **{'train_cfg.max_epochs': 3}, **groups), copied, 'latest')


def test_a_finished_run_says_so(digits: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_det.main([str(as_file(tiny(digits), copied.parent)), '--work-dir', str(copied), '--resume'])
    said = capsys.readouterr().out
    assert 'the config writes none' not in said
    assert 'epoch_2.pth: has all 2 epochs already; raise train_cfg.max_epochs' in said


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize('workers', [0, 2])
def test_flips_of_a_resumed_run_are_those_of_the_uninterrupted_one(
    digits: Path, whole: Path, tmp_path: Path, workers: int
) -> None:
    options = {'train_dataloader.num_workers': workers, 'train_dataloader.persistent_workers': workers > 0, **FLIPS}
    with pytest.raises(Dead):
        run(tiny(digits, **options), tmp_path, hooks=(DieAt(4),))
    run(tiny(digits, **options), tmp_path, 'auto')
    assert_same(tmp_path / 'epoch_2.pth', whole / 'epoch_2.pth')


def test_a_run_with_checkpoints_within_epochs_makes_every_step_once(digits: Path, whole: Path, tmp_path: Path) -> None:
    options = {'default_hooks.checkpoint.by_epoch': False, 'default_hooks.checkpoint.interval': 2, **FLIPS}
    steps = Steps()
    with pytest.raises(Dead):
        run(tiny(digits, **options), tmp_path, hooks=(steps, DieAt(5)))
    again = Steps()
    run(tiny(digits, **options), tmp_path, 'auto', hooks=(again,))
    assert [step for step, _ in again.seen] == [4, 5]  # from iter_4.pth, the first step of the second epoch done
    assert again.seen[0] == steps.seen[4]
    assert again.left == [2, 1]
    found, expected = (torch.load(p, weights_only=False) for p in (tmp_path / 'iter_6.pth', whole / 'epoch_2.pth'))
    for key, value in expected['state_dict'].items():
        assert torch.equal(found['state_dict'][key], value), key


@pytest.mark.slow
def test_an_epoch_of_another_length_leaves_no_negative_time(digits: Path, tmp_path: Path) -> None:
    short = {'train_dataloader.batch_size': 2}
    with pytest.raises(Dead):
        run(tiny(digits, **short, **{'default_hooks.checkpoint.by_epoch': False}), tmp_path, hooks=(DieAt(8),))
    steps = Steps()
    run(tiny(digits), tmp_path, 'auto', hooks=(steps,))
    assert steps.left == [3, 2, 1]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_without_a_seed_keeps_the_one_it_drew(digits: Path, tmp_path: Path) -> None:
    options = {'randomness': {'seed': None}, 'default_hooks.checkpoint.by_epoch': False, **FLIPS}
    steps = Steps()
    run(tiny(digits, **options), tmp_path, hooks=(steps,))
    again = Steps()
    config = tiny(digits, **options)
    training.prepare(config, tmp_path, str(tmp_path / 'iter_4.pth'))
    config.work_dir = str(tmp_path / 'other')
    training.train(config, (again,))
    assert again.seen == steps.seen[4:]
    assert_same(tmp_path / 'other' / 'iter_6.pth', tmp_path / 'iter_6.pth')


MIX = [
    {'type': 'Mosaic', 'img_scale': (160, 160)},
    {'type': 'RandomAffine', 'scaling_ratio_range': (0.5, 1.5), 'border': (-80, -80)},
    {'type': 'MixUp', 'img_scale': (160, 160)},
    {'type': 'RandomFlip', 'prob': 0.5},
    {'type': 'PackDetInputs'},
]
TWO_STAGES = """
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', '{base}']
model = dict(
    backbone=dict(base_channels=4, depth=18, norm_eval=False, frozen_stages=-1, init_cfg=None, num_stages=4),
    neck=dict(in_channels=[4, 8, 16, 32], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=16, num_classes=10),
    ),
    train_cfg=dict(rpn=dict(sampler=dict(num=32)), rcnn=dict(sampler=dict(num=32))),
)
"""


def mixed(digits: Path, workers: int) -> Any:
    """A training with Mosaic and MixUp, whose other images are drawn too, and an average of the weights."""
    config = tiny(digits, **{'train_dataloader.num_workers': workers})
    config.train_dataloader.persistent_workers = workers > 0
    inner = {**config.train_dataloader.dataset, 'pipeline': FLIP[:2]}
    config.train_dataloader.dataset = {'type': 'MultiImageMixDataset', 'dataset': inner, 'pipeline': MIX}
    training.average(config, momentum=0.1)
    return config


def two_stages(digits: Path, workers: int) -> Any:
    """A Faster R-CNN, which draws the proposals that it learns from."""
    rest = {key: value for key, value in tiny(digits).to_dict().items() if key != 'model'}
    (digits.parent / 'base.py').write_text(Config(rest).pretty_text)
    path = digits.parent / 'two_stages.py'
    path.write_text(TWO_STAGES.format(base=digits.parent / 'base.py'))
    config = Config.fromfile(path)
    config.train_dataloader.update(num_workers=workers, persistent_workers=workers > 0)
    return config


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize('configured', [mixed, two_stages])
@pytest.mark.parametrize('stop', [DieAt, SignalAt])
def test_whatever_is_drawn_is_drawn_as_without_the_stop(
    digits: Path, tmp_path: Path, configured: Any, stop: Any
) -> None:
    run(configured(digits, 1), tmp_path / 'whole')
    with pytest.raises((Dead, KeyboardInterrupt)):
        run(configured(digits, 0), tmp_path / 'parts', hooks=(stop(4),))
    run(configured(digits, 2), tmp_path / 'parts', 'auto')
    assert_same(tmp_path / 'parts' / 'epoch_2.pth', tmp_path / 'whole' / 'epoch_2.pth')


@pytest.mark.slow
@pytest.mark.parametrize('sampler', ['InfiniteSampler', 'DefaultSampler'])
def test_a_loop_without_epochs_goes_on_as_without_the_stop(digits: Path, tmp_path: Path, sampler: str) -> None:
    def config() -> Any:
        made = tiny(digits, **FLIPS, **{'train_dataloader.sampler.type': sampler})
        made.train_cfg = {'type': 'IterBasedTrainLoop', 'max_iters': 8, 'val_interval': 100}
        made.default_hooks.checkpoint.update(by_epoch=False, interval=2)
        made.param_scheduler = [{'type': 'LinearLR', 'start_factor': 0.01, 'by_epoch': False, 'begin': 0, 'end': 6}]
        return made

    run(config(), tmp_path / 'whole')
    with pytest.raises(Dead):
        run(config(), tmp_path / 'parts', hooks=(DieAt(5),))
    run(config(), tmp_path / 'parts', 'auto')
    assert_same(tmp_path / 'parts' / 'iter_8.pth', tmp_path / 'whole' / 'iter_8.pth')


@pytest.mark.parametrize('copy', [lambda dataset: dataset, lambda dataset: pickle.loads(pickle.dumps(dataset))])
def test_what_is_drawn_for_a_picture_follows_from_seed_epoch_and_index(digits: Path, copy: Any) -> None:
    """Also in a data set that a worker has unpickled."""
    loader = Runner.build_dataloader(tiny(digits, **FLIPS).train_dataloader, seed=3)
    stock = type(loader.dataset)
    draws = draw_by_sample(loader, seed=3)
    assert draws is not None
    assert isinstance(loader.dataset, stock)
    draws.epoch = 0
    first = flips(copy(loader.dataset), draws)
    torch.manual_seed(5)
    assert flips(copy(loader.dataset), draws) == first
    draws.skip = 2
    assert flips(copy(loader.dataset), draws) == first[8:]
    draws.skip, draws.epoch = 0, 1
    assert flips(copy(loader.dataset), draws) != first
    assert len(draws) == len(loader) == 3  # what is left of an epoch does not change its length


def flips(dataset: Any, draws: Any) -> list[tuple[int, bool]]:
    """Which pictures come, and whether they are mirrored."""
    samples = [dataset[draw]['data_samples'] for batch in draws for draw in batch]
    return [(sample.img_id, sample.flip) for sample in samples]
