"""Test-time augmentation: MMDetection's own, around a detector that is at hand."""

from __future__ import annotations

import copy
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from torch import nn

from asr_downstream.errors import DataError

__all__ = ['augmented']

# What MMDetection's tools/test.py takes where a config has no `tta_model` and `tta_pipeline`: the image and its mirror.
MODEL = {'type': 'DetTTAModel', 'tta_cfg': {'nms': {'type': 'nms', 'iou_threshold': 0.5}, 'max_per_img': 100}}
META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')


def augmented(config: Config, model: nn.Module) -> tuple[Config, nn.Module]:
    """Return the config and the detector for a test with augmentation (``tta_model``, ``tta_pipeline`` of the config).

    Raises:
        DataError: the test data are wrapped, or the detector finds masks, which MMDetection cannot merge.
    """
    metric = config.get('test_evaluator', {})
    if not isinstance(metric, dict) or 'segm' in metric.get('metric', ()):
        raise DataError(f'{config.filename}: --tta merges boxes only; masks and several evaluators are not supported')
    changed = copy.deepcopy(config)
    dataset = changed.test_dataloader.dataset
    if 'pipeline' not in dataset:
        raise DataError(f'{config.filename}: --tta needs the pipeline of the test data, which are wrapped here')
    dataset.pipeline = config.get('tta_pipeline') or mirrored(dataset.pipeline)
    wrapped = MODELS.build(ConfigDict({**(config.get('tta_model') or MODEL), 'module': model}))
    wrapped.eval()
    return changed, wrapped


def mirrored(pipeline: list[Any]) -> list[Any]:
    """Pipeline that gives every image and its mirror."""
    *steps, last = pipeline
    flips = [{'type': 'RandomFlip', 'prob': 1.0}, {'type': 'RandomFlip', 'prob': 0.0}]
    return [*steps, {'type': 'TestTimeAug', 'transforms': [flips, [{**last, 'meta_keys': META}]]}]
