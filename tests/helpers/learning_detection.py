"""Detectors in which a part learns, trained on a few pictures of digits."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from conftest import randomise
from mmengine.hooks import Hook

from asr_downstream.detection.models.detectors import build_detector
from helpers.tiny_detection import (
    FLIP,
    tiny,
)

ASR = 'det_configs/digits/retinanet_r18-w16-asr-se_fpn_digits.py'
DIA = 'det_configs/digits/retinanet_r18-w16-dia_fpn_digits.py'
FLIPS = {'train_dataloader.dataset.pipeline': FLIP}
STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


def stock_checkpoint(digits: Path, folder: Path) -> Path:
    """A checkpoint of the stock detector, with statistics and affines that are not those of a fresh one."""
    path = folder / 'stock.pth'
    torch.save({'state_dict': randomise(build_detector(tiny(digits))).state_dict()}, path)
    return path


def plugged(digits: Path, stock: Path | None, path: str = ASR, **options: Any) -> Any:
    start = {} if stock is None else {'load_from': str(stock)}
    return tiny(digits, path=path, **{'model.backbone.plug.preserve': True, **start, **options})


class AtStart(Hook):
    """Keeps the weights before the first step."""

    priority = 'LOWEST'

    def before_train(self, runner: Any) -> None:
        self.wrapped = runner.model
        model = getattr(runner.model, 'module', runner.model)
        self.state = copy.deepcopy(model.state_dict())
        self.optimiser = runner.optim_wrapper.optimizer
        self.model = model


def is_norm(name: str) -> bool:
    return bool(re.search(r'\.(bn\d|downsample\.1)\.(weight|bias)$', name))
