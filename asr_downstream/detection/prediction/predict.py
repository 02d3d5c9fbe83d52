"""A detector over image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.logging import MMLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from asr_downstream.detection.data.coco import leaves
from asr_downstream.detection.evaluation.evaluate import Detections
from asr_downstream.detection.types import kind_of
from asr_downstream.errors import DataError

__all__ = ['Found', 'class_names', 'predict']


class Found(NamedTuple):
    """What a detector finds in one image: its height and width, detections, and masks ``(n, H, W)`` if it has any."""

    size: tuple[int, int]
    detections: Detections
    masks: Tensor | None = None


class Images(Dataset):
    """Images through the test pipeline of a config, with their number; a text in place of those that cannot be read."""

    def __init__(self, config: Config, files: Sequence[Path]) -> None:
        steps = next(leaves(config.test_dataloader.dataset)).pipeline
        self.pipeline = Compose([step for step in steps if 'LoadAnnotations' not in str(kind_of(step['type']))])
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.pipeline({'img_path': str(self.files[index]), 'img_id': index})
        except DataError as error:
            return str(error).replace('; replace it or take it out of the annotation file', '')


def class_names(config: Config, model: nn.Module) -> list[str]:
    """Names of what a detector finds: from its checkpoint, else from its config.

    Raises:
        DataError: neither has them.
    """
    leaf = next(leaves(config.test_dataloader.dataset))
    known = getattr(DATASETS.get(leaf.type), 'METAINFO', {})
    for info in (getattr(model, 'dataset_meta', None) or {}, leaf.get('metainfo') or {}, known):
        names = info.get('classes', info.get('CLASSES'))
        if names:
            return [names] if isinstance(names, str) else list(names)
    raise DataError(f'{config.filename}: the names of the classes are neither in the checkpoint nor in the config')


@torch.no_grad()
def predict(
    config: Config, model: nn.Module, files: Sequence[Path], batch_size: int = 1, workers: int = 0
) -> Iterator[Found | str]:
    """Run a detector over image files, by the test pipeline of its config.

    Args:
        config: of the detector.
        model: the detector.
        files: of the images.
        batch_size: images in a forward.
        workers: processes that read images.

    Yields:
        For each file what is found, or a line that says why it cannot be read. Detections are in the image's pixels.
    """
    MMLogger.get_current_instance().setLevel('WARNING')
    model.eval()
    model.to(get_device())
    loader = DataLoader(Images(config, files), batch_size, num_workers=workers, collate_fn=list)
    for batch in loader:
        readable = [item for item in batch if not isinstance(item, str)]
        samples = iter(model.test_step(pseudo_collate(readable)) if readable else ())  # type: ignore[operator]
        for item in batch:
            yield item if isinstance(item, str) else found_in(next(samples))


def found_in(sample: Any) -> Found:
    """What a data sample of MMDetection has."""
    seen = sample.pred_instances
    masks = seen.masks.cpu() if 'masks' in seen else None
    return Found(tuple(sample.ori_shape[:2]), (seen.bboxes.cpu(), seen.scores.cpu(), seen.labels.cpu()), masks)
