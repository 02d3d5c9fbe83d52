"""Detectors as analyses see them, see `asr_downstream.folding.analysis.runs`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from torch import Tensor, nn

from asr_downstream.detection.config import load_config
from asr_downstream.detection.data.coco import check_datasets
from asr_downstream.detection.evaluation.calibrate import pipeline_of, step_of, training_images
from asr_downstream.detection.evaluation.evaluate import detect
from asr_downstream.detection.models.detectors import load_detector
from asr_downstream.detection.training.checkpoints import noted
from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import sha256
from asr_downstream.folding.analysis.attacks import Attack
from asr_downstream.folding.analysis.runs import Change, OpenRun, Wanted
from asr_downstream.folding.analysis.stripes import Metric
from asr_downstream.registry import RUNS

__all__ = ['files_of', 'open_detector']


@RUNS.register_module(name='detection')
def open_detector(path: Path, wanted: Wanted) -> OpenRun:
    """Open a run of `tools/train_det.py`, or a file of weights with a config beside it.

    The images are training images, as the test pipeline prepares them; the metric is AP on the test set of the config.

    Raises:
        CheckpointError: there is no config or no checkpoint, or they do not fit.
        DataError: the data are not there, or unsound.
    """
    config_file, checkpoint = files_of(path, wanted.config)
    config = load_config(config_file, wanted.data)
    check_datasets(config, 'train_dataloader', 'test_dataloader')
    model, _ = load_detector(config, checkpoint, wanted.trust)
    model.to(get_device())
    return OpenRun(
        name=path.resolve().name,
        kind='detection',
        model=model,
        data=partial(training_images, config, wanted.images),
        step=step_of(model),
        metric=Metric('AP', partial(average_precision, config)),
        changed=changed,
        attack=partial(attacked, config, in_file_pixels(config)) if annotated(config) else None,
        folder=checkpoint.parent,
        facts={'config': str(config_file), 'checkpoint': str(checkpoint), 'sha256': sha256(checkpoint)},
    )


def files_of(path: Path, config: Path | None = None) -> tuple[Path, Path]:
    """Config and checkpoint of a run.

    Args:
        path: its folder, whose last checkpoint counts, or a file of weights.
        config: instead of the one beside the weights.

    Raises:
        CheckpointError: there is none, or there are several configs.
    """
    folder = path if path.is_dir() else path.parent
    checkpoint = (noted(path) if path.is_dir() else path) or newest_file(path)
    if config is None:
        found = [checkpoint.with_suffix('.py')] if checkpoint.with_suffix('.py').is_file() else [*folder.glob('*.py')]
        if len(found) != 1:
            what = 'no config' if not found else f'{len(found)} configs'
            raise CheckpointError(f'{folder}: has {what} beside the weights; say which it is with --config')
        config = found[0]
    return config, checkpoint


def newest_file(folder: Path) -> Path:
    """Checkpoint of a folder that notes none: the one that was written last."""
    found = sorted(folder.glob('*.pth'), key=lambda file: (file.stat().st_mtime, file.name))
    if not found:
        raise CheckpointError(f'{folder}: has no checkpoint; give the folder of a training, or a file of weights')
    return found[-1]


def average_precision(config: Config, model: nn.Module) -> float:
    """AP on the test set."""
    return detect(config, model, 'AP')[0].summary['AP']


@contextmanager
def changed(model: Any, change: Change) -> Iterator[None]:
    """Let images go through a change before they are normalised and padded."""

    def before(module: nn.Module, args: Any) -> Any:
        data, *rest = args
        images = [change(image[None].float(), 0.0, 255.0)[0] for image in data['inputs']]
        return ({**data, 'inputs': images}, *rest)

    handle = model.data_preprocessor.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def steps_of(config: Config) -> list[str]:
    """Names of the steps of the test pipeline."""
    return [str(step['type']).rpartition('.')[2] for step in pipeline_of(config.test_dataloader.dataset)]


def annotated(config: Config) -> bool:
    """Whether the test pipeline loads boxes, which a loss needs."""
    return 'LoadAnnotations' in steps_of(config)


def in_file_pixels(config: Config) -> bool:
    """Whether the boxes of the test pipeline are still in pixels of the file: it resizes before it loads them."""
    steps = steps_of(config)
    return 'Resize' in steps and steps.index('Resize') < steps.index('LoadAnnotations')


def attacked(config: Config, rescale: bool, model: Any, attack: Attack) -> float:
    """AP on the test set, each batch of which an attack on the training loss has changed.

    Args:
        config: of the detector.
        rescale: whether annotated boxes are in pixels of the file.
        model: the detector.
        attack: changes normalised images.
    """
    normal = model.data_preprocessor
    mean, std = (normal.mean, normal.std) if normal._enable_normalize else (0.0, 1.0)
    black, white = (0.0 - mean) / std, (255.0 - mean) / std

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        samples = output['data_samples']

        def loss(images: Tensor) -> Tensor:
            found = model.loss(images, [with_boxes(sample, rescale) for sample in samples])
            return torch.stack([part for key, value in found.items() if 'loss' in key for part in listed(value)]).sum()

        return {**output, 'inputs': attack(loss, output['inputs'], black, white)}

    handle = normal.register_forward_hook(after)
    try:
        return average_precision(config, model)
    finally:
        handle.remove()


def listed(value: Any) -> list[Tensor]:
    """A loss, or those of several levels."""
    return [part.sum() for part in (value if isinstance(value, list | tuple) else [value])]


def with_boxes(sample: Any, rescale: bool) -> Any:
    """Copy a sample with its annotated boxes in pixels of the image that the model sees."""
    found = copy.deepcopy(sample)
    boxes = found.gt_instances.bboxes
    if rescale:
        found.gt_instances.bboxes = boxes * boxes.new_tensor(found.scale_factor).repeat(2)
    return found
