"""Classifying images as a task: a ViT or DeiT of transformers, labelled images, accuracy on those held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from mmengine.config import Config
from torch import Tensor, nn
from transformers.image_processing_base import ImageProcessingMixin

from asr_downstream.console.text import some
from asr_downstream.engine.classification import ImageClassification, accuracy
from asr_downstream.engine.data.labelled import normal, split
from asr_downstream.engine.optim import decay_of, decaying_groups
from asr_downstream.errors import AsrError, did_you_mean
from asr_downstream.far.config import SCHEMA
from asr_downstream.files.configs import plain
from asr_downstream.modules.seeds import generator
from asr_downstream.plugging.weights import check_weights_finite
from asr_downstream.registry import TASKS, Registry, find, named

__all__ = ['CLASSIFIERS', 'Classification', 'accuracy', 'build_classifier', 'split']

CLASSIFIERS = Registry('classifier', error=AsrError, key='teacher', unknown='is not trained here')
for each in (transformers.ViTForImageClassification, transformers.DeiTForImageClassification):
    CLASSIFIERS.register_module(module=each)


def build_classifier(spec: dict[str, Any], seed: int) -> nn.Module:
    """Build a classifier of transformers, in eval mode, from arguments of its config or a pretrained folder.

    Raises:
        AsrError: the class or an argument is not known, or the folder cannot be read.
    """
    arguments = plain(spec)
    name = arguments.pop('type', None)
    cls = find(CLASSIFIERS, name)
    pretrained = arguments.pop('pretrained_model_name_or_path', None)
    torch.manual_seed(seed)
    if pretrained is not None:
        return load_classifier(cls, pretrained, arguments).eval()
    known = vars(cls.config_class())  # the signature takes anything
    for key in arguments:
        if key not in known and key != 'num_labels':
            raise AsrError(f'teacher: {name} takes no {key!r}; {did_you_mean(key, known)}')
    with named(CLASSIFIERS.label(name), arguments):
        return cls(cls.config_class(**arguments)).eval()


def load_classifier(cls: Any, folder: str, arguments: dict[str, Any]) -> Any:
    """Load a classifier of transformers from a pretrained folder.

    Raises:
        AsrError: it cannot be read, or is another model.
    """
    name = cls.__name__
    try:
        # transformers takes the precision of the file: half of it would round the steps of the optimiser away
        precise = {'dtype': torch.float32, **arguments}
        model, found = cls.from_pretrained(folder, output_loading_info=True, **precise)
    except Exception as error:  # libraries raise anything for damaged files
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise AsrError(f'teacher: {name} cannot be made from {folder} ({first})') from error
    if lost := sorted(key for key in found['missing_keys'] if not key.startswith('classifier.')):
        raise AsrError(f'teacher: {folder} has no {some(lost)}: is it a {name}? Its config.json says')
    check_weights_finite(model.state_dict(), Path(folder), model)
    return model


@TASKS.register_module()
class Classification(ImageClassification):
    """Cross entropy on labelled images; validation is accuracy on the images held out.

    Args:
        config: a FAR config, or that of a stage.
        model: the classifier; default: built from ``config.teacher``.

    Raises:
        AsrError: model or data are not known, or do not fit each other.
    """

    schema = SCHEMA
    fixed = (
        'teacher', 'replace', 'learns', 'task_weight', 'distance', 'hoyer', 'holdout', 'images_per_class', 'augment',
    )  # fmt: skip

    def __init__(self, config: Config, model: nn.Module | None = None) -> None:
        self.model = build_classifier(config.teacher, config.seed) if model is None else model
        settings = self.model.config
        super().__init__(config, settings.num_channels)
        if self.all_images.resolution != settings.image_size:
            raise AsrError(
                f'data: resolution={self.all_images.resolution} does not fit image_size={settings.image_size} of the '
                f'teacher; make them equal'
            )
        if self.classes != settings.num_labels:
            raise AsrError(
                f'teacher: num_labels={settings.num_labels}, but the data has {self.classes} classes; a pretrained '
                f'teacher gets a new head with num_labels={self.classes}, ignore_mismatched_sizes=True, and a stage to '
                f'learn it'
            )
        self.normal = normal_of(config, settings.num_channels)

    def parameter_groups(self, config: Config) -> list[dict[str, Any]]:
        """Matrices decay, vectors (biases, norms) do not."""
        return decaying_groups(self.model, decay_of(config))

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model."""
        return {'pixel_values': self.normalised(batch)}

    def example(self, batch: int = 1) -> dict[str, Any]:
        """Arguments of a forward on noise."""
        size = self.model.config.image_size
        return {'pixel_values': torch.randn(batch, self.model.config.num_channels, size, size, generator=generator(0))}


def normal_of(config: Config, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the config, or of a pretrained teacher; see `normal`."""
    mean, std = config.image_mean, config.image_std
    pretrained = config.teacher.get('pretrained_model_name_or_path')
    if mean is None and std is None and pretrained is not None:
        try:
            stored = ImageProcessingMixin.get_image_processor_dict(pretrained)[0]
        except OSError as error:
            raise AsrError(
                f'teacher: {pretrained} has no preprocessor_config.json; say how its images are normalised, such as '
                f'image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]'
            ) from error
        mean, std = stored.get('image_mean'), stored.get('image_std')
    return normal(mean, std, channels)
