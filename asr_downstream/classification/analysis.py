"""Classifiers as analyses see them, see `asr_downstream.folding.analysis.runs`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asr_downstream.classification.config import load_config
from asr_downstream.classification.evaluate import run_logits, trained
from asr_downstream.classification.task import Classification
from asr_downstream.engine.classification import accuracy, logits
from asr_downstream.engine.config import CONFIG_FILE
from asr_downstream.engine.state import checkpoints
from asr_downstream.engine.state.train_state import AVERAGE, WEIGHTS
from asr_downstream.errors import CheckpointError
from asr_downstream.files.atomic import sha256
from asr_downstream.folding.analysis.attacks import Attack
from asr_downstream.folding.analysis.runs import Change, OpenRun, Wanted
from asr_downstream.folding.analysis.stripes import Metric
from asr_downstream.modules.seeds import generator
from asr_downstream.registry import RUNS

__all__ = ['open_classifier']


@RUNS.register_module(name='classification')
def open_classifier(path: Path, wanted: Wanted) -> OpenRun:
    """Open a run of `tools/train_cls.py`, or one of its checkpoints.

    The images are training images, not augmented; the metric is accuracy on all images held out.

    Raises:
        CheckpointError: this is no run, or it has no complete checkpoint or no average.
        DataError: the data are not there.
    """
    folder = checkpoints.run_of(path)
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f'{path}: is no run of train-cls (it has no {CONFIG_FILE})')
    checkpoint = checkpoints.find(folder, 'latest' if folder == path.resolve() else str(path))
    average = (checkpoint / AVERAGE).is_file() if wanted.ema is None else wanted.ema
    weights = checkpoint / (AVERAGE if average else WEIGHTS)
    if not weights.is_file():
        raise CheckpointError(f'{checkpoint}: has no {weights.name}; was it trained with use_ema=False?')
    task = Classification(load_config(folder / CONFIG_FILE, data=wanted.data))
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    return OpenRun(
        name=path.resolve().name,
        kind='classification',
        model=trained(task, weights).to(device),
        data=partial(training_images, task, wanted.images, device),
        step=run_logits,
        metric=Metric('accuracy', partial(measured, task)),
        changed=partial(changed, task),
        attack=partial(attacked, task),
        folder=folder,
        facts={'checkpoint': str(checkpoint), 'ema': average, 'sha256': sha256(weights)},
    )


def training_images(task: Classification, count: int, device: torch.device) -> list[dict[str, Any]]:
    """Arguments of the model for so many training images, the same ones each time."""
    order = torch.randperm(len(task.train_indices), generator=generator(task.config.seed, 'analysis'))
    task.to(device)
    loader = task.loader([task.train_indices[n] for n in order[:count].tolist()])
    return [task.inputs(task.prepare({key: value.to(device) for key, value in batch.items()})) for batch in loader]


def measured(task: Classification, model: nn.Module) -> float:
    """Accuracy on the images held out, in [0, 1]."""
    return accuracy(model, task)


def limits(task: Classification, like: Tensor) -> tuple[Tensor, Tensor]:
    """Black and white as the model sees them, ``(C, 1, 1)`` or one number each."""
    mean, std = (value.to(like) for value in task.normal)
    return (-1 - mean) / std, (1 - mean) / std


@contextmanager
def changed(task: Classification, model: nn.Module, change: Change) -> Iterator[None]:
    """Let images go through a change before the model sees them."""

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        images = kwargs[task.input_name]
        return args, {**kwargs, task.input_name: change(images, *limits(task, images))}

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def attacked(task: Classification, model: nn.Module, attack: Attack) -> float:
    """Accuracy on the images held out, each batch of which an attack on the cross entropy has changed."""
    device = next(model.parameters()).device
    task.to(device)
    right = 0
    for batch in task.validation():
        batch = task.prepare({key: value.to(device) for key, value in batch.items()})
        images, labels = task.normalised(batch), batch['label']

        def loss(found: Tensor, labels: Tensor = labels) -> Tensor:
            return F.cross_entropy(logits(model(found)), labels, reduction='sum')

        images = attack(loss, images, *limits(task, images))
        right += int((logits(model(images)).argmax(-1) == labels).sum())
    return right / len(task.held_out)
