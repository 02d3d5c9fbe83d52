"""A small image encoder for FID and KID where Inception is not at hand; it is trained on the data and kept with a run.

A ResNet-20 (64 features) learns the classes of the images, or without classes which way up they are (rotations by 0,
90, 180 and 270 degrees, Gidaris et al., arXiv 1803.07728). Its numbers compare models on one data set, through one file
of weights; they are not the FID of the literature, which uses Inception.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from asr_downstream.console.progress import bar
from asr_downstream.engine.data.images import Images
from asr_downstream.engine.data.sampler import Draws
from asr_downstream.errors import AsrError, CheckpointError
from asr_downstream.files.atomic import sha256, write_atomically
from asr_downstream.models.resnet_cifar import BasicBlock, ResNet
from asr_downstream.modules.seeds import generator
from asr_downstream.plugging.weights import check_weights_finite

__all__ = ['FILE', 'Encoder', 'load_encoder', 'train_encoder']

FILE = 'encoder.safetensors'
BATCH, STEPS = 64, 600
HELD_OUT = 10  # every tenth image


class Encoder(nn.Module):
    """Images ``(B, 1 or 3, H, W)`` in [0, 1] to features ``(B, 64)``.

    Attributes:
        about: how it was trained: task, accuracy, steps, seed, images.
        identity: hash of its weights, ``'sha256:...'``.
    """

    num_features = 64  # torchmetrics asks for it

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = ResNet(BasicBlock, 3, classes)
        self.about: dict[str, Any] = {}
        self.identity = ''

    def forward(self, images: Tensor) -> Tensor:
        """Features."""
        return self.net.features(rgb(images))

    def logits(self, images: Tensor) -> Tensor:
        """Scores of the task that it was trained on."""
        return self.net(rgb(images))


def rgb(images: Tensor) -> Tensor:
    """Three channels in [-1, 1]: grey is repeated, transparency left out."""
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return images[:, :3] * 2 - 1


class Labelled(Dataset[tuple[Tensor, int]]):
    """Images in [0, 1] with the label of the task; item ``(index, number)``, see `Draws`."""

    def __init__(self, images: Images, indices: list[int], seed: int) -> None:
        self.images = images
        self.indices = indices
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: tuple[int, int]) -> tuple[Tensor, int]:
        index, number = self.indices[draw[0]], draw[1]
        image = self.images[index] / 2 + 0.5
        if self.images.source.labels is not None:
            return image, self.images.source.labels[index]
        turns = int(torch.randint(4, (), generator=generator(self.seed, 'turn', number)))
        return image.rot90(turns, (1, 2)), turns


def train_encoder(images: Images, out: Path, seed: int = 0, steps: int = STEPS, workers: int = 1) -> Encoder:
    """Train an encoder on nine tenths of the images, measure it on the rest, and write it.

    Args:
        images: of the data set.
        out: file to write, ``.safetensors``.
        seed: of weights and batches.
        steps: of 64 images.
        workers: of the loader.

    Returns:
        The encoder, in eval mode.

    Raises:
        AsrError: there are too few images.
    """
    everything = range(len(images))
    held_out = [i for i in everything if i % HELD_OUT == 0]
    training = [i for i in everything if i % HELD_OUT]
    if len(training) < BATCH:
        raise AsrError(f'an encoder needs at least {BATCH * HELD_OUT // (HELD_OUT - 1) + 1} images, not {len(images)}')
    labelled = images.source.labels is not None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Encoder(len(images.source.classes) if labelled else 4)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps)
    draws = Draws(len(training), BATCH, 1, range(steps), seed)
    loader = DataLoader(Labelled(images, training, seed), batch_sampler=draws, num_workers=workers)
    model.train()
    for pixels, labels in bar(loader, f'training an encoder for FID, {steps} steps'):
        loss = F.cross_entropy(model.logits(pixels), labels, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    about = {
        'task': 'classes' if labelled else 'rotations',
        'accuracy_held_out': round(accuracy(model, Labelled(images, held_out, seed), min(len(held_out), 5000)), 4),
        'steps': steps,
        'batch_size': BATCH,
        'seed': seed,
        'images': len(training),
    }
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise AsrError('the encoder did not learn: its weights are not finite; try another seed')
    metadata = {'about': json.dumps(about)}  # one key: safetensors writes several in any order, and the file is hashed
    write_atomically(out, lambda p: save_file(model.state_dict(), p, metadata))
    return load_encoder(out)


@torch.no_grad()
def accuracy(model: Encoder, data: Labelled, count: int) -> float:
    """Share of the first ``count`` images whose label is found."""
    loader = DataLoader(
        data, batch_sampler=[[(i, i) for i in range(s, min(s + BATCH, count))] for s in range(0, count, BATCH)]
    )
    right = sum(int((model.logits(pixels).argmax(1) == labels).sum()) for pixels, labels in loader)
    return right / count


def load_encoder(path: Path) -> Encoder:
    """Read an encoder.

    Raises:
        CheckpointError: the file is missing or was not written by `train_encoder`.
    """
    try:
        with safe_open(path, 'pt') as file:
            metadata = file.metadata() or {}
        state = load_file(path)
        model = Encoder(len(state['net.fc.bias']))
        model.load_state_dict(state)
        model.about = json.loads(metadata['about'])
        check_weights_finite(state, path)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f'{path}: is no encoder of this package ({type(error).__name__}: {error})') from error
    except Exception as error:  # safetensors has its own class
        raise CheckpointError(f'{path}: is damaged ({error})') from error
    model.identity = f'sha256:{sha256(path)[:16]}'
    return copy.deepcopy(model).eval().requires_grad_(False)
