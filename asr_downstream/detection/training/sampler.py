"""What a training draws at random, as functions of its seed: the same after a resume, with any number of workers.

The state of MMEngine's workers cannot be restored: they live as long as the training, and how far they are depends on
their number. So flips, crops, and the other pictures of a mosaic are drawn anew for every picture, from ``(seed, epoch,
index)``, and what the model draws, such as dropout and samplers of proposals, for every step from ``(seed, step)``.

Not covered: transforms with a memory (``CachedMosaic``, ``CachedMixUp``), which a resumed training fills anew, and
those with a generator of their own (``Albu``).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset, IterableDataset

from asr_downstream.console.stopping import leave_stopping_to_the_parent
from asr_downstream.modules.seeds import mix

__all__ = ['Draws', 'DrawsHook', 'draw_by_sample', 'seed_all']


class Draw(NamedTuple):
    """A sample: which picture, and the seed of what is drawn for it."""

    index: Any
    seed: int


class Draws:
    """Batch sampler that gives every index a seed; otherwise the one that it is made from.

    Args:
        batches: the batch sampler of a loader.
        seed: of the run.

    Attributes:
        epoch: that is drawn for; None: of a loop without epochs, whose samples are numbered through.
        skip: batches that the epoch has had already.
        number: batches drawn, where there are no epochs.
    """

    def __init__(self, batches: Any, seed: int) -> None:
        self.batches = batches
        self.seed = int(seed)  # not numpy's, which hash otherwise
        self.epoch: int | None = None
        self.skip = 0
        self.number = 0

    def __getattr__(self, name: str) -> Any:
        if name == 'batches':  # not there yet
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        for batch in islice(self.batches, self.skip, None):
            number, self.number = self.number, self.number + 1
            yield [
                Draw(index, mix(self.seed, 'sample', self.epoch, index))
                if self.epoch is not None
                else Draw(index, mix(self.seed, 'sample', get_rank(), number, place))
                for place, index in enumerate(batch)
            ]


@functools.cache
def seeded(stock: Any) -> type[Any]:
    """Make the class of a data set that reads a `Draw` with its seed, and anything else as before.

    Without a mixin and slots, so that objects of the stock class can take it. They pickle by the stock class, for
    workers that are not forked.
    """

    def get(self: Any, draw: Any) -> Any:
        if not isinstance(draw, Draw):
            return stock.__getitem__(self, draw)
        seed_all(draw.seed)
        return stock.__getitem__(self, draw.index)

    def reduce(self: Any, protocol: Any) -> Any:
        _, (_, *arguments), *state = stock.__reduce_ex__(self, 2)
        return new, (stock, *arguments), *state

    content: dict[str, Any] = {'__slots__': (), '__doc__': stock.__doc__, '__getitem__': get, '__reduce_ex__': reduce}
    return type(stock.__name__, (stock,), content)


def new(stock: Any, *arguments: Any) -> Any:
    """Make an empty data set, for unpickling."""
    made = seeded(stock)
    return made.__new__(made, *arguments)


def seed_all(seed: int, devices: bool = False) -> None:
    """Seed the generators that transforms and models draw from; ``devices``: those of accelerators too."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def draw_by_sample(loader: DataLoader, seed: int) -> Draws | None:
    """Let a loader of MMEngine draw by sample, in place: other hooks and loops go on using what they know of it.

    Returns:
        Its batch sampler; None: the loader has none, or its data set draws no single samples.
    """
    dataset: Dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or loader.batch_sampler is None or hasattr(dataset, '__getitems__'):
        return None
    stock: Any = type(dataset)
    dataset.__class__ = seeded(stock)
    draws = Draws(loader.batch_sampler, seed)
    object.__setattr__(loader, 'batch_sampler', draws)  # DataLoader refuses; its own iterators have not begun
    return draws


class DrawsHook(Hook):
    """Seeds what the model draws in a step, and lets workers of all loaders live until the training ends them."""

    priority = 'HIGHEST'

    def before_run(self, runner: Runner) -> None:
        """Prepare the workers, which start at the first use of a loader."""
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                loader = loop.dataloader
                loader.worker_init_fn = partial(leave_stopping_to_the_parent, then=loader.worker_init_fn)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed; all processes alike, as MMEngine does, unless ``randomness`` has ``diff_rank_seed=True``."""
        seed_all(mix(int(runner.seed), 'model', runner.iter), devices=True)
