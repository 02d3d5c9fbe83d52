"""Classifying images as a task: labelled images, cross entropy, accuracy on the images held out.

What is common to all trainings of classifiers: which model it is, and how it is given its images, a subclass says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from asr_downstream.engine.config import portable
from asr_downstream.engine.data.augment import build_augmentations
from asr_downstream.engine.data.images import build_images
from asr_downstream.engine.data.labelled import Labelled, Store, first_of_each, labels_of, split
from asr_downstream.engine.task import Task
from asr_downstream.engine.trackers import Reporter

__all__ = ['ImageClassification', 'accuracy', 'logits']


class ImageClassification(Task):
    """Cross entropy on labelled images; validation is accuracy on the images held out.

    A subclass sets ``model`` and ``normal``, see `asr_downstream.engine.data.labelled.normal`, and has ``inputs``.

    Args:
        config: with ``data``, ``holdout``, ``images_per_class``, ``images_in`` and ``augment``.
        channels: of the images.

    Attributes:
        train_indices, held_out: indices of the images.
        classes: their number.
    """

    model: Any
    normal: tuple[Tensor, Tensor]

    def __init__(self, config: Config, channels: int) -> None:
        self.config = config
        self.all_images = self.images = build_images(config.data, channels)
        train, self.held_out = split(len(self.all_images), config.holdout)
        labels = labels_of(self.all_images)
        self.train_indices = first_of_each(labels, train, config.images_per_class)
        self.classes = max(labels) + 1
        self.augmentations: list[Any] = []
        parts = self.train_indices, self.held_out
        self.store = Store(self.all_images, *parts) if config.images_in == 'device' else None

    def samples(self) -> Labelled:
        """Training images."""
        self.augmentations = build_augmentations(self.config.augment)
        return Labelled(self.all_images, self.train_indices, self.augmentations, self.config.seed, self.store)

    def read(self) -> None:
        """Read the images into memory, once, if the config wants that."""
        if self.store is not None:
            self.store.read()
        if self.config.images_in == 'memory' and not self.all_images.kept:
            self.all_images.keep(sorted([*self.train_indices, *self.held_out]))

    def to(self, device: torch.device) -> None:
        """Read images that are kept in memory, and move those that are kept on the device."""
        self.read()
        if self.store is not None:
            self.store.to(device)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Cut images out of the memory of the device, and augment them."""
        if self.store is None:
            return batch
        return {**batch, 'image': self.store.batch(batch, self.augmentations, self.config.channels_last)}

    def normalised(self, batch: dict[str, Any]) -> Tensor:
        """Images as the model wants them."""
        mean, std = (t.to(batch['image'].device) for t in self.normal)
        return (batch['image'] - mean) / std

    def objective(self, output: Any, batch: dict[str, Any]) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(logits(output).float(), batch['label'])

    def logits(self, output: Any) -> Tensor:
        """Logits among what the model returned."""
        return logits(output)

    def validation(self) -> DataLoader:
        """Batches of the images held out."""
        return self.loader(self.held_out)

    def loader(self, indices: Sequence[int]) -> DataLoader:
        """Batches of the images of these indices, as they are."""
        self.read()
        draws: Any = [(n, n) for n in range(len(indices))]
        data = Subset(Labelled(self.all_images, indices, store=self.store), draws)
        workers = self.config.dataloader_num_workers if self.store is None else 0
        return DataLoader(data, self.config.train_batch_size, num_workers=workers)

    def validate(self, model: nn.Module, step: int, run: Path, reporter: Reporter) -> None:
        """Log ``val/accuracy`` in [0, 1]."""
        reporter.numbers(step, {'val/accuracy': accuracy(model, self)})

    def config_text(self) -> str:
        """Resolved config."""
        return portable(self.config)


def logits(output: Any) -> Tensor:
    """Logits among what a classifier returned: itself, or its ``logits``."""
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def accuracy(model: nn.Module, task: ImageClassification) -> float:
    """Share of the images held out that ``model`` classifies as their label says, in [0, 1]."""
    device = next(model.parameters()).device
    task.to(device)
    right = torch.zeros((), dtype=torch.long, device=device)
    for batch in task.validation():
        batch = task.prepare({key: value.to(device) for key, value in batch.items()})
        right += (logits(model(**task.inputs(batch))).argmax(-1) == batch['label']).sum()
    return int(right) / len(task.held_out)
