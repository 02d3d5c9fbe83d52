"""Labelled images: training samples and images held out, read one by one or all at once from memory of the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from asr_downstream.engine.data.augment import Augmentation, check_many
from asr_downstream.engine.data.images import Images, in_range
from asr_downstream.errors import AsrError, DataError
from asr_downstream.modules.seeds import generator

__all__ = ['DRAWN', 'Labelled', 'Store', 'first_of_each', 'labels_of', 'normal', 'split']

DRAWN = 'drawn_{}'  # key of a sample: the random numbers of its augmentation of this number


class Labelled(Dataset[dict[str, Any]]):
    """Images with labels: item ``(index, number)`` is one of ``indices`` as sample ``number`` of a training.

    An item has ``image`` ``(C, H, W)``, ``label`` and ``bad``, see `asr_downstream.engine.task.Task.samples`. Of images
    in a `Store` it has ``row`` instead of ``image``, and the random numbers of the augmentations.

    Args:
        images: all images.
        indices: which of them.
        augmentations: applied in this order.
        seed: of the run.
        store: that holds these images.
    """

    def __init__(
        self,
        images: Images,
        indices: Sequence[int],
        augmentations: Sequence[Augmentation] = (),
        seed: int = 0,
        store: Store | None = None,
    ) -> None:
        self.images, self.indices = images, indices
        self.labels = labels_of(images)
        self.augmentations, self.seed = augmentations, seed
        self.used = None if store is None else store.used
        if store is not None:
            check_many(augmentations)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        index, number = draw
        wanted = self.indices[index]
        stream = generator(self.seed, 'sample', number) if self.augmentations else None
        if self.used is not None:
            row, used = self.used[wanted]
            drawn = {DRAWN.format(n): a.draw(stream) for n, a in enumerate(self.augmentations)}  # type: ignore[attr-defined]
            item: dict[str, Any] = {'row': row, **drawn}
        else:
            image, used = self.images.decodable(wanted, self.indices)
            for augmentation in self.augmentations:
                image = augmentation(image, stream)  # type: ignore[arg-type]
            item = {'image': image}
        return {**item, 'label': torch.tensor(self.labels[used]), 'bad': wanted if used != wanted else -1}


class Store:
    """Images in one tensor of 8 bits, on the device of a training, where batches are cut out of it and augmented.

    Args:
        images: all images.
        parts: indices of the images to hold, part by part; one that cannot be decoded is replaced by the next one of
            its part.

    Attributes:
        used: index -> its row, and the index of the image that is there; empty until they are read.
    """

    def __init__(self, images: Images, *parts: Sequence[int]) -> None:
        self.source, self.parts = images, parts
        self.used: dict[int, tuple[int, int]] = {}
        self.pixels: Tensor | None = None

    def read(self) -> None:
        """Decode the images, once."""
        if self.pixels is not None:
            return
        found: list[np.ndarray] = []
        for part in self.parts:
            self.source.keep(part)
            for index in part:
                pixels, used = self.source.decodable_pixels(index, part)
                self.used[index] = len(found), used
                found.append(pixels)
            self.source.kept.clear()
        self.pixels = torch.from_numpy(np.stack(found))

    def to(self, device: torch.device) -> None:
        """Move them."""
        assert self.pixels is not None
        self.pixels = self.pixels.to(device)

    def batch(self, samples: dict[str, Any], augmentations: Sequence[Any], channels_last: bool = False) -> Tensor:
        """Images of a batch of `Labelled`, augmented, in [-1, 1]."""
        assert self.pixels is not None
        image = in_range(self.pixels[samples['row']])
        for number, augmentation in enumerate(augmentations):
            if (key := DRAWN.format(number)) in samples:
                image = augmentation.many(image, samples[key])
        return image.contiguous(memory_format=torch.channels_last) if channels_last else image


def labels_of(images: Images) -> list[int]:
    """Class numbers of all images.

    Raises:
        DataError: they have none.
    """
    if images.source.labels is None:
        raise DataError('data: has no labels; put the images of each class into a folder of its own')
    return images.source.labels


def split(images: int, holdout: float) -> tuple[list[int], list[int]]:
    """Divide numbers of images into those to train on and those held out, always in the same way."""
    if not 0 < holdout < 1:
        raise AsrError(f'holdout={holdout} should be a share between 0 and 1')
    order = torch.randperm(images, generator=generator('holdout')).tolist()
    count = max(1, round(holdout * images))
    return sorted(order[count:]), sorted(order[:count])


def first_of_each(labels: Sequence[int], indices: Sequence[int], count: int | None) -> list[int]:
    """Return the first ``count`` of ``indices`` of each class, in order; None: all.

    Raises:
        DataError: a class has fewer.
    """
    if count is None:
        return list(indices)
    seen: dict[int, int] = {}
    kept = []
    for index in indices:
        seen[labels[index]] = seen.get(labels[index], 0) + 1
        if seen[labels[index]] <= count:
            kept.append(index)
    if few := {label: number for label, number in seen.items() if number < count}:
        label, number = min(few.items())
        raise DataError(
            f'images_per_class={count}: class {label} has {number} images to train on, and {len(few)} classes have '
            f'fewer; give at most {min(few.values())}'
        )
    return kept


def normal(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of images in [-1, 1], given those of images in [0, 1]; None: they stay.

    Raises:
        AsrError: one is given, or for another number of channels.
    """
    if (mean is None) != (std is None) or any(len(v) != channels for v in (mean, std) if v is not None):
        raise AsrError(f'image_mean={mean}, image_std={std}: give both, with {channels} numbers each, or neither')
    if mean is None or std is None:
        return torch.zeros(1), torch.ones(1)
    return (2 * torch.tensor(mean) - 1)[:, None, None], (2 * torch.tensor(std))[:, None, None]
