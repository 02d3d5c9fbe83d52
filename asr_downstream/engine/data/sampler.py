"""Order and noise of the training samples: pure functions of the seed and the sample's number.

A training is one sequence of samples, numbered from 0. Sample ``p`` belongs to epoch ``p // n``; its image, flip,
timestep and noise follow from ``(seed, p)`` alone. So they are the same after a resume, in the middle of an epoch, with
any number of workers, and when a batch is split over processes or accumulation steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from asr_downstream.modules.seeds import generator

__all__ = ['Draws']


class Draws(Sampler[list[tuple[int, int]]]):
    """Batches of ``(index, number)`` for one process: the image to read and the number of the sample.

    Args:
        images: number of images.
        batch_size: of one process and one forward.
        accumulation: forwards in an optimiser step.
        steps: ``range`` of optimiser steps to draw for.
        seed: of the run.
        rank, world: this process and their number.
    """

    def __init__(
        self, images: int, batch_size: int, accumulation: int, steps: range, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.steps = steps
        self.seed = seed
        self.rank = rank
        self.world = world
        self.order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for forward in range(self.steps.start * self.accumulation, self.steps.stop * self.accumulation):
            first = (forward * self.world + self.rank) * self.batch_size
            yield [(self.index(number), number) for number in range(first, first + self.batch_size)]

    def index(self, number: int) -> int:
        """Image of a sample: the next one in the permutation of its epoch."""
        epoch, position = divmod(number, self.images)
        if self.order[0] != epoch:
            order = torch.randperm(self.images, generator=generator(self.seed, 'order', epoch))
            self.order = epoch, order.tolist()
        return self.order[1][position]
