"""Training data of a denoiser: images with the noise and timestep of each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from asr_downstream.engine.data.images import Images
from asr_downstream.modules.seeds import generator

__all__ = ['Samples']


class Samples(Dataset[dict[str, Any]]):
    """Training samples: item ``(index, number)`` is the image ``index`` as sample ``number`` of the training.

    An item has ``image`` ``(C, H, W)``, ``noise`` (of ``shape``), ``timestep``, ``chance`` (uniform in [0, 1), for
    dropping the condition), ``label``, and ``bad``: the index of a file that could not be decoded, or -1. Its place is
    taken by the next image that can be.

    Args:
        images: the images.
        shape: of the noise: ``(C, H, W)`` of what the model denoises.
        draw: stream of random numbers -> timestep, see `asr_downstream.diffusion.models.process.Process`.
        seed: of the run.
        encode: index -> tensor of a condition, such as tokens of a caption; its result is ``label``.
    """

    def __init__(
        self,
        images: Images,
        shape: tuple[int, int, int],
        draw: Callable[[Generator], Tensor],
        seed: int,
        encode: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.images = images
        self.shape = shape
        self.draw = draw
        self.seed = seed
        self.encode = encode

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, Any]:
        index, number = pair
        stream = generator(self.seed, 'sample', number)
        image, used = self.images.decodable(index)
        if self.images.random_flip and torch.rand((), generator=stream) < 0.5:
            image = image.flip(-1)
        return {
            'image': image,
            'timestep': self.draw(stream),
            'noise': torch.randn(self.shape, generator=stream),
            'chance': torch.rand((), generator=stream),
            'label': torch.tensor(-1) if self.encode is None else self.encode(used),
            'bad': index if used != index else -1,
        }
