"""Classification as a task: a classifier, plugged as its config says, on labelled images."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from asr_downstream.classification.config import SCHEMA
from asr_downstream.classification.models import build_model
from asr_downstream.engine.classification import ImageClassification
from asr_downstream.engine.config import with_epochs
from asr_downstream.engine.data.labelled import normal
from asr_downstream.engine.launch import world
from asr_downstream.errors import AsrError
from asr_downstream.modules.seeds import generator

__all__ = ['Classification']


class Classification(ImageClassification):
    """Cross entropy of a classifier; validation is accuracy on the images held out.

    Args:
        config: a classification config; it gets the number of classes of the data, and steps in the place of epochs.

    Raises:
        AsrError: model or data are not known, or do not fit each other.
    """

    schema = SCHEMA
    fixed = ('model', 'plug', 'channels', 'holdout', 'images_per_class', 'augment', 'image_mean', 'image_std')

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.channels)
        given = config.model.get('num_classes', self.classes)
        if given != self.classes:
            raise AsrError(f'model: num_classes={given}, but the data has {self.classes} classes; leave it out')
        self.use(self.complete(config))
        self.normal = normal(config.image_mean, config.image_std, config.channels)
        self.model = self.build()
        self.input_name = next(iter(inspect.signature(self.model.forward).parameters))

    def complete(self, config: Config) -> Config:
        """Copy a config with what the data says."""
        found = with_epochs(config, len(self.train_indices), world())
        found.model['num_classes'] = self.classes
        return found

    def build(self) -> Any:
        """Build the model anew, as it is before it is trained."""
        return build_model(self.config, self.classes)

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model."""
        return {self.input_name: self.normalised(batch)}

    def example(self, batch: int = 1) -> Tensor:
        """Noise in the place of normalised images."""
        size = self.all_images.resolution
        return torch.randn(batch, self.config.channels, size, size, generator=generator(0))
