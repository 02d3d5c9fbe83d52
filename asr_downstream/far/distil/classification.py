"""Classifying images as a task: a ViT or DeiT of transformers, labelled images, accuracy on those held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.image_processing_base import ImageProcessingMixin

from asr_downstream.console.text import some
from asr_downstream.engine.config import portable
from asr_downstream.engine.data.augment import Augmentation, build_augmentations
from asr_downstream.engine.data.images import Images, build_images
from asr_downstream.engine.data.sampler import generator
from asr_downstream.engine.optim import decay_of, decaying_groups
from asr_downstream.engine.task import Task
from asr_downstream.engine.trackers import Reporter
from asr_downstream.errors import AsrError, DataError, did_you_mean
from asr_downstream.far.config import SCHEMA
from asr_downstream.files.configs import plain
from asr_downstream.plugging.weights import check_weights_finite
from asr_downstream.registry import TASKS, Registry, find, named

__all__ = ['CLASSIFIERS', 'Classification', 'Labelled', 'accuracy', 'build_classifier']

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
        model, found = cls.from_pretrained(folder, output_loading_info=True, **arguments)
    except Exception as error:  # libraries raise anything for damaged files
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise AsrError(f'teacher: {name} cannot be made from {folder} ({first})') from error
    if lost := sorted(key for key in found['missing_keys'] if not key.startswith('classifier.')):
        raise AsrError(f'teacher: {folder} has no {some(lost)}: is it a {name}? Its config.json says')
    check_weights_finite(model.state_dict(), Path(folder), model)
    return model


class Labelled(Dataset[dict[str, Any]]):
    """Images with labels: item ``(index, number)`` is one of ``indices`` as sample ``number`` of a training.

    An item has ``image`` ``(C, H, W)``, ``label`` and ``bad``, see `asr_downstream.engine.task.Task.samples`.

    Args:
        images: all images.
        indices: which of them.
        augmentations: applied in this order.
        seed: of the run.
    """

    def __init__(
        self, images: Images, indices: Sequence[int], augmentations: Sequence[Augmentation] = (), seed: int = 0
    ) -> None:
        if images.source.labels is None:
            raise DataError('data: has no labels; put the images of each class into a folder of its own')
        self.images, self.indices = images, indices
        self.labels = images.source.labels
        self.augmentations, self.seed = augmentations, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        index, number = draw
        image, used = self.images.decodable(self.indices[index], self.indices)
        stream = generator(self.seed, 'sample', number)
        for augmentation in self.augmentations:
            image = augmentation(image, stream)
        bad = self.indices[index] if used != self.indices[index] else -1
        return {'image': image, 'label': torch.tensor(self.labels[used]), 'bad': bad}


@TASKS.register_module()
class Classification(Task):
    """Cross entropy on labelled images; validation is accuracy on the images held out.

    Args:
        config: a FAR config, or that of a stage.
        model: the classifier; default: built from ``config.teacher``.

    Raises:
        AsrError: model or data are not known, or do not fit each other.
    """

    schema = SCHEMA
    fixed = ('teacher', 'replace', 'learns', 'task_weight', 'distance', 'hoyer', 'holdout', 'augment')

    model: Any

    def __init__(self, config: Config, model: nn.Module | None = None) -> None:
        self.config = config
        self.model = build_classifier(config.teacher, config.seed) if model is None else model
        settings = self.model.config
        self.all_images = self.images = build_images(config.data, settings.num_channels)
        if self.all_images.resolution != settings.image_size:
            raise AsrError(
                f'data: resolution={self.all_images.resolution} does not fit image_size={settings.image_size} of the '
                f'teacher; make them equal'
            )
        self.train_indices, self.held_out = split(len(self.all_images), config.holdout)
        found = Labelled(self.all_images, self.train_indices)
        classes = max(found.labels) + 1
        if classes != settings.num_labels:
            raise AsrError(
                f'teacher: num_labels={settings.num_labels}, but the data has {classes} classes; a pretrained teacher '
                f'gets a new head with num_labels={classes}, ignore_mismatched_sizes=True, and a stage to learn it'
            )
        self.normal = normal(config, settings.num_channels)

    def samples(self) -> Labelled:
        """Training images."""
        augmentations = build_augmentations(self.config.augment)
        return Labelled(self.all_images, self.train_indices, augmentations, self.config.seed)

    def parameter_groups(self, config: Config) -> list[dict[str, Any]]:
        """Matrices decay, vectors (biases, norms) do not."""
        return decaying_groups(self.model, decay_of(config))

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the model."""
        mean, std = (t.to(batch['image'].device) for t in self.normal)
        return {'pixel_values': (batch['image'] - mean) / std}

    def objective(self, output: Any, batch: dict[str, Any]) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(output.logits.float(), batch['label'])

    def validation(self) -> DataLoader:
        """Batches of the images held out."""
        draws: Any = [(n, n) for n in range(len(self.held_out))]
        data = Subset(Labelled(self.all_images, self.held_out), draws)
        return DataLoader(data, self.config.train_batch_size, num_workers=self.config.dataloader_num_workers)

    def validate(self, model: nn.Module, step: int, run: Path, reporter: Reporter) -> None:
        """Log ``val/accuracy`` in [0, 1]."""
        reporter.numbers(step, {'val/accuracy': accuracy(model, self)})

    def example(self, batch: int = 1) -> dict[str, Any]:
        """Arguments of a forward on noise."""
        size = self.model.config.image_size
        return {'pixel_values': torch.randn(batch, self.model.config.num_channels, size, size, generator=generator(0))}

    def config_text(self) -> str:
        """Resolved config."""
        return portable(self.config)


@torch.no_grad()
def accuracy(model: nn.Module, task: Classification) -> float:
    """Share of the images held out that ``model`` classifies as their label says, in [0, 1]."""
    device = next(model.parameters()).device
    right = torch.zeros((), dtype=torch.long, device=device)
    for batch in task.validation():
        batch = {key: value.to(device) for key, value in batch.items()}
        right += (model(**task.inputs(batch)).logits.argmax(-1) == batch['label']).sum()
    return int(right) / len(task.held_out)


def split(images: int, holdout: float) -> tuple[list[int], list[int]]:
    """Divide numbers of images into those to train on and those held out, always in the same way."""
    if not 0 < holdout < 1:
        raise AsrError(f'holdout={holdout} should be a share between 0 and 1')
    order = torch.randperm(images, generator=generator('holdout')).tolist()
    count = max(1, round(holdout * images))
    return sorted(order[count:]), sorted(order[:count])


def normal(config: Config, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of images in [-1, 1], by which they are normalised for the model."""
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
    if (mean is None) != (std is None) or any(len(v) != channels for v in (mean, std) if v is not None):
        raise AsrError(f'image_mean={mean}, image_std={std}: give both, with {channels} numbers each, or neither')
    if mean is None:
        return torch.zeros(1), torch.ones(1)
    return (2 * torch.tensor(mean) - 1)[:, None, None], (2 * torch.tensor(std))[:, None, None]
