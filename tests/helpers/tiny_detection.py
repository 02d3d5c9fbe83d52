"""The smallest training of a detector: a RetinaNet of 8,000 weights on 12 pictures, two epochs of three steps."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from asr_downstream.detection.config import load_config
from asr_downstream.detection.data.digits import make_digits
from asr_downstream.detection.training import train as training
from asr_downstream.files.weights import read_checkpoint

STOCK = 'det_configs/digits/retinanet_r18-w16_fpn_digits.py'
TINY = {
    'train_cfg.max_epochs': 2,
    'train_dataloader.batch_size': 4,
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'val_dataloader.num_workers': 0,
    'test_dataloader.num_workers': 0,
    'default_hooks.checkpoint.interval': 1,
    'default_hooks.checkpoint.max_keep_ckpts': -1,
    'model.backbone.base_channels': 4,
    'model.neck.in_channels': [8, 16],
    'model.neck.out_channels': 8,
    'model.bbox_head.in_channels': 8,
    'model.bbox_head.feat_channels': 8,
}
FLIP = [
    {'type': 'LoadImageFromFile'},
    {'type': 'LoadAnnotations', 'with_bbox': True},
    {'type': 'RandomFlip', 'prob': 0.5},
    {'type': 'PackDetInputs'},
]


def pictures(folder: Path) -> Path:
    """Write the digits set that `tiny` trains on."""
    make_digits(folder / 'digits', sizes={'train': 12, 'val': 2})
    return folder / 'digits'


def tiny(digits: Path, validate: bool = False, path: Path | str = STOCK, **options: Any) -> Any:
    """Config of a training that takes a second."""
    config = load_config(ROOT / path, digits, {**TINY, 'log_level': 'ERROR', **options})
    if not validate:
        config.val_dataloader = config.val_evaluator = config.val_cfg = None
    return config


def run(config: Any, work_dir: Path, resume: str | None = None, hooks: tuple[Any, ...] = ()) -> Any:
    """Train as `tools/train_det.py` does."""
    training.prepare(config, work_dir, resume)
    return training.train(config, hooks)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights in a checkpoint."""
    return read_checkpoint(path)['state_dict']


def assert_same(found: Path, expected: Path) -> None:
    """Weights and optimiser are those of another checkpoint, bit for bit."""
    mine, other = read_checkpoint(found), read_checkpoint(expected)
    assert (mine['meta']['epoch'], mine['meta']['iter']) == (other['meta']['epoch'], other['meta']['iter'])
    different = [key for key, value in other['state_dict'].items() if not torch.equal(mine['state_dict'][key], value)]
    assert not different
    for index, state in other['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(mine['optimizer']['state'][index][key], value), key


def as_file(config: Any, folder: Path, name: str = 'tiny.py') -> Path:
    """Write a config, for the command line."""
    path = folder / name
    path.write_text(config.pretty_text)
    return path


class Dead(Exception):
    """Stands in for a kill."""


class DieAt(Hook):
    """Ends a training before a step, without a word to it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.step:
            raise Dead


@HOOKS.register_module()
class SignalAt(Hook):
    """Stands in for a user at the keyboard or a scheduler: sends the signal before a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step = step
        self.number = number

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.step:
            os.kill(os.getpid(), self.number)


class Steps(Hook):
    """Notes every step, its images, and how many steps are left by the count that the log's ETA comes from."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.left: list[int] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.seen.append((runner.iter, [s.img_id for s in data_batch['data_samples']]))
        self.left.append(runner.max_iters - runner.iter)
